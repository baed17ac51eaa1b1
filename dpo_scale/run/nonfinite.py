"""What happens when a step's loss or gradient is not finite.

`engine.optimizer_step` has not applied such a gradient on any rank, so weights and optimizer are those of the step
before. What is left is to write down the rows of the step, so that the cause can be looked for in the data, and to
decide whether the run goes on. A gradient that is too large for fp16's loss scale does not count: it comes and goes.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch

from dpo_scale.data.dataset import PairDataset
from dpo_scale.distributed import ranks
from dpo_scale.errors import TrainingError
from dpo_scale.settings.tree import TrainSettings

NONFINITE_FILE = "nonfinite.jsonl"
MAX_ROWS_NAMED = 10


def record_nonfinite_step(
    settings: TrainSettings,
    run_dir: Path,
    data: PairDataset,
    step: int,
    seen: list[tuple[torch.Tensor, torch.Tensor]],
    grad_norm: float,
    times_before: int,
) -> None:
    """Add a line about the step to `nonfinite.jsonl`; return if the run leaves the step out and goes on.

    Every rank must call it.

    Args:
        step: the optimizer step, counted from 1.
        seen: (row ids [P], losses [P]) of this rank's micro-steps.
        grad_norm: of the whole step.
        times_before: how many steps the run has left out so far.

    Raises:
        TrainingError: naming the step and its rows, if the run is to stop.
    """
    own = [(row, value) for rows, losses in seen for row, value in zip(rows.tolist(), losses.tolist(), strict=True)]
    of_ranks = [[(data.describe(row), value) for row, value in pairs] for pairs in ranks.gather_objects(own)]
    bad = [f"{row}: loss {value}" for pairs in of_ranks for row, value in pairs if not math.isfinite(value)]
    stops = settings.on_nonfinite == "stop" or times_before >= settings.max_nonfinite
    if ranks.is_main():
        record = {
            "step": step,
            "grad_norm": _number(grad_norm),
            "action": "stopped" if stops else "skipped",
            "ranks": [[{"row": row, "loss": _number(value)} for row, value in pairs] for pairs in of_ranks],
        }
        with open(run_dir / NONFINITE_FILE, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
    if bad:
        more = f" and {len(bad) - MAX_ROWS_NAMED} more" if len(bad) > MAX_ROWS_NAMED else ""
        what = f"the loss is not finite for {'; '.join(bad[:MAX_ROWS_NAMED])}{more}"
    else:
        what = f"all losses are finite, but the gradient's norm is {grad_norm}"
    text = f"step {step}: {what}; the weights were not updated ({run_dir / NONFINITE_FILE} has all rows of the step)"
    if not stops:
        ranks.log(f"WARNING: {text}; {times_before + 1} of at most {settings.max_nonfinite} such steps")
        return
    if settings.on_nonfinite == "skip":
        text += f"; train.max_nonfinite = {settings.max_nonfinite} such steps were left out before"
    raise TrainingError(text)


def _number(value: float) -> Any:
    """A number for JSON, which has no NaN and no infinity: those are written as text."""
    return value if math.isfinite(value) else str(value)
