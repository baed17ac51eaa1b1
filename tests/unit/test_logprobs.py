"""Token log-probs: each implementation against log_softmax written out in fp64.

On a GPU if there is one; otherwise on the CPU, where Triton's kernels run in its interpreter.
"""

from __future__ import annotations

import itertools

import pytest
import torch

from dpo_scale import logprobs
from dpo_scale.logprobs import BY_PRODUCTS, IMPLEMENTATIONS, choose_implementation, token_logps
from dpo_scale.logprobs.chunked import chunked_token_logps
from dpo_scale.logprobs.tiles import MIN_TILE_WIDTH, Head

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HIDDEN = 24
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
HEADS = {  # bias, logit_scale, softcap
    "plain": (False, 1.0, None),
    "bias": (True, 1.0, None),
    "scaled": (False, 0.25, None),
    "capped": (False, 1.0, 5.0),
    "all": (True, 1.7, 4.0),
}
# Of the norm. 16 bits: the gradient's own rounding, with room for the products' rounded operands. fp32: 1 - p
# loses digits where the target is nearly certain, whoever computes it.
GRADIENT_TOLERANCE = {torch.bfloat16: 8e-3, torch.float16: 1e-3, torch.float32: 1e-5, torch.float64: 1e-12}


@pytest.fixture(autouse=True)
def on_device():
    with torch.device(DEVICE):
        yield


