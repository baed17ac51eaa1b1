"""Scorer and loss on fake tensors that are on CUDA, with a build of torch for it and no GPU.

Fake tensors have shapes, dtypes and devices and no values. So an operation of host and device tensors raises, and so
does everything whose result or control flow depends on values: what would make the host wait for the device. Kernels
that Triton would launch are left out; what goes into them is checked to be on the device.
"""

from __future__ import annotations

from contextlib import ExitStack, nullcontext
from dataclasses import replace
from unittest.mock import patch

import numpy as np
import pytest
import torch
from tiny import tiny_config
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from transformers import AutoModelForCausalLM

from dpo_scale.data.dataset import Pair
from dpo_scale.data.layout import make_batch
from dpo_scale.models.attention_backends import use_attention
from dpo_scale.models.scorer import PairScorer
from dpo_scale.settings.loss import LossSettings
from dpo_scale.training.objective import across_ranks, from_logps, fused_by_pair

pytestmark = pytest.mark.skipif(
    not torch.backends.cuda.is_built() or torch.cuda.is_available(),
    reason="needs a CUDA build of torch, on a machine without a GPU",
)


class Policy:
    """What the objective sees of an engine."""

    def __init__(self, module):
        self.module = module

    def __call__(self, *inputs, **named):
        return self.module(*inputs, **named)


LOSSES = {
    "sigmoid": LossSettings(),
    "ld": LossSettings(ld_alpha=0.5),
    "wpo": LossSettings(use_weighting=True),
    "aot": LossSettings(loss_type="aot"),
}
# how log-probs and loss are computed: implementation, loss and gradient pair by pair, dtype
HEADS = {
    "naive": ("naive", False, torch.bfloat16),
    "chunked": ("chunked", False, torch.bfloat16),
    "triton": ("triton", False, torch.bfloat16),
    "chunked pair loss": ("auto", True, torch.float32),
    "triton pair loss": ("auto", True, torch.bfloat16),
}


class NotLaunched:
    """A Triton kernel."""

    def __getitem__(self, grid):
        return self

    def __call__(self, *arguments, **options):
        tensors = [argument for argument in arguments if isinstance(argument, torch.Tensor)]
        assert tensors and all(tensor.is_cuda for tensor in tensors)
        launches.append(len(tensors))


launches = []


@pytest.fixture
def cuda():
    """Fake tensors, and stand-ins for what needs a driver: launching kernels and autograd's engine."""
    triton_logps = pytest.importorskip("dpo_scale.logprobs.triton_logps")
    compile_function = torch.compile
    with ExitStack() as stack:
        for holder, name, value in (
            (torch.cuda, "get_device_capability", lambda *_: (9, 0)),
            (torch.autograd, "grad", lambda loss, leaf: (torch.zeros_like(leaf),)),
            (torch, "compile", lambda *a, **options: compile_function(*a, **(options | {"backend": "eager"}))),
            (triton_logps, "current_device", lambda device: nullcontext()),
            *((triton_logps.kernels, n, NotLaunched()) for n in vars(triton_logps.kernels) if n.endswith("_kernel")),
        ):
            stack.enter_context(patch.object(holder, name, value))
        torch._dynamo.reset()
        launches.clear()
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        yield
    torch._dynamo.reset()


def micro_step(backend, head, loss="sigmoid"):
    """Loss, losses and metrics of three pairs under a model whose head alone is trained."""
    implementation, by_pair, dtype = HEADS[head]
    draw = np.random.default_rng(0)
    sizes = [(90, 7, 25), (1, 14, 8), (33, 20, 31)]
    pairs = [Pair(*(draw.integers(0, 300, n) for n in size), b"", i) for i, size in enumerate(sizes)]
    layout = "padded" if backend == "padded" else "shared_prefix"
    batch = make_batch(layout, pairs, np.ones(3, dtype=np.float32), 0)
    batch = replace(batch, reference_logps=torch.zeros(3, 2)).to(torch.device("cuda"))
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(tiny_config("llama"), dtype=dtype)
    # compiled attention of what is trained would ask the driver for a device
    model.requires_grad_(False).get_output_embeddings().weight.requires_grad_(True)
    if backend != "padded":
        use_attention(model, backend)
    settings = LOSSES[loss]
    loss_of = fused_by_pair if by_pair else across_ranks if settings.needs_batch else from_logps
    return loss_of(Policy(PairScorer(model, implementation, layout)), batch, settings, 13.0, (3,))


def assert_on_device(total, losses, metrics):
    for value in (total, losses, *metrics.values()):
        assert value.is_cuda


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("backend", ["padded", "blocks", "flex", "varlen"])
def test_a_forward_pass_waits_for_nothing_and_stays_on_the_device(cuda, backend, head):
    try:
        assert_on_device(*micro_step(backend, head))
    except ImportError as error:
        pytest.skip(f"attention by {backend}: {error}")
    assert ("triton" in head) == bool(launches)


@pytest.mark.parametrize("head", ["chunked", "chunked pair loss", "triton pair loss"])
def test_so_does_ld_dpo(cuda, head):
    assert_on_device(*micro_step("blocks", head, "ld"))


@pytest.mark.parametrize("loss", ["wpo", "aot"])
def test_so_does_a_loss_that_is_no_function_of_one_pairs_sums(cuda, loss):
    assert_on_device(*micro_step("blocks", "chunked", loss))


def test_what_would_wait_is_found(cuda):
    segments = torch.zeros(4, dtype=torch.int64, device="cuda")
    with pytest.raises(DynamicOutputShapeException):
        torch.bincount(segments).tolist()
    with pytest.raises(DataDependentOutputException):
        bool(segments.sum() > 0)
    with pytest.raises((RuntimeError, DynamicOutputShapeException)):
        segments[segments > 0]
    with pytest.raises(RuntimeError, match="device"):
        segments + torch.zeros(4, dtype=torch.int64)
