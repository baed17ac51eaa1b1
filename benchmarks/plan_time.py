"""Step times for `plan_accuracy.py`: predicted by a calibration right before the run, and measured by the run."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import numpy as np

from dpo_scale.data.flops import forward_flops
from dpo_scale.forecast.calibrate import calibrate
from dpo_scale.forecast.lengths import Lengths
from dpo_scale.forecast.parts import StepTime
from dpo_scale.forecast.shape import shape_of, shape_of_reference
from dpo_scale.forecast.speed import time_of
from dpo_scale.forecast.workload import model_configs_of, workload_of
from dpo_scale.observe.metrics_file import METRICS_FILE, read_metrics
from dpo_scale.settings.tree import Config


def predicted_step(config: Config, lengths: np.ndarray, ranks: int) -> StepTime:
    """The mean step of a run on this machine, after measuring it (at most a minute).

    Args:
        lengths: [N, 3] tokens of prompt, chosen and rejected of the pairs that it trains on.
        ranks: how many it has.
    """
    model_configs = model_configs_of(config)
    policy = model_configs[0]
    of_pairs = Lengths(lengths, lengths[:0], "the rows of this benchmark")
    workload = workload_of(config, of_pairs, model_configs, forward_flops(policy), ranks)
    measured = calibrate(config, policy, workload, ranks)
    sizes, reference = shape_of(config, policy), shape_of_reference(config, policy)
    return time_of(config, measured.as_cluster(), workload, sizes, reference=reference, rates=measured.rates)


def measured_step(run_dir: Path) -> float:
    """The median of a finished run's steps but for the first, in which code is compiled and memory first touched."""
    steps = [row["step_seconds"] for row in read_metrics(run_dir / METRICS_FILE) if "step_seconds" in row]
    return statistics.median(steps[1:])


def time_columns(predicted: StepTime, measured: float) -> dict[str, Any]:
    """For a row of the table and its JSON: seconds, and by how much of the measured ones the prediction is off."""
    return {
        "predicted_seconds": predicted.step,
        "measured_seconds": measured,
        "time_error": predicted.step / measured - 1.0,
        "predicted_parts": predicted.parts,
    }