def make(tokens, vocabulary, dtype=torch.float32, bias=False, seed=0):
    """hidden, weight, bias or None, targets; logits spread by about 5; both ends are hit."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, HIDDEN, generator=generator, device="cpu").to(dtype)
    weight = torch.randn(vocabulary, HIDDEN, generator=generator, device="cpu").to(dtype)
    offsets = torch.randn(vocabulary, generator=generator, device="cpu").to(dtype) if bias else None
    targets = torch.randint(0, vocabulary, (tokens,), generator=generator, device="cpu")
    targets[:1], targets[1:2] = vocabulary - 1, 0
    return tuple(None if t is None else t.to(DEVICE) for t in (hidden, weight, offsets, targets))


def exact_logits(hidden, weight, bias, logit_scale, softcap):
    logits = hidden.double() @ weight.double().T
    if bias is not None:
        logits = logits + bias.double()
    logits = logits * logit_scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def exact_logps(hidden, weight, bias, targets, logit_scale, softcap):
    logits = exact_logits(hidden, weight, bias, logit_scale, softcap)
    return torch.log_softmax(logits, 1)[torch.arange(len(targets)), targets]


def leaves(*tensors):
    return [None if t is None else t.detach().clone().requires_grad_() for t in tensors]


def relative_error(actual, exact):
    return ((actual.double() - exact).norm() / exact.norm().clamp(min=1e-30)).item()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head", HEADS)
def test_values_and_gradients_agree_with_fp64(implementation, dtype, head):
    if implementation == "triton" and dtype == torch.float64:
        pytest.skip("its statistics are fp32; that it refuses fp64 is tested beside its other refusals")
    with_bias, scale, softcap = HEADS[head]
    for tokens, vocabulary in itertools.product((0, 1, 7, 33), (11, 130, 1000)):
        hidden, weight, bias, targets = make(tokens, vocabulary, dtype, with_bias)
        ours = leaves(hidden, weight, bias)
        logps = token_logps(
            ours[0],
            ours[1],
            targets,
            bias=ours[2],
            logit_scale=scale,
            softcap=softcap,
            implementation=implementation,
        )
        truth = leaves(*(None if t is None else t.double() for t in (hidden, weight, bias)))
        exact = exact_logps(*truth, targets, scale, softcap)

        assert logps.shape == (tokens,)
        assert logps.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        logit_size = max(1.0, exact_logits(hidden, weight, bias, scale, softcap).abs().max().item() if tokens else 1)
        bound = 1e-13 if dtype == torch.float64 else 1e-6
        assert (logps.double() - exact).abs().max().item() < bound * logit_size if tokens else True

        upstream = torch.linspace(-1.0, 2.0, tokens, dtype=torch.float64)
        (logps * upstream.to(logps.dtype)).sum().backward()
        (exact * upstream).sum().backward()
        for mine, true in zip(ours, truth, strict=True):
            if mine is not None:
                assert mine.grad.dtype == dtype
                assert relative_error(mine.grad, true.grad) < GRADIENT_TOLERANCE[dtype], (tokens, vocabulary)


@pytest.mark.parametrize("extra", (-1, 0, 1, MIN_TILE_WIDTH))
@pytest.mark.parametrize("rows", (1, 3, 7))
def test_results_do_not_depend_on_where_tiles_end(extra, rows):
    """Seven tokens and about two tiles of the vocabulary; targets at the ends and around the boundary."""
    vocabulary = MIN_TILE_WIDTH + 1 + extra
    hidden, weight, bias, _ = make(7, vocabulary, bias=True)
    edges = torch.tensor([0, 1, MIN_TILE_WIDTH - 1, MIN_TILE_WIDTH, MIN_TILE_WIDTH + 1, vocabulary - 2, vocabulary - 1])
    targets = edges.clamp(max=vocabulary - 1)
    names = list(BY_PRODUCTS)

    def run(tile_bytes):
        inputs = leaves(hidden, weight, bias)
        logps, extras = chunked_token_logps(inputs[0], Head(inputs[1], inputs[2], 1.3, 6.0), targets, names, tile_bytes)
        (logps * torch.arange(1.0, 8.0)).sum().backward()
        return logps.detach(), *extras.values(), *(t.grad for t in inputs)

    for tiled, whole in zip(run(rows * MIN_TILE_WIDTH * 4), run(2**30), strict=True):
        torch.testing.assert_close(tiled, whole, rtol=1e-5, atol=1e-5)


def test_running_statistics_survive_growing_and_falling_peaks():
    """The largest logit in the last tile, then in the first: earlier sums must shrink, later ones add."""
    vocabulary = 3 * MIN_TILE_WIDTH
    hidden = torch.ones(2, 1)
    weight = torch.linspace(-40.0, 40.0, vocabulary).unsqueeze(1)
    for head in (weight, weight.flip(0)):
        targets = torch.tensor([vocabulary - 1, 1])
        logps, extras = chunked_token_logps(hidden, Head(head), targets, list(BY_PRODUCTS), MIN_TILE_WIDTH * 8)
        exact = torch.log_softmax((hidden.double() @ head.double().T), 1)
        torch.testing.assert_close(logps.double(), exact[torch.arange(2), targets], rtol=1e-6, atol=1e-5)
        torch.testing.assert_close(extras["entropy"].double(), -(exact.exp() * exact).sum(1), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(extras["log_sum_p2"].double(), (2 * exact).logsumexp(1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("head", HEADS)
def test_by_products_agree_with_their_definitions(implementation, head):
    with_bias, scale, softcap = HEADS[head]
    hidden, weight, bias, targets = make(33, 1000, bias=with_bias)
    logits = exact_logits(hidden, weight, bias, scale, softcap)
    targets[3:9] = logits.argmax(1)[3:9]
    _, found = token_logps(
        hidden.requires_grad_(),
        weight,
        targets,
        bias=bias,
        logit_scale=scale,
        softcap=softcap,
        implementation=implementation,
        by_products=BY_PRODUCTS,
    )
    p = torch.softmax(logits, 1)
    close = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(found["logsumexp"].double(), logits.exp().sum(1).log(), **close)
    torch.testing.assert_close(found["entropy"].double(), -(p * p.log()).sum(1), **close)
    torch.testing.assert_close(found["log_sum_p2"].double(), (p * p).sum(1).log(), **close)
    assert found["argmax_is_target"].tolist() == (logits.argmax(1) == targets).tolist()
    assert found["argmax_is_target"][3:9].all() and not found["argmax_is_target"].all()
    assert not any(value.requires_grad for value in found.values())


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_only_the_by_products_asked_for_are_returned_and_none_for_an_empty_batch(implementation):
    hidden, weight, _, targets = make(0, 11)
    logps, found = token_logps(
        hidden, weight, targets, implementation=implementation, by_products=["entropy", "logsumexp"]
    )
    assert list(found) == ["entropy", "logsumexp"]
    assert logps.shape == found["entropy"].shape == (0,)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bf16_logits_are_never_rounded_to_bf16(implementation):
    hidden, weight, _, targets = make(33, 1000, torch.bfloat16)
    exact = exact_logps(hidden, weight, None, targets, 1.0, None)
    rounded = torch.log_softmax((hidden @ weight.T).float(), 1)[torch.arange(33), targets]
    ours = token_logps(hidden, weight, targets, implementation=implementation)
    error, peer_error = ((x.double() - exact).abs().max().item() for x in (ours, rounded))
    assert error < 3e-5 and peer_error > 100 * error


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_certain_token_keeps_its_digits(implementation):
    """logp = -1e-6 with logits of 50: a log-sum-exp rounded before the subtraction would give 0."""
    hidden, weight = torch.ones(1, 1), torch.tensor([[50.0], [50.0 + torch.log(torch.tensor(1e-6)).item()]])
    logp = token_logps(hidden, weight, torch.tensor([0]), implementation=implementation)
    exact = exact_logps(hidden, weight, None, torch.tensor([0]), 1.0, None)
    assert logp.item() == pytest.approx(exact.item(), rel=0.1) and logp.item() < 0


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_strides_do_not_matter(implementation):
    hidden, weight, bias, targets = make(7, 130, bias=True)
    plain = token_logps(hidden, weight, targets, bias=bias, implementation=implementation)
    strided = leaves(hidden.T.contiguous().T, weight.T.contiguous().T)
    every_second = targets.repeat_interleave(2)[::2], bias.repeat_interleave(2)[::2]
    logps = token_logps(*strided, every_second[0], bias=every_second[1], implementation=implementation)
    torch.testing.assert_close(logps, plain, rtol=1e-6, atol=1e-5)
    logps.sum().backward()
    dense = leaves(hidden, weight)
    token_logps(*dense, targets, bias=bias, implementation=implementation).sum().backward()
    for one, other in zip(strided, dense, strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_autocast_changes_nothing(implementation):
    hidden, weight, _, targets = make(7, 130)
    inside, outside = leaves(hidden, weight), leaves(hidden, weight)
    with torch.autocast(DEVICE, torch.bfloat16):
        logps = token_logps(*inside, targets, implementation=implementation)
    logps.sum().backward()
    expected = token_logps(*outside, targets, implementation=implementation)
    expected.sum().backward()
    assert torch.equal(logps, expected)
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(inside, outside, strict=True))


def test_chunked_backward_under_autocast_changes_nothing():
    hidden, weight, _, targets = make(7, 130)
    inside, outside = leaves(hidden, weight), leaves(hidden, weight)
    with torch.autocast(DEVICE, torch.bfloat16):
        token_logps(*inside, targets, implementation="chunked").sum().backward()
    token_logps(*outside, targets, implementation="chunked").sum().backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(inside, outside, strict=True))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_two_runs_are_bit_identical(implementation):
    def run():
        inputs = leaves(*make(33, 1000, torch.bfloat16)[:2])
        logps = token_logps(*inputs, make(33, 1000)[3], implementation=implementation)
        logps.sum().backward()
        return logps, inputs[0].grad, inputs[1].grad

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


def test_chunked_gradient_passes_gradcheck():
    hidden, weight, bias, targets = make(4, 11, torch.float64, bias=True)
    hidden, weight = 0.3 * hidden, 0.3 * weight

    def function(*inputs):
        return chunked_token_logps(inputs[0], Head(inputs[1], inputs[2], 1.3, 4.0), targets, (), max_held=0)[0]

    assert torch.autograd.gradcheck(function, leaves(hidden, weight, bias))


@pytest.fixture
def count_products(monkeypatch):
    """The number of matrix products made so far, as a function."""
    from dpo_scale.logprobs import chunked

    calls = []
    mm = torch.mm

    def counted(*args, **kwargs):
        calls.append(args[0].shape)
        return mm(*args, **kwargs)

    monkeypatch.setattr(chunked.torch, "mm", counted)
    return lambda: len(calls)


@pytest.mark.parametrize(
    ("trained", "held", "products"),
    [
        ("hidden weight", 0, 4),
        ("hidden weight", 2**20, 3),
        ("weight", 0, 3),
        ("weight", 2**20, 2),
        ("hidden", 0, 2),
        ("", 2**20, 1),
    ],
)
def test_chunked_makes_only_the_products_that_are_needed(count_products, trained, held, products):
    """Logits forward, again backward where they were not held, one for each gradient; a frozen head's only forward."""
    hidden, weight, _, targets = make(7, 130)
    hidden.requires_grad_("hidden" in trained)
    weight.requires_grad_("weight" in trained)
    logps, _ = chunked_token_logps(hidden, Head(weight), targets, (), max_held=held)
    made = count_products()
    if trained:
        logps.sum().backward()
    assert count_products() == products
    assert made == (2 if trained == "hidden" else 1)
    assert (hidden.grad is not None) == ("hidden" in trained)
    assert (weight.grad is not None) == ("weight" in trained)
    assert logps.requires_grad == bool(trained)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_with_a_frozen_head_agree_with_fp64(dtype, head):
    with_bias, scale, softcap = HEADS[head]
    hidden, weight, bias, targets = make(33, 3000, dtype, with_bias)
    (ours,), (truth, *rest) = (
        leaves(hidden),
        leaves(*(None if t is None else t.double() for t in (hidden, weight, bias))),
    )
    logps, _ = chunked_token_logps(ours, Head(weight, bias, scale, softcap), targets, (), 4 * MIN_TILE_WIDTH * 8)
    upstream = torch.linspace(-1.0, 2.0, 33, dtype=torch.float64)
    (logps * upstream.to(logps.dtype)).sum().backward()
    (exact_logps(truth, *rest, targets, scale, softcap) * upstream).sum().backward()
    assert relative_error(ours.grad, truth.grad) < GRADIENT_TOLERANCE[dtype]


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_do_not_depend_on_how_much_is_held(dtype, head):
    with_bias, scale, softcap = HEADS[head]
    hidden, weight, bias, targets = make(33, 3 * MIN_TILE_WIDTH, dtype, with_bias)
    found = []
    for tiles_held in range(4):
        inputs = leaves(hidden, weight, bias)
        held = tiles_held * 33 * MIN_TILE_WIDTH * 8
        capped = Head(*inputs[1:], scale, softcap)
        logps, _ = chunked_token_logps(inputs[0], capped, targets, (), 4 * MIN_TILE_WIDTH * 8, held)
        logps.sum().backward()
        found.append([t.grad.double() for t in inputs if t is not None])
    for other in found[1:]:
        for one, grad in zip(found[0], other, strict=True):
            assert (one - grad).norm() / one.norm() < GRADIENT_TOLERANCE[dtype]


