"""The small files in `logs/` of a run folder by which ranks know of one another; `dpo_scale.run.watchdog` uses them.

Every file is small, is there from the start, and is written in place or grows: a network file system shows that to
whoever opens the file again, while a new name may stay hidden for a minute, and a disk that has become full still takes
it. What is not of this launch's processes, or was torn by two writers, is passed over.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from dpo_scale.disk.atomic import machine_id

LOGS_DIR = "logs"
LAST_LINES = 12
_POSITION_BYTES = 1024  # reserved from the start
_MOST_TEXT = 2000


@dataclass(frozen=True)
class Process:
    """A rank's process, told apart from any other that has its number at another time or place.

    Attributes:
        machine: names the space that process ids are unique in.
        started: when, in the kernel's ticks since it was booted; -1 where /proc does not tell.
    """

    host: str
    machine: str
    number: int
    started: int

    def is_gone(self) -> bool:
        """Whether the process has ended, as far as that can be seen; ask only for one of this machine."""
        try:
            fields = _stat(self.number)
        except (FileNotFoundError, ProcessLookupError):
            return self.started >= 0
        except OSError:
            return False
        return fields[0] in ("Z", "X") or int(fields[19]) != self.started


def this_process(machine: str | None = None) -> Process:
    """Who this is.

    Args:
        machine: another name for this machine; ranks with different ones take each other for remote.
    """
    number = os.getpid()
    try:
        return Process(socket.gethostname(), machine or machine_id(), number, int(_stat(number)[19]))
    except OSError:  # without /proc nobody sees whether a process is gone, so each is a machine of its own
        return Process(socket.gethostname(), machine or f"{machine_id()}-{number}", number, -1)


def _stat(process: int) -> list[str]:
    """The fields of /proc/N/stat from the third, the state, on."""
    return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()


@dataclass(frozen=True)
class Position:
    """How far a rank has come.

    Attributes:
        looks: how often its watchdog has looked around.
        beats: places passed that all ranks pass.
        moves: the most steps forward that it knows of, of any rank.
        last_word: why its watchdog stopped, if it did.
    """

    rank: int
    process: Process
    looks: int = 0
    beats: int = 0
    moves: int = 0
    where: str = "an unknown place"
    last_word: str | None = None

    def __str__(self) -> str:
        return f"rank {self.rank} (process {self.process.number} on {self.process.host}, last seen at {self.where})"


@dataclass(frozen=True)
class End:
    """A rank ended, or was found to be gone.

    Attributes:
        code: the exit code with which the others follow.
        said_on: the machine on whose console `text` has been said.
    """

    rank: int
    process: Process
    code: int
    said_on: str
    text: str


class RankFiles:
    """One rank's view of them.

    Args:
        processes: of all ranks of this launch, in their order.
    """

    def __init__(self, run_dir: Path, rank: int, processes: Sequence[Process]) -> None:
        self.folder = run_dir / LOGS_DIR
        self._rank, self._processes = rank, processes
        self._ends = self.folder / "ends"
        self._ends_read = 0

    def make(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._ends.touch()

    def log(self, rank: int) -> Path:
        return self.folder / f"rank-{rank}.log"

    def write(self, position: Position) -> bool:
        """Write this rank's position; whether that worked."""
        content = json.dumps(asdict(position), ensure_ascii=False).encode().ljust(_POSITION_BYTES)
        try:
            descriptor = os.open(self._at(self._rank), os.O_WRONLY | os.O_CREAT, 0o666)
            try:
                written = os.write(descriptor, content)
                os.ftruncate(descriptor, len(content))
            finally:
                os.close(descriptor)
        except OSError:
            return False
        return written == len(content)

    def read(self, rank: int) -> Position | None:
        """What a rank has written last; None if that can't be read."""
        try:
            content = json.loads(self._at(rank).read_text(encoding="utf-8"))
            position = Position(**{**content, "process": Process(**content["process"])})
        except (OSError, ValueError, TypeError, KeyError):
            return None
        return position if position.process == self._processes[rank] else None

    def read_or_unknown(self, rank: int) -> Position:
        return self.read(rank) or Position(rank, self._processes[rank])

    def add_end(self, end: End) -> None:
        line = json.dumps({**asdict(end), "text": end.text[:_MOST_TEXT]}) + "\n"
        with suppress(OSError), open(self._ends, "ab", buffering=0) as file:
            file.write(line.encode())

    def new_ends(self) -> list[End]:
        """The ends of other ranks that were added since this was last asked."""
        try:
            with open(self._ends, "rb") as file:
                if os.fstat(file.fileno()).st_size <= self._ends_read:
                    return []
                file.seek(self._ends_read)
                text = file.read()
        except OSError:
            return []
        whole = text[: text.rfind(b"\n") + 1]
        self._ends_read += len(whole)
        found = []
        for line in whole.splitlines():
            with suppress(ValueError, TypeError, KeyError, IndexError):
                content = json.loads(line)
                end = End(**{**content, "process": Process(**content["process"])})
                if end.rank != self._rank and self._processes[end.rank] == end.process:
                    found.append(end)
        return found

    def last_lines(self, rank: int) -> str:
        """The end of a rank's log, indented."""
        try:
            lines = self.log(rank).read_text(errors="replace").splitlines()[-LAST_LINES:]
        except OSError as error:
            lines = [f"({error.strerror})"]
        return "".join(f"\n    {line}" for line in lines)

    def _at(self, rank: int) -> Path:
        return self.folder / f"rank-{rank}.at"
