"""Which pairs of a global batch go together, under a budget of tokens: ranks finish together, micro-batches are full.

Every rank takes the same number of micro-steps, the fewest that the budget allows. Which pairs share a micro-batch
is a matter of the layout:

- Where rows are packed, any pairs fit together. The costliest is placed first, each in the micro-batch with the least
  work so far that has room for it (longest processing time first), so all micro-batches come out about equal.
- Where rows are padded, pairs of one width belong together. They are sorted by width and cut into runs, and the runs
  are made as even as can be without another micro-step.

Either way micro-batches are then sorted by cost and dealt to the ranks, neighbours to the same micro-step: in each the
ranks have about the same to do, and the first needs the most memory. Cost is FLOPs (`dpo_scale.data.flops`), so a long
pair weighs more than its tokens; the budget is in tokens, because memory grows with them.

Where N ranks may share a row (`dpo_scale.data.groups`), the row holds N budgets, and each rank does an N-th of it. A
micro-step can hold rows of several sizes side by side. A pair gets as many ranks as its tokens need. Attention is
quadratic, so it may still hold all others up: plans that give costly pairs more ranks than that are tried too
(`LEVELS`), and the quickest is taken, the exchange between ranks that share rows included. Pairs of a size have as many
ranks as their share of the work, single ranks have the rest, and short pairs go wherever there is least to do, into
longer pairs' rows as well.

All of it is a pure function of the pairs, their lengths, the budget and the groups. A plan is made per global batch, in
O(G log G) and memory for one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from heapq import heappop, heappush

import numpy as np

from dpo_scale.data.batching import MicroBatch, deal, to_ranks
from dpo_scale.data.flops import ForwardFlops
from dpo_scale.data.groups import Groups
from dpo_scale.data.layout import Layout, pair_tokens, row_widths

# How long a pair may take in its row, in mean times of a rank's micro-step.
LEVELS = (math.inf, 2.0, 1.0, 0.5)
# What the exchange in every layer adds to the time of shared rows, roughly: about 5% for an 8B model over NVLink by
# bytes and FLOPs, several times that between nodes. So rows are not shared for less.
EXCHANGE = 0.1


def pack_among_ranks(
    pairs: np.ndarray, lengths: np.ndarray, *, max_tokens: int, groups: Groups, layout: Layout, flops: ForwardFlops
) -> list[list[MicroBatch]]:
    """Lay a global batch out over micro-steps and ranks.

    Args:
        pairs: [G] indices into the dataset.
        lengths: [N, 3] tokens of prompt, chosen and rejected of the whole dataset.
        max_tokens: most tokens of a micro-batch that one rank holds, as its layout computes them: prompts once or
            twice, padding included. A pair that is longer than the largest group holds gets a micro-batch of its own.
        groups: of one size where rows are padded.
        flops: of the model, for the balance.

    Returns:
        `result[micro_step][rank]`, the costliest first; of several sizes of groups, those with the largest.
    """
    assert len(pairs) > 0
    # sorted, so that the order in which pairs are given decides nothing
    pairs = np.sort(pairs)
    of_pairs = lengths[pairs]
    costs = flops.of_pairs(of_pairs, layout)
    spare = pairs[costs.argmin()]
    if layout == "padded":
        assert len(groups.sizes) == 1
        size = groups.largest
        count = groups.world_size // size
        runs = _even_runs(of_pairs, costs, size * max_tokens, count)
        runs.sort(key=lambda run: -run[0])  # stable, so equal costs keep the order in which they were made
        steps = deal([MicroBatch.of(pairs[members], size) for _, members in runs], count, spare)
        return [ranks[::-1] if k % 2 else ranks for k, ranks in enumerate(steps)]  # as in `_packed_rows`
    made = _packed_rows(pair_tokens(of_pairs, layout), costs, max_tokens, groups)
    return [to_ranks([row.micro_batch(pairs, spare) for row in rows]) for rows in made]


@dataclass
class _Row:
    """What the ranks of a group have in a micro-step: positions of pairs, and their cost together."""

    size: int
    room: int  # tokens that still fit
    cost: float = 0.0
    members: list[int] = field(default_factory=list)

    @property
    def time(self) -> float:
        return self.cost / self.size

    def micro_batch(self, pairs: np.ndarray, spare: int) -> MicroBatch:
        if self.members:
            return MicroBatch.of(pairs[self.members], self.size)
        return MicroBatch.filler(spare, self.size)


def _packed_rows(tokens: np.ndarray, costs: np.ndarray, max_tokens: int, groups: Groups) -> list[list[_Row]]:
    """Rows of all pairs as `result[micro_step]`, from the first rank to the last.

    The fewest micro-steps that go; a few more where that spares short pairs the exchange.
    """
    fits = groups.smallest_for(tokens, max_tokens)
    held = int(np.minimum(tokens, groups.largest * max_tokens).sum())
    alone = int((2 * tokens > groups.largest * max_tokens).sum())  # in their rows, of those pairs
    count = -(-max(held, alone * groups.largest * max_tokens) // (max_tokens * groups.world_size))
    few: list[list[_Row]] = []  # all rows in the largest groups, which leaves the least room empty
    while not (steps := _quickest(LEVELS, fits, tokens, costs, max_tokens, groups, count)):
        few = few or _quickest((0.0,), fits, tokens, costs, max_tokens, groups, count)
        count += 1
        if few and count > (1 + EXCHANGE) * len(few):
            steps = few
            break
    # those with the same groups follow each other, so that forward passes can be merged
    steps.sort(key=lambda step: sorted(-row.size for row in step))
    # every other one the other way round: otherwise the first rank of a size would have the most to do in all of them
    return [sorted(step[::-1] if k % 2 else step, key=lambda row: -row.size) for k, step in enumerate(steps)]


def _quickest(
    levels: tuple[float, ...],
    fits: np.ndarray,
    tokens: np.ndarray,
    costs: np.ndarray,
    max_tokens: int,
    groups: Groups,
    count: int,
) -> list[list[_Row]]:
    """At most `count` micro-steps with groups of at least the sizes `fits` [G]; none if the pairs need more."""
    mean = costs.sum() / (count * groups.world_size)
    best: list[list[_Row]] = []
    least, tried = math.inf, None
    for level in levels:
        sizes = np.maximum(fits, groups.smallest_for(costs, level * mean))
        if tried is not None and (sizes == tried).all():
            continue
        tried = sizes
        numbers = _rows_of_sizes(sizes, tokens, costs, max_tokens, groups, count)
        steps = _side_by_side(_filled(sizes, tokens, costs, max_tokens, numbers), groups.world_size)
        shared = sum(row.cost for step in steps for row in step if row.size > 1) / costs.sum()
        time = sum(max(row.time for row in step) for step in steps) * (1 + EXCHANGE * shared)
        if steps and time < least:
            best, least = steps, time
    return best


def _rows_of_sizes(
    sizes: np.ndarray, tokens: np.ndarray, costs: np.ndarray, max_tokens: int, groups: Groups, count: int
) -> dict[int, int]:
    """How many rows of each size `count` micro-steps have, the largest first, for pairs in groups of `sizes` [G].

    Enough for the tokens of the pairs of that size, and for their work to take no longer than others'. The rest are of
    the smallest size.
    """
    left = count * groups.world_size
    mean = costs.sum() / left
    numbers = {}
    for size in groups.sizes[:0:-1]:
        own = sizes == size
        room = size * max_tokens
        wanted = max(
            -(-int(np.minimum(tokens[own], room).sum()) // room),
            int((2 * tokens[own] > room).sum()),  # no two of them fit together
            min(int(own.sum()), math.ceil(costs[own].sum() / (size * mean))),
        )
        numbers[size] = min(wanted, left // size)
        left -= size * numbers[size]
    return numbers | {groups.sizes[0]: left // groups.sizes[0]}


def _filled(
    sizes: np.ndarray, tokens: np.ndarray, costs: np.ndarray, max_tokens: int, numbers: dict[int, int]
) -> list[_Row]:
    """So many rows of each size, filled with pairs that need groups of `sizes` [G]; none if a pair fits nowhere.

    Pairs come by size, then by cost, and each goes to the row that is done first with it.
    """
    rows = [_Row(size, size * max_tokens) for size, number in numbers.items() for _ in range(number)]
    heaps: dict[int, list[tuple[float, int]]] = {size: [] for size in numbers}
    for number, row in enumerate(rows):
        heaps[row.size].append((0.0, number))
    order = np.lexsort((np.arange(len(costs)), -costs, -sizes))
    for i in order.tolist():
        least_size, length, cost = int(sizes[i]), int(tokens[i]), float(costs[i])
        end, chosen = math.inf, 0
        passed_over = []
        for size, heap in heaps.items():
            if size < least_size:
                break
            while heap and length > rows[heap[0][1]].room and rows[heap[0][1]].members:
                passed_over.append((heap, heappop(heap)))
            if heap and (heap[0][0] + cost) / size <= end:  # the smaller of equals
                end, chosen = (heap[0][0] + cost) / size, size
        if not chosen:
            return []
        _, number = heappop(heaps[chosen])
        row = rows[number]
        row.members.append(i)
        row.cost += cost
        row.room -= length
        if row.room > 0:
            heappush(heaps[chosen], (row.cost, number))
        for heap, item in passed_over:
            heappush(heap, item)
    return rows


def _side_by_side(rows: list[_Row], world_size: int) -> list[list[_Row]]:
    """Micro-steps of rows that take about as long as each other, the longest first.

    Each is filled to the last rank: sizes divide each other and all rows together make whole micro-steps, so what is
    left to fill is a multiple of the smallest size that waits.
    """
    waiting = sorted(rows, key=lambda row: -row.time)
    steps = []
    while waiting and waiting[0].members:
        step, others, left = [], [], world_size
        for k, row in enumerate(waiting):
            if left == 0:
                others += waiting[k:]
                break
            if row.size <= left:
                step.append(row)
                left -= row.size
            else:
                others.append(row)
        assert left == 0
        steps.append(step)
        waiting = others
    return steps


def _even_runs(lengths: np.ndarray, costs: np.ndarray, max_tokens: int, count: int) -> list[tuple[float, list[int]]]:
    """(cost, positions of pairs) of runs of neighbours by width, of at most `max_tokens` slots, as even as can be.

    As few as go, in multiples of `count`.
    """
    widths = row_widths(lengths)
    order = np.lexsort((np.arange(len(widths)), -widths))
    fits = np.maximum(1, max_tokens // (2 * widths[order])).tolist()
    pair_costs = costs[order].tolist()

    def cut(max_cost: float) -> list[int]:
        """Starts of runs of as many pairs as fit, all as wide, and about as costly, as the first."""
        starts, start = [], 0
        while start < len(order):
            starts.append(start)
            start += max(1, int(min(fits[start], max_cost // pair_costs[start])))
        return starts

    starts = cut(float("inf"))
    allowed = -(-len(starts) // count) * count
    low, high = 0.0, pair_costs[0] * len(order)
    for _ in range(16):
        middle = (low + high) / 2
        tried = cut(middle)
        if len(tried) <= allowed:
            starts, high = tried, middle
        else:
            low = middle
    runs = zip(starts, [*starts[1:], len(order)], strict=True)
    return [(pair_costs[start] * (end - start), order[start:end].tolist()) for start, end in runs]