@pytest.mark.parametrize("held", (0, 9 * 1024 * 2, 60000))
def test_chunked_saves_the_weight_itself_and_no_more_of_the_soft_max_than_allowed(held):
    hidden, weight, _, targets = make(33, 7000, torch.bfloat16)
    hidden, weight = leaves(hidden, weight)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        chunked_token_logps(hidden, Head(weight), targets, (), 4 * MIN_TILE_WIDTH * 8, held)
    kept = [t for t in saved if t.data_ptr() not in (hidden.data_ptr(), weight.data_ptr())]
    assert any(t.data_ptr() == weight.data_ptr() for t in saved)
    # of the first H tokens in the memory of the weight's gradient, of the other 9 in tiles
    assert [t.dtype for t in kept if t.shape == weight.shape] == ([torch.bfloat16] if held else [])
    tiles = [t for t in kept if t.ndim == 2 and t.dtype == torch.bfloat16 and t.shape != weight.shape]
    assert sum(t.numel() * t.itemsize for t in tiles) <= held and len(tiles) == held // (9 * 1024 * 2)
    # targets, log-sum-exps, gradients at the target, and peaks
    assert sum(t.numel() for t in kept if t.ndim == 1) == 3 * 33 + 9 * len(tiles)


def test_chunked_allocates_a_bounded_tile_whatever_the_number_of_tokens():
    """No single allocation above the tile, the fp32 copy of hidden, or a gradient."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                Largest.numel = max(Largest.numel, result.numel())
            return result

    hidden, weight, _, targets = make(300, 5000)
    hidden.requires_grad_(), weight.requires_grad_()
    tile_bytes = 4 * MIN_TILE_WIDTH * 64
    with Largest():
        logps, _ = chunked_token_logps(hidden, Head(weight), targets, (), tile_bytes, 0)
        logps.sum().backward()
    assert Largest.numel <= max(tile_bytes // 4, weight.numel())
    assert Largest.numel < 300 * 5000 / 10


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_nan_comes_out_as_nan(implementation):
    hidden, weight, _, targets = make(7, 130)
    hidden[2, 3] = float("nan")
    found = token_logps(hidden, weight, targets, implementation=implementation).isnan().tolist()
    assert found == [False, False, True, False, False, False, False]


def refused(match, hidden=None, weight=None, targets=None, **options):
    good_hidden, good_weight, _, good_targets = make(7, 11)
    with pytest.raises(ValueError, match=match):
        token_logps(
            good_hidden if hidden is None else hidden,
            good_weight if weight is None else weight,
            good_targets if targets is None else targets,
            **options,
        )


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("bad", (-100, -1, 11))
@pytest.mark.skipif(DEVICE == "cuda", reason="there it fails on the device, which no later test could use")
def test_targets_outside_the_vocabulary_are_refused(implementation, bad):
    targets = torch.tensor([0, 1, 2, bad, 4, 5, 10])
    refused(r"targets must be in 0 \.\. 10", targets=targets, implementation=implementation)


def test_what_does_not_fit_is_refused_by_name():
    refused(r"hidden \[S, H\] and head_weight", hidden=torch.zeros(7, HIDDEN + 1))
    refused(r"hidden \[S, H\] and head_weight", hidden=torch.zeros(1, 7, HIDDEN))
    refused("head_weight has no rows", weight=torch.zeros(0, HIDDEN))
    refused(r"targets \[7\] expected, got \[6\]", targets=torch.zeros(6, dtype=torch.int64))
    refused("targets must be int64", targets=torch.zeros(7, dtype=torch.int32))
    refused(r"bias \[11\] expected", bias=torch.zeros(12))
    refused("one floating-point dtype", weight=torch.zeros(11, HIDDEN, dtype=torch.bfloat16))
    refused("one floating-point dtype", bias=torch.zeros(11, dtype=torch.float64))
    refused("softcap must be above 0", softcap=0.0)
    refused("unknown by-product 'entropie'", by_products=["entropie"])
    refused("unknown log-prob implementation 'fast'; known: auto, naive, chunked, triton", implementation="fast")
    refused("on one device", weight=torch.zeros(11, HIDDEN, device="meta"))


def test_auto_means_triton_on_cuda_in_16_bits_and_chunked_elsewhere(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setattr(logprobs, "has_triton", lambda: True)
    for dtype in (None, torch.bfloat16, torch.float16):
        assert choose_implementation("auto", cuda, dtype)[0] == "triton"
        assert choose_implementation("auto", cpu, dtype)[0] == "chunked"
    assert choose_implementation("auto", cuda, torch.float32)[0] == "chunked"
    assert choose_implementation("auto", cuda, torch.float64)[0] == "chunked"
    assert "full logits" in choose_implementation("auto", cpu)[1]
    assert choose_implementation("naive") == ("naive", "asked for by name")

    monkeypatch.setattr(logprobs, "has_triton", lambda: False)
    name, reason = choose_implementation("auto", cuda, torch.bfloat16)
    assert name == "chunked" and "Triton is not installed" in reason
    with pytest.raises(ValueError, match="Triton is not installed"):
        choose_implementation("triton", cuda)


def test_auto_computes_what_it_says():
    hidden, weight, _, targets = make(7, 130)
    name, _ = choose_implementation("auto", hidden.device, hidden.dtype)
    chosen = token_logps(hidden, weight, targets)
    assert torch.equal(chosen, token_logps(hidden, weight, targets, implementation=name))
