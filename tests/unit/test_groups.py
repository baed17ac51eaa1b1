"""Plans for ranks that share rows: every pair once, whole groups in their places, budgets kept, nobody idle."""

import math
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_scale.data.batching import (
    MicroBatch,
    counted_pairs,
    forward_batches,
    of_groups,
    regroup_for_forward,
    split_among_ranks,
)
from dpo_scale.data.flops import ForwardFlops
from dpo_scale.data.groups import Groups
from dpo_scale.data.layout import pair_tokens
from dpo_scale.data.packing import pack_among_ranks
from dpo_scale.data.planning import Planner

LAYOUTS = ["packed", "shared_prefix"]
# of Llama-3.1-8B
FLOPS = ForwardFlops(2 * 6.98e9, 2 * 4096 * 128256, ((None, 4.0 * 4096 * 32),))
LINEAR = ForwardFlops(1.0, 0.0, ())
SEVERAL = [Groups(1), Groups(4, (1, 2)), Groups(6, (1, 2)), Groups(8, (1, 2, 4, 8)), Groups(12, (1, 2, 4))]
ONE_SIZE = [Groups(2, (2,)), Groups(6, (3,)), Groups(8, (2,)), Groups(12, (4,)), Groups(8, (8,))]


def long_tailed(count, seed=0, median=150, spread=0.5, times=32):
    """Log-normal lengths [count, 3]; one pair in a hundred is `times` as long."""
    rng = np.random.default_rng(seed)
    lengths = rng.lognormal(np.log(median), spread, size=(count, 3))
    lengths[rng.random(count) < 0.01] *= times
    return lengths.astype(np.int32) + 1


def any_lengths(seed):
    """90 pairs of up to about 1,000 tokens, as many of each order of magnitude."""
    return np.exp(np.random.default_rng(seed).uniform(0, 6, size=(90, 3))).astype(np.int32)


def pack(pairs, lengths, budget, groups, layout="shared_prefix"):
    return pack_among_ranks(pairs, lengths, max_tokens=budget, groups=groups, layout=layout, flops=FLOPS)


def shown(plan):
    return [[(m.indices.tolist(), m.weights.tolist(), m.group_size) for m in of_ranks] for of_ranks in plan]


def check_groups(plan, groups):
    """Every rank has its place in a group of neighbours, all of which have the same micro-batch."""
    for of_ranks in plan:
        assert len(of_ranks) == groups.world_size
        for rank, micro_batch in enumerate(of_ranks):
            size = micro_batch.group_size
            assert size in groups.sizes
            first = rank // size * size
            assert all(shown([[other]]) == shown([[micro_batch]]) for other in of_ranks[first : first + size])
        assert any(micro_batch.weights.any() for micro_batch in of_ranks), "a micro-step of fillers alone"


def check_pairs(plan, pairs):
    real = [m.indices for of_ranks in plan for m in of_groups(of_ranks) if m.weights.any()]
    assert sorted(np.concatenate(real)) == sorted(pairs)
    assert sum(sum(counted_pairs(of_ranks)) for of_ranks in plan) == len(pairs)


def check_budget(plan, lengths, budget, layout, sizes_over):
    """No rank holds more than the budget; a pair that needs more is alone, in a group of a size in `sizes_over`."""
    for micro_batch in (m for of_ranks in plan for m in of_groups(of_ranks) if m.weights.any()):
        size = micro_batch.group_size
        held = int(pair_tokens(lengths[micro_batch.indices], layout).sum())
        assert held <= size * budget or (len(micro_batch.indices) == 1 and size in sizes_over)


