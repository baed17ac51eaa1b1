"""What the fault tests share: a small run, its ranks as forks or under a real launcher, and the comparison at the end.

Imports are most of a launch. So ranks that are killed by the dozen are forks of a process that has imported the
libraries, and run the code of `launch/train.py` from there on. Faults (`hooks.py`) are patched into the forks or, under
a launcher, by `patched_train.py`, so that no line of the program knows of them.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tiny import ROOT, free_port, read_metrics, run_overrides, without_timings

STEPS = 12
SAVE_STEPS = 2
RANKS = 2
SECONDS_TO_END = 60  # within which everything here has to end by itself
LAUNCHERS = ("deepspeed", "torchrun")


# Settings of all runs on top of those below, e.g. checkpoint.async_save=true.
EXTRA: list[str] = []


def overrides(folder: Path, *more: str) -> list[str]:
    """The small run that is interrupted: fp32 at stage 2, held-out data every 4 steps; made in `folder` once."""
    made = folder / "overrides.json"
    if not made.exists():
        made.write_text(json.dumps(run_overrides(folder)))
    return [
        *json.loads(made.read_text()), "deepspeed.stage=2", f"train.max_steps={STEPS}", "train.eval_steps=4",
        f"checkpoint.save_steps={SAVE_STEPS}", "checkpoint.preempt_grace_seconds=20", *EXTRA, *more,
    ]  # fmt: skip


def train_rank(rank: int, ranks: int, port: int, settings: list[str], log: Path, fault: Any) -> None:
    """A fork's whole life: `launch/train.py --resume auto`, with the fault's patches in place."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    import torch

    torch.set_num_threads(1)
    if fault is not None:
        fault(rank)
    from dpo_scale.run.cli import run
    from dpo_scale.settings.tree import load_config
    from dpo_scale.training.loop import train

    run(lambda: train(load_config(None, settings, resume="auto"), resume="auto") and None)


