"""`metrics.jsonl`: a line for each step and evaluation, none doubled, none missing, whatever happened to the run.

A resumed run cuts the file back to the step that it starts from. While the disk is full, lines wait in memory. Half a
line is cut off again. All follow in order once there is room.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dpo_scale.errors import TrainingError

METRICS_FILE = "metrics.jsonl"


class MetricsFile:
    """Appends records to a run's file."""

    def __init__(self, path: Path, start_step: int, warn: Callable[[str], None]) -> None:
        """Cut the file back to the lines of the steps that the run keeps.

        Args:
            start_step: lines of later steps are dropped; at 0, a fresh start, all are.
            warn: gets a message each time that lines start to wait for room.

        Raises:
            TrainingError: if the file cannot be written.
        """
        self._path, self._warn = path, warn
        self._waiting: list[bytes] = []
        try:
            kept = _lines_up_to(path, start_step, warn) if path.exists() else []
            temporary = path.with_suffix(".tmp")
            temporary.write_bytes(b"".join(kept))
            os.replace(temporary, path)
            self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND)
        except OSError as error:
            raise TrainingError(f"{path}: cannot be written: {error.strerror}") from None
        self._size = os.fstat(self._descriptor).st_size

    def write(self, record: dict[str, Any]) -> None:
        """Append a record as a line of JSON."""
        had_room = not self._waiting
        self._waiting.append(json.dumps(record).encode() + b"\n")
        error = self._write_waiting()
        if error is not None and had_room:
            self._warn(f"WARNING: {self._path}: {error.strerror}; lines are kept in memory until there is room")

    def sync(self) -> None:
        """Put the lines so far on the disk."""
        self._write_waiting()
        try:
            os.fsync(self._descriptor)
        except OSError as error:
            self._warn(f"WARNING: {self._path}: {error.strerror}")

    def close(self) -> None:
        error = self._write_waiting()
        os.close(self._descriptor)
        if error is not None:
            self._warn(f"WARNING: {self._path}: {error.strerror}; {len(self._waiting)} lines could not be written")

    def _write_waiting(self) -> OSError | None:
        try:
            while self._waiting:
                line = self._waiting[0]
                if os.write(self._descriptor, line) < len(line):
                    raise OSError(errno.ENOSPC, "No space left on device")
                self._size += len(line)
                del self._waiting[0]
        except OSError as error:
            os.ftruncate(self._descriptor, self._size)
            return error
        return None


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a `metrics.jsonl`, in order, without lines that are damaged or that a crash cut short."""
    return [record for line in path.read_bytes().splitlines() if (record := _record(line)) is not None]


def _lines_up_to(path: Path, step: int, warn: Callable[[str], None]) -> list[bytes]:
    lines = path.read_bytes().splitlines(keepends=True) if step else []
    kept = []
    for number, line in enumerate(lines, 1):
        record = _record(line)
        if record is None and number < len(lines):  # the last one is what a crash cut short
            warn(f"WARNING: {path}: line {number} is damaged; it is left out")
        if record is not None and line.endswith(b"\n") and record["step"] <= step:
            kept.append(line)
    return kept


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    is_ours = isinstance(record, dict) and isinstance(record.get("step"), int) and "phase" in record
    return record if is_ours else None
