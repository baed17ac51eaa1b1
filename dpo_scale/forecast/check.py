"""The forecast at the start of a run (`train.check_memory`). It may refuse a run that cannot fit; it fails no other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from dpo_scale.data.batching import PairOrder
from dpo_scale.data.dataset import LoadedData
from dpo_scale.data.planning import Planner, StepPlan
from dpo_scale.distributed import ranks
from dpo_scale.errors import ConfigError, UserError, first_line
from dpo_scale.forecast.calibrate import calibrated
from dpo_scale.forecast.cluster import cluster_of
from dpo_scale.forecast.describe import short
from dpo_scale.forecast.forecast import MEMORY_ERROR, Forecast, Forecaster
from dpo_scale.forecast.lengths import Lengths, lengths_of
from dpo_scale.forecast.parts import Cluster, Workload
from dpo_scale.forecast.workload import model_configs_of, workload_by
from dpo_scale.models.load import uses_liger
from dpo_scale.settings.tree import Config

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def check_memory(
    config: Config,
    model_config: PreTrainedConfig,
    data: LoadedData,
    planner: Planner,
    pair_order: PairOrder,
    steps: int,
    plans: Sequence[StepPlan],
) -> Forecast | None:
    """Say what is predicted of this run on these ranks. Every rank calls it; rank 0 predicts, and has the result.

    Args:
        model_config: the policy's.
        planner, pair_order, steps, plans: what the run does.

    Returns:
        The forecast; None where there is none: `train.check_memory` is off, or the run cannot be modelled.

    Raises:
        ConfigError: with `train.check_memory` error, on every rank, if the prediction exceeds the device by more than
            the planner may be wrong by.
    """
    if config.train.check_memory == "off":
        return None
    machines = ranks.gather_objects(ranks.local_rank()).count(0)
    found: list[Forecast] = []  # of rank 0, which need not be sent to the others

    def look() -> None:
        lengths = lengths_of(data, "the run's own data")
        workload = workload_by(planner, pair_order, steps, plans, lengths)
        forecast = _forecast(config, model_config, lengths, workload, machines)
        if forecast is not None:
            found.append(forecast)
            _judge(forecast)

    ranks.on_main(look)
    return found[0] if found else None


def _forecast(
    config: Config, model_config: PreTrainedConfig, lengths: Lengths, workload: Workload, machines: int
) -> Forecast | None:
    try:
        cluster = _this_cluster(config, machines)
        model_configs = [model_config, *model_configs_of(config)[1:]]
        flops, liger = workload.planner.flops, uses_liger(config)[0]
        forecaster = Forecaster(model_configs, lengths, flops=flops, liger=liger)
        measured = calibrated(config, model_config, workload, cluster.per_node) if machines == 1 else None
        if measured is not None:
            cluster = measured.as_cluster()
            forecaster.rates = measured.rates
        memory = forecaster.memory(config, cluster, workload)
        knows_speed = measured is not None or cluster.device.name != "cpu"
        time = forecaster.time(config, cluster, workload) if knows_speed else None
        return Forecast(config, cluster, workload, memory, time)
    except Exception as error:  # a prediction is no reason to lose a run
        said = f"{error}" if isinstance(error, UserError) else f"{type(error).__name__}: {first_line(error)}"
        ranks.log(f"predicted: nothing, as this run cannot be modelled ({said})")
        return None


def _this_cluster(config: Config, machines: int) -> Cluster:
    """The machines of this run, with the memory that they have."""
    per_node = ranks.world_size() // machines
    device = ranks.device_name()
    cluster = cluster_of(f"{machines}x{per_node}", device, None, config.model.dtype)
    if ranks.device().type == "cuda":
        import torch

        memory = torch.cuda.get_device_properties(ranks.device()).total_memory
        cluster = replace(cluster, device=replace(cluster.device, memory=memory))
    return cluster


def _judge(forecast: Forecast) -> None:
    memory, device = forecast.memory.total, forecast.cluster.device.memory
    ranks.log(f"predicted: {short(forecast)}")
    if memory <= device:
        return
    parts = sorted(forecast.memory.device.items(), key=lambda part: -part[1])[:3]
    most = ", ".join(f"{name} {size / 1e9:.2f} GB" for name, size in parts)
    help_ = f"most of it is {most}; launch/plan.py says what makes it fit"
    if forecast.config.train.check_memory == "error" and memory > (1 + MEMORY_ERROR) * device:
        raise ConfigError(
            f"train.check_memory = 'error': this run is predicted to need {memory / 1e9:.2f} GB on the fullest rank, "
            f"of {device / 1e9:.2f} GB on its device; {help_}"
        )
    ranks.log(f"WARNING: this run may not fit: {help_}")
