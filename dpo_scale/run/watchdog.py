"""Each rank's log, an end to waiting for ranks that are gone or stuck, and a word on which rank it was.

A rank that waits for another waits inside a collective. On a GPU that spins for ever if the peer is gone: nothing
raises, and a launcher ends only the ranks of its own node. So a thread of each rank looks after the others and ends its
own process where it has to. It works through small files in `logs/` of the run folder (`dpo_scale.run.rank_files`),
which every node sees anyway: no server and no port has to outlive the failure.

`rank-N.log` gets a rank's warnings, errors with their stacks, and crashes.

`rank-N.at` is a rank's position. Its thread renews it every six seconds, so it also says that the process lives, even
while the rank itself waits in a collective. Each rank reads the positions of the ranks 1, 2, 4, 8, ... further on, ten
of 1,024. `moves` in it is the most steps forward that a rank knows of, its own or another's. A rank takes over larger
numbers than its own, so news of progress reaches all of them within log2(ranks) looks. A run hangs when `moves` stands
still for `train.hang_timeout_minutes`. So one rank that writes a checkpoint keeps alive all that wait for it. When
nobody moves, the others wait for the ranks with the fewest beats (`dpo_scale.progress`).

`ends` gets a line from a rank that ends too early, and from one that finds another gone. All read it every two seconds.

A rank is gone

- if its process is, which the ranks of its own machine look for every two seconds;
- if no rank of its machine has renewed its position for 30 seconds. Clocks of machines are never compared: a reader
  counts its own looks, and only those in which it could write its own position and made no progress itself. So a file
  system that stalls or is full is not taken for a death, nor is a job that was suspended, nor anything while the run
  moves.

A process that ends in order, or knows why it ends, says so in its position first and is not missed. The others follow a
rank that ended by an error 15 seconds later. By then it has printed that error. And if another rank was killed, which
is why most connections break, that has been found.
"""

from __future__ import annotations

