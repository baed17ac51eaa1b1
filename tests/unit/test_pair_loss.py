"""The fused pair loss against plain torch in fp64: losses, sums and gradients, however pairs fall into memory."""

from __future__ import annotations

import itertools

import pytest
import torch

from dpo_scale.logprobs import pair_loss as module
from dpo_scale.logprobs import token_logps
from dpo_scale.logprobs.pair_loss import PairLoss, fused_pair_loss
from dpo_scale.logprobs.tiles import MIN_TILE_WIDTH
from dpo_scale.losses import ld_token_weights, preference_loss, sum_token_logps
from dpo_scale.settings.loss import LOSSES, LossSettings

HIDDEN, VOCABULARY = 24, 1300
SEPARABLE = [name for name, info in LOSSES.items() if info.separable]
COUNTS = [(3, 5), (40, 17), (1, 1), (0, 6), (9, 8)]  # completion tokens of chosen and rejected
# of the norm, as in test_logprobs
TOLERANCE = {torch.bfloat16: 8e-3, torch.float16: 1e-3, torch.float32: 1e-5, torch.float64: 1e-12}
PARAMETERS = {
    "label_smoothing": 0.15, "discopop_tau": 0.3, "simpo_gamma": 0.7, "orpo_lambda": 0.25, "cpo_alpha": 0.6,
}  # fmt: skip


class Case:
    """Random hidden states, head and pairs, and the same loss by log_softmax written out in fp64."""

    def __init__(self, dtype=torch.float32, counts=COUNTS, settings=None, bias=False, scale=1.0, softcap=None, seed=0):
        generator = torch.Generator().manual_seed(seed)

        def randn(*shape):
            return torch.randn(*shape, generator=generator)

        self.lengths = torch.tensor(counts, dtype=torch.int64).view(-1, 2)
        self.pairs, tokens = len(counts), int(self.lengths.sum())
        self.segments = torch.arange(2 * self.pairs).repeat_interleave(self.lengths.flatten())
        self.targets = torch.randint(0, VOCABULARY, (tokens,), generator=generator)
        self.targets[:1], self.targets[1:2] = VOCABULARY - 1, 0
        offsets = randn(VOCABULARY).to(dtype) if bias else None
        self.inputs = [randn(tokens, HIDDEN).to(dtype), 0.4 * randn(VOCABULARY, HIDDEN).to(dtype), offsets]
        self.transform = {"logit_scale": scale, "softcap": softcap}
        self.settings = settings or LossSettings()
        # near the policy's own sums, so that no loss is saturated
        exact = self._exact_sums([None if t is None else t.double() for t in self.inputs]).float()
        self.reference = exact + torch.linspace(-3.0, 2.0, 2 * self.pairs).view(-1, 2)
        self.weights = torch.linspace(1.0, 0.0, self.pairs)

    def loss_of_sums(self, sums):
        reference = self.reference if self.settings.needs_reference else None
        losses, _ = preference_loss(sums, reference, self.lengths, self.settings, mean_chosen_tokens=9.5)
        return losses * self.weights

    def leaves(self, dtype=None, trained=(True, True, True)):
        return [
            None if t is None else t.detach().to(dtype or t.dtype, copy=True).requires_grad_(needs)
            for t, needs in zip(self.inputs, trained, strict=True)
        ]

    def fused(self, leaves, **options):
        alpha = self.settings.ld_alpha
        weights = None if alpha is None else ld_token_weights(self.segments, self.pairs, self.lengths, alpha)
        pair_loss = PairLoss(self.segments, self.lengths.sum(1).tolist(), self.loss_of_sums, weights)
        return fused_pair_loss(
            leaves[0], leaves[1], self.targets, pair_loss, bias=leaves[2], **self.transform, **options
        )

    def _exact_sums(self, leaves):
        logits = leaves[0] @ leaves[1].T
        logits = (logits if leaves[2] is None else logits + leaves[2]) * self.transform["logit_scale"]
        cap = self.transform["softcap"]
        logits = logits if cap is None else cap * torch.tanh(logits / cap)
        logps = torch.log_softmax(logits, 1)[torch.arange(len(self.targets)), self.targets]
        sums, start = [], 0
        alpha = 1.0 if self.settings.ld_alpha is None else self.settings.ld_alpha
        for pair in self.lengths.tolist():
            for count in pair:
                row, shared = logps[start : start + count], min(pair)
                sums.append(row[:shared].sum() + alpha * row[shared:].sum())
                start += count
        return torch.stack(sums).view(-1, 2) if sums else logps.new_zeros(0, 2)

    def exact(self, upstream=1.0):
        """Loss, sums and gradients in fp64."""
        leaves = self.leaves(torch.float64)
        sums = self._exact_sums(leaves)
        total = self.loss_of_sums(sums).sum()
        (total * upstream).backward()
        return total.item(), sums.detach(), [None if t is None else t.grad for t in leaves]

    def check(self, upstream=1.0, trained=(True, True, True), tolerance=None, **options):
        leaves = self.leaves(trained=trained)
        total, sums = self.fused(leaves, **options)
        (total * upstream).backward()
        dtype = leaves[0].dtype
        exact_total, exact_sums, gradients = self.exact(upstream)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        assert total.dtype == sums.dtype == wide and sums.shape == (self.pairs, 2) and not sums.requires_grad
        assert total.item() == pytest.approx(exact_total, rel=2e-5, abs=2e-5)
        torch.testing.assert_close(sums.double(), exact_sums, rtol=1e-6, atol=1e-4)
        for leaf, exact, needs in zip(leaves, gradients, trained, strict=True):
            if leaf is None or not needs:
                assert leaf is None or leaf.grad is None
                continue
            assert leaf.grad.dtype == dtype
            error = (leaf.grad.double() - exact).norm() / exact.norm()
            assert error < (tolerance or TOLERANCE[dtype]), (leaf.shape, error)
        return leaves


