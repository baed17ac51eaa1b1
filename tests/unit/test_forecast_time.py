"""The time of a step by hand, and what must hold whatever the figures are."""

from dataclasses import dataclass, replace

import numpy as np
import pytest

from dpo_scale.data.batching import MicroBatch, PairOrder
from dpo_scale.data.flops import ForwardFlops
from dpo_scale.data.groups import Groups
from dpo_scale.data.planning import make_planner
from dpo_scale.forecast.cluster import cluster_of
from dpo_scale.forecast.parts import Cluster, Device, Workload
from dpo_scale.forecast.speed import (
    GATHERS,
    Line,
    Rates,
    exchange_seconds,
    ring_seconds,
    stage3_traffic,
    time_of,
)
from dpo_scale.settings.tree import load_config

GPU = Device("gpu", 80 * 10**9, 100e12, 0.5, 1e12, 10e9, 0, "made up")
FLOPS = ForwardFlops(2e9, 1e8, ((None, 4e3),))


@dataclass(frozen=True)
class Shape:
    """A model of a billion parameters in ten layers."""

    total: int = 10**9
    trained: int = 10**9
    layers: int = 10
    hidden: int = 1000
    heads: int = 10
    key_heads: int = 5
    head_dim: int = 100


def cluster(nodes=1, per_node=8, **changes):
    return replace(Cluster(GPU, per_node, nodes, 100e9, 10e9, 0.0), **changes)


def config_of(*overrides):
    return load_config(None, ["model.path=m", "data.train=[t.jsonl]", "reference.mode=store", *overrides])


def workload(config, ranks, lengths=(100, 50, 50), pairs=64, steps=10, held_out=0, held_out_tokens=0, groups=(1,)):
    table = np.tile(np.array(lengths, dtype=np.int32), (pairs, 1))
    planner = make_planner(config, "shared_prefix", Groups(ranks, groups), FLOPS, table)
    order = PairOrder(pairs, config.train.global_batch_size, 0)
    return Workload(planner, order, steps, planner.first_plans(order, steps), held_out, held_out_tokens, "made up")


def predicted(*overrides, on=None, shape=None, rates=None, **of_workload):
    config, on = config_of(*overrides), on or cluster(per_node=1)
    return time_of(config, on, workload(config, on.world_size, **of_workload), shape or Shape(), rates=rates)


def forward_flops():
    """Of one pair of 100 + 50 + 50 tokens with its prompt shared: weights, attention, head."""
    attended = 100 * 101 / 2 + 2 * sum(range(101, 151))
    return 200 * 2e9, attended * 4e3, 100 * 1e8


def test_computing_by_hand_on_one_gpu():
    weights, attention, head = forward_flops()
    time = predicted("train.global_batch_size=4")
    assert time.parts["layers"] == pytest.approx(4 * 3 * weights / 50e12)
    assert time.parts["attention"] == pytest.approx(4 * 3 * attention / 50e12)
    assert time.parts["head"] == pytest.approx(4 * 3 * head / 50e12)
    assert time.step == pytest.approx(sum(time.parts.values()))
    assert {"gathering weights", "reducing gradients", "reference"}.isdisjoint(time.parts)


def test_checkpointing_computes_the_layers_once_more_but_not_the_head():
    plain, again = predicted(), predicted("model.gradient_checkpointing=true")
    assert again.parts["layers"] == pytest.approx(plain.parts["layers"] * 4 / 3)
    assert again.parts["attention"] == pytest.approx(plain.parts["attention"] * 4 / 3)
    assert again.parts["head"] == pytest.approx(plain.parts["head"])


def test_frozen_weights_save_a_pass_but_not_in_attention():
    pytest.importorskip("peft")
    plain, adapter = predicted(), predicted("lora.r=4", shape=Shape(trained=10**6))
    assert adapter.parts["layers"] == pytest.approx(plain.parts["layers"] * 2 / 3)
    assert adapter.parts["attention"] == pytest.approx(plain.parts["attention"])


def test_measured_rates_are_lines():
    # every pass of a micro-batch takes 0.1 s a layer and 0.5 s of the head; FLOPs cost nothing to speak of
    line = Line(0.1, 1e30)
    time = predicted("train.global_batch_size=2", rates=Rates(line, line, Line(0.5, 1e30), line, optimizer=1e-9))
    assert time.parts["layers"] == pytest.approx(2 * 10 * 0.1)
    assert time.parts["head"] == pytest.approx(2 * 0.5)
    assert time.parts["optimizer"] == pytest.approx(1.0)


