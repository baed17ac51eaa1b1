"""Forecasts: assumed lengths, workloads for ranks that do not exist, what is said of them, and what is proposed."""

from __future__ import annotations

import numpy as np
import pytest
from tiny import preference_rows, run_overrides, save_model, write_rows

from dpo_scale.data.batching import of_groups
from dpo_scale.data.groups import Groups
from dpo_scale.data.planning import make_planner
from dpo_scale.errors import ConfigError, DataError, UserError
from dpo_scale.forecast.cluster import cluster_of
from dpo_scale.forecast.describe import bound, describe
from dpo_scale.forecast.forecast import Forecaster
from dpo_scale.forecast.lengths import PUBLISHED_SIZES, assumed_lengths, read_lengths
from dpo_scale.forecast.parts import StepTime
from dpo_scale.forecast.solve import single_changes, smaller_clusters, solve, with_changes
from dpo_scale.forecast.workload import fullest_step, model_configs_of, workload_of
from dpo_scale.models.load import load_model_config
from dpo_scale.settings.tree import load_config

SMALL = ["model.dtype=float32", "train.global_batch_size=8", "data.max_length=64"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A folder with a tiny model and pairs, and the overrides of a run with them."""
    folder = tmp_path_factory.mktemp("tiny")
    return folder, run_overrides(folder)


@pytest.fixture(scope="module")
def forecaster(tiny):
    config = load_config(None, [*tiny[1], *SMALL])
    return Forecaster(model_configs_of(config), assumed_lengths(config, "60:200", 64))


def config_of(tiny, *overrides):
    return load_config(None, [*tiny[1], *SMALL, *overrides])


def test_assumed_lengths_have_the_median_and_the_tail_that_were_named(tiny):
    config = config_of(tiny, "data.max_length=null", "data.eval=[]")
    lengths = assumed_lengths(config, "800:4000", 20_000)
    tokens = lengths.train.sum(axis=1)
    assert len(tokens) == 20_000 and len(lengths.held_out) == 0
    assert np.median(tokens) == pytest.approx(800, rel=0.03)
    assert np.quantile(tokens, 0.99) == pytest.approx(4000, rel=0.08)
    cut = assumed_lengths(config_of(tiny, "data.max_length=512"), "800:4000", 500)
    assert (cut.train[:, :1] + cut.train[:, 1:]).max() == 512 and cut.train[:, 0].max() == 256 and cut.train.min() > 0


@pytest.mark.parametrize("name", PUBLISHED_SIZES)
def test_published_sizes_become_lengths_of_that_mean(tiny, name):
    lengths = assumed_lengths(config_of(tiny, "data.max_length=null"), name, 20_000)
    assert lengths.train.sum(axis=1).mean() == pytest.approx(PUBLISHED_SIZES[name].tokens, rel=0.05)
    assert PUBLISHED_SIZES[name].source in lengths.origin and "assumed" in lengths.origin


@pytest.mark.parametrize("text", ["", "long", "0", "800:", "800:400", "-5", "800:4000:1"])
def test_lengths_that_say_nothing_are_refused(tiny, text):
    with pytest.raises(ConfigError, match=r"^--lengths .*(expected MEDIAN or MEDIAN:TAIL)"):
        assumed_lengths(config_of(tiny), text)


def test_lengths_of_data_are_those_of_the_data(tiny):
    config = config_of(tiny)
    model_config = load_model_config(config.model.path)
    lengths = read_lengths(config, model_config, lambda line: None)
    assert len(lengths.train) == 22 and len(lengths.held_out) == 5
    config.data.train[0].path = "nowhere.jsonl"
    with pytest.raises(DataError, match="nowhere.jsonl.*give --lengths"):
        read_lengths(config, model_config, lambda line: None)


@pytest.mark.parametrize("world, size", [(1, 1), (8, 1), (8, 4), (6, 3)])
def test_a_workload_is_planned_for_ranks_that_do_not_exist(tiny, forecaster, world, size):
    config = config_of(
        tiny, f"train.sequence_parallel_size={size}", "train.micro_batch_size=1", "train.max_tokens_per_micro_batch=256"
    )
    lengths = forecaster.lengths
    found = workload_of(config, lengths, forecaster.model_configs, forecaster.flops, world)
    planner = make_planner(config, "shared_prefix", Groups(world, (size,)), forecaster.flops, lengths.train)
    assert found.steps == 8 and len(found.plans) == 8
    for ours, theirs in zip(found.plans, planner.first_plans(found.pair_order, 8), strict=True):
        assert all(len(of_ranks) == world for of_ranks in ours.micro_steps)
        pairs = [sorted(i for row in of_groups(step) for i in row.indices) for step in ours.micro_steps]
        assert pairs == [sorted(i for row in of_groups(step) for i in row.indices) for step in theirs.micro_steps]
    assert lengths.train.sum(axis=1).argmax() in fullest_step(found).pairs


def test_a_workload_of_too_few_pairs_or_undividable_ranks_is_refused(tiny, forecaster):
    few = assumed_lengths(config_of(tiny), "60", 5)
    with pytest.raises(DataError, match="there are 5 pairs, too few"):
        config = config_of(tiny, "train.drop_last=true")
        workload_of(config, few, forecaster.model_configs, forecaster.flops, 2)
    with pytest.raises(ConfigError, match="sequence_parallel_size = 4: expected a divisor .* which is 6"):
        workload_of(
            config_of(tiny, "train.sequence_parallel_size=4"),
            forecaster.lengths, forecaster.model_configs, forecaster.flops, 6,
        )  # fmt: skip


def test_a_forecast_adds_up_and_says_all_of_it(tiny, forecaster):
    cluster = cluster_of("2x4", "h100", "nvlink+ib400", "float32")
    found = forecaster.forecast(config_of(tiny), cluster)
    text = "\n".join(describe(found, price=2.0))
    assert found.fits and found.memory.total == sum(found.memory.device.values())
    assert found.seconds == pytest.approx(8 * found.time.step + sum(found.time.once.values()))
    assert found.gpu_hours == pytest.approx(8 * found.seconds / 3600)
    assert f"{2 * found.gpu_hours:,.2f} at 2 an hour" in text and "2 x 4 x h100" in text and "fits" in text
    for part, size in found.memory.device.items():
        assert part in text or size < 1e6
    for name in found.left_out:
        assert name in text


def test_what_takes_longest_bounds_a_step():
    assert bound(StepTime({"layers": 1.0, "reducing gradients": 3.0})).startswith("the links: gradients")
    assert "(75% of a step)" in bound(StepTime({"layers": 1.0, "reducing gradients": 3.0}))


def _with_memory(cluster, memory):
    from dataclasses import replace

    return replace(cluster, device=replace(cluster.device, memory=int(memory), context=0))


def test_what_is_proposed_fits_and_is_the_fastest_that_does(tiny, forecaster):
    config = config_of(tiny, "deepspeed.stage=1", "reference.mode=live")
    cluster = cluster_of("4", "h100", None, "float32")
    before = forecaster.forecast(config, cluster)
    tight = _with_memory(cluster, 0.7 * (before.memory.total - cluster.device.context))
    assert not forecaster.forecast(config, tight).fits
    found = solve(config, tight, forecaster)
    assert found is not None and found.changes and found.forecast.fits
    again = forecaster.forecast(load_config(None, [*tiny[1], *SMALL, *found.overrides]), tight)
    assert again.fits and again.memory.device == found.forecast.memory.device
    for proposal in single_changes(forecaster.forecast(config, tight), forecaster):
        assert proposal.forecast.memory.total < before.memory.total
        assert not proposal.forecast.fits or proposal.cost >= 0.99 * found.cost
    assert solve(config, _with_memory(cluster, 1e4), forecaster) is None


def test_smaller_clusters_grow_to_all_of_it():
    cluster = cluster_of("3x4", "h100", "nvlink+ib400", "float32")
    assert [(c.nodes, c.per_node) for c in smaller_clusters(cluster)] == [(1, 1), (1, 2), (1, 4), (2, 4), (3, 4)]


def test_changes_that_exclude_each_other_are_no_config(tiny):
    with pytest.raises(UserError, match="offload_param"):
        with_changes(config_of(tiny), {"deepspeed.stage": 2, "deepspeed.offload_param": "cpu"})


def test_a_run_that_cannot_fit_is_refused_before_weights_are_loaded(tmp_path, monkeypatch):
    from dpo_scale.forecast import check
    from dpo_scale.training.prepare import prepare
    from dpo_scale.training.setup import course_of

    said = []
    monkeypatch.setattr(check.ranks, "log", said.append)
    save_model(tmp_path / "start")
    write_rows(tmp_path / "train.jsonl", preference_rows(22))
    base = [f"model.path={tmp_path / 'start'}", f"data.train={tmp_path / 'train.jsonl'}", "train.micro_batch_size=2",
            f"data.cache_dir={tmp_path / 'cache'}", "deepspeed.stage=1", *SMALL]  # fmt: skip

    def look(choice):
        config = load_config(None, [*base, f"train.check_memory={choice}"])
        assert config.train.check_memory == choice
        prepared = prepare(config)
        course = course_of(config, prepared)
        lengths, flops = prepared.data.train.lengths, Forecaster([prepared.model_config], None).flops
        planner = make_planner(config, "shared_prefix", Groups(1), flops, lengths)
        plans = planner.first_plans(course.pair_order, course.total_steps)
        said.clear()
        return check.check_memory(
            config, prepared.model_config, prepared.data, planner, course.pair_order, course.total_steps, plans
        )

    assert look("off") is None and not said
    assert look("warn").fits and said[0].startswith("predicted: ")
    monkeypatch.setattr(check, "cluster_of", lambda *named: _with_memory(cluster_of(*named), 1e5))
    assert not look("warn").fits and said[-1].startswith("WARNING: this run may not fit: most of it is")
    with pytest.raises(ConfigError, match=r"train.check_memory = 'error': .* predicted to need .* launch/plan.py"):
        look("error")
    monkeypatch.setattr(check, "cluster_of", lambda *_: 1 / 0)
    assert look("error") is None
    assert said[-1] == "predicted: nothing, as this run cannot be modelled (ZeroDivisionError: division by zero)"
