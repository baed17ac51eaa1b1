"""The names that a config may ask for are those that the losses and the trainer give."""

import pytest
import torch

from dpo_scale.errors import ConfigError
from dpo_scale.losses import preference_loss
from dpo_scale.settings.loss import LOSSES, LossSettings
from dpo_scale.settings.tree import load_config

MINIMAL = ["model.path=m", "data.train=t.jsonl", "data.eval_fraction=0.1"]


@pytest.mark.parametrize("loss", [*LOSSES, ["sigmoid", "sft"], ["sft", "simpo"]])
def test_names_are_those_of_the_loss(loss):
    settings = LossSettings(loss_type=loss, label_smoothing=0.1 if loss == "exo_pair" else 0.0)
    sums = torch.full((3, 2), -4.0)
    reference = sums if settings.needs_reference else None
    _, metrics = preference_loss(sums, reference, torch.full((3, 2), 5), settings, mean_chosen_tokens=5.0)
    assert set(settings.metric_names) == set(metrics)
    assert len(settings.metric_names) == len(metrics)


@pytest.mark.parametrize(
    "override",
    [
        "checkpoint.metric_for_best_model=kl",
        "checkpoint.metric_for_best_model=loss/sft",
        "checkpoint.metric_for_best_model=grad_norm",
        "logging.console_metrics=[loss, kl]",
        "logging.console_metrics=ref_logps/margins",
    ],
)
def test_what_the_loss_does_not_give_is_refused(override):
    with pytest.raises(ConfigError, match="rewards/margins"):
        load_config(None, [*MINIMAL, "loss.loss_type=simpo", override])


@pytest.mark.parametrize(
    "override",
    [
        "checkpoint.metric_for_best_model=loss/sft",
        "checkpoint.metric_for_best_model=kl",
        "logging.console_metrics=[loss/sigmoid, kl, grad_norm, tokens_per_second]",
        "logging.console_metrics=[]",
        "logging.console_metrics=[loss, router/aux_loss]",  # by the model's config it is known whether there is one
    ],
)
def test_what_it_gives_is_taken(override):
    load_config(None, [*MINIMAL, "loss.loss_type=[sigmoid, sft]", override])
