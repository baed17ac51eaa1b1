"""How a row becomes the sequences of a variable-length kernel, and what is asked of which version of which package.

The yardstick is the mask rule, pair by pair, over the whole row.
"""

import inspect
from dataclasses import replace

import numpy as np
import pytest
import torch
import varlen_kernels
from varlen_kernels import KERNELS, install

from dpo_scale.data.dataset import Pair
from dpo_scale.data.layout import make_batch
from dpo_scale.distributed import ranks
from dpo_scale.models import varlen_attention
from dpo_scale.models.attention import AttentionPlan, Limits, blockwise_attention
from dpo_scale.models.attention_backends import BACKENDS, attention_function, log_once

# prompt, chosen, rejected: branches of one token, longer than their prompts, longer than a window of 16
SIZES = [(1, 1, 1), (24, 3, 30), (7, 1, 1), (40, 12, 9)]


def plan_of(layout, sizes=SIZES):
    pairs = [Pair(*(np.zeros(n, dtype=np.int64) for n in of_pair), b"", i) for i, of_pair in enumerate(sizes)]
    batch = make_batch(layout, pairs, np.ones(len(sizes)), pad_token_id=0)
    return AttentionPlan(batch.position_ids, batch.document_ids, batch.branch_ids, batch.segments)


def inputs_of(plan, heads=4, key_heads=2, width=16, dtype=torch.bfloat16):
    """Queries, keys and values as transformers hands them over: [1, heads, T, width], not contiguous."""
    torch.manual_seed(0)
    tokens = len(plan.position_ids)
    return [
        torch.randn(1, tokens, count, width, dtype=torch.float64).to(dtype).transpose(1, 2).requires_grad_()
        for count in (heads, key_heads, key_heads)
    ]


def by_the_rule(plan, query, key, value, window, scaling):
    """In fp64, with a mask [T, T]."""
    q, k, v = (tensor.double() for tensor in (query, key, value))
    k, v = (tensor.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for tensor in (k, v))
    document, branch, position = plan.document_ids, plan.branch_ids, plan.position_ids
    allowed = (document[:, None] == document) & ((branch == 0) | (branch[:, None] == branch))
    behind = position[:, None] - position
    allowed &= (behind >= 0) & (behind < (window or len(position)))
    scores = (q @ k.transpose(2, 3) * scaling).masked_fill(~allowed, float("-inf"))
    return (scores.softmax(-1) @ v).transpose(1, 2)


