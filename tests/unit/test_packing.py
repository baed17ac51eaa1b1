"""Micro-batches under a budget of tokens: every pair once, in step, within the budget, balanced, always the same."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_scale.data.batching import PairOrder, forward_batches
from dpo_scale.data.flops import ForwardFlops
from dpo_scale.data.groups import Groups
from dpo_scale.data.layout import pair_tokens, slots
from dpo_scale.data.packing import pack_among_ranks
from dpo_scale.data.planning import Planner

LAYOUTS = ["padded", "packed", "shared_prefix"]
# a token costs as much as 3,000 attended keys, as in a model of 135 million weights; in larger ones it costs more
FLOPS = ForwardFlops(per_token=3000.0, per_scored_token=800.0, attention=((None, 1.0),))


def plan(pairs, lengths, budget, world, layout, flops=FLOPS):
    return pack_among_ranks(pairs, lengths, max_tokens=budget, groups=Groups(world), layout=layout, flops=flops)


def indices(layout):
    return [[micro_batch.indices.tolist() for micro_batch in ranks] for ranks in layout]


def wide_lengths(count, seed=0):
    """Pairs of 8 to 4,000 tokens, as many of each order of magnitude."""
    rng = np.random.default_rng(seed)
    totals = np.exp(rng.uniform(np.log(8), np.log(4000), size=count))
    shares = rng.dirichlet([2, 2, 2], size=count)
    return np.maximum(1, (totals[:, None] * shares)).astype(np.int32)


@settings(max_examples=150, deadline=None)
@given(
    count=st.integers(1, 60),
    budget=st.integers(1, 3000),
    world=st.integers(1, 8),
    layout=st.sampled_from(LAYOUTS),
    seed=st.integers(0, 100),
)
def test_every_pair_is_in_one_micro_batch_within_the_budget_and_ranks_run_in_step(count, budget, world, layout, seed):
    rng = np.random.default_rng(seed)
    lengths = np.exp(rng.uniform(0, 6, size=(80, 3))).astype(np.int32)
    pairs = rng.permutation(80)[:count]
    made = plan(pairs, lengths, budget, world, layout)
    assert all(len(ranks) == world for ranks in made)
    real = [micro_batch for ranks in made for micro_batch in ranks if micro_batch.weights.any()]
    assert sorted(np.concatenate([micro_batch.indices for micro_batch in real])) == sorted(pairs)
    for micro_batch in real:
        assert slots(layout, micro_batch.indices, lengths) <= budget or len(micro_batch.indices) == 1
        assert (micro_batch.weights == 1).all()
    for ranks in made:
        assert any(micro_batch.weights.any() for micro_batch in ranks), "a micro-step without work"
        assert all(len(micro_batch.indices) for micro_batch in ranks)
    shuffled = plan(rng.permutation(pairs), lengths.copy(), budget, world, layout)
    assert indices(made) == indices(shuffled)


def test_no_more_micro_steps_than_needed_where_the_pairs_fill_the_budget():
    lengths = np.full((24, 3), 100, dtype=np.int32)
    # 300 tokens a pair, 400 with the prompt twice
    for layout, in_budget in (("shared_prefix", 4), ("packed", 3), ("padded", 3)):
        assert [len(m.indices) for ranks in plan(np.arange(24), lengths, 1200, 2, layout) for m in ranks] == (
            [in_budget] * (24 // in_budget)
        )


def test_few_pairs_are_spread_over_all_ranks():
    lengths = np.full((4, 3), 5, dtype=np.int32)
    for layout in LAYOUTS:
        assert indices(plan(np.arange(4), lengths, 10_000, 4, layout)) == [[[0], [1], [2], [3]]]


def test_a_rank_without_a_pair_repeats_a_short_one_at_weight_0():
    lengths = np.array([[50, 9, 9], [5, 2, 2]], dtype=np.int32)
    for layout in LAYOUTS:
        (ranks,) = plan(np.arange(2), lengths, 1000, 3, layout)
        assert [(m.indices.tolist(), m.weights.tolist()) for m in ranks] == [([0], [1]), ([1], [1]), ([1], [0])]


def test_longest_first_and_a_pair_over_the_budget_is_alone():
    lengths = np.array([[10, 10, 10]] * 6 + [[500, 300, 200]], dtype=np.int32)
    for layout in LAYOUTS:
        made = plan(np.arange(7), lengths, 120, 2, layout)
        assert made[0][0].indices.tolist() == [6]


def test_a_long_pair_counts_for_more_than_its_tokens():
    # one pair of 1,200 tokens against twelve of 100: as many tokens, several times the attention
    lengths = np.array([[400, 400, 400]] + [[34, 33, 33]] * 24, dtype=np.int32)
    flops = ForwardFlops(per_token=1000.0, per_scored_token=0.0, attention=((None, 2.0),))
    (ranks,) = plan(np.arange(25), lengths, 3000, 2, "shared_prefix", flops)
    with_long = next(m for m in ranks if 0 in m.indices)
    tokens = [pair_tokens(lengths[m.indices], "shared_prefix").sum() for m in ranks]
    assert pair_tokens(lengths[with_long.indices], "shared_prefix").sum() == min(tokens) < max(tokens)
    costs = [flops.of_pairs(lengths[m.indices], "shared_prefix").sum() for m in ranks]
    assert max(costs) < 1.05 * min(costs)


@pytest.mark.parametrize("layout", ["packed", "shared_prefix"])
@pytest.mark.parametrize("world", [2, 8])
def test_rows_of_8_to_4000_tokens_leave_ranks_idle_and_slots_empty_for_under_5_percent(layout, world):
    lengths = wide_lengths(64 * world * 8)
    planner = Planner(lengths, layout, Groups(world), 1, 8192, FLOPS, 3.0, 3.0)
    pair_order = PairOrder(len(lengths), 32 * world, seed=0)
    plans = planner.first_plans(pair_order, 16)
    assert len(plans) == 16
    assert np.mean([planner.idle_fraction(one) for one in plans]) < 0.05
    assert max(one.padding_fraction for one in plans) < 0.05
    # the same pairs in micro-batches of a fixed number of padded rows
    fixed = Planner(lengths, "padded", Groups(world), 4, None, FLOPS, 3.0, 3.0)
    assert np.mean([fixed.idle_fraction(one) for one in fixed.first_plans(pair_order, 16)]) > 0.05


def test_padded_runs_are_more_even_and_emptier_of_padding_than_fixed_numbers_of_pairs():
    lengths = wide_lengths(512, seed=3)
    pair_order = PairOrder(512, 64, seed=0)
    by_tokens = Planner(lengths, "padded", Groups(2), 1, 8192, FLOPS, 3.0, 3.0)
    by_pairs = Planner(lengths, "padded", Groups(2), 4, None, FLOPS, 3.0, 3.0)

    def mean(planner, measure):
        return np.mean([measure(planner, one) for one in planner.first_plans(pair_order, 8)])

    assert mean(by_tokens, Planner.idle_fraction) < 0.7 * mean(by_pairs, Planner.idle_fraction)
    steps = [mean(planner, lambda _, one: len(one.micro_steps)) for planner in (by_tokens, by_pairs)]
    assert steps[0] < steps[1]


def test_plans_say_what_a_step_holds():
    lengths = np.array([[4, 2, 3], [1, 5, 1]], dtype=np.int32)
    flops = ForwardFlops(per_token=1.0, per_scored_token=100.0, attention=())
    one = Planner(lengths, "padded", Groups(1), 2, None, flops, 3.0, 3.0).plan(np.arange(2))
    assert one.tokens == 16 and one.mean_chosen_tokens == 3.5
    assert one.padding_fraction == pytest.approx(1 - 21 / 28)  # 4 rows of 7; rows of 6, 7, 6 and 2 tokens
    assert one.useful_flops == 3 * (16 + 100 * 11)


@settings(max_examples=60, deadline=None)
@given(count=st.integers(1, 50), budget=st.integers(1, 2000), world=st.integers(1, 4), layout=st.sampled_from(LAYOUTS))
def test_forward_batches_of_every_layout_hold_every_pair_once_within_the_budget(count, budget, world, layout):
    lengths = wide_lengths(50) // 10 + 1
    pairs = np.random.default_rng(2).permutation(50)[:count]
    made = forward_batches(pairs, lengths, max_tokens=budget, groups=Groups(world), layout=layout)
    assert all(len(ranks) == world for ranks in made)
    real = [m.indices for ranks in made for m in ranks if m.weights.any()]
    assert sorted(np.concatenate(real)) == sorted(pairs)
    assert all(slots(layout, m, lengths) <= budget or len(m) == 1 for m in real)
    if layout != "padded" and count >= 8 * world:
        # the next pair would not have fitted, or every rank has its share
        used = [pair_tokens(lengths[m], layout).sum() for m in real]
        following = [pair_tokens(lengths[m[:1]], layout)[0] for m in real[1:]]
        share = -(-count // world)
        for m, now, after in list(zip(real, used, following, strict=False))[world:]:
            assert now + after > budget or len(m) == share


def test_planning_is_quick():
    lengths = wide_lengths(128 * 200)
    pair_order = PairOrder(len(lengths), 128, seed=0)
    order = pair_order.epoch_order(0)
    started = time.process_time()
    for step in range(pair_order.steps_per_epoch):
        plan(pair_order.global_batch(step, order), lengths, 8192, 8, "shared_prefix")
    # 0.3 ms a step where this was written: 20 s for an epoch of ten million pairs
    assert (time.process_time() - started) / pair_order.steps_per_epoch < 0.003
