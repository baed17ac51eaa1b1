"""A step's pairs laid out for the reference's passes, and its values brought to the policy's micro-batches."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_scale.data.batching import MAX_ADDED_SLOTS, MicroBatch, regroup_for_forward, split_among_ranks
from dpo_scale.data.dataset import Pair
from dpo_scale.data.flops import ForwardFlops
from dpo_scale.data.groups import Groups
from dpo_scale.data.layout import make_batch, slots
from dpo_scale.data.packing import pack_among_ranks
from dpo_scale.data.planning import Planner
from dpo_scale.reference.live import LiveReference
from dpo_scale.reference.protocol import NoReference

LAYOUTS = ["padded", "packed", "shared_prefix"]
FLOPS = ForwardFlops(per_token=3000.0, per_scored_token=800.0, attention=((None, 1.0),))


def lengths_of(count, seed=0):
    return np.exp(np.random.default_rng(seed).uniform(0, 5, size=(count, 3))).astype(np.int32)


def of_rank(steps, rank, *, real_only=False):
    return [m.indices.tolist() for ranks in steps for m in [ranks[rank]] if m.weights.any() or not real_only]


@settings(max_examples=200, deadline=None)
@given(
    count=st.integers(1, 60),
    micro=st.integers(1, 6),
    tokens=st.none() | st.integers(1, 900),
    budget=st.integers(1, 3000),
    world=st.integers(1, 5),
    layout=st.sampled_from(LAYOUTS),
    seed=st.integers(0, 20),
)
def test_each_rank_scores_its_own_pairs_in_their_order_within_the_budget(
    count, micro, tokens, budget, world, layout, seed
):
    lengths = lengths_of(70, seed)
    pairs = np.random.default_rng(seed).permutation(70)[:count]
    if tokens is None:
        micro_steps = split_among_ranks(pairs, lengths, micro_batch_size=micro, groups=Groups(world))
    else:
        micro_steps = pack_among_ranks(
            pairs, lengths, max_tokens=tokens, groups=Groups(world), layout=layout, flops=FLOPS
        )
    passes = regroup_for_forward(micro_steps, lengths, max_tokens=budget, layout=layout)
    assert all(len(ranks) == world for ranks in passes)
    assert any(all(ranks[rank].weights.any() for ranks in passes) for rank in range(world)), "a pass of fillers alone"
    for rank in range(world):
        scored = of_rank(passes, rank, real_only=True)
        trained = of_rank(micro_steps, rank)
        assert sum(scored, []) == sum(trained, [])
        assert all(slots(layout, np.array(run), lengths) <= budget or len(run) == 1 for run in scored)
        # fillers come last and are short
        assert of_rank(passes, rank)[: len(scored)] == scored
        for filler in of_rank(passes, rank)[len(scored) :]:
            own = [slots(layout, np.array([pair]), lengths) for pair in sum(trained, [])]
            assert slots(layout, np.array(filler), lengths) == min(own)
    micro_batches = [m.indices for ranks in micro_steps for m in ranks]
    if all(slots(layout, indices, lengths) <= budget for indices in micro_batches):
        assert len(passes) <= len(micro_steps)


@pytest.mark.parametrize("layout", ["packed", "shared_prefix"])
def test_no_pass_has_room_for_the_pair_after_it(layout):
    lengths = lengths_of(64)
    micro_steps = split_among_ranks(np.arange(64), lengths, micro_batch_size=2, groups=Groups(2))
    passes = regroup_for_forward(micro_steps, lengths, max_tokens=1500, layout=layout)
    assert 2 < len(passes) < len(micro_steps)
    for rank in range(2):
        scored = of_rank(passes, rank, real_only=True)
        for run, after in zip(scored, scored[1:], strict=False):
            assert slots(layout, np.array([*run, after[0]]), lengths) > 1500


def test_padded_micro_batches_are_merged_while_that_adds_little_padding():
    lengths = np.array([[10, 90, 90]] * 4 + [[10, 70, 70]] * 4 + [[1, 9, 9]] * 8, dtype=np.int32)
    micro_steps = split_among_ranks(np.arange(16), lengths, micro_batch_size=2, groups=Groups(1))
    passes = regroup_for_forward(micro_steps, lengths, max_tokens=10_000, layout="padded")
    # rows of 80 go with rows of 100, rows of 10 do not
    assert [len(run) for run in of_rank(passes, 0)] == [8, 8]
    apart = [sum(slots("padded", m.indices, lengths) for (m,) in part) for part in (micro_steps[:4], micro_steps[4:])]
    for run, before in zip(of_rank(passes, 0), apart, strict=True):
        assert slots("padded", np.array(run), lengths) <= MAX_ADDED_SLOTS * before


def test_a_single_micro_step_is_scored_as_it_is_trained():
    lengths = lengths_of(6)
    for layout in LAYOUTS:
        micro_steps = split_among_ranks(np.arange(6), lengths, micro_batch_size=3, groups=Groups(2))
        passes = regroup_for_forward(micro_steps, lengths, max_tokens=10_000, layout=layout)
        for rank in range(2):
            assert of_rank(passes, rank) == of_rank(micro_steps, rank)


def test_only_a_reference_that_runs_is_planned_for():
    planner = Planner(lengths_of(12), "packed", Groups(2), 1, None, FLOPS, 4.0, 4.0, reference_tokens=100_000)
    plan = planner.plan(np.arange(12))
    assert len(plan.micro_steps) == 6 and len(plan.reference_passes) == 1
    assert "reference passes a step: 1 of at most 100000 tokens" in planner.describe([plan], dataset=None)
    without = replace(planner, reference_tokens=None).plan(np.arange(12))
    assert without.reference_passes == []
    assert [of_rank(p.micro_steps, 0) for p in (plan, without)] == [of_rank(plan.micro_steps, 0)] * 2


def a_pair(index):
    rng = np.random.default_rng(index)
    ids = [rng.integers(1, 99, size=n) for n in rng.integers(1, 6, size=3)]
    return Pair(*ids, pair_key=bytes(16), index=index)


def batch_of(*indices):
    return make_batch("packed", [a_pair(i) for i in indices], np.ones(len(indices)), 0)


class Model:
    """Stands for an engine: every token has a log-prob of its own."""

    passes = 0

    def __call__(self, score_targets, **_):
        self.passes += 1
        return -torch.sqrt(score_targets.float())


def sums_of(index, ld_alpha=1.0):
    pair = a_pair(index)
    shared = min(len(pair.chosen_ids), len(pair.rejected_ids))
    of_tokens = [-np.sqrt(ids.astype(np.float64)) for ids in (pair.chosen_ids, pair.rejected_ids)]
    return [values[:shared].sum() + ld_alpha * values[shared:].sum() for values in of_tokens]


@pytest.mark.parametrize("ld_alpha", [None, 0.25])
def test_values_scored_in_passes_come_to_the_batches_of_their_pairs(ld_alpha):
    model = Model()
    reference = LiveReference(model, ld_alpha)
    passes = [batch_of(3, 1, 4), batch_of(5, 9), batch_of(2)]  # the last is a filler
    for indices in ((3, 1), (4, 5, 9)):
        attached = reference.attach(batch_of(*indices), passes).reference_logps
        passes = []
        expected = [sums_of(index, 1.0 if ld_alpha is None else ld_alpha) for index in indices]
        torch.testing.assert_close(attached, torch.tensor(expected, dtype=torch.float32), atol=1e-5, rtol=1e-6)
    assert model.passes == 3, "nothing is scored twice"
    reference.after_step(1)
    attached = reference.attach(batch_of(6)).reference_logps
    expected = torch.tensor([sums_of(6, 1.0 if ld_alpha is None else ld_alpha)], dtype=torch.float32)
    torch.testing.assert_close(attached, expected, atol=1e-5, rtol=1e-6)  # not what the filler left


def test_a_filler_between_passes_leaves_no_values_behind():
    """A rank of a large group may need fewer passes than others before its groups change."""
    filler = make_batch("packed", [a_pair(1)], np.zeros(1), 0)
    reference = LiveReference(Model())
    passes = [batch_of(3, 1), filler, batch_of(4, 5), filler]
    for index in (3, 1, 4, 5):
        attached = reference.attach(batch_of(index), passes).reference_logps
        passes = []
        torch.testing.assert_close(attached, torch.tensor([sums_of(index)]).float(), atol=1e-5, rtol=1e-6)


def test_a_batch_that_was_not_scored_is_scored_when_it_comes():
    model = Model()
    reference = LiveReference(model)
    for index in (7, 8):
        attached = reference.attach(batch_of(index)).reference_logps
        torch.testing.assert_close(attached, torch.tensor([sums_of(index)]).float(), atol=1e-5, rtol=1e-6)
    assert model.passes == 2


def test_no_reference_leaves_the_batch_alone():
    batch = replace(batch_of(1), reference_logps=torch.zeros(1, 2))
    assert NoReference().attach(batch) is batch


def test_micro_batches_of_unequal_ranks_make_as_many_passes():
    lengths = np.full((5, 3), 10, dtype=np.int32)
    ones = np.ones(1, dtype=np.float32)
    micro_steps = [[MicroBatch(np.array([k]), ones), MicroBatch(np.array([4]), 0 * ones)] for k in range(4)]
    first, second = regroup_for_forward(micro_steps, lengths, max_tokens=80, layout="packed")
    assert [m.indices.tolist() for m in first] == [[0, 1], [4, 4]]
    assert [m.indices.tolist() for m in second] == [[2, 3], [4, 4]]
