"""Order and layout of batches: pure functions, every pair once, little padding, the same pairs for any world size."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_scale.data.batching import PairOrder, forward_batches, split_among_ranks
from dpo_scale.data.groups import Groups
from dpo_scale.data.layout import pair_tokens, slots


def random_lengths(count, seed=0):
    return np.random.default_rng(seed).integers(1, 60, size=(count, 3)).astype(np.int32)


def test_an_epoch_is_every_pair_once_in_another_order_each_epoch():
    pair_order = PairOrder(10, 4, seed=3)
    orders = [pair_order.epoch_order(epoch) for epoch in range(2)]
    batches = [pair_order.global_batch(step, orders[0]) for step in range(3)]
    assert [len(batch) for batch in batches] == [4, 4, 2]
    assert sorted(np.concatenate(batches)) == list(range(10))
    assert list(orders[0]) != list(orders[1])
    assert list(orders[0]) == list(PairOrder(10, 4, seed=3).epoch_order(0))
    assert list(orders[0]) != list(PairOrder(10, 4, seed=4).epoch_order(0))


def test_the_last_incomplete_batch_is_used_or_dropped():
    assert PairOrder(10, 4, seed=0).total_steps(2, None) == 6
    assert PairOrder(10, 4, seed=0, drop_last=True).total_steps(2, None) == 4
    assert PairOrder(10, 4, seed=0).total_steps(0.5, None) == 2
    assert PairOrder(10, 4, seed=0).total_steps(2, 100) == 100


def test_steps_past_an_epoch_continue_in_the_next():
    pair_order = PairOrder(4, 2, seed=0)
    assert [pair_order.epoch_of(step) for step in range(5)] == [0, 0, 1, 1, 2]
    order = pair_order.epoch_order(1)
    assert list(pair_order.global_batch(2, order)) == list(order[:2])


def test_unshuffled_order_is_the_files():
    assert list(PairOrder(5, 2, seed=0, shuffle=False).epoch_order(3)) == [0, 1, 2, 3, 4]


@settings(max_examples=60, deadline=None)
@given(count=st.integers(1, 40), micro=st.integers(1, 6), world=st.integers(1, 5))
def test_every_pair_is_seen_once_and_ranks_run_in_step(count, micro, world):
    lengths = random_lengths(50)
    pairs = np.random.default_rng(1).permutation(50)[:count]
    layout = split_among_ranks(pairs, lengths, micro_batch_size=micro, groups=Groups(world))
    assert len(layout) == max(1, -(-count // (micro * world)))
    assert all(len(ranks) == world for ranks in layout)
    real = np.concatenate([m.indices[m.weights > 0] for ranks in layout for m in ranks])
    assert sorted(real) == sorted(pairs)
    sizes = [len(m.indices) for ranks in layout for m in ranks if m.weights.any()]
    assert 1 <= min(sizes) <= max(sizes) <= micro and max(sizes) - min(sizes) <= 1
    assert all(len(m.indices) >= 1 for ranks in layout for m in ranks)


def test_layout_does_not_depend_on_the_order_of_the_pairs():
    lengths = random_lengths(20)
    pairs = np.arange(12)
    one = split_among_ranks(pairs, lengths, micro_batch_size=2, groups=Groups(2))
    two = split_among_ranks(pairs[::-1].copy(), lengths, micro_batch_size=2, groups=Groups(2))
    assert [list(m.indices) for r in one for m in r] == [list(m.indices) for r in two for m in r]


def test_sorting_by_length_pads_less_than_the_given_order():
    lengths = random_lengths(64, seed=5)
    pairs = np.arange(64)

    def padding(batches):
        computed = sum(slots("padded", b, lengths) for b in batches)
        return 1 - sum(pair_tokens(lengths[b], "padded").sum() for b in batches) / computed

    laid_out = split_among_ranks(pairs, lengths, micro_batch_size=4, groups=Groups(2))
    ours = padding([m.indices for ranks in laid_out for m in ranks])
    assert ours < 0.6 * padding(np.array_split(pairs, 16))


@pytest.mark.parametrize("world", [1, 2, 4])
def test_longest_rows_come_first(world):
    lengths = random_lengths(32)
    layout = split_among_ranks(np.arange(32), lengths, micro_batch_size=2, groups=Groups(world))
    widest = [max(int((lengths[m.indices, 0] + lengths[m.indices, 1:].max(1)).max()) for m in r) for r in layout]
    assert widest == sorted(widest, reverse=True)


@settings(max_examples=60, deadline=None)
@given(count=st.integers(1, 50), budget=st.integers(1, 2000), world=st.integers(1, 4))
def test_forward_batches_hold_every_pair_once_within_the_budget(count, budget, world):
    lengths = random_lengths(50)
    pairs = np.random.default_rng(2).permutation(50)[:count]
    layout = forward_batches(pairs, lengths, max_tokens=budget, groups=Groups(world))
    assert all(len(ranks) == world for ranks in layout)
    real = [m.indices for ranks in layout for m in ranks if m.weights.any()]
    assert sorted(np.concatenate(real)) == sorted(pairs)
    assert all(slots("padded", m, lengths) <= budget or len(m) == 1 for m in real)
    if count >= world:
        assert all(any(ranks[r].weights.any() for ranks in layout) for r in range(world)), "a rank without work"


@pytest.mark.parametrize("drop_last", [False, True])
def test_the_pairs_of_a_run_are_those_its_steps_see(drop_last):
    pair_order = PairOrder(22, 8, seed=1, drop_last=drop_last)
    for total in (1, 2, 3, 4, 7):
        seen = set()
        for step in range(total):
            seen |= set(pair_order.global_batch(step, pair_order.epoch_order(pair_order.epoch_of(step))).tolist())
        assert pair_order.pairs_of_run(total).tolist() == sorted(seen)
