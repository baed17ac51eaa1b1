"""How ZeRO-3 goes through a model: a whole decoder layer at a time.

By itself DeepSpeed gathers and frees the weights of every submodule, from Python hooks on each: ten modules a layer,
each with hooks before and after its forward and its backward pass. On a GPU the host spends more time in them than the
device needs for a micro-batch of a few thousand tokens. As a *leaf module* a decoder layer has these hooks once, its
weights come in one gather, and nothing inside it knows of ZeRO, so that its forward can be compiled. The price is
memory: all weights of a layer are there at once, and all its gradients, until its backward pass is over.

What DeepSpeed asks of a leaf: it reduces the gradients of all the layer's weights at once, from a backward hook that
torch runs when the gradients of the layer's *positional inputs* are complete. A layer without such an input would have
its gradients taken before they exist. So the first layer behind frozen embeddings (LoRA) is given an input that
requires a gradient, and a model that passes hidden states by keyword is refused.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from dpo_scale.errors import ModelError

# Layers whose weights may be on the device, gathered or still in use, when the next layer's are asked for: one that is
# computed and one that is gathered meanwhile.
LAYERS_AHEAD = 2


def decoder_layers(model: Any) -> list[nn.Module]:
    """The layers of a transformers model's decoder, by the model's own list of what belongs together.

    Args:
        model: a causal LM without peft's wrapper; adapters inside its layers make no difference.

    Returns:
        Instances of the classes in `_no_split_modules` that stand in a list of layers; none if the model names none.
    """
    names = set(getattr(model, "_no_split_modules", None) or ())
    # of a model that also sees or hears: no layers of its encoders, which text does not pass through
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    stacks = [module for module in decoder.modules() if isinstance(module, nn.ModuleList)]
    return [layer for stack in stacks for layer in stack if type(layer).__name__ in names]


def make_leaves(model: Any, max_parameters: int) -> tuple[bool, str]:
    """Mark a model's decoder layers as leaf modules. Before its engine is built, with its adapters on it.

    Args:
        model: a causal LM without peft's wrapper, whole or in ZeRO-3 shards; what is frozen is frozen already.
        max_parameters: larger layers stay divided, as `stage3_max_live_parameters` asks for.

    Returns:
        Whether the layers are leaves now, and for the log what they are, or why not.
    """
    layers = decoder_layers(model)
    if not layers:
        return False, f"{type(model).__name__} does not name its layers (_no_split_modules)"
    largest = max(sum(getattr(p, "ds_numel", p.numel()) for p in layer.parameters()) for layer in layers)
    size = f"{len(layers)} x {type(layers[0]).__name__}, the largest of {largest:,} weights"
    if largest > max_parameters:
        return False, f"{size}, more than stage3_max_live_parameters = {max_parameters:,}"
    for layer in layers:
        setattr(layer, "_z3_leaf", True)  # noqa: B010 - what deepspeed.utils.set_z3_leaf_modules does to all instances of a class
        _check_first_input(layer)
    if not any(p.requires_grad for p in model.get_input_embeddings().parameters()):  # LoRA, or a reference
        model.enable_input_require_grads()
    return True, size


def _check_first_input(layer: nn.Module) -> None:
    """At the layer's first pass with a gradient make sure that its hidden states are what DeepSpeed waits for."""

    def check(layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        if not torch.is_grad_enabled():
            return
        handle.remove()
        if not any(isinstance(value, torch.Tensor) and value.requires_grad for value in inputs):
            raise ModelError(
                f"{type(layer).__name__}: none of its positional inputs requires a gradient, so DeepSpeed would reduce "
                "its gradients before they are computed; train this model at deepspeed.stage 2"
            )

    handle = layer.register_forward_pre_hook(check)


def limit_gathers(model: Any, new_event: Callable[[], Any], ahead: int = LAYERS_AHEAD) -> None:
    """Keep the host from asking for weights more than so many layers ahead of what the device computes.

    DeepSpeed's gathers do not wait for the computation. Memory for them is taken when the host asks, and what a layer
    has used comes back only when the device is through with it, so a host that is far ahead would hold most of a model.
    Letting the stream of the gathers wait instead would not help: the host would go on taking memory. Here it waits,
    before a layer, for the end of the layer `ahead` before it. The device has the layers between to work on meanwhile.

    Args:
        model: as in `decoder_layers`. A model that names no layers stays as it is.
        new_event: makes an event of the device, with `record` (on the current stream) and `synchronize`.
    """
    under_way: deque[Any] = deque()  # the ends of layers that the device may still be working on, oldest first

    def wait(*_: Any) -> None:
        while len(under_way) >= ahead:
            under_way.popleft().synchronize()

    def mark(*_: Any) -> None:
        event = new_event()
        event.record()
        under_way.append(event)

    def in_forward(action: Callable[[], None]) -> Callable[..., None]:
        # not where a backward pass computes a layer again: its weights are there
        return lambda *_: None if torch._C._current_graph_task_id() != -1 else action()

    for layer in decoder_layers(model):
        layer.register_forward_pre_hook(in_forward(wait))
        layer.register_forward_hook(in_forward(mark))
        layer.register_full_backward_pre_hook(wait)
        layer.register_full_backward_hook(mark)
