"""Each rank's last words: where it is, what went wrong with it, and an end to waiting for ranks that are gone or stuck.

While a run trains, each rank keeps two small files in `logs/`. `rank-N.log` gets warnings, errors with their stacks and
crashes. `rank-N.at` says how far the rank has come: it counts beats, one wherever a rank makes progress, and all ranks
beat alike. So when nothing moves any more, the ranks with the fewest beats are those that the others wait for, and when
a rank is killed, the others can say which one and where it was.

A thread looks after the beats. Without one for `train.hang_timeout_minutes` it writes the stacks of all threads into
the log, says which ranks are behind, and ends the process, whereupon the launcher ends the job.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import logging.handlers
import os
import socket
import sys
import threading
import time
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

from dpo_scale.preemption import Preempted

EXIT_HANGING = 70  # EX_SOFTWARE of sysexits.h
LOGS_DIR = "logs"
MOST_LOG_BYTES = 1_000_000  # of a rank's log, and of the one before it
LAST_LINES = 12

_beats = 0
_where = "start"


def beat(where: str) -> None:
    """This rank makes progress. Call it at the same places on every rank; it costs nothing."""
    global _beats, _where
    _beats += 1
    _where = where


@dataclass(frozen=True)
class Position:
    """How far a rank has come.

    Attributes:
        last_word: why it ended by itself, if it did.
    """

    rank: int
    host: str
    process: int
    beats: int
    where: str
    last_word: str | None = None

    def __str__(self) -> str:
        return f"rank {self.rank} (process {self.process} on {self.host}, last seen at {self.where})"

    def is_gone(self) -> bool:
        """Whether the process is known to have ended; False where that can't be seen from this host."""
        if self.host != socket.gethostname():
            return False
        try:
            state = Path(f"/proc/{self.process}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return True
        return state in ("Z", "X")


class Watchdog:
    """Keeps this rank's log and position while it is entered, and ends the process when it makes no progress."""

    current: Watchdog | None = None

    def __init__(self, run_dir: Path, timeout_minutes: float | None, rank: int, world_size: int) -> None:
        """
        Args:
            timeout_minutes: longest time without a beat; None waits forever.
        """
        self._folder = run_dir / LOGS_DIR
        self._rank, self._world_size = rank, world_size
        self._timeout = None if timeout_minutes is None else timeout_minutes * 60
        self._period = 10.0 if self._timeout is None else min(10.0, self._timeout / 5)
        self._ended = threading.Event()
        self._last_word: str | None = None

    def __enter__(self) -> Watchdog:
        self._folder.mkdir(parents=True, exist_ok=True)
        self._write_position()
        path = self._folder / f"rank-{self._rank}.log"
        self._log = logging.handlers.RotatingFileHandler(path, maxBytes=MOST_LOG_BYTES, backupCount=1)
        self._log.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        self._log.setLevel(logging.WARNING)
        logging.getLogger().addHandler(self._log)
        self._write(f"rank {self._rank} starts as process {os.getpid()} on {socket.gethostname()}")
        self._stacks = open(path, "a")  # noqa: SIM115 (a crash writes there whenever it comes)
        faulthandler.enable(self._stacks)
        self._thread = threading.Thread(target=self._look_after, name="watchdog", daemon=True)
        self._thread.start()
        Watchdog.current = self
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, stack: TracebackType | None) -> None:
        self._ended.set()
        self._thread.join()
        if error is not None and not isinstance(error, Preempted):  # its files and `current` stay, for others to read
            self.fail(error)
            return
        Watchdog.current = None
        faulthandler.disable()
        self._stacks.close()
        logging.getLogger().removeHandler(self._log)
        self._log.close()
        (self._folder / f"rank-{self._rank}.at").unlink(missing_ok=True)

    def fail(self, error: BaseException) -> None:
        """Leave an error as this rank's last word."""
        self._write("".join(traceback.format_exception(error)).rstrip())
        self._last_word = f"{type(error).__name__}: {error}"
        self._write_position()

    def lost_peers(self) -> list[Position]:
        """The other ranks on this host whose processes are gone."""
        return [position for position in self._positions() if position.rank != self._rank and position.is_gone()]

    def speaks_for(self, lost: list[Position]) -> bool:
        """Whether this is the first rank of those that are left on its host, so that one of them speaks."""
        gone = {position.rank for position in lost}
        host = socket.gethostname()
        return min(p.rank for p in self._positions() if p.host == host and p.rank not in gone) == self._rank

    def last_lines(self, rank: int) -> str:
        """The end of a rank's log, indented."""
        try:
            lines = (self._folder / f"rank-{rank}.log").read_text(errors="replace").splitlines()[-LAST_LINES:]
        except OSError as error:
            lines = [f"({error.strerror})"]
        return "".join(f"\n    {line}" for line in lines)

    def _look_after(self) -> None:
        beats, since = _beats, time.monotonic()
        while not self._ended.wait(self._period):
            if _beats != beats:
                beats, since = _beats, time.monotonic()
                self._write_position()
            elif self._timeout is not None and time.monotonic() - since >= self._timeout:
                self._end_waiting(time.monotonic() - since)

    def _end_waiting(self, seconds: float) -> None:
        try:
            self._stacks.write(f"no progress for {seconds:.0f} s at {_where}; the stacks of all threads:\n")
            self._stacks.flush()
            faulthandler.dump_traceback(self._stacks)
            text = self._describe_hang(seconds)
            self._write(text)
            print(text, file=sys.stderr, flush=True)
        finally:
            os._exit(EXIT_HANGING)

    def _describe_hang(self, seconds: float) -> str:
        positions = self._positions()
        last = min(position.beats for position in positions)
        behind = [position for position in positions if position.beats == last]
        if len(behind) == len(positions):
            who = "all ranks are equally far: what they wait for does not answer"
        else:
            who = "the others wait for " + ", ".join(map(str, behind[:8]))
        return (
            f"rank {self._rank}: no progress for {seconds:.0f} s (train.hang_timeout_minutes) at {_where}; {who}. "
            f"The stacks are in {self._folder}/rank-N.log"
        )

    def _positions(self) -> list[Position]:
        found = {self._rank: self._position()}
        for rank in range(self._world_size):
            try:
                found.setdefault(rank, Position(**json.loads((self._folder / f"rank-{rank}.at").read_text())))
            except (OSError, ValueError, TypeError):  # it is being written, or its disk is gone too
                continue
        return [found[rank] for rank in sorted(found)]

    def _position(self) -> Position:
        return Position(self._rank, socket.gethostname(), os.getpid(), _beats, _where, self._last_word)

    def _write_position(self) -> None:
        path = self._folder / f"rank-{self._rank}.at"
        try:
            path.write_text(json.dumps(asdict(self._position())))
        except OSError:  # a full disk must not end a run that could go on
            pass

    def _write(self, text: str) -> None:
        record = logging.LogRecord("dpo_scale", logging.WARNING, __file__, 0, text, None, None)
        self._log.handle(record)
