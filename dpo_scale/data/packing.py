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

All of it is a pure function of the pairs, their lengths, the budget and the number of ranks. A plan is made per global
batch, in O(G log G) and memory for one.
"""

from __future__ import annotations

from heapq import heappop, heappush, heapreplace

import numpy as np

from dpo_scale.data.batching import MicroBatch, deal
from dpo_scale.data.flops import ForwardFlops
from dpo_scale.data.layout import Layout, pair_tokens, row_widths


def pack_among_ranks(
    pairs: np.ndarray, lengths: np.ndarray, *, max_tokens: int, world_size: int, layout: Layout, flops: ForwardFlops
) -> list[list[MicroBatch]]:
    """Lay a global batch out over micro-steps and ranks.

    Args:
        pairs: [G] indices into the dataset.
        lengths: [N, 3] tokens of prompt, chosen and rejected of the whole dataset.
        max_tokens: most tokens of a micro-batch, as its layout computes them: prompts once or twice, padding
            included. A pair that is longer by itself gets a micro-batch of its own.
        flops: of the model, for the balance.

    Returns:
        `result[micro_step][rank]`, the costliest first.
    """
    assert len(pairs) > 0
    # sorted, so that the order in which pairs are given decides nothing
    pairs = np.sort(pairs)
    of_pairs = lengths[pairs]
    costs = flops.of_pairs(of_pairs, layout)
    if layout == "padded":
        groups = _even_runs(of_pairs, costs, max_tokens, world_size)
    else:
        groups = _even_bins(pair_tokens(of_pairs, layout), costs, max_tokens, world_size)
    groups.sort(key=lambda group: -group[0])  # stable, so equal costs keep the order in which they were made
    steps = deal([MicroBatch.of(pairs[members]) for _, members in groups], world_size, pairs[costs.argmin()])
    # every other micro-step the other way round: otherwise rank 0 would have the most to do in all of them
    return [ranks[::-1] if k % 2 else ranks for k, ranks in enumerate(steps)]


def _even_bins(
    tokens: np.ndarray, costs: np.ndarray, max_tokens: int, world_size: int
) -> list[tuple[float, list[int]]]:
    """(cost, positions of pairs) of bins of at most `max_tokens`, as few as go, in multiples of `world_size`."""
    order = np.lexsort((np.arange(len(costs)), -costs)).tolist()
    token_list, cost_list = tokens.tolist(), costs.tolist()
    needed = -(-int(np.minimum(tokens, max_tokens).sum()) // max_tokens)
    count = -(-needed // world_size) * world_size
    while (bins := _fill_bins(order, token_list, cost_list, max_tokens, count)) is None:
        count += world_size
    return [(load, members) for load, members in bins if members]


def _fill_bins(
    order: list[int], tokens: list[int], costs: list[float], max_tokens: int, count: int
) -> list[tuple[float, list[int]]] | None:
    """`count` bins filled in `order`, each pair into the cheapest with room for it; None if one fits nowhere."""
    bins: list[list[int]] = [[] for _ in range(count)]
    loads, room = [0.0] * count, [max_tokens] * count
    heap = [(0.0, number) for number in range(count)]
    for i in order:
        passed_over = []
        while heap and tokens[i] > room[heap[0][1]] and bins[heap[0][1]]:
            passed_over.append(heappop(heap))
        if not heap:
            return None
        number = heap[0][1]
        bins[number].append(i)
        loads[number] += costs[i]
        room[number] -= tokens[i]
        if room[number] > 0:
            heapreplace(heap, (loads[number], number))
        else:
            heappop(heap)
        for item in passed_over:
            heappush(heap, item)
    return list(zip(loads, bins, strict=True))


def _even_runs(
    lengths: np.ndarray, costs: np.ndarray, max_tokens: int, world_size: int
) -> list[tuple[float, list[int]]]:
    """(cost, positions of pairs) of runs of neighbours by width, of at most `max_tokens` slots, as even as can be."""
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
    allowed = -(-len(starts) // world_size) * world_size
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
