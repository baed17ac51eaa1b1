"""What `launch/plan.py` does: a config and what stands on the command line in, lines of text out."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

from dpo_scale.errors import ConfigError
from dpo_scale.forecast.calibrate import Calibration, calibrate, calibrated
from dpo_scale.forecast.cluster import cluster_of, parse_gpus
from dpo_scale.forecast.describe import describe, describe_changes, describe_command, describe_solution
from dpo_scale.forecast.forecast import Forecaster
from dpo_scale.forecast.lengths import assumed_lengths, read_lengths
from dpo_scale.forecast.parts import Cluster
from dpo_scale.forecast.solve import Proposal, single_changes, smaller_clusters, solve, solve_cheapest
from dpo_scale.forecast.workload import model_configs_of
from dpo_scale.settings.tree import Config

DEFAULT_DEVICE = "h100"


@dataclass(frozen=True)
class Request:
    """What a plan is asked for beside the config, as the command line has it.

    Attributes:
        device: None: the one at hand with `calibrate`, else `DEFAULT_DEVICE`.
        price: of one device for an hour.
        lengths: None: the data is read.
        pairs: number of assumed ones.
        config_file, overrides: for the command that is printed.
    """

    gpus: str = "8"
    device: str | None = None
    interconnect: str | None = None
    price: float | None = None
    lengths: str | None = None
    pairs: int | None = None
    solve: bool = False
    cheapest: bool = False
    calibrate: bool = False
    config_file: str | None = None
    overrides: tuple[str, ...] = ()


def plan(config: Config, request: Request, log: Callable[[str], None]) -> list[str]:
    """The lines that answer a request.

    Args:
        log: takes lines about the reading of data and the measuring.

    Raises:
        UserError: for an unknown device, model or interconnect, data that cannot be read, or a config that cannot run.
    """
    _check(request)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    cluster = _named_cluster(config, request)
    model_configs = model_configs_of(config)
    if request.lengths is not None:
        lengths = assumed_lengths(config, request.lengths, request.pairs)
    else:
        lengths = read_lengths(config, model_configs[0], log)
    forecaster = Forecaster(model_configs, lengths, trust_remote_code=config.model.trust_remote_code)
    measured = _calibration(config, request, forecaster, cluster, log)
    if measured is not None:
        cluster, forecaster.rates = measured.as_cluster(), measured.rates
    if request.solve:
        return _solved(config, request, cluster, forecaster)
    forecast = forecaster.forecast(config, cluster)
    lines = [*describe(forecast, request.price), ""]
    lines += describe_changes(forecast, single_changes(forecast, forecaster))
    if not forecast.fits:
        lines += ["", *describe_solution(forecast, solve(config, cluster, forecaster))]
    return lines


def _check(request: Request) -> None:
    if request.cheapest and not request.solve:
        raise ConfigError("--cheapest: is for --solve; give both, or neither")
    if request.price is not None and request.price < 0:
        raise ConfigError(f"--price {request.price:g}: expected what a device costs an hour, at least 0")
    if request.pairs is not None and request.lengths is None:
        raise ConfigError("--pairs: is for --lengths; without it the data is read and its pairs are counted")
    if request.pairs is not None and request.pairs < 1:
        raise ConfigError(f"--pairs {request.pairs}: expected at least 1")
    if request.calibrate and parse_gpus(request.gpus)[0] > 1:
        raise ConfigError(f"--calibrate: measures this machine alone, and --gpus {request.gpus} names several")


def _named_cluster(config: Config, request: Request) -> Cluster:
    device = request.device
    if request.calibrate:
        from dpo_scale.distributed import ranks

        here = ranks.device_name()
        if device not in (None, "cpu" if here == "cpu" else here):
            raise ConfigError(f"--device {device!r}: --calibrate measures the device at hand, {here!r}; leave it out")
        device = here
    return cluster_of(request.gpus, device or DEFAULT_DEVICE, request.interconnect, config.model.dtype)


def _calibration(
    config: Config, request: Request, forecaster: Forecaster, cluster: Cluster, log: Callable[[str], None]
) -> Calibration | None:
    """What is measured now, or was before of a processor, for this number of ranks."""
    if not request.calibrate and (cluster.device.name != "cpu" or cluster.nodes > 1):
        return None
    workload, model_config = forecaster.workload(config, cluster.world_size), forecaster.model_configs[0]
    if request.calibrate:
        log(f"measuring this machine with {cluster.per_node} ranks")
        return calibrate(config, model_config, workload, cluster.per_node)
    return calibrated(config, model_config, workload, cluster.per_node)


def _solved(config: Config, request: Request, cluster: Cluster, forecaster: Forecaster) -> list[str]:
    found: Proposal | None
    if request.cheapest:
        found = solve_cheapest(config, smaller_clusters(cluster), forecaster)
    else:
        found = solve(config, cluster, forecaster)
    if found is None:
        return [
            f"nothing that was tried fits on --gpus {request.gpus} of {cluster.device.memory / 1e9:.0f} GB: it takes "
            "more or larger devices, LoRA, or shorter pairs"
        ]
    command = describe_command(found, request.config_file, request.overrides)
    return [*command, "", *describe(found.forecast, request.price)]
