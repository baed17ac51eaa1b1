"""Faults, and holds that keep a run still for one. Each is pickled, sent to a rank and patched in before it runs."""

from __future__ import annotations

import builtins
import os
import resource
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path


def _around_saves(around: Callable[[Callable[[], object]], object]) -> None:
    """Let `around(save)` run what saves a checkpoint: all of it, or in the background what writes the copies."""
    from dpo_scale.checkpoint import save as saving

    real_start, real_write = saving.Saver.start, saving.write

    def start(saver, *arguments):
        if saver.in_background:
            return real_start(saver, *arguments)
        return around(lambda: real_start(saver, *arguments))

    def write(*arguments):
        if not threading.current_thread().name.startswith(saving.THREAD_NAME):
            return real_write(*arguments)
        return around(lambda: real_write(*arguments))

    saving.Saver.start, saving.write = start, write


def _during_saves(before: Callable[[], object], after: Callable[[], object], number: int) -> None:
    """Call `before()` and `after()` around the `number`th save of this process."""
    count = 0

    def around(save: Callable[[], object]) -> object:
        nonlocal count
        count += 1
        if count != number:
            return save()
        before()
        try:
            return save()
        finally:
            after()

    _around_saves(around)


HOLD_SECONDS = 60  # within which a test has to release what it holds


@dataclass(frozen=True)
class HoldSteps:
    """The ranks do some steps and then wait until one of them is told to stop, so that no signal comes too late.

    The machine's speed then decides only whether the signal falls into one of those steps or meets ranks that wait.

    Attributes:
        after: how many steps a process does before it waits.
        released: a file that lets the ranks go on too, once it exists; None if only a notice or a kill does.
    """

    after: int
    released: Path | None = None

    def __call__(self, rank: int) -> None:
        from dpo_scale.distributed import ranks
        from dpo_scale.run import preemption
        from dpo_scale.training import loop as trainer

        real, started = trainer.train_step, 0

        def train_step(*arguments, **keywords):
            nonlocal started
            started += 1
            if started == self.after + 1:
                until = time.monotonic() + HOLD_SECONDS
                # the ranks ask together, so that all go on at the same step
                while not any(ranks.gather_objects(preemption.was_noticed() or self._is_released())):
                    assert time.monotonic() < until, f"nothing came within {HOLD_SECONDS} s"
                    time.sleep(0.01)
            return real(*arguments, **keywords)

        trainer.train_step = train_step

    def _is_released(self) -> bool:
        return self.released is not None and self.released.exists()


@dataclass(frozen=True)
class HoldSaves:
    """No rank begins a save before a file exists."""

    released: Path

    def __call__(self, rank: int) -> None:
        def around(save: Callable[[], object]) -> object:
            until = time.monotonic() + HOLD_SECONDS
            while not self.released.exists():
                assert time.monotonic() < until, f"{self.released} was not made within {HOLD_SECONDS} s"
                time.sleep(0.01)
            return save()

        _around_saves(around)


@dataclass(frozen=True)
class KillInSave:
    """SIGKILL before the `event`th opening for writing, sync, rename or removal of a file in a save.

    Attributes:
        rank: the rank that is killed; None to count only.
        event: counted from 1, in the second save of the process.
        counted: a folder that gets a file from each rank with the number of events in the save.
    """

    rank: int | None
    event: int
    counted: Path

    def __call__(self, rank: int) -> None:
        if self.rank not in (rank, None):
            return
        active, events = None, 0  # the thread whose calls count

        def happened() -> None:
            nonlocal events
            if active == threading.get_ident():
                events += 1
                if self.rank is not None and events == self.event:
                    os.kill(os.getpid(), signal.SIGKILL)

        def wrap(real):
            def wrapped(*arguments, **keywords):
                happened()
                return real(*arguments, **keywords)

            return wrapped

        for name in ("fsync", "replace", "rename", "unlink", "rmdir", "mkdir"):
            setattr(os, name, wrap(getattr(os, name)))
        real_open = builtins.open

        def open_noted(file, mode="r", *arguments, **keywords):
            if set(mode) & set("wxa+"):
                happened()
            return real_open(file, mode, *arguments, **keywords)

        builtins.open = open_noted

        def start() -> None:
            nonlocal active
            active = threading.get_ident()

        def stop() -> None:
            nonlocal active
            active = None
            (self.counted / str(rank)).write_text(str(events))

        _during_saves(start, stop, number=2)


