"""flash-attention's variable-length kernel over one row of many sequences, prompts shared or not.

The kernel takes queries and keys of different lengths per sequence and aligns the causal mask at their ends. So a
branch is a sequence whose queries are its own tokens and whose keys are the shared prompt's and its own: prompts are
computed once in every layer, and only their keys and values are copied, once a branch.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from dpo_scale.models.attention import AttentionPlan, blockwise_attention, checked_plan


def varlen_function() -> Any:
    """`flash_attn_varlen_func` of the flash-attention package, version 2; ImportError where it is missing."""
    from flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func


def varlen_attention(
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
    """Attention of a row, with the arguments and the result of `blockwise_attention`.

    Layers with attention sinks or with values narrower than keys, which the kernel has not, are left to
    `blockwise_attention`.
    """
    if s_aux is not None or value.shape[-1] != key.shape[-1]:
        return blockwise_attention(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, sliding_window=sliding_window,
            softcap=softcap, s_aux=s_aux, attention_plan=attention_plan, **others,
        )  # fmt: skip
    plan = checked_plan(module, attention_mask, sliding_window, attention_plan, others)
    key_index, query_offsets, key_offsets, most_queries, most_keys = plan.varlen
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    if plan.has_branches:
        k, v = k.index_select(0, key_index), v.index_select(0, key_index)
    output = varlen_function()(
        q,
        k,
        v,
        cu_seqlens_q=query_offsets,
        cu_seqlens_k=key_offsets,
        max_seqlen_q=most_queries,
        max_seqlen_k=most_keys,
        dropout_p=dropout,
        softmax_scale=scaling,
        causal=True,
        window_size=(-1, -1) if sliding_window is None else (sliding_window - 1, 0),
        softcap=0.0 if softcap is None else softcap,
    )
    return output[None], None
