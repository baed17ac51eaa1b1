"""What the `loss:` section refuses, and what it tells the rest of the program."""

from __future__ import annotations

import subprocess
import sys

import pytest

from dpo_scale.errors import ConfigError
from dpo_scale.settings.loss import LOSSES, LossSettings
from dpo_scale.settings.reader import build

REFUSALS = [
    (
        dict(loss_type="sigmiod"),
        "loss.loss_type = 'sigmiod': unknown loss 'sigmiod'; did you mean 'sigmoid'?",
    ),
    (dict(loss_type=["sigmoid", "stf"]), "unknown loss 'stf'; did you mean 'sft'?"),
    (dict(loss_type="zzz"), "unknown loss 'zzz'; known: sigmoid, robust, hinge"),
    (dict(loss_type=[]), "give at least one of: sigmoid"),
    (dict(loss_type=["hinge", "hinge"]), "'hinge' is given twice"),
    (
        dict(loss_type=["sigmoid", "sft"], loss_weights=[1.0]),
        "loss.loss_weights = [1.0]: expected 2, one weight per loss",
    ),
    (dict(loss_weights=[1.0, 2.0]), "expected 1, one weight per loss"),
    (dict(loss_weights=[-1.0]), "expected weights of at least 0"),
    (dict(loss_weights=[0.0]), "not all of them 0"),
    (dict(loss_weights=[float("nan")]), "loss.loss_weights[0] = nan: expected a number"),
    (dict(beta=0.0), "loss.beta = 0.0: expected a number, above 0 (strength of the pull towards the reference"),
    (dict(beta=-0.1), "loss.beta = -0.1"),
    (dict(beta=float("inf")), "loss.beta = inf"),
    (dict(beta=float("nan")), "loss.beta = nan"),
    (
        dict(label_smoothing=-0.1),
        "loss.label_smoothing = -0.1: expected a number, at least 0 and below 1",
    ),
    (dict(label_smoothing=1.0), "loss.label_smoothing = 1.0: expected a number, at least 0 and below 1"),
    (dict(loss_type="exo_pair"), "loss.label_smoothing = 0.0: exo_pair takes its logarithm"),
    (dict(loss_type="robust", label_smoothing=0.5), "loss.label_smoothing = 0.5: robust divides by"),
    (
        dict(loss_type="hinge", label_smoothing=0.1),
        "loss.label_smoothing = 0.1: hinge does not read it (sigmoid,",
    ),
    (
        dict(f_divergence="forward-kl"),
        "loss.f_divergence = 'forward-kl': expected one of 'reverse_kl', 'forward_kl', 'js', 'alpha'",
    ),
    (dict(loss_type="ipo", f_divergence="js"), "loss.f_divergence = 'js': has no meaning for ipo"),
    (
        dict(loss_type=["sigmoid", "apo_down"], f_divergence="js"),
        "has no meaning for apo_down; it can be used with",
    ),
    (dict(loss_type="simpo", f_divergence="js"), "has no meaning for simpo"),
    (
        dict(f_divergence="alpha", f_alpha_divergence_coef=1.0),
        "loss.f_alpha_divergence_coef = 1.0: 1 is the limit",
    ),
    (dict(f_alpha_divergence_coef=0.3), "is read only with loss.f_divergence = 'alpha'"),
    (dict(f_divergence="js", f_alpha_divergence_coef=0.3), "is read only with loss.f_divergence = 'alpha'"),
    (dict(ld_alpha=1.1), "loss.ld_alpha = 1.1: expected null or a number, at least 0 and at most 1"),
    (dict(ld_alpha=-0.1), "loss.ld_alpha = -0.1"),
    (
        dict(loss_type=["sigmoid", "sft"], ld_alpha=0.5),
        "loss.ld_alpha = 0.5: would also reweight the likelihood",
    ),
    (dict(loss_type="aot", use_weighting=True), "loss.use_weighting = True: aot sorts values over pairs"),
    (
        dict(loss_type="discopop", discopop_tau=0.0),
        "loss.discopop_tau = 0.0: expected a number, above 0 and at most 1",
    ),
    (dict(loss_type="discopop", discopop_tau=2.0), "at most 1"),
    (dict(discopop_tau=0.1), "loss.discopop_tau = 0.1: sigmoid does not read it (discopop would)"),
    (dict(loss_type="sft", simpo_gamma=1.0), "loss.simpo_gamma = 1.0: sft does not read it"),
    (dict(loss_type="simpo", simpo_gamma=float("inf")), "loss.simpo_gamma = inf: expected a number"),
    (dict(orpo_lambda=0.2), "loss.orpo_lambda = 0.2: sigmoid does not read it"),
    (dict(loss_type="orpo", orpo_lambda=-1.0), "loss.orpo_lambda = -1.0"),
    (dict(cpo_alpha=0.2), "loss.cpo_alpha = 0.2: sigmoid does not read it"),
    (dict(loss_type="cpo", cpo_alpha=-1.0), "loss.cpo_alpha = -1.0"),
]


@pytest.mark.parametrize(("given", "message"), REFUSALS, ids=[str(given) for given, _ in REFUSALS])
def test_impossible_settings_are_refused_by_name(given, message):
    with pytest.raises(ConfigError) as error:
        build(LossSettings, given, "loss").validate()
    assert message in str(error.value)


ALLOWED = [
    dict(),
    dict(loss_type="exo_pair", label_smoothing=0.001),
    dict(loss_type="robust", label_smoothing=0.0),
    dict(loss_type="robust", label_smoothing=0.49),
    dict(loss_type=["hinge", "sigmoid"], label_smoothing=0.1),
    dict(loss_type=["sigmoid", "sft"], loss_weights=[1.0, 0.0], f_divergence="js"),
    dict(f_divergence="alpha", f_alpha_divergence_coef=2.0),
    dict(loss_type="ipo", ld_alpha=0.0, use_weighting=True),
    dict(loss_type="aot_unpaired", label_smoothing=0.2),
]


@pytest.mark.parametrize("given", ALLOWED, ids=str)
def test_possible_settings_pass(given):
    build(LossSettings, given, "loss").validate()


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_passes_with_its_defaults(name):
    LossSettings(loss_type=name, label_smoothing=0.01 if name == "exo_pair" else 0.0).validate()


def test_one_name_and_a_list_read_alike():
    assert LossSettings().loss_types == ["sigmoid"] and LossSettings().weights == [1.0]
    both = LossSettings(loss_type=["sigmoid", "sft"])
    assert both.loss_types == ["sigmoid", "sft"] and both.weights == [1.0, 1.0]
    assert LossSettings(loss_type=["sigmoid", "sft"], loss_weights=[1.0, 0.2]).weights == [1.0, 0.2]


def test_a_reference_is_needed_unless_every_loss_is_policy_only():
    free = [name for name in LOSSES if not LossSettings(loss_type=name).needs_reference]
    assert free == ["sft", "simpo", "orpo", "cpo"]
    assert not LossSettings(loss_type=["sft", "simpo"]).needs_reference
    assert LossSettings(loss_type=["sft", "sigmoid"]).needs_reference


def test_the_whole_micro_step_is_needed_only_by_the_sorting_losses():
    assert [name for name in LOSSES if LossSettings(loss_type=name).needs_batch] == ["aot", "aot_unpaired"]
    assert LossSettings(loss_type=["sigmoid", "aot"]).needs_batch


def test_settings_are_read_without_importing_torch():
    code = "import sys, dpo_scale.settings.loss; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
