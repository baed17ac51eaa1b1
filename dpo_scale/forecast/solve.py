"""Settings that make a run fit, or faster, found by trying: each trial is a forecast, which is arithmetic.

What is tried changes neither what a step learns nor its order of pairs: ZeRO stage and offloads, checkpointing of
activations, where the reference's values come from, how large micro-batches are, how many ranks share a row. The cost
of a change is the predicted slowdown. Learning rate, batch, precision, LoRA and the data stay as they are.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dpo_scale.errors import ConfigError, UserError
from dpo_scale.forecast.forecast import Forecast, Forecaster
from dpo_scale.forecast.parts import Cluster
from dpo_scale.forecast.workload import planned_layout
from dpo_scale.models.layout_choice import why_whole_rows
from dpo_scale.settings.reader import apply_override, build, to_mapping
from dpo_scale.settings.rules import check_rules
from dpo_scale.settings.tree import Config

STEPS_TRIED = 2  # of which a trial plans the micro-steps
# A change that gains less is not worth a line in a config: each costs this share of the time of a run.
CHANGE_COSTS = 0.002
# What "faster" and "less" mean for a single change.
NOTABLE = 0.01

Change = Mapping[str, Any]  # setting -> value


@dataclass(frozen=True)
class Proposal:
    """Changed settings, and the forecast with them.

    Attributes:
        before: the forecast without them, by plans of as many steps.
    """

    changes: Change
    forecast: Forecast
    before: Forecast | None = None

    @property
    def overrides(self) -> list[str]:
        """The changes as a command takes them."""
        return [f"{key}={_yaml(value)}" for key, value in self.changes.items()]

    @property
    def cost(self) -> float:
        """Predicted seconds of the run, and a little for each change."""
        return _cost(self.forecast.seconds, self.changes)


def solve(config: Config, cluster: Cluster, forecaster: Forecaster) -> Proposal | None:
    """The fastest settings that fit; None if none do.

    Time is arithmetic and memory takes measuring, so all are timed, and the first that fits in the order of time wins.
    """
    timed: list[tuple[float, Change]] = []
    for changes in _all_changes(config, cluster, forecaster):
        changed = _changed(config, changes)
        needs_budget = changed.train.sequence_parallel_size == "auto"
        if needs_budget and changed.train.max_tokens_per_micro_batch is None:
            continue
        if not forecaster.may_fit(changed, cluster):
            continue
        try:
            workload = forecaster.workload(changed, cluster.world_size, STEPS_TRIED)
        except UserError:
            continue
        timed.append((_cost(forecaster.seconds(changed, cluster, workload), changes), changes))
    for _, changes in sorted(timed, key=lambda candidate: candidate[0]):
        for steps_planned in (STEPS_TRIED, None):
            found = _try(config, changes, cluster, forecaster, steps_planned=steps_planned)
            if found is None or not found.forecast.fits:
                break
        else:
            return found
    return None


def solve_cheapest(config: Config, clusters: Sequence[Cluster], forecaster: Forecaster) -> Proposal | None:
    """The fastest settings on the smallest of the clusters that anything fits on; None if nothing fits on any.

    Args:
        clusters: smallest first.
    """
    found = (solve(config, cluster, forecaster) for cluster in clusters)
    return next((proposal for proposal in found if proposal is not None), None)


def smaller_clusters(cluster: Cluster) -> list[Cluster]:
    """Clusters of the same machines, from one device to all of these."""
    sizes = [n for n in range(1, cluster.per_node + 1) if cluster.per_node % n == 0]
    of_one = [replace(cluster, nodes=1, per_node=n) for n in sizes]
    return of_one + [replace(cluster, nodes=n) for n in range(2, cluster.nodes + 1)]


def single_changes(forecast: Forecast, forecaster: Forecaster, count: int = 3) -> list[Proposal]:
    """The best changes of one kind each: the fastest that fit if the run fits, else those that save memory cheaply."""
    config, cluster, device = forecast.config, forecast.cluster, forecast.cluster.device
    now = _try(config, {}, cluster, forecaster)
    assert now is not None
    found: list[Proposal] = []
    for options in _kinds(config, cluster, forecaster):
        tried = (_try(config, _differing(config, option), cluster, forecaster) for option in options)
        of_kind = [proposal for proposal in tried if proposal is not None and proposal.changes]
        if forecast.fits:
            of_kind = [p for p in of_kind if p.forecast.fits and p.cost < (1 - NOTABLE) * now.cost]
        else:
            saved = NOTABLE * device.memory
            of_kind = [p for p in of_kind if p.forecast.memory.total < now.forecast.memory.total - saved]
        found += sorted(of_kind, key=lambda p: (not p.forecast.fits, p.cost))[:1]
    found = sorted(found, key=lambda p: (not p.forecast.fits, p.cost))[:count]
    return [replace(proposal, before=now.forecast) for proposal in found]


def _try(
    config: Config,
    changes: Change,
    cluster: Cluster,
    forecaster: Forecaster,
    *,
    steps_planned: int | None = STEPS_TRIED,
) -> Proposal | None:
    """The proposal of these changes; None if such a run is refused."""
    try:
        return Proposal(changes, forecaster.forecast(with_changes(config, changes), cluster, steps_planned))
    except UserError:
        return None


def _cost(seconds: float, changes: Change) -> float:
    return seconds * (1 + CHANGE_COSTS * len(changes))


def _changed(config: Config, changes: Change) -> Config:
    """A config with other values, unchecked."""
    by_section: dict[str, dict[str, Any]] = {}
    for key, value in changes.items():
        section, name = key.split(".")
        by_section.setdefault(section, {})[name] = value
    sections = {name: replace(getattr(config, name), **values) for name, values in by_section.items()}
    return replace(config, **sections)


def with_changes(config: Config, changes: Change) -> Config:
    """A config with other values, checked as if it had been read so.

    Raises:
        ConfigError: if they exclude each other.
    """
    if not changes:
        return config
    mapping = to_mapping(config)
    for key, value in changes.items():
        apply_override(mapping, f"{key}={_yaml(value)}")
    changed: Config = build(Config, mapping)
    changed.deepspeed.resolve()
    check_rules(changed, for_training=False)
    return changed


def _all_changes(config: Config, cluster: Cluster, forecaster: Forecaster) -> Iterator[Change]:
    """Every combination, each once."""
    seen = set()
    combined: Iterable[dict[str, Any]] = (
        {key: value for option in options for key, value in option.items()}
        for options in itertools.product(*_kinds(config, cluster, forecaster))
    )
    for option in combined:
        changes = _differing(config, option)
        if (key := tuple(changes.items())) not in seen:
            seen.add(key)
            yield changes


def _kinds(config: Config, cluster: Cluster, forecaster: Forecaster) -> list[list[Change]]:
    """What may be set, kind by kind; the values of a kind that depend on each other stand together."""
    on_cpu = cluster.device.name == "cpu"
    return [
        _sharding(on_cpu),
        _checkpointing(on_cpu),
        _references(config, on_cpu),
        _micro_batches(config),
        _sharing(config, cluster.world_size, forecaster),
    ]


def _sharding(on_cpu: bool) -> list[Change]:
    kinds = [(stage, "none", "none") for stage in (1, 2, 3)]
    if not on_cpu:  # there offloading moves nothing
        kinds += [(1, "cpu", "none"), (2, "cpu", "none"), (3, "cpu", "none"), (3, "none", "cpu"), (3, "cpu", "cpu")]
    names = ("stage", "offload_optimizer", "offload_param")
    return [{f"deepspeed.{name}": value for name, value in zip(names, kind, strict=True)} for kind in kinds]


def _checkpointing(on_cpu: bool) -> list[Change]:
    kinds = [(False, False), (True, False)] + ([] if on_cpu else [(True, True)])
    names = ("gradient_checkpointing", "gradient_checkpointing_offload")
    return [{f"model.{name}": value for name, value in zip(names, kind, strict=True)} for kind in kinds]


def _references(config: Config, on_cpu: bool) -> list[Change]:
    reference = config.reference
    if not config.loss.needs_reference or reference.mode == "columns":
        return [{}]
    kinds = [("live", 0, "none"), ("live", 3, "none")] + ([] if on_cpu else [("live", 3, "cpu")])
    if reference.sync_steps is None:
        kinds += [("store", 0, "none"), ("store", 3, "none")]
        if config.lora.enabled and reference.model is None:
            kinds.append(("adapter", 0, "none"))
    names = ("mode", "stage", "offload_param")
    return [{f"reference.{name}": value for name, value in zip(names, kind, strict=True)} for kind in kinds]


def _micro_batches(config: Config) -> list[Change]:
    now = {name: getattr(config.train, name) for name in ("micro_batch_size", "max_tokens_per_micro_batch")}
    budgets = sorted({2**k for k in range(11, 17)} | {now["max_tokens_per_micro_batch"] or 2**11})
    kinds = [now] if now["max_tokens_per_micro_batch"] is None else []
    kinds += [{"micro_batch_size": 1, "max_tokens_per_micro_batch": budget} for budget in budgets]
    return [{f"train.{name}": value for name, value in kind.items()} for kind in kinds]


def _sharing(config: Config, world_size: int, forecaster: Forecaster) -> list[Change]:
    key = "train.sequence_parallel_size"
    try:
        splits = planned_layout(config, forecaster.model_configs) != "padded"
    except ConfigError:
        splits = False
    if not splits or any(map(why_whole_rows, forecaster.model_configs)):
        return [{key: config.train.sequence_parallel_size}]
    sizes = [2**k for k in range(world_size.bit_length()) if world_size % 2**k == 0]
    return [{key: size} for size in [*sizes, *(["auto"] if len(sizes) > 1 else [])]]


def _differing(config: Config, option: Change) -> Change:
    """What of an option the config does not have already."""
    changes = {}
    for key, value in option.items():
        section, name = key.split(".")
        if getattr(getattr(config, section), name) != value:
            changes[key] = value
    return changes


def _yaml(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
