"""Preference losses against their formulas worked out pair by pair with `math`, and gradients in fp64."""

from __future__ import annotations

import math
from typing import get_args

import pytest
import torch

from dpo_scale.losses import preference_loss
from dpo_scale.settings.loss import LOSSES, Divergence, LossSettings

POLICY = [(-12.0, -15.0), (-30.5, -28.0), (-7.25, -9.5)]
REFERENCE = [(-13.0, -14.5), (-29.0, -29.25), (-9.0, -9.125)]
LENGTHS = [(4, 6), (10, 7), (3, 5)]
MEAN_CHOSEN = (4 + 10 + 3) / 3
OF_D = [name for name, info in LOSSES.items() if info.of_d]
SEPARABLE = [name for name, info in LOSSES.items() if info.separable]
WITH_REFERENCE = [name for name, info in LOSSES.items() if info.needs_reference]


def settings_for(name, **changes):
    """Settings in which every parameter of the loss has an effect."""
    values = {"loss_type": name, "beta": 0.4}
    for field in LOSSES[name].reads:
        values[field] = {
            "label_smoothing": 0.15,
            "discopop_tau": 0.3,
            "simpo_gamma": 0.7,
            "orpo_lambda": 0.25,
            "cpo_alpha": 0.6,
        }[field]
    settings = LossSettings(**{**values, **changes})
    settings.validate()
    return settings


def run(settings, policy=POLICY, reference=REFERENCE, lengths=LENGTHS, dtype=torch.float64, **options):
    """Loss, metrics and the policy tensor (a leaf)."""
    policy = torch.tensor(policy, dtype=dtype, requires_grad=True)
    reference = torch.tensor(reference, dtype=dtype) if settings.needs_reference else None
    if "sft" in settings.loss_types:
        options = {"mean_chosen_tokens": MEAN_CHOSEN, **options}
    loss, metrics = preference_loss(policy, reference, torch.tensor(lengths), settings, **options)
    return loss, metrics, policy


def sig(x):
    return 1 / (1 + math.exp(-x))


def ls(x):
    return math.log(sig(x))


def by_hand(name, s, r, n, b, e, tau, gamma, lam, alpha):
    """The table of losses, for one pair, in its plainest form. aot: sorted already."""
    (sc, sr), (rc, rr), (nc, nr) = s, r, n
    lc, lr = sc - rc, sr - rr
    d = lc - lr
    smoothed = -(1 - e) * ls(b * d) - e * ls(-b * d)

    def odds(logp):
        return math.exp(logp) / (1 - math.exp(logp))

    m = sig(b * d / tau)
    return {
        "sigmoid": lambda: smoothed,
        "robust": lambda: (-(1 - e) * ls(b * d) + e * ls(-b * d)) / (1 - 2 * e),
        "hinge": lambda: max(0, 1 - b * d),
        "ipo": lambda: (lc / nc - lr / nr - 1 / (2 * b)) ** 2,
        "exo_pair": lambda: sig(b * d) * (ls(b * d) - math.log(1 - e)) + sig(-b * d) * (ls(-b * d) - math.log(e)),
        "nca_pair": lambda: -ls(b * lc) - 0.5 * ls(-b * lc) - 0.5 * ls(-b * lr),
        "bco_pair": lambda: -ls(b * lc) - ls(-b * lr),
        "sppo_hard": lambda: (lc - 1 / (2 * b)) ** 2 + (lr + 1 / (2 * b)) ** 2,
        "aot": lambda: smoothed,
        "aot_unpaired": lambda: smoothed,
        "apo_zero": lambda: 1 - sig(b * lc) + sig(b * lr),
        "apo_down": lambda: sig(b * lc) + 1 - sig(b * (lc - lr)),
        "discopop": lambda: -ls(b * d) * (1 - m) + math.exp(-b * d) * m,
        "sigmoid_norm": lambda: -ls(b * (lc / nc - lr / nr)),
        "sft": lambda: -sc / MEAN_CHOSEN,
        "simpo": lambda: -ls(b * (sc / nc - sr / nr) - gamma),
        "orpo": lambda: -sc / nc - lam * ls(math.log(odds(sc / nc)) - math.log(odds(sr / nr))),
        "cpo": lambda: -ls(b * (sc - sr)) - alpha * sc / nc,
    }[name]()


