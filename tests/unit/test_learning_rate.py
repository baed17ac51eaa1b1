"""The learning rate against transformers' schedulers and hand-worked values."""

import pytest
import torch
import transformers

from dpo_scale.settings.tree import TrainSettings
from dpo_scale.training.learning_rate import learning_rate, warmup_steps


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("warmup", [0, 3])
def test_same_as_transformers(kind, warmup):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
    name = "constant_with_warmup" if kind == "constant" else kind
    scheduler = transformers.get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=11)
    settings = TrainSettings(learning_rate=0.3, lr_scheduler_type=kind, warmup_steps=warmup)
    for step in range(11):
        assert learning_rate(step, 11, settings) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-12)
        optimizer.step()
        scheduler.step()


def test_min_lr_ratio_is_where_the_decay_ends():
    settings = TrainSettings(learning_rate=2.0, lr_scheduler_type="cosine", min_lr_ratio=0.1)
    assert learning_rate(0, 10, settings) == 2.0
    assert learning_rate(5, 10, settings) == pytest.approx(2.0 * 0.55)
    assert learning_rate(10, 10, settings) == pytest.approx(0.2)


def test_warmup_ratio_rounds_up_and_steps_win():
    assert warmup_steps(TrainSettings(warmup_ratio=0.1), 11) == 2
    assert warmup_steps(TrainSettings(warmup_ratio=0.1, warmup_steps=5), 11) == 5
