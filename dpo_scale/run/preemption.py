"""Notices that this process should end soon, and from where they come.

A queue announces the end of a job with SIGTERM or SIGUSR1, to whichever process it pleases. The launchers pass on
little of that. DeepSpeed's runner dies of either signal and leaves its child and the ranks behind; that child dies of
SIGUSR1 and leaves the ranks behind; torchrun does the same with SIGUSR1, and hands SIGTERM on. So a rank listens to
four things:

- SIGTERM and SIGUSR1, sent to itself;
- the launcher above it, and DeepSpeed's runner above that: when one is gone, nobody is left to end this rank;
- a file named `stop` in the run folder, which reaches ranks on any node through any launcher;
- the clock, if `train.max_hours` is set.

A notice only sets a flag here. The trainer lets the ranks agree on the step to stop after, saves and leaves with
`EXIT_PREEMPTED`. It has a grace time for that; when it is over, the process ends where it stands, which costs the
steps since the last checkpoint and nothing else. Before there is anything to save the grace time is zero.

Signals wake a thread of their own through a pipe, because Python runs its handlers only between two instructions of the
main thread, and the main thread may be inside a collective that will never end.
"""

from __future__ import annotations

import datetime
import json
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from dpo_scale.disk.atomic import naming, write_atomically
from dpo_scale.errors import CheckpointError

EXIT_PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: try again later
STOP_FILE = "stop"
PREEMPTED_FILE = "preempted.json"  # of a run that stopped in order to be resumed
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
POLL_SECONDS = 0.5


class Preempted(Exception):
    """The run has stopped early, as it was told; the message says after which step and why."""


class _Watch:
    """What this process has been told, and the thread that listens."""

    def __init__(self) -> None:
        self.started = time.monotonic()
        self.reason: str | None = None
        self.noticed = threading.Event()
        self.grace_seconds = 0.0
        self.run_dir: Path | None = None
        self.stop_file: Path | None = None
        self.farewell: Callable[[str], None] | None = None
        self._deadline = float("inf")
        self._launchers = _launchers()
        self._pipe, write_end = os.pipe()
        os.set_blocking(write_end, False)
        for number in SIGNALS:
            signal.signal(number, lambda *_: None)  # the pipe is what wakes somebody
            signal.siginterrupt(number, False)  # system calls of libraries go on instead of failing
        signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
        # a forked worker that is told to end must end, and not pass that on to us through the pipe it inherited
        os.register_at_fork(after_in_child=_forget)
        threading.Thread(target=self._listen, name="preemption", daemon=True).start()

    def note(self, reason: str) -> None:
        if self.reason is None:
            self._deadline = time.monotonic() + self.grace_seconds
            self.reason = reason
            self.noticed.set()

    def _listen(self) -> None:
        while True:
            if select.select([self._pipe], [], [], POLL_SECONDS)[0]:
                for number in os.read(self._pipe, 256):
                    if number in SIGNALS:
                        self.note(signal.Signals(number).name)
            if any(_parent_of(child) != launcher for child, launcher in self._launchers):
                self.note("the launcher is gone")
            if self.stop_file is not None and self.stop_file.exists():
                self.note(f"the file {self.stop_file}")
            if time.monotonic() >= self._deadline:
                self._leave()

    def _leave(self) -> NoReturn:
        rank = os.environ.get("RANK", "0")
        try:
            if self.farewell is not None:
                with suppress(Exception):
                    self.farewell(str(self.reason))
            if self.run_dir is not None:
                why = f"not done {self.grace_seconds:g} s later, so the last checkpoint is what there is"
                print(f"rank {rank}: told to stop ({self.reason}), {why}", file=sys.stderr, flush=True)
                mark_preempted(self.run_dir, None, str(self.reason))
            elif rank == "0":
                print(f"stopped ({self.reason}) before there was anything to save", file=sys.stderr, flush=True)
        finally:
            os._exit(EXIT_PREEMPTED)


_watch: _Watch | None = None


def watch() -> None:
    """Listen from now on; without it, nothing below ever reports a notice. Call it once, from the main thread."""
    global _watch
    if _watch is None:
        _watch = _Watch()


def _forget() -> None:
    global _watch
    if _watch is not None:
        signal.set_wakeup_fd(-1)
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        _watch = None


def allow(grace_seconds: float, run_dir: Path, *, looks_for_file: bool) -> None:
    """From now on a notice leaves this process `grace_seconds` to save; before, it ends at once.

    Args:
        looks_for_file: whether this rank looks for `run_dir/stop` (one is enough).
    """
    if _watch is not None:
        _watch.grace_seconds, _watch.run_dir = grace_seconds, run_dir
        _watch.stop_file = run_dir / STOP_FILE if looks_for_file else None


def before_leaving(farewell: Callable[[str], None] | None) -> None:
    """What to call, with the reason, when the grace time is over and this process ends where it stands."""
    if _watch is not None:
        _watch.farewell = farewell


def reason_to_stop(max_hours: float | None) -> str | None:
    """Why this rank wants to stop after the step that it is in; None if it does not.

    Args:
        max_hours: wall-clock time since the process began to watch.
    """
    if _watch is None:
        return None
    if _watch.reason is None and max_hours is not None and time.monotonic() - _watch.started >= max_hours * 3600:
        _watch.note(f"train.max_hours = {max_hours:g}")
    return _watch.reason


def wait_for_notice(seconds: float) -> bool:
    """Wait so long at most; whether there is a notice."""
    if _watch is None:
        time.sleep(seconds)
        return False
    return _watch.noticed.wait(seconds)


def was_noticed() -> bool:
    return _watch is not None and _watch.noticed.is_set()


def mark_preempted(run_dir: Path, step: int | None, reason: str) -> None:
    """Say for whoever starts runs that this one wants to be resumed; exit codes do not survive every launcher.

    A request to stop that came as a file is fulfilled and removed. One that came while the run was starting is not, and
    stops it after its first step.

    Args:
        step: the step that was saved; None if there was no time for it.
    """
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    record = {"step": step, "reason": reason, "time": now}
    with naming(run_dir / PREEMPTED_FILE, CheckpointError, to="written"):
        write_atomically(run_dir / PREEMPTED_FILE, [json.dumps(record, indent=1).encode() + b"\n"])
    (run_dir / STOP_FILE).unlink(missing_ok=True)


def unmark_preempted(run_dir: Path) -> None:
    """Before the run goes on."""
    (run_dir / PREEMPTED_FILE).unlink(missing_ok=True)


def _launchers() -> list[tuple[int, int]]:
    """(process, its parent) up from here, for the parents that are launchers: one, or two under `deepspeed`."""
    found = []
    process = os.getpid()
    while len(found) < 2 and (parent := _parent_of(process)) is not None and _is_launcher(parent):
        found.append((process, parent))
        process = parent
    return found


def _parent_of(process: int) -> int | None:
    try:
        stat = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return None
    return int(stat.rpartition(")")[2].split()[1])


def _is_launcher(process: int) -> bool:
    """Whether a process is `deepspeed`, its child, or `torchrun`, under whichever interpreter."""
    try:
        arguments = Path(f"/proc/{process}/cmdline").read_text().split("\0")
    except (OSError, UnicodeDecodeError):
        return False
    # interpreter and script, or interpreter, -u, -m and module: what comes later is the script's
    names = [os.path.basename(argument) for argument in arguments[:4]]
    modules = ("deepspeed.launcher.launch", "deepspeed.launcher.runner", "torch.distributed.run")
    return any(name in ("deepspeed", "torchrun", "torch.distributed.launch", *modules) for name in names)
