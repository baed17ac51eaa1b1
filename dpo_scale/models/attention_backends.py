"""The attention back ends for rows of many sequences: a row of `BACKENDS` each.

A new one is a function with the arguments and the result of `attention.blockwise_attention`, in a file of its own, and
a row here (docs/extending.md). The row says the rest: which runs take it (`layouts`), which layers it can compute, and
what messages call it. A layer that it cannot compute goes through the next one that can.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from dpo_scale.distributed import ranks
from dpo_scale.distributed.sequence_parallel import over_heads
from dpo_scale.errors import first_line
from dpo_scale.models import varlen_attention
from dpo_scale.models.attention import Limits, blockwise_attention
from dpo_scale.models.flex_attention import flex_attention

Attention = Callable[..., tuple[Tensor, None]]


@dataclass(frozen=True)
class Backend:
    """One way to compute the attention of a row of many sequences.

    Attributes:
        title: for messages.
        attend: the function, in the form of `blockwise_attention`.
        setting: the value of `model.attn_implementation` that asks for it.
        in_transformers: whether transformers knows that value too, so that padded rows can have it.
        devices: types of the devices that it is made for. None: any, but chosen unasked only where no other runs.
        limits: what the installed version can compute. Raises ImportError, with the reason, if there is none.
    """

    title: str
    attend: Attention
    setting: str
    in_transformers: bool = False
    devices: tuple[str, ...] | None = None
    limits: Callable[[], Limits] = Limits

    def why_not(self, device: str, dtype: torch.dtype | None = None) -> str | None:
        """Why it cannot run on a type of device, or, if one is given, with a dtype; None if it can."""
        if self.devices is not None and device not in self.devices:
            return f"{self.title} runs on {' and '.join(self.devices)}, not on a {device} device"
        try:
            dtypes = self.limits().dtypes
        except ImportError as error:
            return first_line(error)
        if dtype is not None and dtypes is not None and dtype not in dtypes:
            return f"{self.title} does not take {str(dtype).removeprefix('torch.')}"
        return None


# Best first. Names are without "flash": transformers would take those for its own.
BACKENDS = {
    "fa_varlen": Backend(
        "flash-attn's variable-length kernel", varlen_attention.flash_attention,
        setting="flash_attention_2", in_transformers=True, devices=("cuda",),
        limits=lambda: varlen_attention.flash_attn_kernel().limits,
    ),
    "varlen": Backend(
        "torch's variable-length kernel", varlen_attention.varlen_attention,
        setting="varlen_attention", devices=("cuda",),
        limits=lambda: varlen_attention.torch_kernel().limits,
    ),
    "flex": Backend(
        "FlexAttention with a block mask", flex_attention,
        setting="flex_attention", in_transformers=True, devices=("cuda",),
        limits=lambda: Limits(dropout=False),
    ),
    "blocks": Backend(
        "scaled_dot_product_attention, sequence by sequence", blockwise_attention,
        setting="sdpa", in_transformers=True,
    ),
}  # fmt: skip


def use_attention(model: nn.Module, backend: str) -> None:
    """Make all attention of a transformers model go through one of the back ends.

    Args:
        model: the transformers model itself, not a peft model around it.
    """
    from transformers import AttentionInterface

    name = f"dpo_scale_{backend}"
    AttentionInterface.register(name, attention_function(backend))
    model.set_attn_implementation(name)  # type: ignore[operator]


@cache
def attention_function(name: str) -> Attention:
    """What a model calls for a back end. torch.compile leaves it alone: each row brings another plan."""

    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **settings: Any
    ) -> tuple[Tensor, None]:
        taken = _able_backend(name, query, value, settings)
        return taken.attend(module, query, key, value, attention_mask, **settings)

    def observable(*arguments: Any, **settings: Any) -> tuple[Tensor, None]:
        if _observer is not None:
            return _observer(name, attend, *arguments, **settings)
        return attend(*arguments, **settings)

    @torch.compiler.disable
    def of_row(*arguments: Any, **settings: Any) -> tuple[Tensor, None]:
        plan = settings.get("attention_plan")
        if plan is not None and plan.group is not None:
            return over_heads(observable, plan.group, *arguments, **settings)
        return observable(*arguments, **settings)

    return of_row


def _able_backend(name: str, query: Tensor, value: Tensor, settings: dict[str, Any]) -> Backend:
    """The back end of that name, or the next one that can compute the layer, which the log then says."""
    asked = BACKENDS[name]
    lacking = asked.limits().lacks(query, value, settings)
    if lacking is None:
        return asked
    later = itertools.dropwhile(lambda row: row is not asked, BACKENDS.values())
    running = (row for row in later if row.why_not(query.device.type) is None)
    able = (row for row in running if row.limits().lacks(query, value, settings) is None)
    other = next(able, BACKENDS["blocks"])
    log_once(f"attention: {asked.title} does not support {lacking}; layers with that go through {other.title}")
    return other


@cache
def log_once(message: str) -> None:
    """Log what would be said anew for each layer and step."""
    ranks.log(message)


_observer: Callable[..., tuple[Tensor, None]] | None = None


@contextmanager
def observed(observer: Callable[..., tuple[Tensor, None]]) -> Iterator[None]:
    """Within, attention is what `observer(name of the back end, its function, *arguments of the call)` returns."""
    global _observer
    assert _observer is None
    _observer = observer
    try:
        yield
    finally:
        _observer = None
