"""Each rank's last words: where it is, what went wrong with it, and an end to waiting for ranks that are gone or stuck.

A rank that waits for another waits inside a collective. On a GPU that spins for ever if the peer is gone: nothing
raises, and a launcher ends only the ranks of its own node. So a thread of each rank looks after the others and ends its
own process where it has to. It works over small files in `logs/` of the run folder, which every node sees anyway: no
server and no port has to outlive the failure. There are three kinds (`dpo_scale.run.rank_files`):

`rank-N.log` gets a rank's warnings, errors with their stacks, and crashes.

`rank-N.at` says where a rank is. Its thread renews it every six seconds, so it also says that the process lives, even
while the rank itself waits in a collective. Each rank reads the files of the ranks 1, 2, 4, 8, ... further on, ten of
1,024. In them is `moves`, the most steps forward that a rank knows of, its own or another's: a rank takes over larger
numbers than its own, so news of progress reaches all of them within log2(ranks) looks. A run hangs when `moves` stands
still for `train.hang_timeout_minutes`. So one rank that writes a checkpoint keeps alive all that wait for it, and when
nobody moves, the ranks with the fewest beats (`dpo_scale.progress`) are those that the others wait for.

`ends` gets a line from a rank that ends too early, and from one that finds another gone. All read it every two seconds.

A rank is gone

- if its process is, which the ranks of its own machine look for every two seconds. Processes are told apart by their
  start time as well, and compared only within one space of process ids (containers have their own);
- if no rank of its machine has renewed its file for 30 seconds. Clocks of machines are never compared: a reader counts
  its own looks, and only those in which it could write its own file and made no progress itself. So a file system that
  stalls or is full is not taken for a death, nor is a job that was suspended, nor anything while the run moves.

A process that ends in order, or knows why it ends, says so in its file first and is not missed. The others follow a
rank that ended by an error 15 seconds later. By then it has printed that error, and if another rank was killed, which
is what most broken connections come from, that has been found.
"""

from __future__ import annotations

import datetime
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
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import NoReturn

from dpo_scale.disk.atomic import write_atomically
from dpo_scale.errors import EXIT_USER_ERROR, UserError
from dpo_scale.progress import progress
from dpo_scale.run import preemption
from dpo_scale.run.preemption import EXIT_PREEMPTED, Preempted
from dpo_scale.run.rank_files import End, Position, Process, RankFiles

EXIT_HANGING = 70  # EX_SOFTWARE of sysexits.h
EXIT_LOST = 71  # EX_OSERR: a rank was killed, crashed or lost with its node
LOST_FILE = "lost.json"  # in the run folder: a rank was lost, and the run can be resumed
MAX_LOG_BYTES = 1_000_000  # of a rank's log, and of the one before it
MAX_NAMED = 8  # ranks in a message
MAX_LAST_WORD = 200  # characters


@dataclass
class Silence:
    """For how many of this rank's looks a rank of another machine, and its machine, have not renewed their positions.

    Attributes:
        looks_of_rank: what the rank's position said last.
        looks_of_machine: the same of all ranks there, by rank, once it fell silent.
    """

    looks_of_rank: int
    own_looks: int = 0
    looks_of_machine: dict[int, int] | None = None


