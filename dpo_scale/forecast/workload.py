"""What a run would compute, step by step, on so many ranks: planned by the run's own planner, without the ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from dpo_scale.data.batching import MicroBatch, PairOrder
from dpo_scale.data.flops import ForwardFlops
from dpo_scale.data.layout import Layout, pair_tokens
from dpo_scale.data.planning import Planner, StepPlan, make_planner
from dpo_scale.errors import ConfigError, DataError
from dpo_scale.forecast.lengths import Lengths
from dpo_scale.forecast.parts import Workload
from dpo_scale.forecast.published_models import published_config
from dpo_scale.models.attention_backends import BACKENDS
from dpo_scale.models.files import looks_like_folder
from dpo_scale.models.layout_choice import choose_groups, why_padded
from dpo_scale.models.load import load_model_config, policy_source, reference_source
from dpo_scale.settings.tree import Config

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def model_configs_of(config: Config) -> list[PreTrainedConfig]:
    """The transformers configs of the policy and, where it is another model, of the reference.

    Raises:
        ModelError: naming the path and what could not be read.
    """
    configs = []
    for source in dict.fromkeys((policy_source(config), reference_source(config))):
        known = None if source.revision or looks_like_folder(source.path) else published_config(source.path)
        trusted = config.model.trust_remote_code
        configs.append(known or load_model_config(source.path, revision=source.revision, trust_remote_code=trusted))
    return configs


def workload_of(
    config: Config,
    lengths: Lengths,
    model_configs: Sequence[PreTrainedConfig],
    flops: ForwardFlops,
    world_size: int,
    steps_planned: int | None = None,
) -> Workload:
    """The run's workload on `world_size` ranks.

    Args:
        config: `data.layout` may be "auto".
        model_configs: of policy and reference.
        flops: of the policy.
        steps_planned: how many of the first steps are planned; None: as many as a run sums up at its start.

    Raises:
        ConfigError: if ranks or heads cannot be divided as `train.sequence_parallel_size` says, or `data.layout` names
            a layout that a model cannot take.
        DataError: if there are too few pairs for a step.
    """
    train, pairs = config.train, lengths.train
    if len(pairs) == 0 or (train.drop_last and len(pairs) < train.global_batch_size):
        raise DataError(
            f"train.global_batch_size = {train.global_batch_size}: there are {len(pairs)} pairs, too few for a step"
        )
    layout = planned_layout(config, model_configs)
    groups = choose_groups(config, model_configs, world_size)
    planner = RememberingPlanner(**vars(make_planner(config, layout, groups, flops, pairs)))
    order = PairOrder(len(pairs), train.global_batch_size, train.seed, train.shuffle, train.drop_last)
    steps = order.total_steps(train.num_train_epochs, train.max_steps)
    plans = planner.first_plans(order, steps if steps_planned is None else min(steps, steps_planned))
    return workload_by(planner, order, steps, plans, lengths)


@dataclass(frozen=True)
class RememberingPlanner(Planner):
    """A planner that counts the FLOPs of a row once, however many forecasts ask for them."""

    _known: dict[int, tuple[MicroBatch, np.ndarray]] = field(default_factory=dict, compare=False, repr=False)

    def flops_of(self, micro_batches: Sequence[MicroBatch]) -> np.ndarray:
        for row in micro_batches:
            if id(row) not in self._known:  # the row is kept, so that its id stays its own
                self._known[id(row)] = row, super().flops_of([row])[0]
        return np.array([self._known[id(row)][1] for row in micro_batches])


def workload_by(
    planner: Planner, pair_order: PairOrder, steps: int, plans: Sequence[StepPlan], lengths: Lengths
) -> Workload:
    """The workload of a run whose steps are planned."""
    tokens = int(pair_tokens(lengths.held_out, planner.layout).sum())
    of_rank = -(-tokens // planner.groups.world_size)
    return Workload(planner, pair_order, steps, plans, len(lengths.held_out), of_rank, lengths.origin)


def fullest_step(workload: Workload) -> StepPlan:
    """The plan of the step that holds the longest pair of those that the run sees first."""
    order = workload.pair_order
    first = order.epoch_order(0)[: workload.steps * order.global_batch_size]
    position = int(pair_tokens(workload.planner.lengths[first], workload.planner.layout).argmax())
    step = min(position // order.global_batch_size, order.steps_per_epoch - 1)
    return workload.planner.plan(order.global_batch(step, order.epoch_order(0)))


def planned_layout(config: Config, model_configs: Sequence[PreTrainedConfig]) -> Layout:
    """The layout that a run with these models takes on a device that has all it needs.

    Raises:
        ConfigError: if the config names one that a model or its attention cannot take.
    """
    asked, attention = config.data.layout, config.model.attn_implementation
    if asked == "padded":
        return "padded"
    against = [why for each in model_configs if (why := why_padded(each)) is not None]
    if attention is not None and not any(row.setting == attention for row in BACKENDS.values()):
        against.insert(0, f"model.attn_implementation = {attention!r} takes one sequence a row")
    if not against:
        return "shared_prefix" if asked == "auto" else asked
    if asked != "auto":
        raise ConfigError(f"data.layout = {asked!r}: {against[0]}; expected 'padded' or 'auto' for this run")
    if config.train.sequence_parallel_size != 1:
        raise ConfigError(
            f"train.sequence_parallel_size = {config.train.sequence_parallel_size!r}: {against[0]}; expected 1 for "
            "this run, whose rows hold one sequence each"
        )
    return "padded"