def test_ranks_wait_for_the_slowest_of_a_micro_step():
    # 2 ranks and 3 equal pairs: the second micro-step has work for one of them, a filler takes as long
    config = config_of("train.global_batch_size=3", "deepspeed.stage=2")
    of_run = workload(config, 2, pairs=3)
    lengths = np.array([[100, 50, 50], [100, 50, 50], [10, 5, 5]], dtype=np.int32)
    planner = replace(of_run.planner, lengths=lengths)
    steps = [[MicroBatch.of(np.array([0])), MicroBatch.of(np.array([2]))]]
    plan = replace(of_run.plans[0], micro_steps=steps)
    time = time_of(config, cluster(per_node=2), replace(of_run, planner=planner, plans=[plan]), Shape())
    long, short = (planner.flops_of([row]).sum() * 3 / 50e12 for row in steps[0])
    assert time.parts["waiting for the slowest rank"] == pytest.approx((long - short) / 2)
    computing = sum(time.parts[name] for name in ("layers", "attention", "head", "waiting for the slowest rank"))
    assert computing == pytest.approx(long)


def test_a_ring_by_hand():
    size = 800e9
    # one machine: each of 8 takes in 7/8
    assert ring_seconds(cluster(), size) == pytest.approx(size * 7 / 8 / 100e9)
    # 4 machines: each takes in 3/4 over 8 adapters of 5 GB/s, which is slower than 31/32 over 100 GB/s
    assert ring_seconds(cluster(nodes=4, between=5e9), size) == pytest.approx(size * 3 / 4 / 40e9)
    # with adapters of 10 GB/s the links within are slower
    assert ring_seconds(cluster(nodes=4), size) == pytest.approx(size * 31 / 32 / 100e9)
    # 4 machines of one GPU
    assert ring_seconds(cluster(nodes=4, per_node=1), size) == pytest.approx(size * 3 / 4 / 10e9)
    assert ring_seconds(cluster(per_node=1), size) == 0.0


def test_an_exchange_by_hand():
    assert exchange_seconds(cluster(), 8e9, 4) == pytest.approx(8e9 * 3 / 4 / 100e9)
    # 16 ranks over two machines: half of the bytes leave by the rank's own adapter
    assert exchange_seconds(cluster(nodes=2), 8e9, 16) == pytest.approx(8e9 / 2 / 10e9)


def test_stage_3_traffic_by_hand_and_whatever_the_number_of_ranks():
    model = {"parameters": 10**9, "trained": 10**9, "weight_bytes": 2, "reduce_bytes": 4}
    gathers, reductions = stage3_traffic(cluster(), **model)
    assert gathers == pytest.approx(GATHERS * 2e9 * 7 / 8 / 100e9)
    assert reductions == pytest.approx(4e9 * 7 / 8 / 100e9)
    far = [sum(stage3_traffic(cluster(nodes=nodes), **model)) for nodes in (64, 256, 1024)]
    assert max(far) / min(far) < 1.02


def test_a_second_partition_halves_what_leaves_the_machine():
    machines = cluster(nodes=4, between=1e9)
    model = {"parameters": 10**9, "trained": 10**9, "weight_bytes": 2, "reduce_bytes": 2}
    plain, reduced = stage3_traffic(machines, **model)
    gathers, reductions = stage3_traffic(machines, **model, group=8)
    assert gathers == pytest.approx(plain / 2 + GATHERS * 2e9 / 2 * 7 / 8 / 100e9)
    assert reductions == reduced


def test_stage_3_hides_traffic_behind_computing_and_the_rest_shows():
    slow = cluster(within=1e9)
    busy, bound = (predicted("deepspeed.stage=3", "train.global_batch_size=8", on=on) for on in (cluster(), slow))
    weights, attention, head = forward_flops()
    computing = 3 * (weights + attention + head) / 50e12
    traffic = (GATHERS * 2e9 + 2e9) * 7 / 8
    assert traffic / 100e9 > computing  # so that some of it shows on both
    for time, within in ((busy, 100e9), (bound, 1e9)):
        shown = time.parts["gathering weights"] + time.parts["reducing gradients"]
        assert shown == pytest.approx(traffic / within - computing)
        assert time.hidden == pytest.approx(computing)


def test_stage_2_reduces_in_each_micro_step_and_stage_1_once():
    both = ("train.global_batch_size=32", "model.dtype=float32")
    second, first, none = (predicted(f"deepspeed.stage={stage}", *both, on=cluster()) for stage in (2, 1, 0))
    all_reduce = 2 * 4e9 * 7 / 8 / 100e9
    assert second.parts["reducing gradients"] == pytest.approx(4 * all_reduce)
    assert first.parts["reducing gradients"] == pytest.approx(all_reduce)
    assert none.parts["reducing gradients"] == pytest.approx(all_reduce)
    assert second.parts["gathering weights"] == pytest.approx(4e9 * 7 / 8 / 100e9)
    assert "gathering weights" not in none.parts


def test_gradients_summed_in_fp32_are_twice_the_bytes():
    half = predicted("deepspeed.stage=2", on=cluster()).parts["reducing gradients"]
    assert predicted("deepspeed.stage=2", "train.reduce_dtype=float32", on=cluster()).parts[
        "reducing gradients"
    ] == pytest.approx(2 * half)


