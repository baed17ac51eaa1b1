"""A profiler's trace of chosen optimizer steps, for Perfetto or chrome://tracing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from dpo_scale.distributed import ranks
from dpo_scale.errors import ConfigError


def parse_steps(text: str) -> range:
    """The steps that `--profile` names: "3" or "3-5", counted from 1, the last one included.

    Raises:
        ConfigError: if it is neither.
    """
    first, dash, last = text.partition("-")
    if not first.isdecimal() or (dash and not last.isdecimal()):
        raise ConfigError(f"--profile {text}: expected a step such as 3, or steps such as 3-5")
    steps = range(int(first), int(last if dash else first) + 1)
    if steps.start < 1 or not steps:
        raise ConfigError(f"--profile {text}: steps are counted from 1, and the last is not before the first")
    return steps


class StepProfiler:
    """Records some steps and writes one trace a rank into a folder; a context manager around the run.

    The phases of a step (`dpo_scale.observe.timing`) are marked in the trace by name.
    """

    def __init__(self, folder: Path, steps: range) -> None:
        self._folder, self._steps = folder, steps
        self._profile: Any = None
        self._first = 0

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Enter it around step `number` (from 1)."""
        if number in self._steps and self._profile is None:
            activities = [torch.profiler.ProfilerActivity.CPU]
            if ranks.device().type == "cuda":
                activities.append(torch.profiler.ProfilerActivity.CUDA)
            self._profile = torch.profiler.profile(activities=activities, record_shapes=True)
            self._profile.start()
            self._first = number
        yield
        if self._profile is not None and number + 1 not in self._steps:
            self._profile.stop()
            self._folder.mkdir(exist_ok=True)
            path = self._folder / f"steps-{self._first}-{number}-rank-{ranks.rank()}.json"
            self._profile.export_chrome_trace(str(path))
            self._profile = None
            ranks.log(f"profile of steps {self._first} to {number} in {self._folder}")

    def __enter__(self) -> StepProfiler:
        return self

    def __exit__(self, *_: object) -> None:
        if self._profile is not None:  # the run ended within the steps
            self._profile.stop()
            self._profile = None
