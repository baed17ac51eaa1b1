"""The small files in `logs/` of a run folder through which ranks know of one another (`dpo_scale.run.watchdog`).

Every file is there from the start and is written in place or grows. A network file system shows that to whoever opens
the file again, while a new name may stay hidden for a minute. A disk that has become full still takes it. Anything that
was left by another launch, or torn by two writers, is passed over.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

from dpo_scale.disk.atomic import machine_id

LOGS_DIR = "logs"
LAST_LINES = 12
POSITION_BYTES = 1024  # reserved from the start
MAX_END_TEXT = 2000  # characters


@dataclass(frozen=True)
class Process:
    """A rank's process; the same number at another time or place is another process.

    Attributes:
        machine: within which process ids are unique.
        started: in clock ticks after the machine was booted; -1 where /proc does not tell.
    """

    host: str
    machine: str
    number: int
    started: int

    def is_gone(self) -> bool:
        """Whether the process has ended, as far as that can be seen. Ask only on its own machine."""
        try:
            fields = stat_fields(self.number)
        except (FileNotFoundError, ProcessLookupError):
            return self.started >= 0
        except OSError:
            return False
        return fields[0] in ("Z", "X") or int(fields[19]) != self.started


def this_process(machine: str | None = None) -> Process:
    """This process, on this machine or one of another name; ranks of different machines can't see each other end."""
    host, number = socket.gethostname(), os.getpid()
    try:
        return Process(host, machine or machine_id(), number, int(stat_fields(number)[19]))
    except OSError:  # without /proc nobody sees whether a process is gone, so each is a machine of its own
        return Process(host, machine or f"{machine_id()}-{number}", number, -1)


def stat_fields(process: int) -> list[str]:
    """The fields of /proc/N/stat from the third on: state, parent, ..., start time (19).

    Raises:
        OSError: if there is no such process, or no /proc.
    """
    return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()


@dataclass(frozen=True)
class Position:
    """How far a rank has come.

    Attributes:
        looks: how often its watchdog has looked around.
        beats: how many of the places that all ranks pass it has passed.
        moves: the most steps forward that it knows of any rank.
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
    """A rank that ended or was found to be gone.

    Attributes:
        code: the exit code with which the others follow.
        said_on: the machine whose console has `text` already.
    """

    rank: int
    process: Process
    code: int
    said_on: str
    text: str


Record = TypeVar("Record", Position, End)


class RankFiles:
    """One rank's view of the files.

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
        content = json.dumps(asdict(position), ensure_ascii=False).encode().ljust(POSITION_BYTES)
        try:
            # opened by number: by name, mode "wb" would give up the room that is reserved
            descriptor = os.open(self._position(self._rank), os.O_WRONLY | os.O_CREAT, 0o666)
            with open(descriptor, "wb", buffering=0) as file:
                written = file.write(content)
                file.truncate(len(content))
        except OSError:
            return False
        return written == len(content)

    def read(self, rank: int) -> Position | None:
        """What a rank has written last; None if that can't be read."""
        try:
            return self._parse(Position, self._position(rank).read_bytes())
        except OSError:
            return None

    def read_or_unknown(self, rank: int) -> Position:
        return self.read(rank) or Position(rank, self._processes[rank])

    def add_end(self, end: End) -> None:
        line = json.dumps({**asdict(end), "text": end.text[:MAX_END_TEXT]}) + "\n"
        with suppress(OSError), open(self._ends, "ab", buffering=0) as file:
            file.write(line.encode())

    def new_ends(self) -> list[End]:
        """The ends of other ranks that were added since this was last asked."""
        try:
            with open(self._ends, "rb") as file:
                file.seek(self._ends_read)
                text = file.read()
        except OSError:
            return []
        whole = text[: text.rfind(b"\n") + 1]
        self._ends_read += len(whole)
        ends = [self._parse(End, line) for line in whole.splitlines()]
        return [end for end in ends if end is not None and end.rank != self._rank]

    def last_lines(self, rank: int) -> str:
        """The end of a rank's log, indented."""
        try:
            lines = self.log(rank).read_text(errors="replace").splitlines()[-LAST_LINES:]
        except OSError as error:
            lines = [f"({error.strerror})"]
        return "".join(f"\n    {line}" for line in lines)

    def _position(self, rank: int) -> Path:
        return self.folder / f"rank-{rank}.at"

    def _parse(self, kind: type[Record], text: bytes) -> Record | None:
        """A record of this launch; None if the text is torn or of another launch."""
        try:
            content = json.loads(text)
            record = kind(**{**content, "process": Process(**content["process"])})
            return record if self._processes[record.rank] == record.process else None
        except (ValueError, TypeError, KeyError, IndexError):
            return None