def with_gradients(function, inputs):
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    output = function(*leaves)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (output * weights).sum().backward()
    return [output.detach(), *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("window", [None, 1, 5, 16])
@pytest.mark.parametrize("layout", ["packed", "shared_prefix"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_values_and_gradients_follow_the_mask_rule(kernel, layout, window, heads, monkeypatch):
    monkeypatch.setattr(varlen_attention, "DTYPES", (torch.float64,))
    backend = attention_function(install(monkeypatch, kernel))
    plan = plan_of(layout)
    inputs = inputs_of(plan, *heads, dtype=torch.float64)

    def ours(q, k, v):
        module = torch.nn.Linear(1, 1)
        return backend(module, q, k, v, None, scaling=0.3, sliding_window=window, attention_plan=plan)[0]

    got = with_gradients(ours, inputs)
    expected = with_gradients(lambda q, k, v: by_the_rule(plan, q, k, v, window, 0.3), inputs)
    for ours, right in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, right, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kernel", KERNELS)
def test_16_bits_stay_16_bits(kernel, dtype, monkeypatch):
    seen = []

    def watched(*arguments, **settings):
        seen.append([tensor.dtype for tensor in arguments[:3]])
        return KERNELS[kernel](*arguments, **settings)

    watched.__signature__ = inspect.signature(KERNELS[kernel])
    backend = attention_function(install(monkeypatch, kernel, watched))
    plan = plan_of("shared_prefix")
    inputs = inputs_of(plan, dtype=dtype)
    output, _ = backend(torch.nn.Linear(1, 1), *inputs, None, scaling=None, attention_plan=plan)
    assert output.dtype == dtype and seen == [[dtype] * 3]
    right = by_the_rule(plan, *inputs, None, 16**-0.5)
    assert (output - right).norm() / right.norm() < (2e-3 if dtype == torch.float16 else 1e-2)


@pytest.mark.parametrize("layout", ["packed", "shared_prefix"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_keys_are_copied_for_branches_and_repeated_only_for_a_kernel_without_groups(kernel, layout, monkeypatch):
    seen = []

    def watched(q, k, v, *arguments, **settings):
        seen.append((k, v))
        return KERNELS[kernel](q, k, v, *arguments, **settings)

    watched.__signature__ = inspect.signature(KERNELS[kernel])
    backend = attention_function(install(monkeypatch, kernel, watched))
    plan = plan_of(layout)
    query, key, value = inputs_of(plan)
    backend(torch.nn.Linear(1, 1), query, key, value, None, attention_plan=plan)
    repeated = kernel == "torch 2.11"
    for given, original in zip(seen[0], (key, value), strict=True):
        prompts = sum(shared for _, shared in plan.segments)
        assert given.shape[:2] == (len(plan.position_ids) + prompts, 4 if repeated else 2)
        assert (given.data_ptr() == original.data_ptr()) == (layout == "packed" and not repeated)


@pytest.mark.parametrize("backend", ["varlen", "blocks"])
def test_what_the_layers_need_of_a_row_is_derived_once(backend, monkeypatch):
    install(monkeypatch, "torch 2.12")
    plan = plan_of("shared_prefix")
    inputs = inputs_of(plan)
    function, module = attention_function(backend), torch.nn.Linear(1, 1)

    def layer(window):
        with torch.no_grad():
            function(module, *inputs, None, sliding_window=window, attention_plan=plan)

    layer(None), layer(16)
    made = []
    for name in ("arange", "tensor"):
        plain = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *a, _plain=plain, **s: made.append(a) or _plain(*a, **s))
    if backend == "varlen":  # the stand-in makes masks, the kernel does not
        monkeypatch.setattr(varlen_kernels, "kernel", lambda q, *_, **__: q)
    layer(None), layer(16)
    assert made == []


LACKING = {
    "attention sinks": ({}, {"s_aux": torch.zeros(4)}, set(KERNELS)),
    "soft-capped scores": ({}, {"softcap": 3.0}, set(KERNELS) - {"flash-attn 2.8"}),
    "dropout": ({}, {"dropout": 1e-9}, {"torch 2.11", "torch 2.12", "torch 2.13"}),
    "float32": ({"dtype": torch.float32}, {}, set(KERNELS)),
    "heads of width 12": ({"width": 12}, {}, {"torch 2.11", "torch 2.12", "torch 2.13"}),
    "heads of width 264": ({"width": 264}, {}, set(KERNELS)),
    "values of width 8 beside keys of 16": ({}, {}, set(KERNELS)),
}


@pytest.mark.parametrize("flex_runs", [True, False])
@pytest.mark.parametrize("lacks", LACKING)
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_layer_that_the_kernel_lacks_goes_elsewhere_and_the_log_says_so_once(kernel, lacks, flex_runs, monkeypatch):
    shapes, settings, kernels = LACKING[lacks]
    if kernel not in kernels:
        pytest.skip("this version has it")
    lines, flexed = [], []
    monkeypatch.setattr(ranks, "log", lines.append)
    log_once.cache_clear()

    def flex(*arguments, **settings):
        flexed.append(settings)
        return blockwise_attention(*arguments, **settings)

    # on a CPU, where FlexAttention does not train, a stand-in that does
    devices = ("cpu",) if flex_runs else ("cuda",)
    monkeypatch.setitem(BACKENDS, "flex", replace(BACKENDS["flex"], attend=flex, devices=devices))
    name = install(monkeypatch, kernel)
    plan = plan_of("shared_prefix")
    query, key, value = inputs_of(plan, **shapes)
    if "values" in lacks:
        value = value[..., :8]
    arguments = (torch.nn.Linear(1, 1), query, key, value, None)
    settings = {**settings, "attention_plan": plan, "sliding_window": 16}
    for _ in range(2):
        output, _ = attention_function(name)(*arguments, **settings)
    if lacks != "dropout":
        assert torch.equal(output, blockwise_attention(*arguments, **settings)[0])
    to_flex = flex_runs and lacks != "dropout"  # which it does not have either
    assert len(flexed) == (2 if to_flex else 0)
    assert len(lines) == 1 and lacks in lines[0]
    for word in ("torch's" if kernel.startswith("torch") else "flash-attn's", "Flex" if to_flex else "dot_product"):
        assert word in lines[0]


BEYOND = {
    "sliding windows": (Limits(windows=False), {"sliding_window": 16}),
    "prompts that two branches share": (Limits(shared_prompts=False), {}),
    "attention sinks": (Limits(sinks=False), {"s_aux": torch.zeros(4)}),
    "soft-capped scores": (Limits(softcap=False), {"softcap": 3.0}),
    "dropout": (Limits(dropout=False), {"dropout": 0.1}),
    "heads of width 16": (Limits(width_step=12), {}),
    "bfloat16": (Limits(dtypes=(torch.float32,)), {}),
}


@pytest.mark.parametrize("beyond", BEYOND)
def test_a_back_end_is_not_given_what_is_beyond_its_limits(beyond):
    limits, settings = BEYOND[beyond]
    plan = plan_of("shared_prefix")
    query, _, value = inputs_of(plan)
    assert limits.lacks(query, value, {"attention_plan": plan, **settings}) == beyond
    assert Limits().lacks(query, value, {"attention_plan": plan, **settings}) is None
    if not limits.shared_prompts:
        assert limits.lacks(query, value, {"attention_plan": plan_of("packed")}) is None


def test_the_stand_in_has_the_signature_of_the_installed_torch():
    from torch.nn.attention.varlen import varlen_attn

    version = "torch " + ".".join(torch.__version__.split(".")[:2])
    if version not in KERNELS:
        pytest.skip(f"no stand-in for {version}")
    ours, theirs = (inspect.signature(function).parameters for function in (KERNELS[version], varlen_attn))
    assert list(ours) == list(theirs)
    for name, parameter in theirs.items():
        assert (ours[name].kind, ours[name].default) == (parameter.kind, parameter.default), name


@pytest.mark.parametrize("window", [None, 16])
def test_the_installed_torch_takes_the_call_forward_and_backward(window):
    from torch._subclasses.fake_tensor import FakeTensorMode

    plan = plan_of("shared_prefix")
    real = inputs_of(plan)
    with FakeTensorMode() as fake:  # shapes and dtypes only, so no kernel runs
        inputs = [fake.from_tensor(tensor) for tensor in real]
        tensors = (fake.from_tensor(ids)[None] for ids in (plan.position_ids, plan.document_ids, plan.branch_ids))
        settings = {"sliding_window": window, "attention_plan": AttentionPlan(*tensors, plan.segments)}
        output, _ = varlen_attention.varlen_attention(torch.nn.Linear(1, 1), *inputs, None, scaling=0.3, **settings)
        assert output.shape == (1, len(plan.position_ids), 4, 16) and output.dtype == torch.bfloat16
        for gradient, tensor in zip(torch.autograd.grad(output.sum(), inputs), inputs, strict=True):
            assert gradient.shape == tensor.shape and gradient.dtype == torch.bfloat16


def test_a_torch_whose_kernel_takes_no_window_has_none(monkeypatch):
    install(monkeypatch, "torch 2.10", varlen_kernels.varlen_attn_2_10)
    with pytest.raises(ImportError, match="no scale or no window"):
        varlen_attention.torch_kernel()
