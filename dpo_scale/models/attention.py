"""Attention inside one row of many sequences, for the layouts `packed` and `shared_prefix` (`dpo_scale.data.layout`).

transformers lets a model's attention be replaced by a function, and builds no mask for a function that it has no mask
for. Ours are such functions. What they need to know of the row comes as one object, an `AttentionPlan`, through the
keyword arguments that a model hands down to its attention, so it also reaches what gradient checkpointing computes
again. They follow the one rule of `dpo_scale.data.layout`:

    blocks     scaled_dot_product_attention segment by segment (here): any device
    flex       FlexAttention with a block mask (`flex_attention`): CUDA
    varlen     torch's own variable-length flash-attention (`varlen_attention`): CUDA, 16 bits
    fa_varlen  that of the package flash-attn (`varlen_attention`), where installed: CUDA, 16 bits

`blocks` never makes a mask of the whole row. A row is a list of segments; the queries of a segment attend to itself,
causally, and, if it is a branch, to the shared beginning of its document. A whole document needs no mask at all, a
branch of R tokens behind a prompt of P one of [R, P + R], and both are cut into runs of `QUERY_BLOCK` queries, which
also bounds what a sliding window costs. Soft-capped scores (Gemma-2) and attention sinks (gpt-oss), which
scaled_dot_product_attention has not, are computed in plain torch on the same blocks.

Shapes: H query heads, K key heads, T tokens of the row, D width of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, cached_property, wraps
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpo_scale.errors import ModelError

if TYPE_CHECKING:
    from dpo_scale.data.layout import Segment

QUERY_BLOCK = 1024  # queries that share one mask, where one is needed

# what may arrive that changes scores in a way that only the model's own mask or kernel would follow
_UNKNOWN_TERMS = ("position_bias", "indices", "block_indices", "cache")


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
        self, position_ids: Tensor, document_ids: Tensor, branch_ids: Tensor, segments: tuple[Segment, ...]
    ) -> None:
        """Args: as in `PairBatch`, the tensors [1, T] on the device."""
        self.position_ids, self.document_ids, self.branch_ids = position_ids[0], document_ids[0], branch_ids[0]
        self.segments = segments
        self.block_masks: dict[int | None, Any] = {}  # of FlexAttention, by sliding window
        self._runs: dict[tuple[int, int, int | None], list[QueryRun]] = {}

    @cached_property
    def sizes(self) -> list[int]:
        """Tokens of each segment."""
        return [tokens for tokens, _ in self.segments]

    def runs(self, queries: int, keys: int, window: int | None) -> list[QueryRun]:
        """A segment whose queries are the last of its keys, in runs of at most `QUERY_BLOCK` queries."""
        known = self._runs.get((queries, keys, window))
        if known is not None:
            return known
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
        return Sequences(index, query_offsets, key_offsets, max(self.sizes), max_keys)


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
    key, value = (_repeated_heads(tensor, query.shape[1]) for tensor in (key, value))
    # one split a tensor: its backward is one concatenation, where slices would each fill a whole row with zeros
    queries, keys, values = (tensor.split(plan.sizes, dim=2) for tensor in (query, key, value))
    first_keys, first_values = keys[0], values[0]  # of the current document
    outputs = []
    for q, k, v, (_, shared) in zip(queries, keys, values, plan.segments, strict=True):
        if shared:
            k = torch.cat([first_keys[:, :, :shared], k], dim=2)
            v = torch.cat([first_values[:, :, :shared], v], dim=2)
        else:
            first_keys, first_values = k, v
        outputs += _segment_attention(plan, q, k, v, scaling, dropout, sliding_window, softcap, s_aux)
    return torch.cat([output.transpose(1, 2) for output in outputs], dim=1), None


def _segment_attention(
    plan: AttentionPlan,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float,
    dropout: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> list[Tensor]:
    """Attention of queries that are the last of their keys; the output in runs of queries, [1, H, run, D] each."""
    count, total = query.shape[2], key.shape[2]
    explicit = softcap is not None or sinks is not None
    if not explicit and count == total and (window is None or count <= window):
        return [F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, is_causal=True, scale=scaling)]
    outputs = []
    for start, end, first, last, allowed in plan.runs(count, total, window):
        q, k, v = query[:, :, start:end], key[:, :, first:last], value[:, :, first:last]
        if explicit:
            outputs.append(_explicit_attention(q, k, v, allowed, scaling, dropout, softcap, sinks))
        else:
            outputs.append(F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, dropout_p=dropout, scale=scaling))
    return outputs


def _explicit_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    allowed: Tensor,
    scaling: float,
    dropout: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """softmax([scores, sinks]) @ [value, 0], scores soft-capped before they are masked, the softmax in fp32."""
    scores = (query @ key.transpose(2, 3)) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.float().masked_fill(~allowed, float("-inf"))
    if sinks is not None:
        scores = torch.cat([scores, sinks.float()[None, :, None, None].expand(*scores.shape[:3], 1)], dim=-1)
    weights = scores.softmax(dim=-1).to(value.dtype)
    if sinks is not None:
        weights = weights[..., :-1]
    return F.dropout(weights, dropout) @ value


def _repeated_heads(tensor: Tensor, heads: int) -> Tensor:
    """Key or value heads [1, K, T, D] repeated for their groups of query heads, [1, H, T, D]."""
    one, kept, tokens, width = tensor.shape
    if kept == heads:
        return tensor
    return tensor[:, :, None].expand(one, kept, heads // kept, tokens, width).reshape(one, heads, tokens, width)


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


Attention = Callable[..., tuple[Tensor, None]]
_observer: Callable[..., tuple[Tensor, None]] | None = None


@contextmanager
def observed(observer: Callable[..., tuple[Tensor, None]]) -> Iterator[None]:
    """Within, a call of a back end becomes `observer(back end, its arguments)`, whose result the model gets."""
    global _observer
    assert _observer is None
    _observer = observer
    try:
        yield
    finally:
        _observer = None


def _observable(function: Attention) -> Attention:
    @wraps(function)
    def call(*arguments: Any, **settings: Any) -> tuple[Tensor, None]:
        if _observer is not None:
            return _observer(function, *arguments, **settings)
        return function(*arguments, **settings)

    return call


@cache
def attention_functions() -> dict[str, Attention]:
    """The back ends by name. A compiled layer (`model.compile`) calls them as they are: a plan is another each time."""
    from dpo_scale.models.flex_attention import flex_attention
    from dpo_scale.models.varlen_attention import flash_attention, varlen_attention

    functions = {  # names without "flash", by which transformers would take them for its own
        "blocks": blockwise_attention,
        "flex": flex_attention,
        "varlen": varlen_attention,
        "fa_varlen": flash_attention,
    }
    return {name: torch.compiler.disable(_observable(function)) for name, function in functions.items()}


def use_attention(model: nn.Module, backend: str) -> None:
    """Make all attention of a transformers model go through one of the back ends.

    Args:
        model: the transformers model itself, not a peft model around it.
    """
    from transformers import AttentionInterface

    name = f"dpo_scale_{backend}"
    AttentionInterface.register(name, attention_functions()[backend])
    model.set_attn_implementation(name)  # type: ignore[operator]
