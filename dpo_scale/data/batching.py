"""Which pairs an optimizer step sees, and which rank sees which of them in which micro-step.

All of it is arithmetic on (seed, epoch, lengths) that every rank does alike, without communication: a run can be
resumed at any step, and a step holds the same pairs whatever the number of ranks or the micro-batch size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dpo_scale.data.layout import Layout, pair_tokens, row_widths


@dataclass(frozen=True)
class MicroBatch:
    """Pairs of one rank's forward pass: dataset indices [P] and their weights [P] in the global sum.

    A weight is 1, or 0 for a filler. Every rank must take part in every forward and backward pass of a sharded model,
    so a rank with nothing left in a micro-step repeats a short pair at weight 0.

    Attributes:
        group_size: how many ranks share the pairs' row, this one among them (`data.groups`); all have the same
            micro-batch.
    """

    indices: np.ndarray
    weights: np.ndarray
    group_size: int = 1

    @classmethod
    def of(cls, pairs: np.ndarray) -> MicroBatch:
        """Pairs that count."""
        return cls(pairs, np.ones(len(pairs), dtype=np.float32))

    @classmethod
    def filler(cls, pair: int) -> MicroBatch:
        return cls(np.array([pair]), np.zeros(1, dtype=np.float32))


def counted_pairs(ranks: Sequence[MicroBatch]) -> tuple[int, ...]:
    """How many pairs each rank has in a micro-step; none where it repeats one as a filler."""
    return tuple(int(np.count_nonzero(micro_batch.weights)) for micro_batch in ranks)


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
    pairs: np.ndarray, lengths: np.ndarray, *, micro_batch_size: int, world_size: int
) -> list[list[MicroBatch]]:
    """Lay a global batch out over micro-steps and ranks.

    Pairs are sorted by length (longest first, so that memory peaks in the first micro-step) and cut into nearly
    equal runs of neighbours: rows of a micro-batch, and the ranks of a micro-step, are about as long as each other.

    Args:
        pairs: [G] indices into the dataset.
        lengths: [N, 3] tokens of prompt, chosen and rejected of the whole dataset.
        micro_batch_size: most pairs in a micro-batch.

    Returns:
        `result[micro_step][rank]`.
    """
    assert len(pairs) > 0
    ordered = pairs[np.lexsort((pairs, -row_widths(lengths[pairs])))]
    micro_steps = math.ceil(len(pairs) / (micro_batch_size * world_size))
    runs = np.array_split(ordered, micro_steps * world_size)
    return deal([MicroBatch.of(run) for run in runs if len(run)], world_size, ordered[-1])


def deal(batches: list[MicroBatch], world_size: int, spare: int) -> list[list[MicroBatch]]:
    """Micro-batches in their order as `result[micro_step][rank]`; ranks left without one repeat the pair `spare`."""
    batches = batches + [MicroBatch.filler(spare)] * (-len(batches) % world_size)
    return [batches[i : i + world_size] for i in range(0, len(batches), world_size)]


def forward_batches(
    pairs: np.ndarray, lengths: np.ndarray, *, max_tokens: int, world_size: int, layout: Layout = "padded"
) -> list[list[MicroBatch]]:
    """Lay pairs out for forward passes alone: by length, as many a micro-batch as fit a budget of tokens.

    Without a gradient the order does not matter, so rows of one length go together and nearly nothing is padding;
    neighbours in length go to different ranks of the same micro-step, so the ranks finish together.

    Args:
        pairs: [n] indices into the dataset.
        lengths: [N, 3] tokens of prompt, chosen and rejected of the whole dataset.
        max_tokens: most tokens of a micro-batch as the layout computes them (where rows are padded: rows times
            width); a longer pair gets one of its own.

    Returns:
        `result[micro_step][rank]`, longest first.
    """
    tokens = _slots_alone(lengths[pairs], layout)
    order = np.lexsort((pairs, -tokens))
    before = np.concatenate([[0], np.cumsum(tokens[order])])  # tokens of all pairs before each in order
    share = -(-len(pairs) // world_size)  # few pairs are spread over the ranks all the same
    runs: list[np.ndarray] = []
    start = 0
    while start < len(order):
        if layout == "padded":  # sorted longest first, so the first pair's row is the width of the whole run
            fit = int(max_tokens // tokens[order[start]])
        else:
            fit = int(np.searchsorted(before, before[start] + max_tokens, side="right")) - 1 - start
        left_for_others = len(order) - start - max(0, world_size - len(runs) - 1)
        count = max(1, min(share, fit, left_for_others))
        runs.append(pairs[order[start : start + count]])
        start += count
    return deal([MicroBatch.of(run) for run in runs], world_size, runs[-1][-1])


def regroup_for_forward(
    micro_steps: Sequence[Sequence[MicroBatch]], lengths: np.ndarray, *, max_tokens: int, layout: Layout
) -> list[list[MicroBatch]]:
    """Lay each rank's pairs of some micro-steps out again, for forward passes alone under a budget of their own.

    A rank's pairs, fillers among them, stay in the order in which its micro-batches hold them, so values come out in
    that order. Padded micro-batches are merged as wholes, and only while that adds little padding
    (`MAX_ADDED_SLOTS`). All ranks make as many passes: one that needs fewer repeats its shortest pair at weight 0 in
    the others, which come last.

    Args:
        micro_steps: `micro_steps[k][rank]`.
        lengths, max_tokens, layout: as in `forward_batches`.

    Returns:
        `result[pass][rank]`; no more passes than micro-steps, if those are within the budget.
    """
    of_ranks = []
    for micro_batches in zip(*micro_steps, strict=True):
        pairs = np.concatenate([micro_batch.indices for micro_batch in micro_batches])
        tokens = _slots_alone(lengths[pairs], layout)
        sizes = [len(micro_batch.indices) for micro_batch in micro_batches]
        counts = _merged(tokens.tolist(), sizes, max_tokens, layout)
        runs = np.split(pairs, np.cumsum(counts)[:-1])
        of_ranks.append(([MicroBatch.of(run) for run in runs], pairs[tokens.argmin()]))
    passes = max(len(batches) for batches, _ in of_ranks)
    for batches, shortest in of_ranks:
        batches += [MicroBatch.filler(shortest)] * (passes - len(batches))
    return [list(ranks) for ranks in zip(*(batches for batches, _ in of_ranks), strict=True)]


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