def test_nothing_overlaps_on_gloo():
    processor = replace(GPU, name="cpu")
    time = predicted("deepspeed.stage=3", "train.global_batch_size=2", on=cluster(per_node=2, device=processor))
    assert time.hidden == 0.0
    assert time.parts["gathering weights"] == pytest.approx(GATHERS * 2e9 / 2 / 100e9)


def test_a_reference_in_the_step_adds_its_forward_pass():
    weights, attention, head = forward_flops()
    live = predicted("reference.mode=live", "train.global_batch_size=4")
    assert live.parts["reference"] == pytest.approx(4 * (weights + attention + head) / 50e12)
    sharded = predicted("reference.mode=live", "reference.stage=3", "train.global_batch_size=8", on=cluster(within=1e9))
    assert sharded.parts["reference"] == pytest.approx(2e9 * 7 / 8 / 1e9)  # one pass, bound by its gathers
    assert "filling the reference store, if it is empty" not in live.once


def test_the_store_is_filled_by_one_forward_pass_over_the_pairs_of_the_run():
    time = predicted("train.global_batch_size=4", pairs=64, steps=16)
    assert time.once["filling the reference store, if it is empty"] == pytest.approx(64 * sum(forward_flops()) / 50e12)
    short = predicted("train.global_batch_size=4", pairs=64, steps=2)
    assert short.once["filling the reference store, if it is empty"] == pytest.approx(8 * sum(forward_flops()) / 50e12)


def test_evaluations_are_counted_as_the_loop_takes_them():
    def seconds(*overrides):
        found = predicted("data.eval=[e.jsonl]", *overrides, steps=10, held_out=5, held_out_tokens=1000)
        return found.once["evaluations"]

    one = seconds()
    assert one == pytest.approx(1000 / 200 * sum(forward_flops()) / 50e12)
    assert seconds("train.eval_steps=5") == pytest.approx(2 * one)  # after 5, and at the end
    assert seconds("train.eval_steps=3") == pytest.approx(4 * one)  # after 3, 6 and 9, and at the end
    assert seconds("train.eval_steps=3", "train.eval_on_start=true") == pytest.approx(5 * one)


def test_offloaded_states_are_copied_and_updated_on_the_host():
    here = predicted("deepspeed.stage=2", on=cluster())
    there = predicted("deepspeed.stage=2", "deepspeed.offload_optimizer=cpu", on=cluster())
    assert there.parts["optimizer"] > 5 * here.parts["optimizer"]
    # one micro-step of 64 pairs over 8 ranks has 8: gradients there, weights back
    assert there.parts["offloaded copies"] == pytest.approx((8 * 2 + 2) * 1e9 / 8 / 10e9)


def test_shared_rows_exchange_heads():
    on = cluster()
    time = predicted("train.sequence_parallel_size=4", "train.global_batch_size=2", on=on, groups=(4,))
    # 50 tokens a rank, 2 x (10 + 5) heads of 100 in bf16, forward and backward over 10 layers
    assert time.parts["sharing rows"] == pytest.approx(2 * 10 * 50 * 2 * 2 * 15 * 100 * 3 / 4 / 100e9)
    whole = predicted("train.global_batch_size=2", on=on)
    assert "sharing rows" not in whole.parts
    assert time.parts["layers"] == pytest.approx(whole.parts["layers"] / 4)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("reference", ["store", "live"])
def test_more_gpus_never_compute_longer_and_slower_links_are_never_faster(stage, reference):
    settings = ("model.dtype=float32", f"deepspeed.stage={stage}", f"reference.mode={reference}")
    computing, steps = [], []
    for nodes in (1, 2, 4, 8):
        time = predicted(*settings, on=cluster(nodes=nodes))
        computing.append(sum(time.parts[name] for name in ("layers", "attention", "head")))
    assert computing == sorted(computing, reverse=True)
    for within, between in ((400e9, 50e9), (100e9, 50e9), (100e9, 10e9), (10e9, 1e9)):
        steps.append(predicted(*settings, on=cluster(nodes=2, within=within, between=between)).step)
    assert steps == sorted(steps)


def test_no_part_is_negative_on_a_real_cluster():
    for stage in (0, 1, 2, 3):
        for gpus in ("1", "8", "4x8"):
            on = cluster_of(gpus, "h100", "nvlink+ib400", "bfloat16")
            time = predicted("model.dtype=float32", f"deepspeed.stage={stage}", on=on)
            assert all(seconds > 0 for seconds in time.parts.values()) and time.hidden >= 0.0


def test_what_is_not_modelled_is_named():
    zero = "deepspeed.config={'zero_optimization': {'mics_shard_size': 4, 'zero_quantized_weights': true}}"
    left_out = predicted("deepspeed.stage=3", zero, "train.optim=lion").left_out
    assert {"mics_shard_size", "zero_quantized_weights", "train.optim = lion: counted as Adam"} <= set(left_out)
    assert "mics_shard_size" not in predicted().left_out
