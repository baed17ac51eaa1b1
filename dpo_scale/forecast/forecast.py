"""The forecast of a run: memory of its fullest rank, time, price, and whether it fits.

Memory is that of the fullest moment: while a store is filled, in a pass of the reference, in a step's passes, or in the
optimizer's update. What the forecasts of one search share is computed once (`Forecaster`).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from dpo_scale.data.flops import ForwardFlops, forward_flops
from dpo_scale.data.planning import StepPlan, runs_reference
from dpo_scale.forecast.activations import ActivationModel, Rows, fullest_rows
from dpo_scale.forecast.disk import disk_bytes, held_by_a_save
from dpo_scale.forecast.lengths import Lengths
from dpo_scale.forecast.parts import Cluster, Memory, StepTime, Workload
from dpo_scale.forecast.shape import ModelShape, shape_of, shape_of_reference
from dpo_scale.forecast.speed import Rates, time_of
from dpo_scale.forecast.states import (
    Moment,
    policy_host_states,
    policy_states,
    reference_host_states,
    reference_states,
    states_left_out,
)
from dpo_scale.forecast.workload import fullest_step, workload_of
from dpo_scale.settings.tree import Config

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# How far memory may be off: what `train.check_memory: error` allows. The accuracy benchmark holds every row to it.
MEMORY_ERROR = 0.10
TIME_ERROR = 0.25
# Assumed of a GPU's allocator: memory that it holds and cannot give to tensors, as a share of the tensors.
FRAGMENTATION = 0.05

CONTEXT, GAPS = "context and libraries", "allocator's gaps"  # of what is no tensor

Value = TypeVar("Value")


@dataclass(frozen=True)
class Forecast:
    """What is predicted of a run. `time` is None where nothing is known of the device's speed."""

    config: Config
    cluster: Cluster
    workload: Workload
    memory: Memory
    time: StepTime | None

    @property
    def fits(self) -> bool:
        """Whether the fullest rank has room on its device."""
        return self.memory.total <= self.cluster.device.memory

    @property
    def peak_memory_bytes(self) -> int:
        """What the metric of this name will be: on a GPU tensors alone, on a CPU the whole process."""
        beside = (CONTEXT, GAPS) if self.cluster.device.name != "cpu" else ()
        return self.memory.total - sum(self.memory.device.get(name, 0) for name in beside)

    @property
    def seconds(self) -> float:
        """Of the whole run: its steps, and what comes once or now and then."""
        assert self.time is not None
        return seconds_of(self.workload, self.time)

    @property
    def gpu_hours(self) -> float:
        return self.seconds / 3600 * self.cluster.world_size

    @property
    def left_out(self) -> tuple[str, ...]:
        """What of the config is not modelled, by name."""
        of_time = self.time.left_out if self.time is not None else ()
        return tuple(dict.fromkeys((*self.memory.left_out, *of_time)))


def seconds_of(workload: Workload, time: StepTime) -> float:
    return workload.steps * time.step + sum(time.once.values())