def expected(settings, name, policy=POLICY, reference=REFERENCE, lengths=LENGTHS):
    policy, reference = list(policy), list(reference)
    if name == "aot":  # as if the k-th smallest margins of policy and reference were one pair's
        margins = sorted(c - r for c, r in policy), sorted(c - r for c, r in reference)
        policy, reference = ([(margin, 0.0) for margin in column] for column in margins)
    if name == "aot_unpaired":
        chosen = sorted(s[0] - r[0] for s, r in zip(policy, reference, strict=True))
        rejected = sorted(s[1] - r[1] for s, r in zip(policy, reference, strict=True))
        policy, reference = list(zip(chosen, rejected, strict=True)), [(0.0, 0.0)] * len(chosen)
    x = settings
    options = (x.beta, x.label_smoothing, x.discopop_tau, x.simpo_gamma, x.orpo_lambda, x.cpo_alpha)
    return [by_hand(name, *rows, *options) for rows in zip(policy, reference, lengths, strict=True)]


@pytest.mark.parametrize("name", LOSSES)
def test_each_loss_is_its_formula(name):
    settings = settings_for(name)
    assert run(settings)[0].tolist() == pytest.approx(expected(settings, name), rel=1e-12)


def test_sigmoid_of_a_pair_worked_on_paper():
    """L_c = 1, L_r = -0.5, so bD = 0.15 and the loss is log(1 + exp(-0.15)) = 0.62096."""
    loss, metrics, _ = run(LossSettings(), POLICY[:1], REFERENCE[:1], LENGTHS[:1])
    assert loss.item() == pytest.approx(0.62096, abs=5e-6)
    found = {name: round(value.item(), 9) for name, value in metrics.items() if name != "loss"}
    assert found == {
        "rewards/chosen": 0.1,
        "rewards/rejected": -0.05,
        "rewards/margins": 0.15,
        "rewards/accuracies": 1.0,
        "logps/chosen": -12.0,
        "logps/rejected": -15.0,
        "logps/margins": 3.0,
        "ref_logps/margins": 1.5,
        "accuracy/policy": 1.0,
        "kl": 0.25,
    }


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_agree_with_finite_differences(name):
    settings = settings_for(name)
    reference, lengths = torch.tensor(REFERENCE, dtype=torch.float64), torch.tensor(LENGTHS)

    def loss(policy):
        return preference_loss(policy, reference, lengths, settings, mean_chosen_tokens=MEAN_CHOSEN)[0]

    policy = torch.tensor(POLICY, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(loss, (policy,))


@pytest.mark.parametrize("divergence", get_args(Divergence))
@pytest.mark.parametrize("name", OF_D)
def test_f_divergences_replace_the_score_in_d(name, divergence):
    alpha = {"f_alpha_divergence_coef": 0.3} if divergence == "alpha" else {}
    settings = settings_for(name, f_divergence=divergence, **alpha)
    score = {
        "reverse_kl": lambda x: x,
        "forward_kl": lambda x: 1 - math.exp(-x),
        "js": lambda x: math.log(2) + ls(x),
        "alpha": lambda x: (math.exp((0.3 - 1) * x) - 1) / (0.3 - 1),
    }[divergence]
    scored = [(score(s[0] - r[0]), score(s[1] - r[1])) for s, r in zip(POLICY, REFERENCE, strict=True)]
    hand = expected(settings, name, policy=scored, reference=[(0.0, 0.0)] * 3)
    assert run(settings)[0].tolist() == pytest.approx(hand, rel=1e-12)

    reference, lengths = torch.tensor(REFERENCE, dtype=torch.float64), torch.tensor(LENGTHS)
    policy = torch.tensor(POLICY, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda p: preference_loss(p, reference, lengths, settings)[0], (policy,))


@pytest.mark.parametrize("divergence", get_args(Divergence))
def test_an_f_divergence_leaves_the_logged_rewards_alone(divergence):
    metrics = run(LossSettings(f_divergence=divergence))[1]
    assert metrics["rewards/margins"].tolist() == pytest.approx([0.15, -0.275, 0.2125])


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_policy_equal_to_reference_gives_ln_2_and_half_beta_gradients(dtype):
    loss, metrics, policy = run(LossSettings(beta=0.3), policy=REFERENCE, dtype=dtype)
    loss.sum().backward()
    assert loss.dtype == torch.float32
    assert loss.tolist() == pytest.approx([math.log(2)] * 3, abs=1e-7)
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "kl"):
        assert metrics[name].tolist() == [0.0] * 3
    half = torch.tensor([[-0.15, 0.15]] * 3).to(dtype)
    torch.testing.assert_close(policy.grad, half, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ("sigmoid", "hinge", "robust"))
