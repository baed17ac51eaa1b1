"""Where the time of a step goes, without waiting for the device to find out.

On an accelerator every phase lies between two events of the stream. They are read once the step's metrics are on the
host: by then the events are complete, so nothing is waited for that the step does not wait for anyway. On a CPU the
calling thread does the work, so its own clock tells what it computed. In the rest of a phase it waited: for other
ranks, or for its processor.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from dpo_scale.settings.metric_names import PHASES

_COMPUTING = ("reference", "forward", "backward")


class StepTimer:
    """Shares of a step's time; `phase` around its parts, `shares` once at its end.

    Args:
        device: where the work is done.
        num_ranks: a single rank waits for nobody, so all time in its phases counts as computing.
    """

    def __init__(self, device: torch.device, num_ranks: int) -> None:
        self._on_cpu, self._alone = device.type == "cpu", num_ranks == 1
        self._events: list[tuple[str, Any, Any]] = []
        self._seconds: dict[str, float] = defaultdict(float)
        self._last_busy = 0.0
        self.start()

    def start(self) -> None:
        """Begin a step."""
        self._began = time.perf_counter()
        self._events.clear()
        self._seconds.clear()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time inside as `name`, one of `PHASES`, and mark it in a profiler's trace."""
        assert name in PHASES
        with torch.profiler.record_function(f"dpo_scale: {name}"):
            if not self._on_cpu:
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record()
                yield
                end.record()
                self._events.append((name, begin, end))
                return
            wall, computing = time.perf_counter(), time.thread_time()
            yield
            elapsed = time.perf_counter() - wall
            whole = name == "data" or self._alone
            computed = elapsed if whole else min(elapsed, time.thread_time() - computing)
            self._seconds[name] += computed
            self._seconds["communication"] += elapsed - computed

    @property
    def busy_seconds(self) -> float:
        """How long this rank has computed, to be compared between ranks.

        On a CPU: forward and backward passes of this step so far. On an accelerator: the forward passes of the step
        before. This one's are not known yet, and backward passes are mixed with communication.
        """
        return sum(self._seconds[name] for name in _COMPUTING) if self._on_cpu else self._last_busy

    def shares(self) -> dict[str, float]:
        """The seconds since `start`, as `step_seconds`, and each phase's share of them as `time/<phase>`.

        Call it once a step, when the device has finished the step; it waits for the end of the last phase.
        """
        if self._events:
            self._events[-1][2].synchronize()  # reading an event that is not complete raises
        for name, begin, end in self._events:
            self._seconds[name] += begin.elapsed_time(end) / 1000
        self._last_busy = self._seconds["reference"] + self._seconds["forward"]
        total = time.perf_counter() - self._began
        return {"step_seconds": total, **{f"time/{name}": self._seconds[name] / total for name in PHASES}}