class Forecaster:
    """Forecasts of one pair of models on one set of pairs, for any settings and clusters.

    Args:
        model_configs: of the policy and, where it is another model, of the reference.
        lengths: of the pairs.
        flops: of the policy; counted if not given.
        rates: as measured on the device; None: assumed by its figures.
        liger: whether the models take Liger's kernels.
    """

    def __init__(
        self,
        model_configs: Sequence[PreTrainedConfig],
        lengths: Lengths,
        *,
        flops: ForwardFlops | None = None,
        rates: Rates | None = None,
        liger: bool = False,
        trust_remote_code: bool = False,
    ) -> None:
        self.model_configs, self.lengths, self.rates, self.liger = list(model_configs), lengths, rates, liger
        self.flops = flops or forward_flops(self.model_configs[0], trust_remote_code=trust_remote_code)
        self._known: dict[Hashable, Any] = {}

    def forecast(self, config: Config, cluster: Cluster, steps_planned: int | None = None) -> Forecast:
        """The forecast of a run of `config` on `cluster`.

        Args:
            steps_planned: how many of the first steps are planned; None: as many as a run sums up at its start.

        Raises:
            UserError: if such a run would be refused.
        """
        workload = self.workload(config, cluster.world_size, steps_planned)
        return Forecast(
            config, cluster, workload, self.memory(config, cluster, workload), self.time(config, cluster, workload)
        )

    def workload(self, config: Config, world_size: int, steps_planned: int | None = None) -> Workload:
        decides = repr((config.train, config.data.layout, config.reference.max_tokens_per_micro_batch))
        key = (decides, runs_reference(config), config.lora.enabled, world_size, steps_planned)
        return self._once(
            ("workload", *key),
            lambda: workload_of(config, self.lengths, self.model_configs, self.flops, world_size, steps_planned),
        )

    def time(self, config: Config, cluster: Cluster, workload: Workload) -> StepTime:
        shape, reference = self.shapes(config)
        return time_of(config, cluster, workload, shape, reference=reference, rates=self.rates)

    def seconds(self, config: Config, cluster: Cluster, workload: Workload) -> float:
        """Of the whole run."""
        return seconds_of(workload, self.time(config, cluster, workload))

    def may_fit(self, config: Config, cluster: Cluster) -> bool:
        """Whether there is room for the models' states alone: what is known without measuring activations."""
        shape, reference = self.shapes(config)
        world = cluster.world_size
        states = self._states(config, cluster, shape, "backward") | reference_states(config, reference, world)
        return sum(states.values()) + cluster.device.context <= cluster.device.memory

    def memory(self, config: Config, cluster: Cluster, workload: Workload) -> Memory:
        """Memory of the fullest rank, host memory of a machine, and the disk."""
        shape, reference = self.shapes(config)
        world, device_type = cluster.world_size, _type_of(cluster)
        on_cpu = device_type == "cpu"
        fullest = self._once(("fullest", id(workload)), lambda: (workload, fullest_step(workload)))[1]
        plans = [*workload.plans, fullest]
        rows, reference_rows = self._once(
            ("rows", id(workload)), lambda: (workload, fullest_rows(workload.planner, plans))
        )[1]
        activations = self.activations(config, device_type)

        def states(moment: Moment) -> dict[str, int]:
            return self._states(config, cluster, shape, moment)

        beside = reference_states(config, reference, world)
        moments = [states(moment) | beside for moment in ("gather", "reduce", "step")]
        moments.append(states("backward") | beside | self._micro_step(activations, rows))
        if reference_rows is not None:
            scoring = reference_states(config, reference, world, "pass") | self._reference_pass(
                activations, reference_rows
            )
            moments.append(states("rest") | scoring)
        if config.loss.needs_reference and config.reference.mode == "store":
            moments.append(self._while_filling(config, workload, fullest, reference, world, activations))
        tensors = max(moments, key=lambda parts: sum(parts.values()))
        device = {name: size for name, size in tensors.items() if size}
        if not on_cpu:
            device[GAPS] = round(FRAGMENTATION * sum(device.values()))
        device[CONTEXT] = cluster.device.context
        host: dict[str, int] = {}
        if not on_cpu:
            of_rank = (
                policy_host_states(config, shape, world)
                | reference_host_states(config, reference, world)
                | activations.host(rows)
            )
            host = {name: size * cluster.per_node for name, size in of_rank.items() if size}
            if saving := held_by_a_save(config, shape, world):
                host["copies of a save"] = saving
        left_out = (*states_left_out(config), *activations.left_out)
        return Memory(device, host, self._disk(config, shape, workload.steps), left_out)

    def shapes(self, config: Config) -> tuple[ModelShape, ModelShape]:
        """Of the policy, and of the reference as a model of its own."""

        def build() -> tuple[ModelShape, ModelShape]:
            return shape_of(config, self.model_configs[0]), shape_of_reference(config, self.model_configs[-1])

        return self._once(("shapes", self._models_of(config)), build)

    def activations(self, config: Config, device_type: str) -> ActivationModel:
        decides = repr((config.model, config.logprobs, config.loss, config.data.layout))
        return self._once(
            ("activations", device_type, decides, self._models_of(config), config.deepspeed.stage == 3),
            lambda: ActivationModel(
                config,
                self.model_configs[0],
                device_type,
                reference_config=self.model_configs[1] if len(self.model_configs) > 1 else None,
                liger=self.liger,
            ),
        )

    def _states(self, config: Config, cluster: Cluster, shape: ModelShape, moment: Moment) -> dict[str, int]:
        device_type, world = _type_of(cluster), cluster.world_size
        decides = repr((config.deepspeed, config.train.optim, config.train.optim_args, config.train.reduce_dtype))
        return self._once(
            ("states", moment, device_type, self._models_of(config), decides, world),
            lambda: policy_states(config, shape, world, moment, device_type=device_type),
        )

    def _micro_step(self, activations: ActivationModel, rows: Rows) -> dict[str, int]:
        return self._once(("micro-step", id(activations), rows), lambda: activations.micro_step(rows))

    def _reference_pass(self, activations: ActivationModel, rows: Rows) -> dict[str, int]:
        return self._once(("reference's pass", id(activations), rows), lambda: activations.reference_pass(rows))

    def _while_filling(
        self,
        config: Config,
        workload: Workload,
        fullest: StepPlan,
        reference: ModelShape,
        world: int,
        activations: ActivationModel,
    ) -> dict[str, int]:
        """The reference alone, before the policy is loaded."""
        budget = config.reference.max_tokens_per_micro_batch
        planner = replace(workload.planner, reference_tokens=budget)
        key = ("filling", id(workload), budget)
        rows = self._once(key, lambda: fullest_rows(planner, [planner.plan(fullest.pairs)]))[1]
        assert rows is not None  # with a budget of its own the reference runs in every step
        live = replace(config, reference=replace(config.reference, mode="live"))
        return reference_states(live, reference, world, "pass") | self._reference_pass(activations, rows)

    def _disk(self, config: Config, shape: ModelShape, steps: int) -> dict[str, int]:
        every = config.checkpoint.save_steps
        saves = (0 if every is None else (steps - 1) // every) + config.checkpoint.save_at_end
        lengths = np.concatenate([self.lengths.train, self.lengths.held_out])
        pairs, tokens, completions = len(lengths), int(lengths.sum()), int(lengths[:, 1:].sum())
        found = disk_bytes(config, shape, saves=saves, pairs=pairs, tokens=tokens, completion_tokens=completions)
        return {name: size for name, size in found.items() if size}

    def _models_of(self, config: Config) -> str:
        adapter = config.reference.mode == "adapter"
        return repr((config.lora, config.model.dtype, config.reference.adapter, adapter))

    def _once(self, key: Hashable, make: Callable[[], Value]) -> Value:
        if key not in self._known:
            self._known[key] = make()
        return self._known[key]


def _type_of(cluster: Cluster) -> str:
    return "cpu" if cluster.device.name == "cpu" else "cuda"