@settings(max_examples=150, deadline=None)
@given(
    count=st.integers(1, 90),
    budget=st.integers(1, 1500),
    groups=st.sampled_from(SEVERAL + ONE_SIZE + [Groups(12, (2, 6)), Groups(18, (1, 3, 9))]),
    layout=st.sampled_from(LAYOUTS),
    seed=st.integers(0, 50),
)
def test_all_plans_hold_every_pair_once_in_whole_groups_within_the_budget(count, budget, groups, layout, seed):
    lengths = any_lengths(seed)
    rng = np.random.default_rng(seed)
    pairs = rng.permutation(90)[:count]
    packed = pack(pairs, lengths, budget, groups, layout)
    forward = forward_batches(pairs, lengths, max_tokens=budget, groups=groups, layout=layout)
    for plan in (packed, forward):
        check_groups(plan, groups)
        check_pairs(plan, pairs)
        check_budget(plan, lengths, budget, layout, {groups.largest})
    again = rng.permutation(pairs)
    assert shown(packed) == shown(pack(again, lengths.copy(), budget, groups, layout))
    assert shown(forward) == shown(forward_batches(again, lengths, max_tokens=budget, groups=groups, layout=layout))


@settings(max_examples=150, deadline=None)
@given(
    count=st.integers(1, 90),
    budget=st.integers(1, 1500),
    of_reference=st.integers(1, 3000),
    groups=st.sampled_from(SEVERAL + ONE_SIZE),
    layout=st.sampled_from(LAYOUTS),
    seed=st.integers(0, 50),
)
def test_each_rank_scores_its_pairs_in_their_order_with_its_group(count, budget, of_reference, groups, layout, seed):
    lengths = any_lengths(seed)
    pairs = np.random.default_rng(seed).permutation(90)[:count]
    micro_steps = pack(pairs, lengths, budget, groups, layout)
    passes = regroup_for_forward(micro_steps, lengths, max_tokens=of_reference, layout=layout)
    check_groups(passes, groups)
    check_budget(passes, lengths, of_reference, layout, groups.sizes)  # a pass keeps its micro-batches' groups
    for rank in range(groups.world_size):
        trained = [(i, m.group_size) for of_ranks in micro_steps for m in [of_ranks[rank]] for i in m.indices]
        scored = [
            (i, m.group_size) for of_ranks in passes for m in [of_ranks[rank]] if m.weights.any() for i in m.indices
        ]
        assert scored == trained
    if of_reference >= budget and (pair_tokens(lengths[pairs], layout) <= groups.largest * budget).all():
        assert len(passes) <= len(micro_steps)