class Forks:
    """The ranks of one try as forks."""

    def __init__(self, folder: Path, settings: list[str], fault: Any = None, ranks: int = RANKS) -> None:
        """
        Args:
            fault: called with the rank in each fork, before the run; must be picklable.
        """
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "deepspeed", "transformers", "datasets", "dpo_scale.training.loop"])
        port = free_port()
        self.log = folder / "output.txt"
        self.log.unlink(missing_ok=True)
        self.ranks = [
            context.Process(target=train_rank, args=(rank, ranks, port, settings, self.log, fault))
            for rank in range(ranks)
        ]
        for process in self.ranks:
            process.start()

    @property
    def processes(self) -> list[int]:
        return [process.pid for process in self.ranks]

    def running(self) -> bool:
        return all(process.is_alive() for process in self.ranks)

    def kill(self, *ranks: int) -> None:
        for rank in ranks:
            self.ranks[rank].kill()

    def wait(self, seconds: float = SECONDS_TO_END) -> list[int]:
        """Wait for all ranks' ends; their exit codes. Those that have not ended are killed and said to hang."""
        until = time.monotonic() + seconds
        for process in self.ranks:
            process.join(max(0.0, until - time.monotonic()))
        hanging = [rank for rank, process in enumerate(self.ranks) if process.is_alive()]
        self.kill(*hanging)
        for process in self.ranks:
            process.join()
        assert not hanging, f"ranks {hanging} did not end within {seconds:g} s\n{self.output()}"
        return [process.exitcode for process in self.ranks]

    def output(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""


class Launched:
    """A try under a real launcher, with the processes that it is made of."""

    def __init__(
        self,
        folder: Path,
        settings: list[str],
        launcher: str,
        *,
        faults: Sequence[Any] = (),
        through: Sequence[str] = (),
    ) -> None:
        """
        Args:
            faults: each is called with the rank in each rank, before the run; must be picklable.
            through: a command that starts the launcher and adds `--resume auto` by itself.
        """
        script = [str(ROOT / "launch/train.py")]
        if faults:
            pickled = folder / "faults.pickle"
            pickled.write_bytes(pickle.dumps(list(faults)))
            script = [str(ROOT / "tests/faults/patched_train.py"), str(pickled)]
        binaries = Path(sys.executable).parent
        port = str(free_port())
        command = {
            "deepspeed": ["deepspeed", "-q", "--num_accelerators", str(RANKS), "--master_port", port],
            "torchrun": ["torchrun", "--nproc_per_node", str(RANKS), "--master_port", port],
        }[launcher]
        self.launcher, self._through = launcher, bool(through)
        self.log = folder / "output.txt"
        with open(self.log, "w") as output:
            self.process = subprocess.Popen(
                [*through, str(binaries / command[0]), *command[1:], *script, *settings]
                + ([] if through else ["--resume", "auto"]),
                cwd=ROOT, env=environment(), stdout=output, stderr=output, start_new_session=True,
            )  # fmt: skip
        self._seen: set[int] = {self.process.pid}

    def find(self, target: str) -> int:
        """The process of `runner`, `launcher` (what started the ranks), `rank0` or `rank1`."""
        runner = children(self.process.pid)[0] if self._through else self.process.pid
        launcher = children(runner)[0] if self.launcher == "deepspeed" else runner
        ranks = children(launcher)[:RANKS]
        self._seen |= {runner, launcher, *ranks}
        return {"runner": runner, "launcher": launcher, "rank0": ranks[0], "rank1": ranks[1]}[target]

    def running(self) -> bool:
        return self.process.poll() is None

    def wait(self, seconds: float = SECONDS_TO_END) -> tuple[int, float]:
        """Wait until no process of the try is left; the launcher's exit code, and the seconds that it took."""
        started = time.monotonic()
        while self.process.poll() is None or any(is_alive(process) for process in self._seen):
            if time.monotonic() - started > seconds:
                left = [process for process in self._seen if is_alive(process)]
                self.kill()
                raise AssertionError(f"processes {left} did not end within {seconds:g} s\n{self.output()}")
            time.sleep(0.05)
        return self.process.returncode, time.monotonic() - started

    def kill(self) -> None:
        for process in self._seen:
            if is_alive(process):
                os.kill(process, signal.SIGKILL)

    def output(self) -> str:
        return self.log.read_text(errors="replace")


def environment() -> dict[str, str]:
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    return {
        **{name: value for name, value in os.environ.items() if name not in names},
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(ROOT),
        "PYTHONWARNINGS": "ignore::FutureWarning",
    }


def children(process: int) -> list[int]:
    return [int(text) for text in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def is_alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def steps_done(run_dir: Path) -> int:
    """The last step of which there is a line."""
    try:
        lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    except OSError:
        return 0
    steps = [int(found[1]) for line in lines if (found := re.match(r'\{"phase": "train", "step": (\d+),', line))]
    return max(steps, default=0)


def wait_for_step(run_dir: Path, step: int, running: Callable[[], bool], seconds: float = 120) -> bool:
    """Wait until a step is done; False if the run ended before."""
    until = time.monotonic() + seconds
    while steps_done(run_dir) < step:
        if not running():
            return False
        assert time.monotonic() < until, f"step {step} was not reached within {seconds:g} s"
        time.sleep(0.005)
    return True


def finish(folder: Path, settings: list[str]) -> None:
    """Resume a run and take it to its end."""
    forks = Forks(folder, settings)
    codes = forks.wait(180)
    assert codes == [0] * RANKS, forks.output()[-3000:]


def uninterrupted(folder: Path) -> Path:
    """The run that nothing happens to, made once."""
    run_dir = folder / "whole"
    if not (run_dir / "finished.json").exists():
        finish(folder, overrides(folder, f"output_dir={run_dir}"))
    return run_dir


def assert_same_run(run_dir: Path, whole: Path) -> None:
    """Metrics line by line and the exported weights bit by bit; no step is lost or doubled."""
    for phase in ("train", "eval"):
        ours, theirs = (without_timings(read_metrics(folder, phase)) for folder in (run_dir, whole))
        steps, expected = ([record["step"] for record in records] for records in (ours, theirs))
        assert steps == expected, f"{phase} steps {steps}, expected {expected}"
        assert ours == theirs, f"{phase} metrics differ"
    assert (run_dir / "finished.json").exists()
    ours, theirs = ((folder / "model" / "model.safetensors").read_bytes() for folder in (run_dir, whole))
    assert ours == theirs, "final weights differ"


def fresh(folder: Path, name: str, rng: random.Random) -> Path:
    return folder / f"{name}-{rng.randrange(10**9)}"
