"""How a model's layers run: with their activations kept, computed again or kept on the host, and compiled or not.

With gradient checkpointing a layer keeps only what comes into it. That is still a [tokens, hidden size] tensor per
layer, the largest part of the memory of long rows; offloaded, it waits in page-locked host memory and costs the device
one copy there and one back per layer. Everything else that a layer shares with the others (masks, rotary angles)
stays where it is.

Compiled are the layers one by one, not the model: they are alike, so one of them is compiled and all use it, in seconds
instead of minutes, and for any number of rows and tokens. A fused operation rounds its intermediate values as separate
ones would. Otherwise equal weights would give unequal numbers with and without a gradient, because they are fused in
other places, and rewards would not be 0 at the first step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from dpo_scale.errors import ModelError

MAX_GRAPHS = 64


def enable_checkpointing(model: Any, *, offload: bool) -> None:
    """Turn on gradient checkpointing of a transformers model, in training mode only.

    Args:
        offload: keep what comes into a layer in host memory until its backward pass.
    """
    # non-reentrant: ZeRO-3's hooks and frozen inputs work with it, and dropout is replayed
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if offload:
        for module in model.modules():
            if hasattr(module, "_gradient_checkpointing_func"):
                module._gradient_checkpointing_func = offloaded_checkpoint


def offloaded_checkpoint(function: Callable[..., Any], hidden: torch.Tensor, *inputs: Any) -> Any:
    """`torch.utils.checkpoint.checkpoint` whose first input, the hidden states, is kept on the host.

    Args:
        function: of the inputs; what else it needs is bound to it.
        hidden: the layer's input, which gradients flow through.
    """

    # not the tensor itself: the hooks live as long as what they packed, and would keep it on the device
    address = hidden.data_ptr()

    def to_host(tensor: torch.Tensor) -> torch.Tensor | tuple[torch.device, torch.Tensor]:
        if tensor.data_ptr() != address:  # masks, which all layers share
            return tensor
        kept = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.device.type == "cuda")
        return tensor.device, kept.copy_(tensor, non_blocking=True)

    def back(packed: torch.Tensor | tuple[torch.device, torch.Tensor]) -> torch.Tensor:
        if isinstance(packed, torch.Tensor):
            return packed
        device, kept = packed
        return kept.to(device, non_blocking=True)

    # only the checkpoint's own inputs meet these hooks: inside the layer nothing is saved
    with torch.autograd.graph.saved_tensors_hooks(to_host, back):
        return checkpoint(function, hidden, *inputs, use_reentrant=False)


def compile_layers(model: torch.nn.Module, *, in_hooks: bool = False, backend: str = "inductor") -> None:
    """Have `torch.compile` compile a transformers model's layers when they first run.

    Args:
        in_hooks: leave the layers' hooks as they are, around what is compiled: those of ZeRO-3 (`models.zero3`).
        backend: of `torch.compile`.

    Raises:
        ModelError: if the model has no layers of transformers' common kind.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ModelError(f"model.compile: {type(model).__name__} has no layers that can be compiled one by one")
    # A graph is made for each kind of layer, with and without a gradient, for policy and reference: more than torch's
    # limit of 8, beyond which it would run the rest uncompiled.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MAX_GRAPHS)
    options: dict[str, Any] | None = {"emulate_precision_casts": True} if backend == "inductor" else None
    for layer in layers:
        if in_hooks:
            layer.forward = torch.compile(layer.forward, dynamic=True, backend=backend, options=options)
        else:
            layer.compile(dynamic=True, backend=backend, options=options)