@pytest.mark.parametrize("groups", ONE_SIZE)
def test_groups_of_one_size_are_planned_as_so_many_ranks_with_all_their_tokens(groups):
    size = groups.largest
    units = Groups(groups.world_size // size)
    for seed in range(20):
        lengths, pairs = any_lengths(seed), np.random.default_rng(seed).permutation(90)[: 4 * seed + 1]
        budget = 40 * seed + 20
        plans = {
            "packed": [pack(pairs, lengths, n * budget, g) for g, n in ((groups, 1), (units, size))],
            "split": [split_among_ranks(pairs, lengths, micro_batch_size=3, groups=g) for g in (groups, units)],
            "forward": [
                forward_batches(pairs, lengths, max_tokens=n * budget, groups=g, layout="packed")
                for g, n in ((groups, 1), (units, size))
            ],
        }
        for of_groups_plan, of_units in plans.values():
            expected = [[(*shown([[m]])[0][0][:2], size) for m in unit for _ in range(size)] for unit in of_units]
            assert shown(of_groups_plan) == expected


def test_a_pair_goes_to_the_smallest_group_that_holds_it_and_short_ones_to_single_ranks():
    groups = Groups(8, (1, 2, 4, 8))
    # 960 tokens a rank, and no attention that would make the longest the costliest
    lengths = np.array([[3740, 50, 50], [1820, 50, 50]] + [[860, 50, 50]] * 2, dtype=np.int32)
    (of_ranks,) = pack_among_ranks(
        np.arange(4), lengths, max_tokens=1000, groups=groups, layout="shared_prefix", flops=LINEAR
    )
    assert [(m.indices.tolist(), m.group_size) for m in of_groups(of_ranks)] == [([0], 4), ([1], 2), ([2], 1), ([3], 1)]
    assert counted_pairs(of_ranks) == (1, 0, 0, 0, 1, 0, 1, 1)


def test_a_short_pair_rides_in_a_longer_ones_row_where_no_rank_is_free():
    lengths = np.array([[1500, 50, 50], [200, 50, 50]], dtype=np.int32)
    (of_ranks,) = pack(np.arange(2), lengths, 1000, Groups(2, (1, 2)))
    assert [(sorted(m.indices.tolist()), m.group_size) for m in of_ranks] == [([0, 1], 2)] * 2


def test_a_costly_pair_gets_more_ranks_than_its_tokens_need_if_it_would_hold_all_others_up():
    lengths = np.array([[10, 4000, 4000]] + [[10, 200, 200]] * 160, dtype=np.int32)
    quadratic = ForwardFlops(1.0, 0.0, ((None, 1.0),))
    # of the work the first pair is a tenth, or most: one rank holds it, and has an eighth of all to do
    for flops, size in ((LINEAR, 1), (quadratic, 8)):
        plan = pack_among_ranks(
            np.arange(161), lengths, max_tokens=10_000, groups=Groups(8, (1, 2, 4, 8)), layout="packed", flops=flops
        )
        assert [m.group_size for of_ranks in plan for m in of_groups(of_ranks) if 0 in m.indices] == [size]


@pytest.mark.parametrize("world", [6, 8, 12, 64])
def test_short_pairs_alone_are_planned_as_without_groups_or_better(world):
    sizes = tuple(2**k for k in range(7) if world % 2**k == 0)
    for seed in range(5):
        lengths = long_tailed(256, seed, times=1)
        planners = [Planner(lengths, "shared_prefix", Groups(world, s), 1, 8192, FLOPS, 3, 3) for s in ((1,), sizes)]
        today, auto = (planner.plan(np.arange(256)) for planner in planners)
        assert len(auto.micro_steps) <= len(today.micro_steps)
        assert planners[1].idle_fraction(auto) <= planners[0].idle_fraction(today) + 1e-9
        if planners[0].idle_fraction(today) < 0.03 and len(auto.micro_steps) == len(today.micro_steps):
            assert shown(auto.micro_steps) == shown(today.micro_steps)


@pytest.mark.parametrize("world", [8, 64])
def test_long_tails_leave_no_ranks_idle_and_share_few_rows(world):
    auto = Groups(world, (1, 2, 4, 8) if world == 8 else (1, 2, 4, 8, 16, 32))
    lengths = long_tailed(256 * 8)
    tokens = pair_tokens(lengths, "shared_prefix")
    assert 2 < tokens.max() / 8192 <= 4, "a row that 4 ranks hold and 2 do not"
    idle, micro_steps = {}, {}
    for groups in (Groups(world), Groups(world, (4,)), auto):
        planner = Planner(lengths, "shared_prefix", groups, 1, 8192, FLOPS, 3, 3)
        plans = [planner.plan(np.arange(256 * k, 256 * (k + 1))) for k in range(8)]
        idle[groups] = np.mean([planner.idle_fraction(plan) for plan in plans])
        micro_steps[groups] = sum(len(plan.micro_steps) for plan in plans)
    # all plans have the same work, so `idle` says how long they take
    assert idle[auto] < 0.05 and idle[auto] < 0.2 * idle[Groups(world)]
    assert micro_steps[auto] <= micro_steps[Groups(world, (4,))] + 2
    if world == 64:
        assert idle[auto] < 0.2 * idle[Groups(world, (4,))]
    of_rows = [m for plan in plans for of_ranks in plan.micro_steps for m in of_groups(of_ranks)]
    shared = sum(tokens[m.indices].sum() for m in of_rows if m.group_size > 1)
    assert tokens[tokens > 8192].sum() <= shared < 0.5 * tokens.sum()


@settings(max_examples=60, deadline=None)
@given(count=st.integers(1, 90), budget=st.integers(50, 1500), groups=st.sampled_from(SEVERAL), seed=st.integers(0, 50))
def test_there_are_at_most_a_tenth_more_micro_steps_than_if_all_groups_were_the_largest(count, budget, groups, seed):
    lengths, pairs = any_lengths(seed), np.random.default_rng(seed).permutation(90)[:count]
    largest = Groups(groups.world_size, (groups.largest,))
    assert len(pack(pairs, lengths, budget, groups)) <= 1.1 * len(pack(pairs, lengths, budget, largest))


def test_micro_steps_with_the_same_groups_follow_each_other():
    lengths = long_tailed(2048, seed=3)
    plan = pack(np.arange(2048), lengths, 8192, Groups(8, (1, 2, 4, 8)))
    structures = [tuple(m.group_size for m in of_groups(of_ranks)) for of_ranks in plan]
    runs = [s for k, s in enumerate(structures) if k == 0 or s != structures[k - 1]]
    assert 1 < len(runs) == len(set(structures)) < len(structures)
    assert all(list(s) == sorted(s, reverse=True) for s in structures), "the largest first, so each in its place"


def test_a_plan_counts_a_shared_row_once_with_what_fills_it_up():
    lengths = np.array([[4, 2, 3], [1, 5, 1]], dtype=np.int32)
    planner = Planner(lengths, "shared_prefix", Groups(4, (4,)), 2, None, FLOPS, 3.0, 3.0)
    plan = planner.plan(np.arange(2))
    assert plan.padding_fraction == pytest.approx(0.0)  # 16 tokens, 4 on each rank
    assert planner.idle_fraction(plan) == 0.0
    one = planner.plan(np.arange(1))
    assert one.padding_fraction == pytest.approx(1 - 9 / 12)


def test_what_the_log_says_of_shared_rows():
    class Dataset:
        def describe(self, index):
            return f"pair {index}"

    lengths = np.array([[3740, 50, 50], [1820, 50, 50]] + [[860, 50, 50]] * 2, dtype=np.int32)
    several = Planner(lengths, "shared_prefix", Groups(8, (1, 2, 4, 8)), 1, 1000, LINEAR, 3.0, 3.0)
    said = several.describe([several.plan(np.arange(4))], Dataset())
    assert "; of 4 micro-batches are shared by several ranks: 1 by 4, 1 by 2; by the plans" in said
    assert "longer" not in said
    alike = np.full((80, 3), 50, dtype=np.int32)
    none = Planner(alike, "shared_prefix", Groups(8, (1, 2)), 1, 1000, LINEAR, 3.0, 3.0)
    assert "; of 16 micro-batches are shared by several ranks: none; by the plans" in none.describe(
        [none.plan(np.arange(80))], Dataset()
    )
    fixed = Planner(lengths, "shared_prefix", Groups(8, (2,)), 1, 1000, LINEAR, 3.0, 3.0)
    said = fixed.describe([fixed.plan(np.arange(4))], Dataset())
    assert "8 ranks of at most 1000 tokens; rows are shared by 2 ranks; by the plans" in said
    assert (
        "; 1 pairs are longer than 2 ranks hold together and get micro-batches of their own, the longest pair 0" in said
    )
    plain = Planner(lengths, "shared_prefix", Groups(8), 1, 1000, LINEAR, 3.0, 3.0)
    said = plain.describe([plain.plan(np.arange(4))], Dataset())
    assert "shared" not in said and "; 2 pairs are longer than that and get" in said


def test_pairs_of_a_step_that_several_groups_share_are_counted_for_the_first_ranks():
    of_ranks = [MicroBatch.of(np.array([5, 6]), 2)] * 2 + [MicroBatch.of(np.array([7])), MicroBatch.filler(7)]
    assert counted_pairs(of_ranks) == (2, 0, 1, 0)


def test_planning_for_many_groups_is_quick():
    lengths = long_tailed(256 * 40)
    groups = Groups(64, (1, 2, 4, 8, 16, 32))
    pack(np.arange(256), lengths, 8192, groups)
    began = time.process_time()
    for k in range(40):
        pack(np.arange(256 * k, 256 * (k + 1)), lengths, 8192, groups)
    assert (time.process_time() - began) / 40 < 0.02  # 1.5 ms where this was written


def test_a_budget_of_nothing_gives_each_pair_the_largest_group():
    """What the check of stored rows goes by."""
    lengths = np.full((5, 3), 1, dtype=np.int32)
    for groups in SEVERAL + ONE_SIZE:
        plan = forward_batches(np.arange(5), lengths, max_tokens=0, groups=groups)
        assert len(plan) == math.ceil(5 * groups.largest / groups.world_size)
        assert all(len(m.indices) == 1 and m.group_size == groups.largest for of_ranks in plan for m in of_ranks)
