"""Flash-attention's variable-length kernel over one row of many sequences, prompts shared or not.

A sequence may have more keys than queries; the causal mask is then aligned at their ends. So a branch is a sequence
whose queries are its own tokens, and whose keys are the shared prompt's and its own. A prompt is computed once.
Only its keys and values are copied, once a branch.

Two packages have the kernel: torch (`torch.nn.attention.varlen`, with nothing to install or to compile) and flash-attn.
The signature of the installed version tells what it takes. flash-attn documents from 2.1 on that the mask is aligned at
the ends. torch does not document it, but its kernel does so (flash_attn/mask.h: a query's last key is
`row + keys - queries`). `layout_check` would find another alignment.

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

from dpo_scale.models.attention import AttentionPlan, Limits, Sequences, checked_plan

MAX_WIDTH = 256  # of a head
DTYPES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Kernel:
    """The variable-length kernel of an installed package.

    Attributes:
        call: (queries [T, H, D], keys and values [keys, K, D], sequences, scale, window, softcap, dropout) ->
            [T, H, D].
        takes_groups: H may be a multiple of K.
    """

    call: Callable[[Tensor, Tensor, Tensor, Sequences, float | None, int | None, float | None, float], Tensor]
    takes_groups: bool
    limits: Limits


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

    def call(q, k, v, row, scale, window, softcap, dropout):  # typed by `Kernel.call`
        sizes = row.query_offsets, row.key_offsets, row.max_queries, row.max_keys
        groups = {"enable_gqa": True} if q.shape[1] != k.shape[1] else {}
        return varlen_attn(q, k, v, *sizes, scale=scale, window_size=_window(window), **groups)

    # scaled_dot_product_attention pads widths for the kernel, varlen_attn does not
    limits = Limits(DTYPES, MAX_WIDTH, width_step=8, value_width=False, softcap=False, sinks=False, dropout=False)
    return Kernel(call, takes_groups, limits)


@cache
def flash_attn_kernel() -> Kernel:
    """That of the package flash-attn.

    Raises:
        ImportError: if it is missing, or was built for another torch or CUDA.
    """
    try:
        from flash_attn import flash_attn_varlen_func
    except (ImportError, OSError) as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == "flash_attn"
        why = "is not installed" if missing else f"is installed but cannot be imported: {error}"
        raise ImportError(f"flash_attn {why}") from error
    takes_softcap = "softcap" in inspect.signature(flash_attn_varlen_func).parameters  # from flash-attn 2.6 on

    def call(q, k, v, row, scale, window, softcap, dropout):  # typed by `Kernel.call`
        sizes = row.query_offsets, row.key_offsets, row.max_queries, row.max_keys
        options = {"dropout_p": dropout, "softmax_scale": scale, "causal": True, "window_size": _window(window)}
        if softcap is not None:
            options["softcap"] = softcap
        return flash_attn_varlen_func(q, k, v, *sizes, **options)

    # it pads widths itself
    return Kernel(call, True, Limits(DTYPES, MAX_WIDTH, value_width=False, softcap=takes_softcap, sinks=False))


def _window(size: int | None) -> tuple[int, int]:
    """How many keys before and after its own position a query sees; -1: all. (-1, 0) is plain causal."""
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
    attention_plan: AttentionPlan | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    plan = checked_plan(module, attention_mask, sliding_window, attention_plan, others)
    sequences = plan.sequences
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    if sequences.key_index is not None:
        k, v = k.index_select(0, sequences.key_index), v.index_select(0, sequences.key_index)
    if not kernel.takes_groups and k.shape[1] != q.shape[1]:
        k, v = (tensor.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for tensor in (k, v))
    return kernel.call(q, k, v, sequences, scaling, sliding_window, softcap, dropout)[None], None