@contextmanager
def _files_no_larger_than(limit_bytes: int) -> Iterator[None]:
    """As on a full disk or under a quota: no file of this process grows beyond the limit."""
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, hard))


@dataclass(frozen=True)
class DiskFull:
    """No room on one rank's disk, beyond some bytes a file, while it does something.

    Attributes:
        during: `save` (its second one), `export`, or `store` (when it writes to the reference store).
    """

    rank: int
    limit_bytes: int
    during: str

    def __call__(self, rank: int) -> None:
        if rank != self.rank:
            return
        from dpo_scale.reference import store_shard
        from dpo_scale.training import loop as trainer

        if self.during == "save":
            limited = _files_no_larger_than(self.limit_bytes)
            _during_saves(limited.__enter__, lambda: limited.__exit__(None, None, None), number=2)
            return
        module, name = {"export": (trainer, "export_model"), "store": (store_shard, "write_atomically")}[self.during]
        real = getattr(module, name)

        def limited_call(*arguments, **keywords):
            with _files_no_larger_than(self.limit_bytes):
                return real(*arguments, **keywords)

        setattr(module, name, limited_call)


@dataclass(frozen=True)
class HangAtStep:
    """The rank stops making progress in a step: it sleeps for ever."""

    rank: int
    step: int

    def __call__(self, rank: int) -> None:
        if rank != self.rank:
            return
        from dpo_scale.training import loop as trainer

        real = trainer.train_step

        def train_step(run, *more):
            if run.state.step + 1 == self.step:
                time.sleep(10_000)
            return real(run, *more)

        trainer.train_step = train_step


@dataclass(frozen=True)
class SlowDisk:
    """Each sync of the rank takes some seconds; the longest save's seconds are left in `report`."""

    rank: int
    seconds: float
    report: Path

    def __call__(self, rank: int) -> None:
        if rank != self.rank:
            return
        real_sync, slowest = os.fsync, 0.0

        def fsync(descriptor: int) -> None:
            time.sleep(self.seconds)
            real_sync(descriptor)

        def around(save: Callable[[], object]) -> object:
            nonlocal slowest
            started = time.monotonic()
            result = save()
            slowest = max(slowest, time.monotonic() - started)
            self.report.write_text(str(slowest))
            return result

        os.fsync = fsync
        _around_saves(around)


@dataclass(frozen=True)
class NoticeInEvaluation:
    """The rank is told to stop at the beginning of an evaluation.

    Attributes:
        number: of the evaluation, from 1.
    """

    rank: int
    number: int

    def __call__(self, rank: int) -> None:
        if rank != self.rank:
            return
        from dpo_scale.run import preemption
        from dpo_scale.training import loop as trainer

        real, count = trainer.evaluate, 0

        def evaluate(*arguments, **keywords):
            nonlocal count
            count += 1
            if count == self.number:
                os.kill(os.getpid(), signal.SIGUSR1)
                assert preemption.wait_for_notice(10)
            return real(*arguments, **keywords)

        trainer.evaluate = evaluate


@dataclass(frozen=True)
class BadNumbers:
    """What the loss becomes on `rank` at some steps.

    Attributes:
        what: `loss` makes it NaN, `gradient` leaves it as it is and makes its gradient infinite.
    """

    rank: int
    steps: tuple[int, ...]
    what: str

    def __call__(self, rank: int) -> None:
        if rank != self.rank:
            return
        import torch

        from dpo_scale.training import loop, setup

        at = {"step": 0}
        real_step, real_choice = loop.train_step, setup.choose_objective

        def train_step(run, *more):
            at["step"] = run.state.step + 1
            return real_step(run, *more)

        def choose_objective(config, policy):
            loss_of, reason = real_choice(config, policy)

            def broken(*arguments):
                total, losses, metrics = loss_of(*arguments)
                if at["step"] in self.steps:
                    if self.what == "loss":
                        # a loss without gradient, so that only its value can tell
                        total, losses = total.detach() * 0.0 + 0.0 * total + float("nan"), losses * float("nan")
                    else:
                        total = total + InfiniteGradient.apply(total)
                return total, losses, metrics

            return broken, reason

        class InfiniteGradient(torch.autograd.Function):
            @staticmethod
            def forward(ctx, value):
                return torch.zeros_like(value)

            @staticmethod
            def backward(ctx, gradient):
                return gradient * float("inf")

        loop.train_step, setup.choose_objective = train_step, choose_objective