def test_losses_of_d_do_not_see_a_shift_of_both_sums(name):
    shifted = [(c - 5.5, r - 5.5) for c, r in POLICY]
    settings = settings_for(name)
    assert run(settings, policy=shifted)[0].tolist() == pytest.approx(run(settings)[0].tolist(), rel=1e-12)


def test_robust_without_smoothing_is_sigmoid():
    assert torch.equal(run(LossSettings(loss_type="robust"))[0], run(LossSettings())[0])


@pytest.mark.parametrize("name", ("aot", "aot_unpaired"))
def test_aot_of_one_pair_is_sigmoid_and_of_many_does_not_see_their_order(name):
    for pair in range(3):
        one = slice(pair, pair + 1)
        inputs = POLICY[one], REFERENCE[one], LENGTHS[one]
        found = run(LossSettings(loss_type=name), *inputs)[0]
        assert found.item() == pytest.approx(run(LossSettings(), *inputs)[0].item(), rel=1e-12)
    swapped = (values[::-1] for values in (POLICY, REFERENCE, LENGTHS))
    settings = LossSettings(loss_type=name)
    assert torch.equal(run(settings)[0], run(settings, *swapped)[0])


@pytest.mark.parametrize("name", SEPARABLE)
def test_a_separable_loss_of_a_pair_does_not_depend_on_its_company(name):
    settings = settings_for(name)
    alone = [run(settings, POLICY[i : i + 1], REFERENCE[i : i + 1], LENGTHS[i : i + 1])[0].item() for i in range(3)]
    assert run(settings)[0].tolist() == alone


def test_the_mean_of_sft_weighs_tokens_not_pairs():
    loss = run(LossSettings(loss_type="sft"))[0]
    total = sum(-chosen for chosen, _ in POLICY)
    assert loss.mean().item() == pytest.approx(total / (4 + 10 + 3), rel=1e-12)


def test_sft_takes_the_mean_number_of_chosen_tokens_as_a_tensor_and_not_from_its_own_pairs():
    loss = run(LossSettings(loss_type="sft"), mean_chosen_tokens=torch.tensor(8.0))[0]
    assert loss.tolist() == [12.0 / 8, 30.5 / 8, 7.25 / 8]
    with pytest.raises(AssertionError, match="global batch"):
        run(LossSettings(loss_type="sft"), mean_chosen_tokens=None)


def test_several_losses_are_summed_with_their_weights_and_logged_apart():
    settings = LossSettings(loss_type=["sigmoid", "bco_pair", "sft"], loss_weights=[0.8, 0.2, 1.5], beta=0.4)
    settings.validate()
    loss, metrics, _ = run(settings)
    parts = {name: expected(settings, name) for name in settings.loss_types}
    hand = [0.8 * a + 0.2 * b + 1.5 * c for a, b, c in zip(*parts.values(), strict=True)]
    assert loss.tolist() == metrics["loss"].tolist() == pytest.approx(hand, rel=1e-12)
    for name, values in parts.items():
        assert metrics[f"loss/{name}"].tolist() == pytest.approx(values, rel=1e-12)
    assert "loss/sigmoid" not in run(LossSettings())[1]


