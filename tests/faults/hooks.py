"""Faults that are patched into a rank before it runs; instances are sent to the forks, so they are picklable."""

from __future__ import annotations

import builtins
import os
import resource
import signal
from dataclasses import dataclass
from pathlib import Path


def _during_saves(before: object, after: object, number: int | None) -> None:
    """Call `before()` and `after()` around the `number`th save of this process (None: every one)."""
    from dpo_scale import trainer

    real, count = trainer.save_checkpoint, 0

    def save_checkpoint(*arguments, **keywords):
        nonlocal count
        count += 1
        if number is not None and count != number:
            return real(*arguments, **keywords)
        before()
        try:
            return real(*arguments, **keywords)
        finally:
            after()

    trainer.save_checkpoint = save_checkpoint


@dataclass(frozen=True)
class KillInSave:
    """SIGKILL at the boundary of a file: before the `event`th opening for writing, sync, rename or removal of a save.

    Attributes:
        rank: the rank that is killed.
        event: counted from 1, in the second save of the process; 0 counts only.
        counted: a file that gets the number of events of the save.
    """

    rank: int
    event: int
    counted: Path

    def __call__(self, rank: int) -> None:
        if rank != self.rank:
            return
        active, events = False, 0

        def happened() -> None:
            nonlocal events
            if active:
                events += 1
                if events == self.event:
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
            active = True

        def stop() -> None:
            nonlocal active
            active = False
            self.counted.write_text(str(events))

        _during_saves(start, stop, number=2)


@dataclass(frozen=True)
class DiskFull:
    """No file of this rank may grow beyond `limit_bytes`, during its second save, or throughout."""

    rank: int
    limit_bytes: int
    throughout: bool = False

    def __call__(self, rank: int) -> None:
        if rank != self.rank:
            return
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]

        def set_to(limit: int) -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))

        if self.throughout:
            set_to(self.limit_bytes)
        else:
            _during_saves(lambda: set_to(self.limit_bytes), lambda: set_to(resource.RLIM_INFINITY), number=2)


@dataclass(frozen=True)
class DiskFullInExport:
    """No file of rank 0 may grow beyond `limit_bytes` while the model is exported."""

    limit_bytes: int

    def __call__(self, rank: int) -> None:
        if rank:
            return
        from dpo_scale import trainer

        real = trainer.export_model
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]

        def export_model(*arguments, **keywords):
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.limit_bytes, hard))
            try:
                return real(*arguments, **keywords)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, hard))

        trainer.export_model = export_model


@dataclass(frozen=True)
class HangAtStep:
    """The rank stops making progress in a step: it sleeps for ever."""

    rank: int
    step: int

    def __call__(self, rank: int) -> None:
        if rank != self.rank:
            return
        import time

        from dpo_scale import trainer

        real = trainer.train_step

        def train_step(run, state, *more):
            if state.step + 1 == self.step:
                time.sleep(10_000)
            return real(run, state, *more)

        trainer.train_step = train_step


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

        from dpo_scale import trainer

        at = {"step": 0}
        real_step, real_losses = trainer.train_step, trainer.pair_losses

        def train_step(run, state, *more):
            at["step"] = state.step + 1
            return real_step(run, state, *more)

        def pair_losses(*arguments, **keywords):
            total, losses, metrics = real_losses(*arguments, **keywords)
            if at["step"] in self.steps:
                if self.what == "loss":
                    # a loss without gradient, so that only its value can tell
                    total, losses = total.detach() * 0.0 + 0.0 * total + float("nan"), losses * float("nan")
                else:
                    total = total + InfiniteGradient.apply(total)
            return total, losses, metrics

        class InfiniteGradient(torch.autograd.Function):
            @staticmethod
            def forward(ctx, value):
                return torch.zeros_like(value)

            @staticmethod
            def backward(ctx, gradient):
                return gradient * float("inf")

        trainer.train_step, trainer.pair_losses = train_step, pair_losses
