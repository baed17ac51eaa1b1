"""The head's rows split over two real processes, against one fp64 soft-max over all of them."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from dpo_scale.logprobs import BY_PRODUCTS
from dpo_scale.logprobs.vocab_parallel import vocab_parallel_token_logps

TOKENS, VOCABULARY, HIDDEN = 19, 151, 24
GRADIENT_TOLERANCE = {torch.bfloat16: 8e-3, torch.float32: 1e-5, torch.float64: 1e-12}
CASES = {  # implementation, dtype, first rank's rows, logit scale, softcap, bias, trained hidden and weight
    "chunked": ("chunked", torch.float64, 76, 1.0, None, False, (True, True)),
    "everything": ("chunked", torch.float32, 40, 1.3, 6.0, True, (True, True)),
    "bf16, a lone row": ("chunked", torch.bfloat16, 1, 1.0, None, True, (True, True)),
    "frozen": ("chunked", torch.float32, 150, 1.0, None, False, (True, False)),
}
if find_spec("triton") is not None:
    CASES["triton"] = ("triton", torch.float32, 60, 1.3, 6.0, True, (True, True))
    CASES["triton, bf16"] = ("triton", torch.bfloat16, 100, 1.0, None, False, (True, True))


def inputs_of(case):
    _, dtype, *_ = CASES[case]
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator).to(dtype)
    weight = torch.randn(VOCABULARY, HIDDEN, generator=generator).to(dtype)
    bias = torch.randn(VOCABULARY, generator=generator).to(dtype)
    targets = torch.randint(0, VOCABULARY, (TOKENS,), generator=generator)
    targets[:4] = torch.tensor([0, 150, 1, 149])
    # the arg-max in some rows, in either shard
    targets[6:12] = (hidden.double() @ weight.double().T + (bias.double() if CASES[case][5] else 0)).argmax(1)[6:12]
    return hidden, weight, bias, targets


def work(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    group = dist.group.WORLD
    results = {}
    for case, (implementation, _, split, scale, softcap, with_bias, trained) in CASES.items():
        hidden, weight, bias, targets = inputs_of(case)
        rows = slice(0, split) if rank == 0 else slice(split, VOCABULARY)
        weight, bias = weight[rows].clone(), bias[rows].clone() if with_bias else None
        hidden.requires_grad_(trained[0]), weight.requires_grad_(trained[1])
        if bias is not None:
            bias.requires_grad_(trained[1])
        options = {"bias": bias, "logit_scale": scale, "softcap": softcap, "implementation": implementation}
        logps, extras = vocab_parallel_token_logps(
            hidden, weight, targets, group, rows.start, **options, by_products=BY_PRODUCTS
        )
        (logps * torch.linspace(-1.0, 2.0, TOKENS)).sum().backward()
        gradients = [None if t is None else t.grad for t in (hidden, weight, bias)]
        results[case] = (logps.detach(), extras, gradients)
    hidden, weight, _, targets = inputs_of("chunked")
    try:  # a gap: no rank has row 100
        rows = slice(0, 100) if rank == 0 else slice(101, VOCABULARY)
        vocab_parallel_token_logps(hidden, weight[rows], torch.full_like(targets, 100), group, rows.start)
    except ValueError as error:
        results["gap"] = str(error)
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("vocab_parallel"))
    mp.spawn(work, args=(folder,), nprocs=2)
    return [torch.load(f"{folder}/{rank}.pt") for rank in (0, 1)]


@pytest.mark.parametrize("case", CASES)
def test_two_shards_give_the_values_and_gradients_of_the_whole_head(results, case):
    _, dtype, split, scale, softcap, with_bias, trained = CASES[case]
    hidden, weight, bias, targets = inputs_of(case)
    exact = [t.double().requires_grad_(train) for t, train in zip((hidden, weight), trained, strict=True)]
    exact_bias = bias.double().requires_grad_(trained[1]) if with_bias else None
    logits = exact[0] @ exact[1].T
    logits = (logits if exact_bias is None else logits + exact_bias) * scale
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    all_logps = torch.log_softmax(logits, 1)
    truth = all_logps[torch.arange(TOKENS), targets]
    (truth * torch.linspace(-1.0, 2.0, TOKENS).double()).sum().backward()
    all_logps, p = all_logps.detach(), all_logps.detach().exp()
    expected = {
        "logsumexp": logits.detach().logsumexp(1),
        "entropy": -(p * all_logps).sum(1),
        "log_sum_p2": (2 * all_logps).logsumexp(1),
    }
    bound = 1e-12 if dtype == torch.float64 else 2e-5
    for rank, rows in enumerate((slice(0, split), slice(split, VOCABULARY))):
        logps, extras, (grad_hidden, grad_weight, grad_bias) = results[rank][case]
        assert (logps.double() - truth).abs().max().item() < bound
        for name, value in expected.items():
            torch.testing.assert_close(extras[name].double(), value, rtol=bound, atol=bound)
        found = extras["argmax_is_target"]
        assert torch.equal(found, logits.argmax(1) == targets) and found[6:12].all() and not found.all()
        gradients = [(grad_hidden, exact[0].grad), (grad_weight, None if not trained[1] else exact[1].grad[rows])]
        if with_bias:
            gradients.append((grad_bias, exact_bias.grad[rows]))
        for mine, true in gradients:
            assert (mine is None) == (true is None)
            if mine is not None:
                assert mine.dtype == dtype
                assert ((mine.double() - true).norm() / true.norm()).item() < GRADIENT_TOLERANCE[dtype]
    first, second = (results[rank][case] for rank in (0, 1))
    assert torch.equal(first[0], second[0]) and torch.equal(first[2][0], second[2][0])


def test_a_target_without_a_row_is_refused_on_every_rank(results):
    for rank in (0, 1):
        assert results[rank]["gap"] == "each target must belong to one rank's rows; 19 of 19 do not"
