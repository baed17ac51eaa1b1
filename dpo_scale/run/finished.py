"""The mark of a finished run: a file in its folder that only a whole success writes, last of all.

Exit codes can't tell: a launcher whose own process was killed may return 0, and a queue may requeue a job that had just
finished.
"""

from __future__ import annotations

import datetime
import json
from pathlib import Path

from dpo_scale import __version__
from dpo_scale.disk.atomic import naming
from dpo_scale.disk.signed_json import read_signed, write_signed
from dpo_scale.distributed import ranks
from dpo_scale.errors import CheckpointError
from dpo_scale.settings.resume import FINISHED_FILE


def mark_finished(run_dir: Path, step: int, model: Path) -> None:
    """Say that the run is done and its model written. Every rank must call it; the mark comes after all of them did.

    Raises:
        CheckpointError: if the mark cannot be written.
    """
    ranks.barrier()
    if ranks.is_main():
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        record = {"step": step, "model": model.name, "finished": now, "tool": f"dpo_scale {__version__}"}
        advice = "training is done and the model is written; make room, then start the run again with --resume auto"
        with naming(run_dir / FINISHED_FILE, CheckpointError, to="written", advice=advice):
            write_signed(run_dir / FINISHED_FILE, record)


def unmark_finished(run_dir: Path) -> None:
    """Before more steps are made in the folder."""
    (run_dir / FINISHED_FILE).unlink(missing_ok=True)


def finished_step(run_dir: Path) -> int | None:
    """The last step of a finished run, None if it is not finished; rank 0's answer. Every rank must call it.

    Raises:
        CheckpointError: if the mark is damaged or cannot be read.
    """

    def look() -> int | None:
        path = run_dir / FINISHED_FILE
        try:
            with naming(path, CheckpointError, to="read"):
                return int(_read_mark(path)["step"]) if path.exists() else None
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path}: damaged ({error}); remove it if the run is to go on") from None

    return ranks.on_main(look)


def _read_mark(path: Path) -> dict:
    try:
        return read_signed(path)
    except ValueError:
        record = json.loads(path.read_text(encoding="utf-8"))
        if "checksum" in record:
            raise
        return record  # version 0.1 wrote it without a checksum