class Watchdog:
    """Keeps this rank's log and position while it is entered, and ends the process if the run can't go on."""

    current: Watchdog | None = None

    def __init__(
        self,
        run_dir: Path,
        timeout_minutes: float | None,
        rank: int,
        processes: Sequence[Process],
        *,
        poll_seconds: float = 2.0,
        look_seconds: float = 6.0,
        silence_seconds: float = 30.0,
        grace_seconds: float = 15.0,
    ) -> None:
        """
        Args:
            timeout_minutes: longest time without progress on any rank; None waits forever.
            processes: of all ranks, in their order.
            poll_seconds: how often to look for ranks that are gone, and for what was said about them.
            look_seconds: how often to write this rank's position and read others'.
            silence_seconds: a machine whose ranks do not renew their positions for so long is lost.
            grace_seconds: how long after a rank's error the others end.
        """
        self._run_dir, self._rank, self._processes = run_dir, rank, processes
        self._files = RankFiles(run_dir, rank, processes)
        self._timeout = None if timeout_minutes is None else timeout_minutes * 60
        shortest = float("inf") if self._timeout is None else self._timeout / 5
        self._poll, self._look = min(poll_seconds, shortest), min(look_seconds, shortest)
        self._silent_looks = max(2, round(silence_seconds / self._look))
        self._grace = grace_seconds
        machine = processes[rank].machine
        self._mates = [r for r, process in enumerate(processes) if process.machine == machine and r != rank]
        self._watched = [(rank + 2**k) % len(processes) for k in range((len(processes) - 1).bit_length())]
        self._silences: dict[int, Silence] = {}  # of the watched ranks of other machines, once they were seen alive
        self._looks = self._moves = 0
        self._noted = (0, 0)  # own progress that is in `moves`
        self._moved_since_look = True
        self._still = 0.0  # seconds without progress on any rank
        self._loss_found: float | None = None
        self._first_end: tuple[float, End] | None = None
        self._ended = threading.Event()
        self._last_word: str | None = None

    def __enter__(self) -> Watchdog:
        self._files.make()
        self._files.write(self._position())
        path = self._files.log(self._rank)
        self._log = logging.handlers.RotatingFileHandler(path, maxBytes=MAX_LOG_BYTES, backupCount=1)
        self._log.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        self._log.setLevel(logging.WARNING)
        logging.getLogger().addHandler(self._log)
        self._write(f"rank {self._rank} starts as process {os.getpid()} on {socket.gethostname()}")
        self._stacks = open(path, "a")  # noqa: SIM115 (a crash writes there whenever it comes)
        faulthandler.enable(self._stacks)
        preemption.before_leaving(lambda reason: self._say_end(EXIT_PREEMPTED, f"told to stop ({reason})"))
        self._thread = threading.Thread(target=self._look_after, name="watchdog", daemon=True)
        self._thread.start()
        Watchdog.current = self
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, stack: TracebackType | None) -> None:
        self._ended.set()
        self._thread.join()
        if error is not None and not isinstance(error, Preempted):  # its files and `current` stay, for others to read
            self._write("".join(traceback.format_exception(error)).rstrip())
            code = EXIT_USER_ERROR if isinstance(error, UserError) else 1
            self._say_end(code, f"{type(error).__name__}: {error}")
            return
        self._last_word = "finished" if error is None else str(error)
        self._files.write(self._position())
        Watchdog.current = None
        preemption.before_leaving(None)
        faulthandler.disable()
        self._stacks.close()
        logging.getLogger().removeHandler(self._log)
        self._log.close()

    def end_with_others(self) -> None:
        """End the process if another rank's end is known to be what this one's failure comes from.

        For a rank that has failed, while it waits for its turn to print its error: the connection to a rank breaks when
        that is killed, but also when its own watchdog has ended it.
        """
        self._read_ends()
        self._look_for_the_gone()
        if self._first_end is not None and self._first_end[1].code in (EXIT_HANGING, EXIT_PREEMPTED):
            self._follow(self._first_end[1])

    def _look_after(self) -> None:
        last = next_look = time.monotonic()
        while not self._ended.wait(self._poll):
            now = time.monotonic()
            self._still += min(now - last, 2 * self._poll)  # the time of a job that was suspended does not count
            last = now
            self._note_own_progress()
            self._read_ends()
            self._look_for_the_gone()
            if self._first_end is not None and now - self._first_end[0] >= self._grace:
                self._follow(self._first_end[1])
            if now >= next_look:
                next_look = now + self._look
                self._look_around()
            if self._timeout is not None and self._still >= self._timeout:
                self._end_hanging()

    def _note_own_progress(self) -> None:
        now = progress()
        if (now.beats, now.activity) != self._noted:
            self._noted = now.beats, now.activity
            self._moved_since_look = True
        elif not now.is_patient:
            return
        self._moves += 1
        self._still = 0.0

    def _read_ends(self) -> None:
        """Take in what others said about ends; a rank that is lost ends this process at once."""
        for end in self._files.new_ends():
            if end.code == EXIT_LOST:
                self._follow(end)
            if self._first_end is None:
                self._first_end = time.monotonic(), end
            elif end.code == EXIT_USER_ERROR != self._first_end[1].code:
                # a user's mistake on one rank is what broken connections on others come from
                self._first_end = self._first_end[0], end

    def _look_for_the_gone(self) -> None:
        """End if a process of this machine is gone without a word; the first rank of those that are left says so."""
        gone = [self._files.read_or_unknown(rank) for rank in self._mates if self._processes[rank].is_gone()]
        lost = [position for position in gone if position.last_word is None]
        self._mates = [rank for rank in self._mates if rank not in {p.rank for p in gone if p.last_word is not None}]
        if not lost:
            return
        now = time.monotonic()
        self._loss_found = self._loss_found or now
        # the others wait for what the first one says, and say it themselves if it does not come
        before = sum(rank < self._rank for rank in self._mates) - sum(p.rank < self._rank for p in lost)
        if now - self._loss_found >= 2 * self._poll * before:
            self._end_without(lost, "was killed or crashed")

    def _look_around(self) -> None:
        """Say that this rank lives, and see which of the others do."""
        self._looks += 1
        # a look counts against others only if the file system works for this rank, and if this rank only waits
        counts = self._files.write(self._position()) and not self._moved_since_look
        self._moved_since_look = False
        for k, rank in enumerate(self._watched):
            position = self._files.read(rank)
            if position is not None and position.moves > self._moves:
                self._moves, self._still = position.moves, 0.0
            if self._processes[rank].machine != self._processes[self._rank].machine:
                # the rank before a silent machine speaks first; those further off do if it does not
                self._listen_to(rank, position, counts, self._silent_looks + 2 * k)

    def _listen_to(self, rank: int, position: Position | None, counts: bool, max_looks: int) -> None:
        """Note whether a rank of another machine has renewed its position; end if its machine has not for long."""
        silence = self._silences.get(rank)
        if position is not None and (silence is None or position.looks != silence.looks_of_rank):
            self._silences[rank] = Silence(position.looks)
        elif silence is not None and (position is None or position.last_word is None):
            if not counts:
                self._silences[rank] = Silence(silence.looks_of_rank)
                return
            # one rank's interpreter may be busy for long; those of all ranks of a machine are not
            of_machine = self._positions_on(self._processes[rank].machine)
            looks = {p.rank: p.looks for p in of_machine if p.last_word is None}
            if silence.looks_of_machine not in (None, looks):
                self._silences[rank] = Silence(silence.looks_of_rank)
                return
            silence.looks_of_machine = looks
            silence.own_looks += 1
            if silence.own_looks >= max_looks:
                self._end_without(of_machine, "has not been heard of for long")

    def _positions_on(self, machine: str) -> list[Position]:
        ranks = [rank for rank, process in enumerate(self._processes) if process.machine == machine]
        return [self._files.read_or_unknown(rank) for rank in ranks]

    def _end_without(self, lost: list[Position], what: str) -> NoReturn:
        """End because other ranks are gone, after saying so to the console and to all ranks."""
        try:
            more = f" and {len(lost) - MAX_NAMED} more ranks" if len(lost) > MAX_NAMED else ""
            names = ", ".join(map(str, lost[:MAX_NAMED])) + more
            first = lost[0].rank
            text = f"{names} {what}\n  the end of the log of rank {first}:{self._files.last_lines(first)}"
            print(text, file=sys.stderr, flush=True)
            self._write(text)
            self._mark_lost(lost)
            self._say_end(EXIT_LOST, text, lost[0])
        finally:
            os._exit(EXIT_LOST)

    def _follow(self, end: End) -> NoReturn:
        """End because another rank has; one rank of each machine whose console does not have it says why."""
        try:
            text = f"rank {self._rank} ends: {end.text.splitlines()[0]}"
            self._write(text)
            is_news = end.said_on != self._processes[self._rank].machine
            if is_news and all(self._rank < rank for rank in self._mates):
                print(text, file=sys.stderr, flush=True)
            self._last_word = text[:MAX_LAST_WORD]
            self._files.write(self._position())
        finally:
            os._exit(end.code)

    def _end_hanging(self) -> NoReturn:
        try:
            where = progress().where
            self._stacks.write(f"no progress for {self._still:.0f} s at {where}; the stacks of all threads:\n")
            self._stacks.flush()
            faulthandler.dump_traceback(self._stacks)
            text = self._describe_hang(where)
            self._write(text)
            print(text, file=sys.stderr, flush=True)
            self._say_end(EXIT_HANGING, text)
        finally:
            os._exit(EXIT_HANGING)

    def _describe_hang(self, where: str) -> str:
        found = [self._position() if r == self._rank else self._files.read(r) for r in range(len(self._processes))]
        positions = [position for position in found if position is not None]
        last = min(position.beats for position in positions)
        behind = [position for position in positions if position.beats == last]
        if len(behind) == len(positions):
            who = "all ranks are equally far: what they wait for does not answer"
        else:
            who = "the others wait for " + ", ".join(map(str, behind[:MAX_NAMED]))
        return (
            f"rank {self._rank}: no progress for {self._still:.0f} s (train.hang_timeout_minutes) at {where}; {who}. "
            f"The stacks are in {self._files.folder}/rank-N.log"
        )

    def _say_end(self, code: int, text: str, of: Position | None = None) -> None:
        """Leave this rank's last word, and tell all ranks that it, or the rank `of` a position, has ended."""
        self._last_word = text[:MAX_LAST_WORD]
        self._files.write(self._position())
        own = self._position()
        if of is None:
            of, text = own, f"{own} ended: {text}"
        self._files.add_end(End(of.rank, of.process, code, own.process.machine, text))

    def _mark_lost(self, lost: list[Position]) -> None:
        """Say for whoever starts runs that this one can be resumed; exit codes do not survive every launcher."""
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        record = {"ranks": [p.rank for p in lost], "host": lost[0].process.host, "where": lost[0].where, "time": now}
        with suppress(OSError):
            write_atomically(self._run_dir / LOST_FILE, [json.dumps(record, indent=1).encode() + b"\n"])

    def _position(self) -> Position:
        now = progress()
        process = self._processes[self._rank]
        return Position(self._rank, process, self._looks, now.beats, self._moves, now.where[:100], self._last_word)

    def _write(self, text: str) -> None:
        record = logging.LogRecord("dpo_scale", logging.WARNING, __file__, 0, text, None, None)
        self._log.handle(record)


def unmark_lost(run_dir: Path) -> None:
    """Before the run goes on."""
    (run_dir / LOST_FILE).unlink(missing_ok=True)
