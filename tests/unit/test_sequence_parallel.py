"""Rows that ranks share: who has which tokens, who scores which, what is refused. Ranks are threads here, or none."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import transformers
from tiny import tiny_config

from dpo_scale.data.dataset import Pair
from dpo_scale.data.groups import Groups
from dpo_scale.data.layout import make_batch
from dpo_scale.distributed import ranks
from dpo_scale.distributed.sequence_parallel import SequenceGroup, over_heads
from dpo_scale.errors import ConfigError
from dpo_scale.logprobs.pair_loss import PairLoss, fused_pair_loss
from dpo_scale.models import load
from dpo_scale.models.layout_choice import choose_groups, choose_layout
from dpo_scale.settings.tree import load_config


def batches(layout, sizes, group_size):
    """The same pairs as each rank of a group gets them."""
    draw = np.random.default_rng(0)
    pairs = [Pair(*(draw.integers(1, 99, n) for n in of_pair), b"", i) for i, of_pair in enumerate(sizes)]
    weights = np.ones(len(pairs))
    return [make_batch(layout, pairs, weights, 0, group_size=group_size, group_rank=rank) for rank in range(group_size)]


@pytest.mark.parametrize("group_size", [2, 3, 4, 8])
@pytest.mark.parametrize("layout", ["packed", "shared_prefix"])
def test_every_scored_hidden_state_reaches_the_rank_that_scores_it_in_order(layout, group_size):
    whole = batches(layout, [(5, 3, 9), (1, 1, 1), (40, 2, 30)], 1)[0]
    of_ranks = batches(layout, [(5, 3, 9), (1, 1, 1), (40, 2, 30)], group_size)
    hidden = torch.arange(of_ranks[0].input_ids.shape[1]) * 10  # a hidden state that tells its position
    assert len(hidden) % group_size == 0
    sent = []
    for batch in of_ranks:
        own = batch.share.part_of(hidden[None])[0]
        sent.append(own[batch.share.sent_index].split(batch.share.sent))
    scored_at = [None] * group_size
    for rank, batch in enumerate(of_ranks):
        arrived = [sent[other][rank] for other in range(group_size)]
        assert tuple(map(len, arrived)) == batch.share.received
        scored_at[rank] = torch.cat(arrived)[batch.share.order]
        assert torch.equal(scored_at[rank], batch.share.dealt(whole.score_index) * 10)
    counts = [len(positions) for positions in scored_at]
    assert max(counts) - min(counts) <= 1


def test_a_shared_row_is_the_whole_row_and_a_document_that_fills_it_up():
    (whole,) = batches("shared_prefix", [(5, 3, 9), (2, 1, 1)], 1)
    batch = batches("shared_prefix", [(5, 3, 9), (2, 1, 1)], 4)[2]
    assert whole.input_ids.shape[1] == 21 and batch.input_ids.shape[1] == 24
    for name in ("input_ids", "position_ids", "document_ids", "branch_ids"):
        assert torch.equal(getattr(batch, name)[:, :21], getattr(whole, name)), name
    assert batch.document_ids[0, 21:].tolist() == [2, 2, 2] and batch.position_ids[0, 21:].tolist() == [0, 1, 2]
    assert batch.segments == (*whole.segments, (3, 0))
    assert torch.equal(batch.score_index, whole.score_index)
    parts = [part.share.part_of(part.input_ids) for part in batches("shared_prefix", [(5, 3, 9), (2, 1, 1)], 4)]
    assert torch.equal(torch.cat(parts, dim=1), batch.input_ids)


def test_pairs_of_a_group_count_on_its_first_rank_only():
    first, second = batches("packed", [(5, 3, 9)], 2)
    assert first.leads and first.counted.tolist() == [1.0]
    assert not second.leads and second.counted.tolist() == [0.0] and second.weights.tolist() == [1.0]


class Ranks:
    """Threads that are the ranks of a group: a sum over them, and how often they summed."""

    def __init__(self, size):
        self.size, self.sums = size, [0] * size
        self._parts, self._barrier = [None] * size, threading.Barrier(size, timeout=20)

    def sum_for(self, rank):
        def sum_over_ranks(values):
            self._parts[rank] = values.clone()
            self._barrier.wait()
            total = torch.stack(self._parts).sum(0)
            self._barrier.wait()
            self.sums[rank] += 1
            return total

        return sum_over_ranks

    def run(self, work):
        with ThreadPoolExecutor(self.size) as pool:
            return [future.result(timeout=60) for future in [pool.submit(work, rank) for rank in range(self.size)]]


@pytest.mark.parametrize("held_rows", [1000, 7, 3])
@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("trained_head", [True, False])
def test_the_fused_loss_of_dealt_tokens_is_that_of_all_tokens(size, held_rows, trained_head):
    # more than fit at a time, one pair longer than that alone, pairs with fewer tokens than ranks
    counts = [5, 1 + 1, 40, 3, 9, 2, 2, 17]
    torch.manual_seed(0)
    hidden, weight = torch.randn(sum(counts), 4, dtype=torch.float64), torch.randn(60, 4, dtype=torch.float64)
    targets = torch.randint(60, (sum(counts),))
    # the chosen completion has one token, the rejected one the rest
    segments = torch.cat([torch.tensor([2 * i] + [2 * i + 1] * (n - 1)) for i, n in enumerate(counts)])
    token_weights = torch.rand(sum(counts), dtype=torch.float64)

    def losses(sums):
        return -torch.nn.functional.logsigmoid(0.3 * (sums[:, 0] - sums[:, 1]))

    def grads(pair_loss, hidden, targets):
        leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_(trained_head)]
        bounds = {"tile_bytes": 40 * 8, "max_held": held_rows * 60 * 8}
        total, sums = fused_pair_loss(leaves[0], leaves[1], targets, pair_loss, implementation="chunked", **bounds)
        total.backward()
        return total, sums, leaves[0].grad, leaves[1].grad

    whole = PairLoss(segments, counts, losses, token_weights)
    total, sums, of_hidden, of_weight = grads(whole, hidden, targets)
    group = Ranks(size)

    def one(rank):
        own = whole.dealt(size, rank, group.sum_for(rank))
        assert sum(own.scored_tokens) == len(own.segments) and max(own.planned_tokens) == -(-40 // size)
        return grads(own, hidden[rank::size], targets[rank::size])

    found = group.run(one)
    for rank, (own_total, own_sums, own_hidden, _) in enumerate(found):
        torch.testing.assert_close(own_total, total)
        torch.testing.assert_close(own_sums, sums)
        torch.testing.assert_close(own_hidden, of_hidden[rank::size])
    if trained_head:
        torch.testing.assert_close(sum(part[3] for part in found), of_weight)
    assert len(set(group.sums)) == 1 and (group.sums[0] > 1) == (held_rows < 1000)


@pytest.mark.parametrize("heads, key_heads", [(8, 8), (8, 4), (8, 2), (8, 1), (6, 3), (6, 2), (9, 3), (12, 6), (7, 1)])
@pytest.mark.parametrize("size", [2, 3, 4])
def test_each_head_meets_its_own_key_head_and_all_tokens(monkeypatch, heads, key_heads, size):
    """Attention that is a sum over all keys' values tells which key head and which tokens a query head saw."""
    tokens, group = 3, Ranks(size)
    posted = [None] * size
    barrier = threading.Barrier(size, timeout=20)

    def exchange(rows, of_group):
        posted[of_group.rank] = rows.chunk(size)
        barrier.wait()
        got = torch.cat([parts[of_group.rank] for parts in posted])
        barrier.wait()
        return got

    monkeypatch.setattr("dpo_scale.distributed.sequence_parallel.exchange", exchange)
    torch.manual_seed(0)
    query, key = torch.randn(1, heads, size * tokens, 2), torch.randn(1, key_heads, size * tokens, 2)
    value, sinks = torch.randn(1, key_heads, size * tokens, 5), torch.randn(heads)

    def attend(module, q, k, v, mask, *, s_aux):
        assert q.shape[2] == size * tokens
        repeats = q.shape[1] // k.shape[1]
        k, v = (tensor.repeat_interleave(repeats, dim=1) for tensor in (k, v))
        weights = (q @ k.transpose(2, 3)).softmax(-1) * s_aux[None, :, None, None]
        return (weights @ v).transpose(1, 2), None

    expected, _ = attend(None, query, key, value, None, s_aux=sinks)

    def one(rank):
        own = slice(rank * tokens, (rank + 1) * tokens)
        parts = (tensor[:, :, own] for tensor in (query, key, value))
        return over_heads(attend, SequenceGroup(size, rank, None), None, *parts, None, s_aux=sinks)[0]

    torch.testing.assert_close(torch.cat(group.run(one), dim=1), expected)


