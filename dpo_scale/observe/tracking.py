"""Where metrics go: the console, `metrics.jsonl`, and the trackers of accelerate that were asked for. Rank 0 only."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dpo_scale.errors import ConfigError
from dpo_scale.observe.metrics_file import METRICS_FILE, MetricsFile
from dpo_scale.settings.reader import to_mapping
from dpo_scale.settings.tree import Config


def check_trackers(names: list[str]) -> None:
    """Refuse a tracker that accelerate does not know or whose package is missing, before any model is loaded."""
    if not names:
        return
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    known = sorted(LOGGER_TYPE_TO_CLASS)
    available = [str(name) for name in get_available_trackers()]
    for name in names:
        if name not in known:
            raise ConfigError(f"logging.report_to = {name!r}: expected one of {', '.join(known)}")
        if name not in available:
            raise ConfigError(f"logging.report_to = {name!r}: its package is not installed (pip install {name})")


class Tracker:
    """Records a run's metrics; `close` it whatever happens."""

    def __init__(self, config: Config, run_dir: Path, total_steps: int, start_step: int) -> None:
        self._config = config.logging
        self._total_steps = total_steps
        self._file = MetricsFile(run_dir / METRICS_FILE, start_step, self._line)
        self._trackers = _start_trackers(config, run_dir)
        self._step_seconds: list[float] = []  # of the steps of this process, without evaluations and saves
        self._peak_memory = 0.0
        self._start_step = start_step
        disable = None if self._config.progress_bar else True  # None: unless it is on a terminal
        self._bar = tqdm(total=total_steps, initial=start_step, unit="step", dynamic_ncols=True, disable=disable)

    def close(self) -> None:
        self._bar.close()
        for tracker in self._trackers:
            tracker.finish()
        self._file.close()

    def sync(self) -> None:
        """Put the lines so far on the disk. A checkpoint comes after: its steps are not done again."""
        self._file.sync()

    def train(self, step: int, metrics: dict[str, float]) -> None:
        """Record the metrics of optimizer step `step` (counted from 1)."""
        self._write("train", step, metrics)
        self._step_seconds.append(metrics["step_seconds"])
        self._peak_memory = max(self._peak_memory, metrics.get("peak_memory_bytes", 0.0))
        self._bar.update()
        if step % self._config.logging_steps == 0 or step == self._total_steps:
            shown = "  ".join(_format(name, metrics[name]) for name in self._config.console_metrics)
            if self._bar.disable:
                self._line(f"step {step}/{self._total_steps}  {shown}  left {self._time_left(step)}")
            else:
                self._bar.set_postfix_str(shown)
            for tracker in self._trackers:
                tracker.log({f"train/{name}": value for name, value in metrics.items()}, step=step)

    def evaluation(self, step: int, metrics: dict[str, float]) -> None:
        """Record metrics of the held-out pairs after `step` optimizer steps."""
        self._write("eval", step, metrics)
        names = ("loss", "rewards/accuracies", "rewards/margins", "accuracy/policy")
        shown = "  ".join(_format(name, metrics[name]) for name in names if name in metrics)
        self._line(f"eval at step {step}: {shown}  pairs {metrics['pairs']:.0f}")
        for tracker in self._trackers:
            tracker.log({f"eval/{name}": value for name, value in metrics.items()}, step=step)

    def forecast(self, step: int, peak_memory_bytes: int, step_seconds: float | None) -> None:
        """Record what was predicted beside what the steps of this process took; nothing if there were none.

        Args:
            step_seconds: mean; the first step, which warms up, is left out of what was measured.
        """
        if not self._step_seconds:
            return
        measured = self._step_seconds[1:] or self._step_seconds
        seconds = sum(measured) / len(measured)
        record = {"peak_memory_bytes": self._peak_memory, "peak_memory_bytes/predicted": float(peak_memory_bytes)}
        text = f"memory {peak_memory_bytes / 1e9:.2f} and {self._peak_memory / 1e9:.2f} GB"
        if step_seconds is not None:
            record |= {"step_seconds": seconds, "step_seconds/predicted": step_seconds}
            text += f", a step {step_seconds:.3g} and {seconds:.3g} s"
        self._write("forecast", step, record)
        self._line(f"predicted and measured: {text}")

    def _write(self, phase: str, step: int, metrics: dict[str, float]) -> None:
        # JSON has no NaN: a value that is not finite is written as null
        finite = {name: value if abs(value) < float("inf") else None for name, value in metrics.items()}
        self._file.write({"phase": phase, "step": step, **finite})

    def _line(self, text: str) -> None:
        tqdm.write(text)  # beside a bar
        sys.stdout.flush()

    def _time_left(self, step: int) -> str:
        seconds = sum(self._step_seconds) / (step - self._start_step) * (self._total_steps - step)
        minutes, seconds = divmod(int(seconds), 60)
        hours, minutes = divmod(minutes, 60)
        return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def _format(name: str, value: float) -> str:
    return f"{name} {value:.2e}" if name == "learning_rate" else f"{name} {value:.4g}"


def _start_trackers(config: Config, run_dir: Path) -> list[Any]:
    if not config.logging.report_to:
        return []
    from accelerate import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    PartialState()  # accelerate's trackers ask it whether this is the main process
    trackers = []
    for name in config.logging.report_to:
        cls = LOGGER_TYPE_TO_CLASS[name]
        folder = {"logging_dir": str(run_dir / "trackers")} if cls.requires_logging_directory else {}
        tracker = cls(config.logging.project_name, **folder)
        tracker.start()
        tracker.store_init_configuration(_flat(to_mapping(config)))
        trackers.append(tracker)
    return trackers


def _flat(mapping: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted names and values of a tree, those that trackers can't take as text."""
    flat: dict[str, Any] = {}
    for name, value in mapping.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value if isinstance(value, bool | int | float | str) else str(value)
    return flat
