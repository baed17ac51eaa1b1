"""A model's forward and backward pass on fake tensors, and how many bytes are held at each layer. Sizes are bytes.

Fake tensors (torch's own, as its compiler uses them) have shapes, dtypes and lifetimes, and no memory. So a pass over a
model of any size takes a fraction of a second, and what autograd saves is what it saves in a run. Bytes are counted
where operations make tensors, and taken back where their storage dies.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors that operations within it make, beside those that are `known` before.

    Attributes:
        live: bytes held now.
        peak: the most since `reset_peak`.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._storages: set[int] = set()
        self._known = [tensor.untyped_storage() for tensor in known]
        self._storages.update(map(id, self._known))

    def reset_peak(self) -> int:
        """The peak so far; the next one begins with what is live now."""
        peak, self.peak = self.peak, self.live
        return peak

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        if function is torch.ops.aten._grouped_mm.default:
            result = _grouped_product(*arguments, **(named or {}))
        else:
            result = function(*arguments, **(named or {}))
        for value in tree_iter(result):
            if isinstance(value, Tensor):
                self._count(value.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        if key in self._storages:
            return
        self._storages.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._release, key, size).atexit = False

    def _release(self, key: int, size: int) -> None:
        self._storages.discard(key)
        self.live -= size


def _grouped_product(left: Tensor, right: Tensor, offs: Tensor, *_: Any, **__: Any) -> Tensor:
    """The result's memory of torch's grouped product, which itself refuses fake tensors that are not bf16."""
    of_weight = left.ndim == right.ndim == 2  # its groups are runs of the dimension that is summed
    return left.new_empty((*((len(offs),) if of_weight else ()), left.shape[-2], right.shape[-1]))


@dataclass(frozen=True)
class LayerBytes:
    """One layer.

    Attributes:
        kept: from its forward to its backward pass, what comes out of it among it.
        forward, backward: the most in that pass, above what is held before it (forward) or above what it and the layers
            before it keep (backward).
    """

    kept: float
    forward: float
    backward: float


@dataclass(frozen=True)
class PassBytes:
    """A pass over a backbone.

    Attributes:
        before: held when the first layer begins: the embeddings' output, masks, rotary angles.
        layers: in their order.
        after: kept beyond the last layer: by the last norm, and its output.
        turn: the most when the gradient goes from the head to the last layer, above what is kept by then.
        end: the most in the embeddings' backward pass, above `before`.
    """

    before: float
    layers: tuple[LayerBytes, ...]
    after: float
    turn: float = 0.0
    end: float = 0.0


class _Head(torch.autograd.Function):
    """Stands for the head and the loss, whose memory is calculated apart."""

    @staticmethod
    def forward(ctx: Any, scored: Tensor) -> Tensor:
        ctx.like = scored.shape, scored.dtype, scored.device
        return scored.new_empty(())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        shape, dtype, device = ctx.like
        return torch.empty(shape, dtype=dtype, device=device)


def measure_pass(
    model: nn.Module, layers: list[nn.Module], backbone: Callable[[], tuple[Tensor, Any]], *, training: bool
) -> PassBytes:
    """Bytes of a pass of a model of fake tensors.

    Args:
        layers: the decoder's.
        backbone: runs it; returns its last hidden states [B, T, H], and what else is held until the end.
        training: forward and backward; otherwise forward alone, without gradient.
    """
    held: list[int] = []  # at the beginning of each layer, and at the end of the last
    tops: list[int] = []  # of the forward pass, by layer
    back: dict[int, int] = {}  # the top of the backward pass, by layer; of the turn at n, of the embeddings at -1
    current = len(layers)  # whose backward pass is under way

    def begin_backward(index: int) -> Callable[[Tensor], None]:
        def begin(_: Tensor) -> None:
            nonlocal current
            back[current], current = count.reset_peak(), index

        return begin

    def before_layer(index: int) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
            if torch._C._current_graph_task_id() != -1:  # computed again in a backward pass
                return
            top = count.reset_peak()
            if held:
                tops.append(top)
            held.append(count.live)
            hidden = inputs[0] if inputs else named["hidden_states"]
            if index == 0 and hidden.requires_grad:
                hidden.register_hook(begin_backward(-1))

        return hook

    def after_layer(index: int) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: Any, output: Any) -> None:
            if torch._C._current_graph_task_id() != -1:
                return
            hidden = output[0] if isinstance(output, tuple) else output
            if hidden.requires_grad:
                hidden.register_hook(begin_backward(index))
            if index == len(layers) - 1:
                tops.append(count.reset_peak())
                held.append(count.live)

        return hook

    def drop_gradient(parameter: Tensor) -> None:
        parameter.grad = None  # those of the weights are counted apart; here they are held for a moment

    handles: list[Any] = []
    for index, layer in enumerate(layers):
        handles.append(layer.register_forward_pre_hook(before_layer(index), with_kwargs=True))
        handles.append(layer.register_forward_hook(after_layer(index)))
    handles += [p.register_post_accumulate_grad_hook(drop_gradient) for p in model.parameters() if p.requires_grad]
    count = LiveBytes([*model.parameters(), *model.buffers()])
    try:
        with torch.set_grad_enabled(training), count:
            hidden, beside = backbone()
            kept = count.live
            count.reset_peak()
            if training:
                loss = _Head.apply(hidden.flatten(0, 1).index_select(0, torch.zeros(1, dtype=torch.long)))
                del hidden
                loss.backward()
                back[current] = count.reset_peak()
            del beside
    finally:
        for handle in handles:
            handle.remove()
    each = tuple(
        LayerBytes(held[i + 1] - held[i], tops[i] - held[i], back.get(i, held[i + 1]) - held[i + 1])
        for i in range(len(layers))
    )
    turn, end = back.get(len(layers), kept) - kept, back.get(-1, held[0]) - held[0]
    return PassBytes(held[0], each, kept - held[-1], turn, end)
