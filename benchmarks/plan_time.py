"""Step times for `plan_accuracy.py`: predicted by a calibration right before the run, and measured by the run."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from dpo_scale.forecast.calibrate import calibrate
from dpo_scale.forecast.parts import StepTime, Workload
from dpo_scale.forecast.speed import Sizes, time_of
from dpo_scale.observe.metrics_file import METRICS_FILE, read_metrics
from dpo_scale.settings.tree import Config


def predicted_step(
    config: Config, model_config: Any, workload: Workload, sizes: Sizes, ranks: int, reference: Sizes | None = None
) -> StepTime:
    """The mean step of a run on this machine, after measuring it (at most a minute).

    Args:
        model_config, sizes: of the policy; `reference` of a reference of another shape.
        workload: planned for `ranks`.
    """
    measured = calibrate(config, model_config, workload, ranks)
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