import faulthandler
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
from typing import NoReturn

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
    """How long a rank of another machine has not renewed its position.

    Attributes:
        looks_of_rank: what that position said last.
        looks_of_machine: what all positions of its machine say, by rank, since it fell silent.
        own_looks: how often this rank has looked since, in vain.
    """

    looks_of_rank: int
    looks_of_machine: dict[int, int] | None = None
    own_looks: int = 0


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
            poll_seconds: how often to look for processes that are gone, and to read `ends`.
            look_seconds: how often to write this rank's position and read others'.
            silence_seconds: a machine whose ranks do not renew their positions for so long is lost.
            grace_seconds: how long after a rank's error the others end.
        """
        self._run_dir, self._rank, self._processes = run_dir, rank, processes
        self._files = RankFiles(run_dir, rank, processes)
        self._timeout = float("inf") if timeout_minutes is None else timeout_minutes * 60
        self._poll, self._look = min(poll_seconds, self._timeout / 5), min(look_seconds, self._timeout / 5)
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
        self._heard: set[int] = set()  # the ranks that said why they end
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
        self._say(f"rank {self._rank} starts as process {os.getpid()} on {socket.gethostname()}", to_console=False)
        self._stacks = open(path, "a")  # noqa: SIM115 (a crash writes there whenever it comes)
        faulthandler.enable(self._stacks)
        preemption.before_leaving(lambda reason: self._say_end(EXIT_PREEMPTED, f"told to stop ({reason})"))
        self._thread = threading.Thread(target=self._look_after, name="watchdog", daemon=True)
        self._thread.start()
        Watchdog.current = self
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _stack: object) -> None:
        self._ended.set()
        self._thread.join()
        if error is not None and not isinstance(error, Preempted):  # its files and `current` stay, for others to read
            self._say("".join(traceback.format_exception(error)).rstrip(), to_console=False)
            code = EXIT_USER_ERROR if isinstance(error, UserError) else 1
            self._say_end(code, f"{type(error).__name__}: {error}")
            return
        self._leave_word("finished" if error is None else str(error))
        Watchdog.current = None
        preemption.before_leaving(None)
        faulthandler.disable()
        self._stacks.close()
        logging.getLogger().removeHandler(self._log)
        self._log.close()

    def end_with_others(self) -> None:
        """End the process if this rank's failure is known to come from another rank's end.

        For a rank that has failed, while it waits for its turn to print its error. The connection to a rank breaks when
        that rank is killed, but also when its own watchdog has ended it.
        """
        self._read_ends()
        self._look_for_the_gone()
        if self._first_end is not None and self._first_end[1].code in (EXIT_HANGING, EXIT_PREEMPTED):
            self._follow(self._first_end[1])

    def end_without_silent_machines(self, looks_before: dict[int, int]) -> None:
        """End as one that lost other machines, if some neither said why they end nor have looked around since.

        For a rank whose connection broke: a machine that is gone resets it at once, and is missed by its files later.

        Args:
            looks_before: what `looks_elsewhere` gave, longer ago than a rank takes to look around again.
        """
        self._read_ends()
        looks = self.looks_elsewhere()
        silent = [rank for rank in looks_before if rank not in self._heard and looks.get(rank) == looks_before[rank]]
        if silent:
            self._end_without([self._files.read_or_unknown(rank) for rank in silent], "does not answer any more")

    def looks_elsewhere(self) -> dict[int, int]:
        """How often each rank of the other machines has looked around, of those that have not left in order."""
        machine = self._processes[self._rank].machine
        others = [self._files.read_or_unknown(r) for r, p in enumerate(self._processes) if p.machine != machine]
        return {position.rank: position.looks for position in others if position.last_word is None}

    @property
    def seconds_to_look(self) -> float:
        """How long a rank takes at most to look around again, with some to spare."""
        return 2 * self._look

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
            if self._still >= self._timeout:
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
            self._heard.add(end.rank)
            if end.code == EXIT_LOST:
                self._follow(end)
            if self._first_end is None:
                self._first_end = time.monotonic(), end
            elif end.code == EXIT_USER_ERROR != self._first_end[1].code:
                # a user's mistake on one rank is why connections break on others
                self._first_end = self._first_end[0], end

    def _look_for_the_gone(self) -> None:
        """End if a process of this machine is gone without a word; the first rank of those that are left says so."""
        gone = [self._files.read_or_unknown(rank) for rank in self._mates if self._processes[rank].is_gone()]
        lost = [position for position in gone if position.last_word is None]
        self._mates = [rank for rank in self._mates if rank not in {p.rank for p in gone if p.last_word is not None}]
        if not lost:
            return
        if not self._files.folder.is_dir():  # rank 0 has refused the run, said why, and taken its folder away
            os._exit(EXIT_USER_ERROR)
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
            return
        if silence is None or (position is not None and position.last_word is not None):
            return  # not there yet, or ended in order
        # one rank's interpreter may be busy for long; those of all ranks of a machine are not
        machine = self._processes[rank].machine
        of_machine = [self._files.read_or_unknown(r) for r, p in enumerate(self._processes) if p.machine == machine]
        looks = {p.rank: p.looks for p in of_machine if p.last_word is None}
        if not counts or silence.looks_of_machine not in (None, looks):
            self._silences[rank] = Silence(silence.looks_of_rank)
            return
        silence.looks_of_machine = looks
        silence.own_looks += 1
        if silence.own_looks >= max_looks:
            self._end_without(of_machine, "has not been heard of for long")

    def _end_without(self, lost: list[Position], what: str) -> NoReturn:
        """End because other ranks are gone, after saying so to the console and to all ranks."""
        try:
            more = f" and {len(lost) - MAX_NAMED} more ranks" if len(lost) > MAX_NAMED else ""
            names = ", ".join(map(str, lost[:MAX_NAMED])) + more
            first = lost[0]
            text = f"{names} {what}\n  the end of the log of rank {first.rank}:{self._files.last_lines(first.rank)}"
            self._say(text)
            record = {"ranks": [p.rank for p in lost], "host": first.process.host, "where": first.where}
            with suppress(Exception):  # the other ranks must be told, whatever happens to this file
                preemption.write_mark(self._run_dir / LOST_FILE, record)
            self._say_end(EXIT_LOST, text, first)
        finally:
            os._exit(EXIT_LOST)

    def _follow(self, end: End) -> NoReturn:
        """End because another rank has; one rank of each machine whose console does not have it says why."""
        try:
            text = f"rank {self._rank} ends: {end.text.splitlines()[0]}"
            is_news = end.said_on != self._processes[self._rank].machine
            self._say(text, to_console=is_news and all(self._rank < rank for rank in self._mates))
            self._leave_word(text)
        finally:
            os._exit(end.code)

    def _end_hanging(self) -> NoReturn:
        """End because nobody moves, after saying for whom the others wait."""
        try:
            where = progress().where
            self._stacks.write(f"no progress for {self._still:.0f} s at {where}; the stacks of all threads:\n")
            self._stacks.flush()
            faulthandler.dump_traceback(self._stacks)
            found = [self._position() if r == self._rank else self._files.read(r) for r in range(len(self._processes))]
            positions = [position for position in found if position is not None]
            fewest = min(position.beats for position in positions)
            behind = [str(position) for position in positions if position.beats == fewest]
            who = "the others wait for " + ", ".join(behind[:MAX_NAMED])
            if len(behind) == len(positions):
                who = "all ranks are equally far: what they wait for does not answer"
            text = (
                f"rank {self._rank}: no progress for {self._still:.0f} s (train.hang_timeout_minutes) at {where}; "
                f"{who}. The stacks are in {self._files.folder}/rank-N.log"
            )
            self._say(text)
            self._say_end(EXIT_HANGING, text)
        finally:
            os._exit(EXIT_HANGING)

    def _say_end(self, code: int, text: str, of: Position | None = None) -> None:
        """Leave this rank's last word, and tell all ranks that it, or the rank `of` a position, has ended."""
        self._leave_word(text)
        own = self._position()
        if of is None:
            of, text = own, f"{own} ended: {text}"
        self._files.add_end(End(of.rank, of.process, code, own.process.machine, text))

    def _leave_word(self, text: str) -> None:
        self._last_word = text[:MAX_LAST_WORD]
        self._files.write(self._position())

    def _position(self) -> Position:
        now = progress()
        process = self._processes[self._rank]
        return Position(self._rank, process, self._looks, now.beats, self._moves, now.where[:100], self._last_word)

    def _say(self, text: str, *, to_console: bool = True) -> None:
        """Write a line into this rank's log, and print it."""
        self._log.handle(logging.makeLogRecord({"name": "dpo_scale", "levelname": "WARNING", "msg": text}))
        if to_console:
            print(text, file=sys.stderr, flush=True)


def unmark_lost(run_dir: Path) -> None:
    """Before the run goes on."""
    (run_dir / LOST_FILE).unlink(missing_ok=True)
