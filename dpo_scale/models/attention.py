"""Attention inside one row of many sequences, for the layouts `packed` and `shared_prefix` (`dpo_scale.data.layout`).

transformers lets a model's attention be replaced by a function. It builds no mask for a function that it does not know.
Ours (`attention_backends`) are such functions, and follow the one rule of `dpo_scale.data.layout`. What they need to
know of the row is an `AttentionPlan`. It comes through the keyword arguments that a model hands down to its attention,
and so also reaches what gradient checkpointing computes again.

`blockwise_attention` runs on any device and never makes a mask of the whole row. A row is a list of segments. A
segment's queries attend to the segment, causally, and, if it is a branch, to the shared beginning of its document. A
whole document needs no mask, a branch of R tokens behind a prompt of P one of [R, P + R]. Both are cut into runs of
`QUERY_BLOCK` queries, which also bounds what a sliding window costs. scaled_dot_product_attention does not support
soft-capped scores (Gemma-2) and attention sinks (gpt-oss). They are computed in plain torch on the same blocks.

Shapes: H query heads, K key heads, T tokens of the row, D width of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpo_scale.errors import ModelError

if TYPE_CHECKING:
    from dpo_scale.data.layout import Segment
    from dpo_scale.distributed.sequence_parallel import SequenceGroup

QUERY_BLOCK = 1024  # queries that share one mask, where one is needed

# Arguments that change scores in ways that only the model's own mask or kernel follows.
_UNKNOWN_TERMS = ("position_bias", "indices", "block_indices", "cache")


@dataclass(frozen=True)
class Limits:
    """What a back end can compute.

    Attributes:
        dtypes: of queries, keys and values; None: any.
        max_width, width_step: the width of a head is at most the one and a multiple of the other.
        value_width: values may have another width than keys.
        windows, softcap, sinks, dropout: as in `blockwise_attention`.
        shared_prompts: two branches of a row may share a prompt.
    """

    dtypes: tuple[torch.dtype, ...] | None = None
    max_width: int | None = None
    width_step: int = 1
    value_width: bool = True
    windows: bool = True
    softcap: bool = True
    sinks: bool = True
    dropout: bool = True
    shared_prompts: bool = True

    def lacks(self, query: Tensor, value: Tensor, settings: dict[str, Any]) -> str | None:
        """What a call asks for beyond these limits; None if nothing.

        Args:
            query: [1, H, T, D]; value: [1, K, T, width of the values].
            settings: the call's keyword arguments.
        """
        width, plan = query.shape[-1], settings.get("attention_plan")
        if self.dtypes is not None and query.dtype not in self.dtypes:
            return str(query.dtype).removeprefix("torch.")
        if width % self.width_step or (self.max_width is not None and width > self.max_width):
            return f"heads of width {width}"
        if not self.value_width and value.shape[-1] != width:
            return f"values of width {value.shape[-1]} beside keys of {width}"
        if not self.windows and settings.get("sliding_window") is not None:
            return "sliding windows"
        if not self.softcap and settings.get("softcap") is not None:
            return "soft-capped scores"
        if not self.sinks and settings.get("s_aux") is not None:
            return "attention sinks"
        if not self.dropout and settings.get("dropout"):
            return "dropout"
        if not self.shared_prompts and plan is not None and any(shared for _, shared in plan.segments):
            return "prompts that two branches share"
        return None


class Sequences(NamedTuple):
    """A row as sequences for a variable-length kernel; a sequence's queries are the last of its keys.

    Attributes:
        key_index: [keys] int64, row positions of the keys, sequence by sequence, those that branches share written out
            for each; None where that is the row itself.
        query_offsets, key_offsets: [segments + 1] int32, where each sequence begins.
        max_queries, max_keys: of one sequence.
    """

    key_index: Tensor | None
    query_offsets: Tensor
    key_offsets: Tensor
    max_queries: int
    max_keys: int


class QueryRun(NamedTuple):
    """Queries start to end of a segment, the keys first to last that some of them may see, and who sees which."""

    start: int
    end: int
    first: int
    last: int
    allowed: Tensor  # [end - start, last - first] bool


class AttentionPlan:
    """Who attends to whom in one row, and what the functions derive from it, once for all layers and passes."""

    def __init__(
        self,
        position_ids: Tensor,
        document_ids: Tensor,
        branch_ids: Tensor,
        segments: tuple[Segment, ...],
        group: SequenceGroup | None = None,
    ) -> None:
        """One row.

        Args:
            position_ids, document_ids, branch_ids, segments: as in `PairBatch`, the tensors [1, T] on the device.
            group: of the ranks that share the row, if any do.
        """
        self.position_ids, self.document_ids, self.branch_ids = position_ids[0], document_ids[0], branch_ids[0]
        self.segments, self.group = segments, group
        self.block_masks: dict[int | None, Any] = {}  # of FlexAttention, by sliding window
        self._runs: dict[tuple[int, int, int | None], list[QueryRun]] = {}

    def runs(self, queries: int, keys: int, window: int | None) -> list[QueryRun]:
        """A segment whose queries are the last of its keys, in runs of at most `QUERY_BLOCK` queries."""
        if (queries, keys, window) in self._runs:
            return self._runs[queries, keys, window]
        device, runs = self.position_ids.device, []
        for start in range(0, queries, QUERY_BLOCK):
            end = min(start + QUERY_BLOCK, queries)
            position, last = keys - queries + start, keys - queries + end  # of the run's own keys
            first = 0 if window is None else max(0, position - window + 1)
            own = torch.arange(position, last, device=device)[:, None]
            other = torch.arange(first, last, device=device)
            allowed = other <= own
            if window is not None:
                allowed &= other > own - window
            runs.append(QueryRun(start, end, first, last, allowed))
        self._runs[queries, keys, window] = runs
        return runs

    @cached_property
    def sequences(self) -> Sequences:
        """The row for a variable-length kernel."""
        runs: list[tuple[int, int]] = []  # of keys that stand together in the row: how many, how far ahead of there
        queries, keys = [0], [0]
        document = 0
        for tokens, shared in self.segments:
            if shared:
                runs.append((shared, document - keys[-1]))
            else:
                document = queries[-1]
            runs.append((tokens, queries[-1] - keys[-1] - shared))
            queries.append(queries[-1] + tokens)
            keys.append(keys[-1] + shared + tokens)
        max_keys = max(tokens + shared for tokens, shared in self.segments)
        # only what is short is copied, and the size is known, so the host does not wait for the device
        device = self.position_ids.device
        query_offsets, key_offsets = torch.tensor([queries, keys], dtype=torch.int32).to(device, non_blocking=True)
        index = None
        if keys != queries:
            lengths, ahead = torch.tensor(runs).to(device, non_blocking=True).unbind(1)
            index = torch.arange(keys[-1], device=device) + ahead.repeat_interleave(lengths, output_size=keys[-1])
        return Sequences(index, query_offsets, key_offsets, max(tokens for tokens, _ in self.segments), max_keys)


def blockwise_attention(
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
    """Attention segment by segment, in the form of transformers' `AttentionInterface`.

    Args:
        query: [1, H, T, D]; key, value: [1, K, T, D].
        sliding_window: a query sees its own position and the `sliding_window - 1` before it.
        softcap: scores become softcap * tanh(scores / softcap).
        s_aux: [H] attention sinks, scores that take part in the softmax and attend to nothing.

    Returns:
        [1, T, H, D], None.
    """
    plan = checked_plan(module, attention_mask, sliding_window, attention_plan, others)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    attend: Callable[..., Tensor] = F.scaled_dot_product_attention
    explicit = softcap is not None or s_aux is not None
    if explicit:
        attend = partial(_explicit_attention, softcap=softcap, sinks=s_aux)
    if key.shape[1] != query.shape[1]:  # key heads, repeated for their groups of query heads
        key, value = (tensor.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for tensor in (key, value))
    # one split a tensor: its backward is one concatenation, where slices would each fill a whole row with zeros
    sizes = [tokens for tokens, _ in plan.segments]
    queries, keys, values = (tensor.split(sizes, dim=2) for tensor in (query, key, value))
    first_keys, first_values = keys[0], values[0]  # of the current document
    outputs = []
    for q, k, v, (_, shared) in zip(queries, keys, values, plan.segments, strict=True):
        if shared:
            k = torch.cat([first_keys[:, :, :shared], k], dim=2)
            v = torch.cat([first_values[:, :, :shared], v], dim=2)
        else:
            first_keys, first_values = k, v
        count, total = q.shape[2], k.shape[2]
        if not explicit and count == total and (sliding_window is None or count <= sliding_window):
            outputs.append(attend(q, k, v, dropout_p=dropout, is_causal=True, scale=scaling))
            continue
        for start, end, first, last, allowed in plan.runs(count, total, sliding_window):
            run = q[:, :, start:end], k[:, :, first:last], v[:, :, first:last]
            outputs.append(attend(*run, attn_mask=allowed, dropout_p=dropout, scale=scaling))
    return torch.cat([output.transpose(1, 2) for output in outputs], dim=1), None


def _explicit_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    attn_mask: Tensor,
    dropout_p: float,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """softmax([scores, sinks]) @ [value, 0], scores soft-capped before they are masked, the softmax in fp32."""
    scores = (query @ key.transpose(2, 3)) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.float().masked_fill(~attn_mask, float("-inf"))
    if sinks is not None:
        scores = torch.cat([scores, sinks.float()[None, :, None, None].expand(*scores.shape[:3], 1)], dim=-1)
    weights = scores.softmax(dim=-1).to(value.dtype)
    if sinks is not None:
        weights = weights[..., :-1]
    return F.dropout(weights, dropout_p) @ value


def checked_plan(
    module: nn.Module,
    attention_mask: Any,
    sliding_window: int | None,
    plan: AttentionPlan | None,
    others: dict[str, Any],
) -> AttentionPlan:
    """The row's plan, once it is clear that the layer asks for nothing that the plan does not say.

    Raises:
        ModelError: if the model keeps the plan from its attention, brings a mask or scores of its own, or has a
            window that it does not tell.
    """
    name = type(module).__name__
    if plan is None:
        raise ModelError(f"{name}: arguments of the model do not reach this attention; set data.layout=padded")
    unknown = [key for key in _UNKNOWN_TERMS if others.get(key) is not None]
    if attention_mask is not None or unknown:
        what = "a mask" if attention_mask is not None else unknown[0]
        raise ModelError(f"{name}: this attention has {what} of its own; set data.layout=padded")
    if others.get("is_causal") is False or not getattr(module, "is_causal", True):
        raise ModelError(f"{name}: this attention is not causal; set data.layout=padded")
    if sliding_window is None and _has_window(module):
        raise ModelError(f"{name}: this attention keeps its sliding window in its mask; set data.layout=padded")
    return plan


def _has_window(module: nn.Module) -> bool:
    """Whether the config says that a layer's attention sees a window only."""
    config, layer = getattr(module, "config", None), getattr(module, "layer_idx", None)
    kinds = getattr(config, "layer_types", None)
    if kinds and layer is not None and layer < len(kinds):
        return kinds[layer] == "sliding_attention"
    return getattr(config, "sliding_window", None) is not None and getattr(config, "use_sliding_window", True)
