"""Notices that this process should end soon, and where they come from.

A queue announces the end of a job with SIGTERM or SIGUSR1, to whichever process it pleases. The launchers pass on
little of that. DeepSpeed's runner dies of either signal and leaves its child and the ranks behind. That child dies of
SIGUSR1 and leaves the ranks behind. So does torchrun, but it passes SIGTERM on. So a rank listens to four things:

- SIGTERM and SIGUSR1, sent to itself;
- the launcher above it, and DeepSpeed's runner above that: when one is gone, nobody is left to end this rank;
- a file named `stop` in the run folder, which reaches ranks on any node through any launcher;
- the clock, if `train.max_hours` is set.

A notice only sets a flag here. The trainer lets the ranks agree on the step to stop after, saves and leaves with
`EXIT_PREEMPTED`. It has a grace time for that. When it is over, the process ends where it stands, which costs the steps
since the last checkpoint and nothing else. Before there is anything to save, the grace time is zero.

Signals wake a thread of their own through a pipe. Python runs its handlers only between two instructions of the main
thread, and the main thread may be inside a collective that will never end.
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
from typing import Any, NoReturn

from dpo_scale.disk.atomic import naming, write_atomically
from dpo_scale.errors import CheckpointError
from dpo_scale.run.rank_files import stat_fields

EXIT_PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: try again later
STOP_FILE = "stop"
PREEMPTED_FILE = "preempted.json"  # of a run that stopped in order to be resumed
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
LAUNCHERS = (
    *("deepspeed", "deepspeed.launcher.runner", "deepspeed.launcher.launch"),
    *("torchrun", "torch.distributed.run", "torch.distributed.launch"),
)
POLL_SECONDS = 0.5


class Preempted(Exception):
    """The run has stopped early, as it was told; the message says after which step and why."""


class _Listener:
    """What this process has been told, and, once started, the thread that listens."""

    def __init__(self) -> None:
        self.started = float("inf")
        self.reason: str | None = None
        self.noticed = threading.Event()
        self.grace_seconds = 0.0
        self.run_dir: Path | None = None
        self.looks_for_file = False
        self.farewell: Callable[[str], None] | None = None
        self._deadline = float("inf")

    def start(self) -> None:
        self.started = time.monotonic()
        self._launchers = _launchers()
        self._pipe, write_end = os.pipe()
        os.set_blocking(write_end, False)
        for number in SIGNALS:
            signal.signal(number, lambda *_: None)  # the pipe is what wakes the thread
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
            if self.run_dir is not None and self.looks_for_file and (self.run_dir / STOP_FILE).exists():
                self.note(f"the file {self.run_dir / STOP_FILE}")
            if time.monotonic() >= self._deadline:
                self._leave()

    def _leave(self) -> NoReturn:
        rank, reason = os.environ.get("RANK", "0"), str(self.reason)
        try:
            if self.farewell is not None:
                with suppress(Exception):
                    self.farewell(reason)
            if self.run_dir is not None:
                why = f"not done {self.grace_seconds:g} s later, so the last checkpoint is what there is"
                print(f"rank {rank}: told to stop ({reason}), {why}", file=sys.stderr, flush=True)
                mark_preempted(self.run_dir, None, reason)
            elif rank == "0":
                print(f"stopped ({reason}) before there was anything to save", file=sys.stderr, flush=True)
        finally:
            os._exit(EXIT_PREEMPTED)


_listener = _Listener()


def listen() -> None:
    """Listen from now on; before that, nothing below reports a notice. Call it from the main thread."""
    if _listener.started == float("inf"):
        _listener.start()


def _forget() -> None:
    global _listener
    signal.set_wakeup_fd(-1)
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    _listener = _Listener()


def allow(grace_seconds: float, run_dir: Path, *, looks_for_file: bool) -> None:
    """From now on a notice leaves this process `grace_seconds` to save; before, it ends at once.

    Args:
        looks_for_file: whether this rank looks for `run_dir/stop`; one rank is enough.
    """
    _listener.grace_seconds, _listener.looks_for_file, _listener.run_dir = grace_seconds, looks_for_file, run_dir


def before_leaving(farewell: Callable[[str], None] | None) -> None:
    """What to call, with the reason, when the grace time is over and this process ends where it stands."""
    _listener.farewell = farewell


def reason_to_stop(max_hours: float | None) -> str | None:
    """Why this rank wants to stop after the step that it is in; None if it does not.

    Args:
        max_hours: wall-clock time since the process began to listen.
    """
    if max_hours is not None and time.monotonic() - _listener.started >= max_hours * 3600:
        _listener.note(f"train.max_hours = {max_hours:g}")
    return _listener.reason


def wait_for_notice(seconds: float) -> bool:
    """Wait so long at most; whether there is a notice."""
    return _listener.noticed.wait(seconds)


def was_noticed() -> bool:
    return _listener.noticed.is_set()


def mark_preempted(run_dir: Path, step: int | None, reason: str) -> None:
    """Tell whoever starts runs that this one wants to be resumed; not every launcher passes exit codes on.

    A request to stop that came as a file is fulfilled and removed. One that came while the run was starting is not, and
    stops it after its first step.

    Args:
        step: the step that was saved; None if there was no time for it.
    """
    with naming(run_dir / PREEMPTED_FILE, CheckpointError, to="written"):
        write_mark(run_dir / PREEMPTED_FILE, {"step": step, "reason": reason})
    (run_dir / STOP_FILE).unlink(missing_ok=True)


def unmark_preempted(run_dir: Path) -> None:
    """Before the run goes on."""
    (run_dir / PREEMPTED_FILE).unlink(missing_ok=True)


def write_mark(path: Path, record: dict[str, Any]) -> None:
    """Write a record and the time as JSON, for scripts that decide whether to start a run again."""
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    write_atomically(path, [json.dumps({**record, "time": now}, indent=1).encode() + b"\n"])


def _launchers() -> list[tuple[int, int]]:
    """(process, its parent) up from here, for the parents that are launchers: one, or two under `deepspeed`."""
    found: list[tuple[int, int]] = []
    child = os.getpid()
    while len(found) < 2 and (parent := _parent_of(child)) is not None and _is_launcher(parent):
        found.append((child, parent))
        child = parent
    return found


def _parent_of(process: int) -> int | None:
    try:
        return int(stat_fields(process)[1])
    except OSError:
        return None


def _is_launcher(process: int) -> bool:
    """Whether a process is `deepspeed`, its child, or `torchrun`, under whichever interpreter."""
    try:
        arguments = Path(f"/proc/{process}/cmdline").read_text().split("\0")
    except (OSError, UnicodeDecodeError):
        return False
    # interpreter and script, or interpreter, -u, -m and module: what comes later is the script's
    return any(os.path.basename(argument) in LAUNCHERS for argument in arguments[:4])
