"""Flash-attention's variable-length kernel over one row of many sequences, prompts shared or not.

The kernel takes queries and keys of different lengths per sequence and aligns the causal mask at their ends. So a
branch is a sequence whose queries are its own tokens and whose keys are the shared prompt's and its own: prompts are
computed once in every layer, and only their keys and values are copied, once a branch.

Two packages have it: torch (`torch.nn.attention.varlen`, the same kernels as its scaled_dot_product_attention, so there
is nothing to install or to compile) and flash-attn. What each version takes is asked of its signature. That the mask is
aligned at the ends is flash-attn's documentation's word from 2.1 on, and in torch, which does not document it, the
kernel's (flash_attn/mask.h: a query's last key is `row + keys - queries`). `layout_check` would see another alignment.

Shapes: H query heads, K key heads, T tokens of the row, D width of a head.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from dpo_scale.distributed import ranks
from dpo_scale.models.attention import AttentionPlan, Sequences, blockwise_attention, checked_plan
from dpo_scale.models.flex_attention import flex_attention

MAX_WIDTH = 256  # of a head
DTYPES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Kernel:
    """A variable-length kernel and what its version takes.

    Attributes:
        name: for messages.
        call: (queries [T, H, D], keys and values [keys, K, D], sequences, scale, window, softcap, dropout) ->
            [T, H, D].
        takes_groups: H may be a multiple of K.
        takes_softcap, takes_dropout: others than 0.
        width_step: D must be a multiple of it.
    """

    name: str
    call: Callable[[Tensor, Tensor, Tensor, Sequences, float | None, int | None, float | None, float], Tensor]
    takes_groups: bool
    takes_softcap: bool
    takes_dropout: bool
    width_step: int

    def lacks(
        self, query: Tensor, value: Tensor, softcap: float | None, dropout: float, sinks: Tensor | None
    ) -> str | None:
        """What a layer asks for that the kernel does not support; None if it can have the layer.

        Args:
            query: [1, H, T, D]; value: [1, K, T, width of the values].
        """
        width = query.shape[-1]
        if sinks is not None:
            return "attention sinks"
        if softcap is not None and not self.takes_softcap:
            return "soft-capped scores"
        if dropout > 0 and not self.takes_dropout:
            return "dropout"
        if value.shape[-1] != width:
            return f"values of width {value.shape[-1]} beside keys of {width}"
        if width > MAX_WIDTH or width % self.width_step:
            return f"heads of width {width}"
        if query.dtype not in DTYPES:
            return str(query.dtype).removeprefix("torch.")
        return None


@cache
def torch_kernel() -> Kernel:
    """torch's own.

    Raises:
        ImportError: if this torch has none that takes a scale and a window.
    """
    from torch.nn.attention.varlen import varlen_attn

    parameters = inspect.signature(varlen_attn).parameters
    if not {"scale", "window_size"} <= parameters.keys():
        raise ImportError(f"varlen_attn of torch {torch.__version__} takes no scale or no window")
    takes_groups = "enable_gqa" in parameters  # from torch 2.12 on

    def call(
        q: Tensor, k: Tensor, v: Tensor, sequences: Sequences, scale: float | None, window: int | None, *_: Any
    ) -> Tensor:
        return varlen_attn(
            q,
            k,
            v,
            sequences.query_offsets,
            sequences.key_offsets,
            sequences.max_queries,
            sequences.max_keys,
            scale=scale,
            window_size=_window(window),
            **({"enable_gqa": True} if q.shape[1] != k.shape[1] else {}),
        )

    # scaled_dot_product_attention pads widths for the kernel, varlen_attn does not
    return Kernel("torch's varlen_attn", call, takes_groups, takes_softcap=False, takes_dropout=False, width_step=8)


@cache
def flash_attn_kernel() -> Kernel:
    """That of the package flash-attn.

    Raises:
        ImportError: if it is missing, or was built for another torch.
    """
    from flash_attn import flash_attn_varlen_func

    parameters = inspect.signature(flash_attn_varlen_func).parameters
    takes_softcap = "softcap" in parameters  # from flash-attn 2.6 on

    def call(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sequences: Sequences,
        scale: float | None,
        window: int | None,
        softcap: float | None,
        dropout: float,
    ) -> Tensor:
        return flash_attn_varlen_func(
            q,
            k,
            v,
            cu_seqlens_q=sequences.query_offsets,
            cu_seqlens_k=sequences.key_offsets,
            max_seqlen_q=sequences.max_queries,
            max_seqlen_k=sequences.max_keys,
            dropout_p=dropout,
            softmax_scale=scale,
            causal=True,
            window_size=_window(window),
            **({} if softcap is None else {"softcap": softcap}),
        )

    # it pads widths itself
    return Kernel("flash-attn", call, takes_groups=True, takes_softcap=takes_softcap, takes_dropout=True, width_step=1)


def _window(size: int | None) -> tuple[int, int]:
    """How many keys before and after a query's own position it sees besides that; -1: all. (-1, 0) is plain causal."""
    return (-1 if size is None else size - 1, 0)


def varlen_attention(module: nn.Module, *arguments: Any, **settings: Any) -> tuple[Tensor, None]:
    """Attention of a row by torch's own kernel, with the arguments and the result of `blockwise_attention`."""
    return _attention(torch_kernel(), module, *arguments, **settings)


def flash_attention(module: nn.Module, *arguments: Any, **settings: Any) -> tuple[Tensor, None]:
    """Attention of a row by flash-attn's kernel, with the arguments and the result of `blockwise_attention`."""
    return _attention(flash_attn_kernel(), module, *arguments, **settings)


def _attention(
    kernel: Kernel,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    attention_plan: AttentionPlan | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """A layer that the kernel does not support is left to FlexAttention or `blockwise_attention`, which the log says.

    Args: as those of `blockwise_attention`.
    """
    lacks = kernel.lacks(query, value, softcap, dropout, s_aux)
    if lacks is not None:
        # FlexAttention is compiled for CUDA only, and has no dropout
        other = flex_attention if query.is_cuda and dropout == 0 else blockwise_attention
        _say_once(f"attention: {kernel.name} does not support {lacks}; layers with that go through {_NAMES[other]}")
        return other(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, sliding_window=sliding_window,
            softcap=softcap, s_aux=s_aux, attention_plan=attention_plan, **others,
        )  # fmt: skip
    plan = checked_plan(module, attention_mask, sliding_window, attention_plan, others)
    sequences = plan.sequences
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    if sequences.key_index is not None:
        k, v = k.index_select(0, sequences.key_index), v.index_select(0, sequences.key_index)
    if not kernel.takes_groups and k.shape[1] != q.shape[1]:
        k, v = (tensor.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for tensor in (k, v))
    return kernel.call(q, k, v, sequences, scaling, sliding_window, softcap, dropout)[None], None


_NAMES: dict[Any, str] = {flex_attention: "FlexAttention", blockwise_attention: "plain torch, sequence by sequence"}


@cache
def _say_once(message: str) -> None:
    ranks.log(message)