def test_pair_weights_multiply_loss_and_gradient():
    weights = torch.tensor([0.5, 0.0, 2.0], dtype=torch.float64)
    plain, _, policy = run(LossSettings())
    weighted, metrics, weighted_policy = run(LossSettings(use_weighting=True), pair_weights=weights)
    plain.sum().backward(), weighted.sum().backward()
    torch.testing.assert_close(weighted, weights * plain)
    torch.testing.assert_close(metrics["loss"], weighted.detach())
    torch.testing.assert_close(weighted_policy.grad, weights.unsqueeze(1) * policy.grad)


@pytest.mark.parametrize("name", [n for n, info in LOSSES.items() if not info.needs_reference])
def test_policy_only_losses_log_rewards_of_the_policy_alone(name):
    settings = settings_for(name)
    metrics = run(settings)[1]
    assert "kl" not in metrics and "ref_logps/margins" not in metrics
    per_token = name in ("simpo", "orpo")
    for column, side in enumerate(("chosen", "rejected")):
        hand = [0.4 * s[column] / (n[column] if per_token else 1) for s, n in zip(POLICY, LENGTHS, strict=True)]
        assert metrics[f"rewards/{side}"].tolist() == pytest.approx(hand, rel=1e-12)
    chosen, rejected = metrics["rewards/chosen"], metrics["rewards/rejected"]
    assert torch.equal(metrics["rewards/margins"], chosen - rejected)
    assert torch.equal(metrics["rewards/accuracies"], (chosen > rejected).double())


@pytest.mark.parametrize("name", WITH_REFERENCE)
def test_a_loss_that_needs_the_reference_asserts_that_it_is_given(name):
    with pytest.raises(AssertionError, match="needs reference"):
        preference_loss(torch.tensor(POLICY), None, torch.tensor(LENGTHS), settings_for(name))


def test_metrics_are_detached_and_one_per_pair():
    for name in LOSSES:
        metrics = run(settings_for(name))[1]
        assert all(value.shape == (3,) and not value.requires_grad for value in metrics.values())


@pytest.mark.parametrize("divergence", get_args(Divergence))
@pytest.mark.parametrize("name", LOSSES)
def test_values_and_gradients_are_finite_when_a_run_has_gone_astray(name, divergence):
    if divergence != "reverse_kl" and not LOSSES[name].of_d:
        return
    settings = settings_for(name, f_divergence=divergence)
    far = [(0.0, -4000.0), (-4000.0, 0.0), (-1e-6, -1e-6), (-4000.0, -4000.0), (0.0, 0.0)]
    reference = [(-2000.0, -2000.0)] * 3 + [(-1e-6, -1e-6)] * 2
    loss, metrics, policy = run(settings, far, reference, [(1, 1)] * 5, torch.float32)
    loss.sum().backward()
    assert loss.isfinite().all() and policy.grad.isfinite().all()
    assert policy.grad.square().sum().isfinite()
    assert all(value.isfinite().all() for value in metrics.values())


@pytest.mark.parametrize("name", LOSSES)
def test_a_pair_without_tokens_is_finite(name):
    loss, metrics, policy = run(settings_for(name), [(0.0, 0.0)], [(0.0, 0.0)], [(0, 0)], torch.float32)
    (0.0 * loss).sum().backward()
    assert loss.isfinite().all() and all(value.isfinite().all() for value in metrics.values())
    assert policy.grad.tolist() == [[0.0, 0.0]]


def test_orpo_log_odds_are_exact_near_certainty():
    """Chosen at -1e-4 a token: log(1 - exp(p)) from a rounded exp(p) would be off in the fourth digit."""
    settings = settings_for("orpo")
    policy, lengths = [(-1e-4, -0.02)], [(1, 1)]
    loss = run(settings, policy, lengths=lengths, dtype=torch.float32)[0]
    odds = [p - math.log(-math.expm1(p)) for p in policy[0]]
    assert loss.item() == pytest.approx(1e-4 - 0.25 * ls(odds[0] - odds[1]), rel=1e-5)


def test_bf16_autocast_does_not_touch_the_maths():
    settings = settings_for("sigmoid")
    with torch.autocast("cpu", torch.bfloat16):
        inside = run(settings, dtype=torch.float32)[0]
    assert torch.equal(inside, run(settings, dtype=torch.float32)[0])