def test_rows_of_a_size_go_to_the_smallest_group_that_holds_them():
    groups = Groups(16, (1, 2, 4, 8))
    assert groups.smallest_for(np.array([1, 100, 101, 200, 201, 800, 9999]), 100).tolist() == [1, 1, 2, 2, 4, 8, 8]
    assert Groups(8, (4,)).smallest_for(np.array([1, 9999]), 100).tolist() == [4, 4]


AUTO = ["train.sequence_parallel_size=auto", "train.max_tokens_per_micro_batch=9"]


def config(*overrides):
    common = ["model.path=somewhere", "data.train=rows.jsonl", "model.dtype=float32"]
    return load_config(None, [*common, *overrides])


@pytest.mark.parametrize(
    "world, asked, sizes",
    [(8, "1", (1,)), (8, "4", (4,)), (8, "auto", (1, 2, 4)), (6, "auto", (1, 2)), (6, "3", (3,)), (1, "auto", (1,))],
)
def test_the_groups_of_a_run(world, asked, sizes):
    asked_for = config(f"train.sequence_parallel_size={asked}", "train.max_tokens_per_micro_batch=100")
    # the tiny model has 4 heads
    assert choose_groups(asked_for, [tiny_config("llama")], world) == Groups(world, sizes)


@pytest.mark.parametrize("of_machine, told", [("2", True), ("8", False), (None, False)])
def test_a_group_that_reaches_over_machines_is_told_of(monkeypatch, tmp_path, of_machine, told):
    said = []
    monkeypatch.setattr(ranks, "log", said.append)
    monkeypatch.setattr(ranks, "from_main", lambda value: value)
    monkeypatch.setattr(load, "make_groups", lambda sizes, minutes: None)  # there are no other ranks here
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.delenv("LOCAL_SIZE", raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if of_machine is not None:
        monkeypatch.setenv("LOCAL_SIZE", of_machine)  # as DeepSpeed's launcher sets it
    tiny_config("llama").save_pretrained(tmp_path)
    load.resolve_layout(config(f"model.path={tmp_path}", "train.sequence_parallel_size=4"))
    assert any("shared by 4 ranks, and a machine has 2" in line for line in said) == told


def rope(kind):
    found = tiny_config("llama")
    found.rope_parameters = {"rope_type": kind, "factor": 2.0, "rope_theta": 1e4}
    return found


@pytest.mark.parametrize(
    "model, overrides, message",
    [
        (tiny_config("llama"), ["train.sequence_parallel_size=3"], "a divisor of the number of ranks, which is 8"),
        (tiny_config("llama"), ["train.sequence_parallel_size=8"], "at most 4, the model's attention heads"),
        (rope("dynamic"), ["train.sequence_parallel_size=2"], "dynamic positions scales them by the length"),
        (rope("longrope"), ["train.sequence_parallel_size=2"], "longrope positions scales them by the length"),
    ],
)
def test_what_cannot_be_shared_is_refused_by_name(model, overrides, message):
    with pytest.raises(ConfigError, match=f"train.sequence_parallel_size = [238].*{message}"):
        choose_groups(config(*overrides), [model], 8)


@pytest.mark.parametrize(
    "model, overrides, why",
    [
        (tiny_config("llama"), ["model.attn_implementation=eager"], "takes one sequence a row"),
        (transformers.MambaConfig(), [], "layers of linear_attention"),
    ],
)
def test_a_model_that_takes_only_padded_rows_cannot_share_them(model, overrides, why):
    with pytest.raises(ConfigError, match=f"train.sequence_parallel_size = 'auto': .*({why}).*; expected 1"):
        choose_layout(config(*AUTO, *overrides), [model])


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["train.sequence_parallel_size=0"], "at least 1"),
        (["train.sequence_parallel_size=half"], "a whole number or one of|a whole number or 'auto'"),
        (["train.sequence_parallel_size=2", "data.layout=padded"], "data.layout = 'padded'"),
        (["train.sequence_parallel_size=auto"], "train.max_tokens_per_micro_batch = None"),
        (
            [
                "train.sequence_parallel_size=auto",
                "train.max_tokens_per_micro_batch=9",
                "train.eval_micro_batch_size=2",
            ],
            "train.eval_micro_batch_size = 2",
        ),
        (["deepspeed.config={sequence_parallel_size: 2}"], "it is set by train.sequence_parallel_size"),
    ],
)
def test_settings_that_exclude_each_other_are_refused_before_anything_is_loaded(overrides, message):
    with pytest.raises(ConfigError, match=message):
        config(*overrides)
