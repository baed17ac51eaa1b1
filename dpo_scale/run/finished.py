"""The mark of a finished run: a file in its folder that only a whole success writes, last of all.

Exit codes can't tell: a launcher whose own process was killed may return 0, and a queue requeues a job that had just
finished.
"""

from __future__ import annotations

import datetime
import json
from pathlib import Path

from dpo_scale import __version__
from dpo_scale.disk.atomic import write_atomically
from dpo_scale.distributed import ranks
from dpo_scale.errors import CheckpointError
from dpo_scale.settings.resume import FINISHED_FILE


def mark_finished(run_dir: Path, step: int, model: Path) -> None:
    """Say that the run is done and its model written. Every rank must call it; the mark comes after all of them did."""
    ranks.barrier()
    if ranks.is_main():
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        record = {"step": step, "model": model.name, "finished": now, "tool": f"dpo_scale {__version__}"}
        write_atomically(run_dir / FINISHED_FILE, [json.dumps(record, indent=1).encode() + b"\n"])


def unmark_finished(run_dir: Path) -> None:
    """Before more steps are made in the folder."""
    (run_dir / FINISHED_FILE).unlink(missing_ok=True)


def finished_step(run_dir: Path) -> int | None:
    """The last step of a finished run, None if it is not finished; rank 0's answer. Every rank must call it.

    Raises:
        CheckpointError: if the mark is damaged.
    """

    def look() -> int | None | str:
        path = run_dir / FINISHED_FILE
        try:
            return int(json.loads(path.read_text(encoding="utf-8"))["step"])
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            return f"{path}: damaged ({error}); remove it if the run is to go on"

    step = ranks.from_main(look() if ranks.is_main() else None)
    if isinstance(step, str):
        raise CheckpointError(step)
    return step