def rows(count, dtype=torch.float32):
    """Memory for the soft-max of so many tokens."""
    return {"most_held": count * VOCABULARY * dtype.itemsize}


def settings_of(name, **changes):
    return LossSettings(loss_type=name, beta=0.4, **{k: PARAMETERS[k] for k in LOSSES[name].reads}, **changes)


@pytest.mark.parametrize("held", (1000, 20))
@pytest.mark.parametrize("name", SEPARABLE)
def test_every_separable_loss_agrees_with_fp64(name, held):
    Case(settings=settings_of(name)).check(**rows(held))
    Case(torch.float64, settings=settings_of(name)).check(**rows(held, torch.float64))


@pytest.mark.parametrize(
    "settings",
    (
        LossSettings(loss_type=["sigmoid", "sft"], loss_weights=[1.0, 0.2]),
        LossSettings(loss_type=["sigmoid", "bco_pair", "sft"], loss_weights=[0.8, 0.2, 1.0], beta=0.2),
        LossSettings(ld_alpha=0.3),
        LossSettings(f_divergence="js", loss_type="hinge"),
        LossSettings(f_divergence="alpha", f_alpha_divergence_coef=0.3),
    ),
    ids=("sigmoid+sft", "mpo", "ld_alpha", "js", "alpha"),
)
def test_sums_of_losses_and_weights_of_tokens_agree_with_fp64(settings):
    Case(settings=settings).check(**rows(20))


@pytest.mark.parametrize("bias", (False, True))
@pytest.mark.parametrize(("scale", "softcap"), ((1.0, None), (0.5, None), (1.0, 3.0), (1.3, 4.0)))
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_every_dtype_and_head_agrees_with_fp64(dtype, scale, softcap, bias):
    case = Case(dtype, bias=bias, scale=scale, softcap=softcap)
    for held in (1000, 60, 20):  # all at once, chunks of pairs, and a pair in pieces
        case.check(upstream=0.3, tile_bytes=4 * MIN_TILE_WIDTH * 16, **rows(held, dtype))


@pytest.mark.parametrize("trained", list(itertools.product((False, True), repeat=3)))
def test_only_what_is_trained_gets_a_gradient(trained):
    if any(trained):
        Case(bias=True, softcap=4.0).check(trained=trained, **rows(20))
    else:
        case = Case(bias=True)
        total, _ = case.fused(case.leaves(trained=trained))
        assert not total.requires_grad and total.item() == pytest.approx(case.exact()[0], rel=1e-5)


def test_without_grad_mode_no_gradient_is_made(count_products):
    case = Case()
    with torch.no_grad():
        total, _ = case.fused(case.leaves())
    assert not total.requires_grad and count_products() == len(case.targets) * HIDDEN * VOCABULARY


@pytest.mark.parametrize("upstream", (65536.0, 1 / 3, -1.0))
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
def test_a_gradient_reaches_16_bits_only_after_its_scale(dtype, upstream):
    """Weights of 1e-7 put gradients below fp16's smallest number, until the loss scale comes."""
    case = Case(dtype)
    tiny = abs(upstream) > 1000
    case.weights = case.weights * (1e-7 if tiny else 1.0)
    leaves = case.check(upstream=upstream * (50 if tiny else 1), **rows(60, dtype))
    assert all(leaf.grad.abs().max() > 0 for leaf in leaves if leaf is not None)


