"""A row shared by a group of neighbouring ranks: each has every N-th part of its tokens, attention sees all of them.

The exchange is that of DeepSpeed-Ulysses (arXiv 2309.14509). Everything in a layer but attention works on single
tokens, so a rank needs only its own. Around attention two all-to-alls turn [all heads, own tokens] into [own heads, all
tokens] and back. So whatever keeps sequences apart there, a mask or the lengths for a kernel, is that of the whole row.

ZeRO does not know of groups. Each of a group's ranks takes the loss of all of the group's pairs and differentiates it
with respect to its own tokens; the sum over ranks is the gradient that one rank would have. That is what ZeRO averages
over all ranks anyway, so loss scales, checkpoints and resharding stay as they are.

All ranks of a group must make the same exchanges in the same order. Shapes: N ranks of a group, t = T / N tokens each.
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dpo_scale.distributed import ranks


@dataclass(frozen=True)
class SequenceGroup:
    """The ranks that share a row with this one.

    Attributes:
        size: N.
        rank: of this process in the group.
    """

    size: int
    rank: int
    process_group: dist.ProcessGroup


_groups: dict[int, SequenceGroup] = {}


def make_groups(sizes: Sequence[int], timeout_minutes: float) -> None:
    """Make the process groups of these sizes, once in the life of the process. Every rank calls it."""
    for size in sizes:
        if size > 1 and size not in _groups:
            timeout = datetime.timedelta(minutes=timeout_minutes)
            process_group, _ = dist.new_subgroups(size, timeout=timeout)
            _groups[size] = SequenceGroup(size, ranks.rank() % size, process_group)


def group_of(size: int) -> SequenceGroup:
    """This rank's group of a size that `make_groups` was called for."""
    return _groups[size]


def exchange(
    rows: Tensor, group: SequenceGroup, sent: Sequence[int] | None = None, received: Sequence[int] | None = None
) -> Tensor:
    """Rows [n, ...] in the order of the ranks that they go to -> rows [m, ...] in the order of those they come from.

    Differentiable: gradients go back the way that rows came.

    Args:
        sent, received: [N] how many rows each rank gets from this one, and this one from each; equal parts if None.
    """
    return _Exchange.apply(rows, group, sent, received)


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: SequenceGroup, sent: Any, received: Any) -> Tensor:
        ctx.arguments = group, sent, received
        return _all_to_all(rows, group, sent, received)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        group, sent, received = ctx.arguments
        return _all_to_all(gradient, group, received, sent), None, None, None


def _all_to_all(
    rows: Tensor, group: SequenceGroup, sent: Sequence[int] | None, received: Sequence[int] | None
) -> Tensor:
    out = rows.new_empty((len(rows) if received is None else sum(received), *rows.shape[1:]))
    to, from_ = (None if counts is None else list(counts) for counts in (sent, received))
    dist.all_to_all_single(out, rows.contiguous(), from_, to, group=group.process_group)
    return out


def gather_dealt(own: Tensor, count: int, group: SequenceGroup) -> Tensor:
    """All of `count` values that were dealt to the ranks one by one, rank r having `values[r::N]`; on every rank.

    Gradients flow to the rank's own values only: each rank computes all that follows, and contributes its own part.
    """
    return _GatherDealt.apply(own, count, group)


class _GatherDealt(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: Tensor, count: int, group: SequenceGroup) -> Tensor:
        ctx.group = group
        size = -(-count // group.size)  # of the longest part; the others are padded
        padded = torch.cat([own, own.new_zeros(size - len(own))])
        parts = [torch.empty_like(padded) for _ in range(group.size)]
        dist.all_gather(parts, padded, group=group.process_group)
        return torch.stack(parts, dim=1).flatten()[:count]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return gradient[ctx.group.rank :: ctx.group.size].contiguous(), None, None


def sum_over(group: SequenceGroup, values: Tensor) -> Tensor:
    """The sum over the group's ranks, on every rank; the gradient of the sum is that of each rank's own part."""
    return _Sum.apply(values, group)


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, group: SequenceGroup) -> Tensor:
        out = values.clone()
        dist.all_reduce(out, group=group.process_group)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return gradient, None


def over_heads(
    attend: Any,
    group: SequenceGroup,
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    *,
    s_aux: Tensor | None = None,
    **settings: Any,
) -> tuple[Tensor, None]:
    """Attention of a shared row: `attend` on all of its tokens, each rank for its own heads.

    Query heads that N does not divide are filled up with empty ones. Key heads that it does not divide are repeated for
    their groups of query heads, as few times as go.

    Args:
        attend: in the form of `models.attention.blockwise_attention`, which says what the rest means.
        query: [1, H, t, D]; key, value: [1, K, t, D], of this rank's tokens.
        s_aux: [H].

    Returns:
        [1, t, H, D], None.
    """
    heads, tokens = query.shape[1], query.shape[2]
    repeats = key_repeats(heads, key.shape[1], group.size)
    if repeats > 1:
        key, value = (tensor.repeat_interleave(repeats, dim=1) for tensor in (key, value))
    parts = [by_rank(tensor[0], group.size) for tensor in (query, key, value)]
    widths = [part.shape[-1] for part in parts]
    whole = exchange(torch.cat(parts, dim=-1).flatten(0, 1), group)  # [T, own heads of all three]
    of_heads = (
        part.view(len(whole), -1, tensor.shape[-1]).transpose(0, 1)[None]
        for part, tensor in zip(whole.split(widths, dim=-1), (query, key, value), strict=True)
    )
    if s_aux is not None:
        s_aux = _filled_up(s_aux, group.size).chunk(group.size)[group.rank]
    output, _ = attend(module, *of_heads, attention_mask, s_aux=s_aux, **settings)
    back = exchange(output.reshape(len(whole), -1), group)  # own tokens, once for each rank's heads
    return back.view(group.size, tokens, -1, output.shape[-1]).transpose(0, 1).flatten(1, 2)[None, :, :heads], None


def key_repeats(heads: int, key_heads: int, ranks_: int) -> int:
    """How often key heads are repeated so that each rank's query heads have theirs with them."""
    groups = heads // key_heads
    if heads % ranks_:
        return groups  # empty heads would break the groups
    return next(n for n in range(1, groups + 1) if groups % n == 0 and (key_heads * n) % ranks_ == 0)


def by_rank(of_heads: Tensor, ranks_: int) -> Tensor:
    """[heads, t, D], of any number -> [N, t, heads of one rank * D]."""
    filled = _filled_up(of_heads, ranks_)
    return filled.unflatten(0, (ranks_, -1)).transpose(1, 2).flatten(2)


def _filled_up(of_heads: Tensor, ranks_: int) -> Tensor:
    """With zeros behind, up to a number of heads that N divides."""
    missing = -len(of_heads) % ranks_
    return of_heads if not missing else torch.cat([of_heads, of_heads.new_zeros(missing, *of_heads.shape[1:])])
