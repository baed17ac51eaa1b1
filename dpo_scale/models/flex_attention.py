"""FlexAttention over one row of many sequences: one compiled kernel that skips the blocks nobody attends in.

The mask is a function of document, branch and position ids, so a row of another composition costs no new kernel. Which
blocks of [128, 128] it leaves empty follows from the smallest and largest ids within each block: no [T, T] mask is
ever made, and nothing waits for the device. A block counts as full, and is then computed without the mask, only where
those bounds prove it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dpo_scale.data.layout import PROMPT
from dpo_scale.models.attention import AttentionPlan, blockwise_attention, checked_plan

BLOCK = 128

_compiled: Any = None


def flex_attention(
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

    Layers with attention sinks or with dropout, which FlexAttention has not, are left to `blockwise_attention`.
    """
    if s_aux is not None or dropout > 0:
        return blockwise_attention(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, sliding_window=sliding_window,
            softcap=softcap, s_aux=s_aux, attention_plan=attention_plan, **others,
        )  # fmt: skip
    plan = checked_plan(module, attention_mask, sliding_window, attention_plan, others)
    if sliding_window not in plan.block_masks:
        plan.block_masks[sliding_window] = block_mask(plan, sliding_window)

    def capped(score: Tensor, *_: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    output = _kernel(query.device)(
        query,
        key,
        value,
        score_mod=None if softcap is None else capped,
        block_mask=plan.block_masks[sliding_window],
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return output.transpose(1, 2), None


def block_mask(plan: AttentionPlan, window: int | None) -> Any:
    """The `BlockMask` [1, 1, T, T] of a row, on its device."""
    from torch.nn.attention.flex_attention import BlockMask

    position, document, branch = plan.position_ids, plan.document_ids, plan.branch_ids

    def allowed(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        of_branch = (branch[k] == PROMPT) | (branch[k] == branch[q])
        seen = (document[q] == document[k]) & of_branch & (position[k] <= position[q])
        return seen if window is None else seen & (position[q] - position[k] < window)

    partial, full = _blocks(plan, window)
    tokens = position.shape[0]
    return BlockMask.from_kv_blocks(
        *_ordered(partial), *_ordered(full), BLOCK_SIZE=BLOCK, mask_mod=allowed, seq_lengths=(tokens, tokens)
    )


def _blocks(plan: AttentionPlan, window: int | None) -> tuple[Tensor, Tensor]:
    """Which blocks may have an allowed pair that the mask must tell, and which are allowed throughout.

    Returns:
        Two bool tensors [query blocks, key blocks]; no block is in both, and those in neither have no allowed pair.
    """
    document, branch, position = (_bounds(ids) for ids in (plan.document_ids, plan.branch_ids, plan.position_ids))
    tokens, count = plan.document_ids.shape[0], document[0].shape[0]

    def of(bounds: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        low, high = bounds
        return low[:, None], high[:, None], low[None], high[None]

    # q_ and k_: of the queries of a block and of its keys
    q_doc, q_doc_high, k_doc, k_doc_high = of(document)
    q_branch, q_branch_high, k_branch, k_branch_high = of(branch)
    q_pos, q_pos_high, k_pos, k_pos_high = of(position)
    index = torch.arange(count, device=document[0].device)

    one_document = (q_doc == q_doc_high) & (k_doc == k_doc_high) & (q_doc == k_doc)
    keys_of_prompt = k_branch_high == PROMPT
    one_branch = (q_branch == q_branch_high) & (k_branch == k_branch_high)
    full = one_document & (k_pos_high <= q_pos) & (keys_of_prompt | (one_branch & (q_branch == k_branch)))
    # documents follow each other, and within one a key never stands behind its queries
    possible = (index[:, None] >= index[None]) & (k_doc_high >= q_doc)
    possible &= ~(one_branch & one_document & (k_branch != PROMPT) & (k_branch != q_branch))
    possible &= ~one_document | (k_pos <= q_pos_high)
    if window is not None:
        full &= q_pos_high - k_pos < window
        possible &= ~one_document | (q_pos - k_pos_high < window)
    if tokens % BLOCK:  # the last block ends early, and only the mask knows where
        full[-1] = False
        full[:, -1] = False
    return possible & ~full, full & possible


def _bounds(ids: Tensor) -> tuple[Tensor, Tensor]:
    """Smallest and largest id of each block, [blocks] each."""
    missing = -ids.shape[0] % BLOCK
    low, high = torch.cat([ids, ids[-1:].expand(missing)]).view(-1, BLOCK).aminmax(dim=1)
    return low, high


def _ordered(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Per row of blocks how many are set, and their columns first, as `BlockMask` wants them; [1, 1, ...] int32."""
    columns = blocks.int().argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(dim=-1, dtype=torch.int32)[None, None], columns.int()[None, None].contiguous()


def _kernel(device: torch.device) -> Any:
    """FlexAttention, compiled where it has kernels; on a CPU as plain torch, forward only."""
    global _compiled
    from torch.nn.attention.flex_attention import flex_attention as plain

    if device.type == "cpu":
        return plain
    if _compiled is None:
        _compiled = torch.compile(plain)
    return _compiled