def test_the_upstream_scale_is_not_rounded_to_the_gradients_dtype():
    case = Case(torch.bfloat16)
    one, third = case.leaves(), case.leaves()
    case.fused(one)[0].backward()
    (case.fused(third)[0] * (1 / 3)).backward()
    ratio = third[1].grad.double().norm() / one[1].grad.double().norm()
    assert ratio.item() == pytest.approx(1 / 3, rel=2e-4)  # bf16(1 / 3) is off by 2e-3


def test_a_scale_that_overflows_fp16_gives_infinities_for_the_scaler_to_see():
    case = Case(torch.float16)
    leaves = case.leaves()
    (case.fused(leaves)[0] * 2.0**40).backward()
    assert not leaves[1].grad.isfinite().all()


def test_many_chunks_do_not_wear_out_the_weights_gradient(monkeypatch):
    """One rounding a chunk in bf16 up to a limit; beyond it the sum is fp32 and as good as one chunk's."""
    counts = [(4, 5)] * 40

    def error(held, most=module.MOST_ROUNDINGS):
        monkeypatch.setattr(module, "MOST_ROUNDINGS", most)
        case = Case(torch.bfloat16, counts)
        leaves = case.leaves()
        case.fused(leaves, **rows(held, torch.bfloat16))[0].backward()
        exact = case.exact()[2][1]
        return ((leaves[1].grad.double() - exact).norm() / exact.norm()).item()

    whole, limited, in_fp32, worn = error(1000), error(30), error(9), error(9, most=1000)
    assert in_fp32 < 1.5 * whole
    assert limited < 3 * whole
    assert worn > 1.5 * in_fp32


@pytest.fixture
def count_products(monkeypatch):
    """The multiplications in matrix products made so far, as a function."""
    calls = []

    def counted(name, owner, left, right):
        original = getattr(owner, name)

        def product(*args, **options):
            calls.append(args[left].shape[0] * args[left].shape[1] * args[right].shape[1])
            return original(*args, **options)

        monkeypatch.setattr(owner, name, product)

    counted("mm", torch, 0, 1)
    counted("addmm_", torch.Tensor, 1, 2)
    return lambda: sum(calls)


@pytest.mark.parametrize(
    ("trained", "held", "passes"),
    [
        ((True, True, False), 1000, 3),  # logits, dhidden, dweight
        ((False, True, False), 1000, 2),
        ((True, False, False), 1000, 2),  # logits and direction
        ((True, True, False), 57 - HIDDEN, 3),  # the first H tokens need no memory of their own
        ((True, True, False), 13, 3 + 20 / 57),  # the logits of 20 tokens again
    ],
)
def test_logits_are_computed_once_unless_a_pair_is_too_long(count_products, trained, held, passes):
    case = Case(counts=[(40, 17)])
    case.fused(case.leaves(trained=trained), **rows(held))[0].backward()
    assert count_products() == pytest.approx(passes * 57 * HIDDEN * VOCABULARY)


def test_backward_makes_no_product(count_products):
    case = Case()
    total, _ = case.fused(case.leaves())
    made = count_products()
    total.backward()
    assert count_products() == made


@pytest.mark.parametrize("settings", (LossSettings(), LossSettings(ld_alpha=0.5), settings_of("ipo")))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_its_numbers_are_those_of_the_token_path(dtype, settings):
    case = Case(dtype, settings=settings)
    ours, theirs = case.leaves(), case.leaves()
    total, sums = case.fused(ours)
    total.backward()
    logps = token_logps(theirs[0], theirs[1], case.targets, implementation="chunked")
    token_sums = sum_token_logps(logps, case.segments, case.pairs, case.lengths, settings.ld_alpha)
    case.loss_of_sums(token_sums).sum().backward()
    torch.testing.assert_close(sums, token_sums.detach(), rtol=1e-6, atol=1e-6)
    for one, other in zip(ours[:2], theirs[:2], strict=True):
        difference = (one.grad.double() - other.grad.double()).norm() / other.grad.double().norm()
        assert difference < (1e-6 if dtype == torch.float32 else 5e-3)


