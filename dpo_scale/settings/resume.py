"""What resuming a run needs before anything is loaded: where it is found, and which settings may differ."""

from __future__ import annotations

import re
from pathlib import Path

from dpo_scale.errors import CheckpointError

# of a run's folder; in it runs, complete checkpoints and finished runs are known by these files
CONFIG_FILE = "config.yaml"
CHECKPOINTS_DIR = "checkpoints"
MANIFEST_FILE = "manifest.json"  # of a complete checkpoint
FINISHED_FILE = "finished.json"

RATE_SETTINGS = tuple(
    f"train.{name}" for name in ("learning_rate", "lr_scheduler_type", "warmup_ratio", "warmup_steps", "min_lr_ratio")
)


def run_to_continue(resume: str, name: str) -> str | None:
    """The run folder that `--resume` means where no `output_dir` is given; None for a new one.

    Args:
        resume: "latest" or "auto" for the newest `runs/<name>-<time>` that has a checkpoint or is finished; or a run
            or checkpoint folder.
        name: what the run folders of this config are called, before the time.

    Raises:
        CheckpointError: if there is no such folder, or none to be the latest.
    """
    if resume in ("latest", "auto"):
        named = re.compile(re.escape(name) + r"-\d{8}-\d{6}")
        runs = {file.parents[2] for file in Path("runs").glob(f"*/{CHECKPOINTS_DIR}/step-*/{MANIFEST_FILE}")}
        runs |= {file.parent for file in Path("runs").glob(f"*/{FINISHED_FILE}")}
        runs = {run for run in runs if named.fullmatch(run.name)}
        if not runs and resume == "latest":
            raise CheckpointError(
                f"--resume: no runs/{name}-<time> has a checkpoint; name a run with output_dir=FOLDER"
            )
        return str(max(runs)) if runs else None
    folder = Path(resume)
    if not folder.is_dir():
        raise CheckpointError(f"--resume {resume}: no such folder; expected a run folder, a checkpoint, latest or auto")
    if folder.resolve().parent.name == CHECKPOINTS_DIR:
        folder = folder.resolve().parents[1]
    # a checkpoint copied out of its run leaves the run behind
    return str(folder) if (folder / CONFIG_FILE).is_file() else None


def may_be_allowed(setting: str) -> bool:
    """Whether `checkpoint.allow_changes` may name a setting: those that only our own code reads, at each step anew.

    What the optimizer's saved state holds (weight decay, betas, clipping) would come back with it. What decides the
    order of pairs, the model or the reference would make it another run.
    """
    return setting in RATE_SETTINGS or setting.startswith("loss.")
