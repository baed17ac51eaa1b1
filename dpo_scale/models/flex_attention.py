"""FlexAttention over one row of many sequences: one compiled kernel that skips the blocks nobody attends in.

The mask is a function of document, branch and position ids, so rows of all compositions share one kernel. The smallest
and largest ids of each block of [128, 128] tell which blocks are empty. No [T, T] mask is ever made, and the host does
not wait for the device. A block is computed without the mask only where those bounds prove that it is full.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpo_scale.data.layout import PROMPT
from dpo_scale.errors import ModelError
from dpo_scale.models.attention import AttentionPlan, checked_plan

BLOCK = 128

# Below 128 queries torch takes its kernel for decoding, which has no block size for Llama-3's heads and 33 to 127
# tokens (NoValidChoicesError, pytorch#185349). The general kernel, asked for by name, serves every length.
KERNEL_OPTIONS = {"BACKEND": "TRITON"}
# For the usual heads, 64 or 128 wide in 16 bits: what torch chooses spills up to 9 KB of registers a thread (backward,
# sm_100, Triton 3.6), this at most 0.8 KB on sm_80, sm_90 and sm_100.
USUAL_HEADS = {"fwd_BLOCK_N": 64, "num_warps": 8}


def flex_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,  # FlexAttention does not support any
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    attention_plan: AttentionPlan | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention of a row, with the arguments and the result of `blockwise_attention`, but without dropout.

    Raises:
        ModelError: if torch would not compile a layer, or in more forms than it allows for one function. The layer
            would then run unfused, with scores [H, T, T].
    """
    assert not dropout
    plan = checked_plan(module, attention_mask, sliding_window, attention_plan, others)
    if sliding_window not in plan.block_masks:
        plan.block_masks[sliding_window] = block_mask(plan, sliding_window)
    sinks = None if s_aux is None else s_aux.view(1, -1, 1)
    arguments = (query, key, value, plan.block_masks[sliding_window], sinks)
    if query.device.type == "cpu":  # plain torch, forward only
        output = _attention(softcap, scaling)(*arguments)
    else:
        output = _call_compiled(_compiled(sliding_window, softcap, scaling, torch.is_grad_enabled()), arguments)
    return output.transpose(1, 2), None


def _attention(softcap: float | None, scaling: float | None) -> Callable[..., Tensor]:
    """FlexAttention with these constants: (query, key, value, block mask, sinks [1, H, 1] or None) -> [1, H, T, D]."""
    from torch.nn.attention.flex_attention import AuxRequest
    from torch.nn.attention.flex_attention import flex_attention as plain

    # With dynamic lengths torch makes variables even of a closure's floats, which kernels do not take.
    @torch.compiler.assume_constant_result
    def constants() -> tuple[float | None, float | None]:
        return softcap, scaling

    def capped(score: Tensor, *_: Tensor) -> Tensor:
        cap, _ = constants()
        return cap * torch.tanh(score / cap)

    def attention(query: Tensor, key: Tensor, value: Tensor, mask: Any, sinks: Tensor | None) -> Tensor:
        output = plain(
            query,
            key,
            value,
            score_mod=None if constants()[0] is None else capped,
            block_mask=mask,
            scale=constants()[1],
            enable_gqa=query.shape[1] != key.shape[1],
            kernel_options=_kernel_options(query.dtype, query.shape[-1]),
            return_aux=None if sinks is None else AuxRequest(lse=True),
        )
        if sinks is None:
            return output
        # a sink adds exp(sink) to the softmax's denominator, exp(lse), and nothing to its numerator
        output, aux = output
        return (output * torch.sigmoid(aux.lse - sinks)[..., None]).to(query.dtype)

    return attention


def _kernel_options(dtype: torch.dtype, width: int) -> dict[str, Any]:
    usual = dtype in (torch.bfloat16, torch.float16) and width in (64, 128)
    return {**KERNEL_OPTIONS, **(USUAL_HEADS if usual else {})}


@cache
def _compiled(
    window: int | None, softcap: float | None, scaling: float | None, gradients: bool
) -> Callable[..., Tensor]:
    """`_attention`, compiled for rows of any length, once for each kind of layer, with and without gradients.

    torch limits the compiled forms of one function, to 8 by default, and counts them by code object. So each function
    here has its own. It needs a form for 128 tokens and more, one for fewer and one for a single token, and each again
    where only some of query, key and value have gradients (LoRA).
    """
    attention = _attention(softcap, scaling)

    def compiled_flex_attention(query: Tensor, key: Tensor, value: Tensor, mask: Any, sinks: Tensor | None) -> Tensor:
        if not torch.compiler.is_compiling():
            raise ModelError(
                "FlexAttention is not compiled, and would make scores [heads, tokens, tokens]; unset what switches "
                "torch.compile off (TORCH_COMPILE_DISABLE, TORCHDYNAMO_DISABLE, a compiler stance), or set "
                "model.attn_implementation=sdpa"
            )
        return attention(query, key, value, mask, sinks)

    name = f"flex_attention_window_{window}_softcap_{softcap}_{'training' if gradients else 'inference'}"
    compiled_flex_attention.__code__ = compiled_flex_attention.__code__.replace(co_name=name)
    return torch.compile(compiled_flex_attention, fullgraph=True, dynamic=True)


def _call_compiled(compiled: Callable[..., Tensor], arguments: tuple[Any, ...]) -> Tensor:
    from torch._dynamo import mark_static
    from torch._dynamo.exc import FailOnRecompileLimitHit

    query, key, value, _, sinks = arguments
    for tensor in (query, key, value) if sinks is None else (query, key, value, sinks):
        # otherwise a first row as long as there are heads, or as a head is wide, is compiled for that length alone
        mark_static(tensor, 1)
        mark_static(tensor, tensor.ndim - 1)
    try:
        return compiled(*arguments)
    except FailOnRecompileLimitHit as error:
        raise ModelError(
            "FlexAttention: torch reached its limit of compiled forms of one function, and would go on with scores "
            "[heads, tokens, tokens]; see why it compiled again with TORCH_LOGS=recompiles, raise "
            "torch._dynamo.config.recompile_limit, or set model.attn_implementation=sdpa"
        ) from error


def block_mask(plan: AttentionPlan, window: int | None) -> Any:
    """The `BlockMask` [1, 1, T, T] of a row, on its device."""
    from torch.nn.attention.flex_attention import BlockMask

    position, document, branch = (ids.int() for ids in (plan.position_ids, plan.document_ids, plan.branch_ids))
    oldest = None if window is None else position - (window - 1)  # position that a query sees

    def allowed(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        of_branch = (branch[k] == PROMPT) | (branch[k] == branch[q])
        seen = (document[q] == document[k]) & of_branch & (position[k] <= position[q])
        return seen if oldest is None else seen & (position[k] >= oldest[q])

    tokens = position.shape[0]
    # at least two blocks: a size of one would be compiled apart
    missing = max(0, 2 - -(-tokens // BLOCK))
    partial, full = (F.pad(blocks, (0, missing, 0, missing)) for blocks in _blocks(plan, window))
    return BlockMask.from_kv_blocks(
        *_ordered(partial), *_ordered(full), BLOCK_SIZE=BLOCK, mask_mod=allowed, seq_lengths=(tokens, tokens)
    )


def _blocks(plan: AttentionPlan, window: int | None) -> tuple[Tensor, Tensor]:
    """Which blocks need the mask, and which are allowed throughout.

    Returns:
        Two bool tensors [query blocks, key blocks]. No block is in both; those in neither have no allowed pair.
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