@pytest.mark.parametrize("counts", ([(1, 1)], [(1, 9)], [(0, 0), (1, 1)], [(0, 0)], []))
def test_few_tokens_or_none_at_all(counts):
    case = Case(counts=counts)
    case.weights = torch.ones(len(counts))
    leaves = case.leaves()
    total, sums = case.fused(leaves)
    total.backward()
    exact_total, exact_sums, gradients = case.exact() if counts else (0.0, torch.zeros(0, 2), [0.0, 0.0, None])
    assert total.item() == pytest.approx(exact_total, rel=1e-5)
    torch.testing.assert_close(sums, exact_sums.float(), rtol=1e-6, atol=1e-4)
    for leaf, exact in zip(leaves[:2], gradients[:2], strict=True):
        torch.testing.assert_close(leaf.grad, torch.as_tensor(exact).float().expand_as(leaf), rtol=1e-4, atol=1e-5)


def test_a_filler_pair_of_weight_0_leaves_no_trace():
    case = Case(counts=[(7, 4), (5, 5)])
    case.weights = torch.tensor([1.0, 0.0])
    both = case.leaves()
    case.fused(both)[0].backward()
    assert both[0].grad[11:].abs().max() == 0
    case.weights = torch.zeros(2)
    none = case.leaves()
    total, _ = case.fused(none)
    total.backward()
    assert total.item() == 0 and none[0].grad.abs().max() == none[1].grad.abs().max() == 0


def test_improbable_and_certain_targets_keep_their_gradients():
    """A target whose tile lies 150 below the largest logit, and one that is certain to 1%."""
    case = Case(counts=[(1, 1)])
    hidden = torch.zeros(2, HIDDEN)
    hidden[:, 0], hidden[1, 1] = 1.0, 1.0
    weight = torch.zeros(VOCABULARY, HIDDEN)
    weight[:, 0] = torch.linspace(-100.0, 50.0, VOCABULARY)
    weight[VOCABULARY - 1, 1] = 7.0
    case.inputs, case.targets = [hidden, weight, None], torch.tensor([0, VOCABULARY - 1])
    case.reference = torch.tensor([[-149.0, -1.0]])
    case.weights = torch.ones(1)
    leaves = case.leaves()
    case.fused(leaves, tile_bytes=4 * MIN_TILE_WIDTH)[0].backward()
    _, _, (exact_hidden, exact_weight, _) = case.exact()
    for row in range(2):
        torch.testing.assert_close(leaves[0].grad[row].double(), exact_hidden[row], rtol=1e-3, atol=1e-9)
    torch.testing.assert_close(leaves[1].grad.double(), exact_weight, rtol=1e-3, atol=1e-9)


def test_two_runs_are_bit_identical():
    def run():
        case = Case(torch.bfloat16)
        leaves = case.leaves()
        total, sums = case.fused(leaves, **rows(20, torch.bfloat16))
        total.backward()
        return total, sums, leaves[0].grad, leaves[1].grad

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


def test_autocast_changes_nothing():
    inside, outside = Case().leaves(), Case().leaves()
    with torch.autocast("cpu", torch.bfloat16):
        total, _ = Case().fused(inside)
        total.backward()
    Case().fused(outside)[0].backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(inside[:2], outside[:2], strict=True))


def test_strides_do_not_matter():
    case = Case()
    dense, strided = case.leaves(), case.leaves()
    strided[0], strided[1] = (t.detach().T.contiguous().T.requires_grad_() for t in strided[:2])
    case.fused(dense)[0].backward()
    case.fused(strided)[0].backward()
    for one, other in zip(dense[:2], strided[:2], strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-5, atol=1e-7)


def test_the_memory_for_the_soft_max_is_bounded():
    """No allocation above the bound, the tile, or a gradient, for a pair a hundred times as long."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                Largest.numel = max(Largest.numel, result.numel())
            return result

    case = Case(counts=[(600, 400)])
    with Largest():
        case.fused(case.leaves(), tile_bytes=4 * MIN_TILE_WIDTH * 8, **rows(10))[0].backward()
    assert Largest.numel <= max(10 * VOCABULARY, VOCABULARY * HIDDEN, 1000 * HIDDEN)


def test_a_second_backward_pass_is_refused_not_wrong():
    case = Case()
    total, _ = case.fused(case.leaves())
    total.backward(torch.tensor(2.0), retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace operation"):
        total.backward(torch.tensor(2.0))


def test_wrong_arguments_are_refused_as_by_the_token_path():
    case = Case()
    case.targets[3] = VOCABULARY
    with pytest.raises(ValueError, match="targets must be in 0"):
        case.fused(case.leaves())
