"""What only the Triton path has: block sizes, tiles in bounded memory, a saved direction, and code for real GPUs.

The sweep that it shares with the other implementations is in test_logprobs.py. As there: on a GPU if there is one,
otherwise in Triton's interpreter; and its code is compiled for GPUs that need not be there.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")
from dpo_scale.logprobs import BY_PRODUCTS, choose_implementation, token_logps  # noqa: E402
from dpo_scale.logprobs.pair_loss import PairLoss, fused_pair_loss  # noqa: E402
from dpo_scale.logprobs.tiles import Head  # noqa: E402
from dpo_scale.logprobs.triton_blocks import Blocks  # noqa: E402
from dpo_scale.logprobs.triton_logps import triton_token_logps  # noqa: E402
from dpo_scale.logprobs.triton_pair_loss import TritonJob  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = Blocks(16, 32, 16, warps=4, stages=2)
BLOCKS = {"small": SMALL, "wide": Blocks(16, 128, 32, warps=4, stages=3), "tall": Blocks(64, 16, 64, 4, 2)}
GRADIENT_TOLERANCE = {torch.bfloat16: 8e-3, torch.float16: 1e-3, torch.float32: 1e-5}
TOKENS, VOCABULARY, HIDDEN = 37, 301, 40


def make(dtype=torch.float32, tokens=TOKENS, vocabulary=VOCABULARY, hidden=HIDDEN, spread=0.8):
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(0, vocabulary, (tokens,), generator=generator)
    targets[:2] = torch.tensor([vocabulary - 1, 0])[:tokens]
    tensors = (
        spread * torch.randn(tokens, hidden, generator=generator),
        torch.randn(vocabulary, hidden, generator=generator),
        torch.randn(vocabulary, generator=generator),
    )
    return *(t.to(DEVICE, dtype) for t in tensors), targets.to(DEVICE)


def exact(hidden, weight, bias, targets, logit_scale=1.0, softcap=None, trained=(True, True, True), *, upstream):
    """fp64 log-probs and the gradients of the trained of hidden, weight, bias."""
    inputs = [t.detach().double() for t in (hidden, weight, bias)]
    for tensor, train in zip(inputs, trained, strict=True):
        tensor.requires_grad_(train)
    logits = (inputs[0] @ inputs[1].T + inputs[2]) * logit_scale
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    logps = torch.log_softmax(logits, 1)[torch.arange(len(targets)), targets]
    (logps * upstream.double()).sum().backward()
    return logps.detach(), [t.grad for t in inputs]


def ours(hidden, weight, bias, targets, logit_scale=1.0, softcap=None, trained=(True, True, True), *, upstream, **how):
    """The same from the Triton path."""
    inputs = [t.detach().clone() for t in (hidden, weight, bias)]
    for tensor, train in zip(inputs, trained, strict=True):
        tensor.requires_grad_(train)
    logps, _ = triton_token_logps(inputs[0], Head(inputs[1], inputs[2], logit_scale, softcap), targets, (), **how)
    (logps * upstream).sum().backward()
    return logps.detach(), [t.grad for t in inputs]


def assert_agrees(found, truth, dtype, bound=3e-5):
    assert (found[0].double() - truth[0]).abs().max().item() < bound
    for mine, true in zip(found[1], truth[1], strict=True):
        assert (mine is None) == (true is None)
        if mine is not None:
            assert mine.dtype == dtype
            assert ((mine.double() - true).norm() / true.norm()).item() < GRADIENT_TOLERANCE[dtype]


def upstream_of(tokens=TOKENS):
    return torch.linspace(-1.0, 2.0, tokens, device=DEVICE)


@pytest.mark.parametrize("blocks", BLOCKS)
@pytest.mark.parametrize("trained", [(True, True, True), (True, False, False), (False, True, False)])
def test_results_do_not_depend_on_block_sizes(blocks, trained):
    inputs, options = make(torch.bfloat16), {"logit_scale": 1.3, "softcap": 12.0, "upstream": upstream_of()}
    found = ours(*inputs, **options, trained=trained, blocks=BLOCKS[blocks])
    assert_agrees(found, exact(*inputs, **options, trained=trained), torch.bfloat16)


@pytest.mark.parametrize("trained", [(True, True, True), (True, False, False)])
@pytest.mark.parametrize("memory_bytes", (1, 20_000, 60_000))
def test_results_do_not_depend_on_how_much_fits_into_the_tile(memory_bytes, trained):
    """From one block of tokens and 1024 columns at a time to a few runs of either."""
    inputs = make(torch.float32, vocabulary=2100)
    options = {"trained": trained, "upstream": upstream_of()}
    found = ours(*inputs, **options, blocks=Blocks(16, 256, 32, 4, 2), memory_bytes=memory_bytes)
    assert_agrees(found, exact(*inputs, **options), torch.float32)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_bf16_and_fp16_log_probs_are_within_1e_5_of_the_logit_scale(dtype):
    """At a hidden size and a spread of logits as in a model, where bf16 logits would be off by 0.1."""
    hidden, weight, bias, targets = make(dtype, 33, 700, hidden=384, spread=1.0)
    logits = hidden.double() @ weight.double().T + bias.double()
    truth = torch.log_softmax(logits, 1)[torch.arange(33), targets]
    logps = token_logps(hidden, weight, targets, bias=bias, implementation="triton")
    assert (logps.double() - truth).abs().max().item() < 1e-6 * logits.abs().max().item()
    rounded = torch.log_softmax(logits.to(dtype).double(), 1)[torch.arange(33), targets]
    assert (rounded - truth).abs().max().item() > 1e-4 * logits.abs().max().item()


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_a_frozen_heads_direction_is_exact_where_other_tokens_are_far_likelier_or_nothing_else_is(dtype):
    """Stored weights are relative to the target's logit: here others lie 200 above it, 10 above, or 30 below.

    The last three tiles of 16 columns have their own highest logit each, so weights of one token get three shifts.
    """
    vocabulary, blocks = 64, Blocks(16, 16, 16, 4, 2)
    hidden = torch.ones(3, 1, device=DEVICE, dtype=dtype)
    hidden[1], hidden[2] = 0.05, -0.15
    weight = torch.linspace(0.0, 200.0, vocabulary, device=DEVICE).to(dtype).unsqueeze(1)
    targets = torch.tensor([0, 0, 0], device=DEVICE)
    bias, upstream = torch.zeros(vocabulary, device=DEVICE, dtype=dtype), torch.ones(3, device=DEVICE)
    only_hidden = (True, False, False)
    truth = exact(hidden, weight, bias, targets, trained=only_hidden, upstream=upstream)
    found = ours(hidden, weight, bias, targets, trained=only_hidden, upstream=upstream, blocks=blocks)
    torch.testing.assert_close(found[0].double(), truth[0], rtol=1e-6, atol=1e-6)
    tolerance = {"rtol": GRADIENT_TOLERANCE[dtype], "atol": 1e-6}
    torch.testing.assert_close(found[1][0].double(), truth[1][0], **tolerance)


@pytest.fixture
def passes(monkeypatch):
    """The logit passes and the gradient products made so far, in order."""
    from dpo_scale.logprobs import triton_logps as path

    made = []

    def counted(name, function):
        return lambda *args, **kwargs: (made.append(name), function(*args, **kwargs))[1]

    monkeypatch.setattr(path.Launcher, "statistics", counted("logits", path.Launcher.statistics))
    monkeypatch.setattr(path.Launcher, "logit_gradient", counted("logits again", path.Launcher.logit_gradient))
    for name in ("mm", "addmm"):
        monkeypatch.setattr(torch, name, counted("product", getattr(torch, name)))
    return made


@pytest.mark.parametrize(
    ("trained", "forward", "backward"),
    [
        ((False, False), ["logits"], []),
        ((True, False), ["logits", "product"], []),
        ((True, True), ["logits"], ["product", "product", "logits again", "product", "product"]),
        ((False, True), ["logits"], ["product", "logits again", "product"]),
    ],
)
def test_only_the_passes_that_are_needed_are_made(passes, trained, forward, backward):
    """2048 columns; where the head is trained, there is memory for the soft-max of 1024."""
    hidden, weight, _, targets = make(torch.float32, vocabulary=2048)
    hidden.requires_grad_(trained[0]), weight.requires_grad_(trained[1])
    memory_bytes = 4 * TOKENS * (1024 + HIDDEN) + 100 if trained[1] else 10**9
    logps, _ = triton_token_logps(hidden, Head(weight), targets, (), memory_bytes=memory_bytes)
    assert passes == forward
    assert logps.requires_grad == any(trained)
    if any(trained):
        logps.sum().backward()
    assert passes == forward + backward
    assert ((hidden.grad is not None), (weight.grad is not None)) == trained


def test_a_frozen_head_saves_the_direction_and_nothing_else():
    hidden, weight, _, targets = make(torch.bfloat16)
    hidden.requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        token_logps(hidden, weight, targets, implementation="triton")
    assert [(t.shape, t.dtype) for t in saved] == [(hidden.shape, torch.bfloat16)]


def test_a_trained_head_saves_the_weight_itself_and_nothing_of_the_logits_size():
    hidden, weight, _, targets = make(torch.bfloat16)
    hidden.requires_grad_(), weight.requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        token_logps(hidden, weight, targets, implementation="triton")
    kept = [t for t in saved if t.data_ptr() not in (hidden.data_ptr(), weight.data_ptr())]
    assert any(t.data_ptr() == weight.data_ptr() for t in saved)
    assert sum(t.numel() for t in kept) == 3 * TOKENS


def test_a_second_backward_pass_gives_the_same_gradients():
    """The first overwrites the soft-max that was kept."""
    hidden, weight, bias, targets = make(torch.float32)
    inputs = [t.requires_grad_() for t in (hidden, weight, bias)]
    logps, _ = triton_token_logps(hidden, Head(weight, bias), targets, (), blocks=SMALL)
    first = torch.autograd.grad(logps.sum(), inputs, retain_graph=True)
    second = torch.autograd.grad(logps.sum(), inputs)
    for one, other in zip(first, second, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("trained", [(True, False, False), (True, True, True)])
def test_what_is_trained_and_what_comes_along_changes_no_bit_of_log_probs_and_by_products(trained):
    """A policy equal to its reference has margins of exactly 0, whatever the batch and the memory."""
    hidden, weight, bias, targets = make(torch.bfloat16)
    plain = triton_token_logps(hidden, Head(weight, bias), targets, BY_PRODUCTS, blocks=SMALL)
    few = triton_token_logps(hidden[5:9], Head(weight, bias), targets[5:9], BY_PRODUCTS, blocks=SMALL)
    for tensor, train in zip((hidden, weight, bias), trained, strict=True):
        tensor.requires_grad_(train)
    for memory_bytes in (1, 10**8):
        how = {"blocks": SMALL, "memory_bytes": memory_bytes}
        found = triton_token_logps(hidden, Head(weight, bias), targets, BY_PRODUCTS, **how)
        assert torch.equal(found[0], plain[0]) and torch.equal(few[0], plain[0][5:9])
        for name in BY_PRODUCTS:
            assert torch.equal(found[1][name], plain[1][name]) and torch.equal(few[1][name], plain[1][name][5:9])


def test_an_infinitely_unlikely_token_leaves_the_others_as_they_are():
    hidden, weight, bias, targets = make(torch.float32)
    bias[5], targets[targets == 5] = float("-inf"), 6
    keep = torch.arange(VOCABULARY, device=DEVICE) != 5
    options = {"upstream": upstream_of(), "trained": (True, True, False)}
    truth = exact(hidden, weight[keep], bias[keep], targets - (targets > 5).long(), **options)
    logps, (grad_hidden, grad_weight, _) = ours(hidden, weight, bias, targets, **options, blocks=SMALL)
    assert_agrees((logps, [grad_hidden, grad_weight[keep], None]), truth, torch.float32)
    assert not grad_weight[5].any()
    _, found = triton_token_logps(hidden, Head(weight, bias), targets, BY_PRODUCTS, blocks=SMALL)
    p = torch.softmax(hidden.double() @ weight[keep].double().T + bias[keep].double(), 1)
    torch.testing.assert_close(found["entropy"].double(), -(p * p.log()).sum(1), rtol=1e-5, atol=1e-5)


def test_fp64_is_refused():
    hidden, weight, _, targets = make(torch.float64)
    with pytest.raises(ValueError, match="'triton': its statistics are fp32"):
        token_logps(hidden, weight, targets, implementation="triton")


def test_a_cpu_is_refused_where_kernels_are_not_interpreted():
    code = "from dpo_scale.logprobs import *; import torch; choose_implementation('triton', torch.device('cpu'))"
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "TRITON_INTERPRET": "0"},
        cwd=Path(__file__).resolve().parents[2],
        capture_output=True,
        text=True,
    )
    assert "ValueError: log-prob implementation 'triton': its kernels run on CUDA, not on a cpu" in result.stderr
    assert choose_implementation("triton", torch.device("cuda"))[0] == "triton"


GPUS = {  # compute capability: shared memory that a block may have; what products become; the most that may be spilled
    "8.0": (163 * 1024, "mma.sync.aligned.m16n8k16", {"soft-capped": 320}),
    "9.0": (227 * 1024, "wgmma.mma_async.sync.aligned.m64n256k16", {"stored": 256, "soft-capped": 64}),
    "10.0": (227 * 1024, "tcgen05.mma.cta_group", {"stored": 640, "soft-capped": 256}),
}
# What a compiled call trains, and so which of these bounds holds; others spill next to nothing.
BOUND_OF_CALL = {"frozen": "stored", "trained": "stored", "soft-capped": "soft-capped"}


@pytest.mark.parametrize("gpu", [gpu if gpu == "9.0" else pytest.param(gpu, marks=pytest.mark.slow) for gpu in GPUS])
def test_kernels_compile_for_gpus_into_their_matrix_instructions_shared_memory_and_registers(gpu, tmp_path):
    """Through Triton's and NVIDIA's compilers, which need no GPU; arguments as in real launches."""
    script = Path(__file__).resolve().parents[1] / "compile_kernels.py"
    found = subprocess.run(
        [sys.executable, str(script), gpu],
        env={**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)},
        cwd=script.parents[1],
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stderr
    kernels = [json.loads(line) for line in found.stdout.splitlines()]
    shared_limit, instruction, bounds = GPUS[gpu]
    assert {k["kernel"] for k in kernels} == {"reference", "forward", "combine", "rescale", "gradient"}
    assert len({k["call"] for k in kernels}) == 7
    for kernel in kernels:
        assert kernel["shared"] <= shared_limit, kernel
        if kernel["kernel"] in ("forward", "gradient"):
            if kernel["call"] in ("nothing trained", "frozen", "trained"):
                assert instruction in kernel["ptx"], kernel
            else:  # smaller blocks, the same units
                assert instruction.partition(".m64")[0] in kernel["ptx"], kernel
            if "odd" not in kernel["call"]:
                assert "cp.async" in kernel["ptx"], kernel
        assert kernel["spilled"] <= bounds.get(BOUND_OF_CALL.get(kernel["call"]), 16), kernel


@pytest.mark.parametrize("rows", (6, 14, 60))
@pytest.mark.parametrize("trained", [(True, True, True), (False, True, False)])
def test_the_fused_pair_loss_is_the_loss_of_all_logits_at_once(rows, trained, monkeypatch):
    """With a tile of 6 tokens pairs are longer than it, with 14 some share it, with 60 all."""
    counts = [(3, 4), (9, 7), (1, 1), (0, 6), (2, 4)]
    hidden, weight, bias, targets = make(torch.bfloat16, tokens=TOKENS)
    lengths = torch.tensor(counts, device=DEVICE).flatten()
    segments = torch.arange(len(lengths), device=DEVICE).repeat_interleave(lengths)
    reference = torch.linspace(-3.0, 2.0, len(counts), device=DEVICE)

    def losses(sums):
        return -torch.nn.functional.logsigmoid(0.1 * (sums[:, 0] - sums[:, 1]) - reference) / len(counts)

    inputs = [t.detach().clone() for t in (hidden, weight, bias)]
    truth = [t.double() for t in inputs]
    for tensors in (inputs, truth):
        for tensor, train in zip(tensors, trained, strict=True):
            tensor.requires_grad_(train)
    monkeypatch.setattr(TritonJob, "memory_bytes", rows * 2 * 128 * 3)
    loss, sums = fused_pair_loss(
        *inputs[:2], targets, PairLoss(segments, [sum(pair) for pair in counts], losses), bias=inputs[2], softcap=12.0,
        implementation="triton",
    )  # fmt: skip
    (loss * 8.0).backward()
    logits = 12.0 * torch.tanh((truth[0] @ truth[1].T + truth[2]) / 12.0)
    logps = torch.log_softmax(logits, 1)[torch.arange(TOKENS, device=DEVICE), targets]
    exact_sums = torch.zeros(2 * len(counts), dtype=torch.float64, device=DEVICE).index_add(0, segments, logps)
    exact_loss = losses(exact_sums.view(-1, 2)).sum()
    (exact_loss * 8.0).backward()
    torch.testing.assert_close(sums.double().flatten(), exact_sums.detach(), rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(loss.double(), exact_loss, rtol=1e-6, atol=1e-6)
    for mine, true in zip(inputs, truth, strict=True):
        assert (mine.grad is None) == (true.grad is None)
        if mine.grad is not None:
            assert mine.grad.dtype == torch.bfloat16
            assert ((mine.grad.double() - true.grad).norm() / true.grad.norm()).item() < 1e-2


def test_the_fused_pair_loss_of_no_tokens_is_zero_gradients():
    hidden, weight, _, targets = make(torch.bfloat16, tokens=0)
    weight.requires_grad_(), hidden.requires_grad_()
    nothing = PairLoss(targets, [0], lambda sums: sums.sum(1))
    loss, _ = fused_pair_loss(hidden, weight, targets, nothing, implementation="triton")
    loss.backward()
    assert loss.item() == 0 and weight.grad.shape == weight.shape and not weight.grad.any()
    assert hidden.grad.shape == hidden.shape
