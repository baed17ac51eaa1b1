"""Which pairs an optimizer step sees, and which rank sees which of them in which micro-step.

All of it is arithmetic on (seed, epoch, lengths) that every rank does alike, without communication: a run can be
resumed at any step, and a step holds the same pairs whatever the number of ranks or the micro-batch size.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dpo_scale.data.groups import Groups
from dpo_scale.data.layout import Layout, pair_tokens, row_widths


@dataclass(frozen=True)
class MicroBatch:
    """Pairs of one rank's forward pass: dataset indices [P] and their weights [P] in the global sum.

    A weight is 1, or 0 for a filler. Every rank must take part in every forward and backward pass of a sharded model,
    so a rank with nothing left in a micro-step repeats a short pair at weight 0.

    Attributes:
        group_size: how many ranks share the pairs' row, this one among them (`dpo_scale.data.groups`). All of them
            have the same micro-batch; whoever counts pairs asks the first alone.
    """

    indices: np.ndarray
    weights: np.ndarray
    group_size: int = 1

    @classmethod
    def of(cls, pairs: np.ndarray, group_size: int = 1) -> MicroBatch:
        """Pairs that count."""
        return cls(pairs, np.ones(len(pairs), dtype=np.float32), group_size)

    @classmethod
    def filler(cls, pair: int, group_size: int = 1) -> MicroBatch:
        return cls(np.array([pair]), np.zeros(1, dtype=np.float32), group_size)


def to_ranks(batches: Sequence[MicroBatch]) -> list[MicroBatch]:
    """The micro-batches of neighbouring groups, one for each of their ranks."""
    return [micro_batch for micro_batch in batches for _ in range(micro_batch.group_size)]


def of_groups(of_ranks: Sequence[MicroBatch]) -> list[MicroBatch]:
    """A micro-step's micro-batches, each once: those of the groups' first ranks."""
    return [micro_batch for rank, micro_batch in enumerate(of_ranks) if rank % micro_batch.group_size == 0]


def counted_pairs(of_ranks: Sequence[MicroBatch]) -> tuple[int, ...]:
    """How many pairs count for each rank in a micro-step.

    None where it repeats one as a filler, and none where it is not the first of its group: its pairs count there.
    """
    return tuple(
        int(np.count_nonzero(micro_batch.weights)) if rank % micro_batch.group_size == 0 else 0
        for rank, micro_batch in enumerate(of_ranks)
    )


@dataclass(frozen=True)
class PairOrder:
    """The steps of a run: `steps_per_epoch` global batches of `global_batch_size` of `num_pairs` pairs."""

    num_pairs: int
    global_batch_size: int
    seed: int
    shuffle: bool = True
    drop_last: bool = False

    @property
    def steps_per_epoch(self) -> int:
        count = self.num_pairs / self.global_batch_size
        return math.floor(count) if self.drop_last else math.ceil(count)

    def total_steps(self, epochs: float, max_steps: int | None) -> int:
        return max_steps if max_steps is not None else math.ceil(epochs * self.steps_per_epoch)

    def epoch_of(self, step: int) -> int:
        """The epoch (from 0) that optimizer step `step` (from 0) belongs to."""
        return step // self.steps_per_epoch

    def epoch_order(self, epoch: int) -> np.ndarray:
        """The pairs of an epoch in order, int64 [num_pairs]."""
        if not self.shuffle:
            return np.arange(self.num_pairs)
        return np.random.default_rng([self.seed, epoch]).permutation(self.num_pairs)

    def pairs_of_run(self, total_steps: int) -> np.ndarray:
        """The pairs that a run of `total_steps` sees at all, ascending."""
        if total_steps >= self.steps_per_epoch and not self.drop_last:
            return np.arange(self.num_pairs)
        epochs = range(-(-total_steps // self.steps_per_epoch))
        orders = {epoch: self.epoch_order(epoch) for epoch in epochs}
        return np.unique(np.concatenate([self.global_batch(i, orders[self.epoch_of(i)]) for i in range(total_steps)]))

    def global_batch(self, step: int, order: np.ndarray) -> np.ndarray:
        """The pairs of optimizer step `step`, given `epoch_order(epoch_of(step))`; the last may be incomplete."""
        start = (step % self.steps_per_epoch) * self.global_batch_size
        return order[start : start + self.global_batch_size]


def split_among_ranks(
    pairs: np.ndarray, lengths: np.ndarray, *, micro_batch_size: int, groups: Groups
) -> list[list[MicroBatch]]:
    """Lay a global batch out over micro-steps and ranks.

    Pairs are sorted by length (longest first, so that memory peaks in the first micro-step) and cut into nearly
    equal runs of neighbours: rows of a micro-batch, and the ranks of a micro-step, are about as long as each other.

    Args:
        pairs: [G] indices into the dataset.
        lengths: [N, 3] tokens of prompt, chosen and rejected of the whole dataset.
        micro_batch_size: most pairs in a micro-batch.
        groups: of one size.

    Returns:
        `result[micro_step][rank]`.
    """
    assert len(pairs) > 0 and len(groups.sizes) == 1
    size = groups.largest
    count = groups.world_size // size
    ordered = pairs[np.lexsort((pairs, -row_widths(lengths[pairs])))]
    micro_steps = math.ceil(len(pairs) / (micro_batch_size * count))
    runs = np.array_split(ordered, micro_steps * count)
    return deal([MicroBatch.of(run, size) for run in runs if len(run)], count, ordered[-1])


def deal(batches: list[MicroBatch], count: int, spare: int) -> list[list[MicroBatch]]:
    """Micro-batches in their order, to `count` groups of one size, as `result[micro_step][rank]`.

    Groups that are left without one repeat the pair `spare`.
    """
    batches = batches + [MicroBatch.filler(spare, batches[0].group_size)] * (-len(batches) % count)
    return [to_ranks(batches[i : i + count]) for i in range(0, len(batches), count)]


def forward_batches(
    pairs: np.ndarray, lengths: np.ndarray, *, max_tokens: int, groups: Groups, layout: Layout = "padded"
) -> list[list[MicroBatch]]:
    """Lay pairs out for forward passes alone: by length, as many a micro-batch as fit a budget of tokens.

    Without a gradient the order does not matter, so rows of one length go together and nearly nothing is padding;
    neighbours in length go to different ranks of the same micro-step, so the ranks finish together. Each pair goes to
    the smallest group that holds it, and all groups of a micro-step have one size.

    Args:
        pairs: [n] indices into the dataset.
        lengths: [N, 3] tokens of prompt, chosen and rejected of the whole dataset.
        max_tokens: most tokens of a micro-batch that one rank holds, as the layout computes them (where rows are
            padded: rows times width); a longer pair gets a micro-batch of its own. 0: every pair does, in the
            largest group.

    Returns:
        `result[micro_step][rank]`, longest first.
    """
    tokens = _slots_alone(lengths[pairs], layout)
    fits = groups.smallest_for(tokens, max_tokens)
    micro_steps = []
    for size in reversed(groups.sizes):
        own = np.flatnonzero(fits == size)
        if len(own):
            count = groups.world_size // size
            runs = _runs_within(pairs[own], tokens[own], size * max_tokens, count, layout)
            micro_steps += deal([MicroBatch.of(run, size) for run in runs], count, runs[-1][-1])
    return micro_steps


def _runs_within(
    pairs: np.ndarray, tokens: np.ndarray, max_tokens: int, count: int, layout: Layout
) -> list[np.ndarray]:
    """Runs of neighbours by length, longest first, each within `max_tokens`; few pairs are spread over `count` all the
    same."""
    order = np.lexsort((pairs, -tokens))
    before = np.concatenate([[0], np.cumsum(tokens[order])])  # tokens of all pairs before each in order
    share = -(-len(pairs) // count)
    runs: list[np.ndarray] = []
    start = 0
    while start < len(order):
        if layout == "padded":  # sorted longest first, so the first pair's row is the width of the whole run
            fit = int(max_tokens // tokens[order[start]])
        else:
            fit = int(np.searchsorted(before, before[start] + max_tokens, side="right")) - 1 - start
        left_for_others = len(order) - start - max(0, count - len(runs) - 1)
        taken = max(1, min(share, fit, left_for_others))
        runs.append(pairs[order[start : start + taken]])
        start += taken
    return runs


def regroup_for_forward(
    micro_steps: Sequence[Sequence[MicroBatch]], lengths: np.ndarray, *, max_tokens: int, layout: Layout
) -> list[list[MicroBatch]]:
    """Lay each rank's pairs of some micro-steps out again, for forward passes alone under a budget of their own.

    A rank's pairs, fillers among them, stay in the order in which its micro-batches hold them, so values come out in
    that order. Padded micro-batches are merged as wholes, and only while that adds little padding
    (`MAX_ADDED_SLOTS`). The ranks of a group make each pass together, so only micro-steps that follow each other and
    have the same groups are merged. All ranks make as many passes: one that needs fewer repeats its shortest pair at
    weight 0, and what comes of that is of no use.

    Args:
        micro_steps: `micro_steps[k][rank]`.
        lengths, max_tokens, layout: as in `forward_batches`.

    Returns:
        `result[pass][rank]`; no more passes than micro-steps, if those are within the budget.
    """
    passes: list[list[MicroBatch]] = []
    by_groups = [of_groups(of_ranks) for of_ranks in micro_steps]
    for _, alike in itertools.groupby(by_groups, key=lambda batches: [one.group_size for one in batches]):
        passes += _merged_passes(list(alike), lengths, max_tokens, layout)
    return passes


def _merged_passes(
    micro_steps: list[list[MicroBatch]], lengths: np.ndarray, max_tokens: int, layout: Layout
) -> list[list[MicroBatch]]:
    """`regroup_for_forward` of micro-steps that have the same groups, `micro_steps[k][group]`."""
    passes_of_groups = []
    for micro_batches in zip(*micro_steps, strict=True):
        size = micro_batches[0].group_size
        pairs = np.concatenate([micro_batch.indices for micro_batch in micro_batches])
        tokens = _slots_alone(lengths[pairs], layout)
        numbers = [len(micro_batch.indices) for micro_batch in micro_batches]
        counts = _merged(tokens.tolist(), numbers, size * max_tokens, layout)
        runs = np.split(pairs, np.cumsum(counts)[:-1])
        filler = MicroBatch.filler(pairs[tokens.argmin()], size)
        passes_of_groups.append(([MicroBatch.of(run, size) for run in runs], filler))
    most = max(len(batches) for batches, _ in passes_of_groups)
    padded = [batches + [filler] * (most - len(batches)) for batches, filler in passes_of_groups]
    return [to_ranks(batches) for batches in zip(*padded, strict=True)]


# Merging padded micro-batches makes all rows as wide as the widest. This bounds the extra computing: where the model is
# replicated, one pass less saves next to nothing.
MAX_ADDED_SLOTS = 1.25


def _merged(tokens: list[int], sizes: list[int], max_tokens: int, layout: Layout) -> list[int]:
    """How many pairs each pass takes, from the first on, as many as go together; `tokens` as by `_slots_alone`.

    Args:
        sizes: pairs of each micro-batch.
    """
    parts, start = [], 0  # (pairs, slots of the widest) of what is not taken apart
    for size in sizes if layout == "padded" else [1] * len(tokens):
        widest = max(tokens[start : start + size])
        fit = max(1, max_tokens // widest)
        parts += [(min(fit, size - i), widest) for i in range(0, size, fit)]
        start += size
    passes = []
    count = widest = apart = 0
    for pairs, slots_each in parts:
        added = pairs * slots_each
        together = (count + pairs) * max(widest, slots_each) if layout == "padded" else apart + added
        if count and together <= min(max_tokens, MAX_ADDED_SLOTS * (apart + added)):
            count, widest, apart = count + pairs, max(widest, slots_each), apart + added
            continue
        passes.append(count)
        count, widest, apart = pairs, slots_each, added
    return [*passes[1:], count]


def _slots_alone(lengths: np.ndarray, layout: Layout) -> np.ndarray:
    """Token slots that each pair takes in a batch of its own, int64 [n], for lengths [n, 3]."""
    if layout == "padded":
        return 2 * row_widths(lengths).astype(np.int64)
    return pair_tokens(lengths, layout)
