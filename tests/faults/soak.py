"""A run of thousands of steps with checkpoints: its memory and file descriptors, from outside, while it goes on."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

from faults.cases import Outcome
from faults.rig import RANKS, Forks, overrides, steps_done

MAX_GROWTH = 0.02


def soak(folder: Path, steps: int) -> Outcome:
    """Resident memory after the first fifth of the steps and at the end, and descriptors, of each rank."""
    outcome = Outcome(f"{steps} steps with a checkpoint every 50")
    run_dir = folder / "soak"
    more = (f"train.max_steps={steps}", "checkpoint.save_steps=50", f"train.eval_steps={steps // 4}")
    more += ("train.global_batch_size=2", "train.micro_batch_size=1")
    forks = Forks(folder, overrides(folder, f"output_dir={run_dir}", *more))
    samples: list[tuple[int, list[int], list[int]]] = []
    while forks.running() and steps_done(run_dir) < steps - 5:
        step = steps_done(run_dir)
        if step and (not samples or step >= samples[-1][0] + steps // 40):
            memory = [_resident_bytes(process) for process in forks.processes]
            samples.append((step, memory, [_descriptors(process) for process in forks.processes]))
        time.sleep(0.2)
    codes = forks.wait(120)
    later = [sample for sample in samples if sample[0] >= steps / 5]

    def flat() -> None:
        assert codes == [0] * RANKS, forks.output()[-3000:]
        for rank in range(RANKS):
            memory = [sample[1][rank] for sample in later]
            growth = memory[-1] / memory[0] - 1
            assert growth < MAX_GROWTH, f"rank {rank}: memory grew by {growth:.1%}: {memory}"
            descriptors = {sample[2][rank] for sample in later}
            # a sample may fall into a save, which has files open
            assert max(descriptors) - min(descriptors) <= 6 and later[-1][2][rank] <= later[0][2][rank] + 6, descriptors

    outcome.attempt("memory and descriptors", flat)
    first, last = (max(sample[1]) / 1e6 for sample in (later[0], later[-1]))
    logs = sum(path.stat().st_size for path in (run_dir / "logs").iterdir())
    line = (run_dir / "metrics.jsonl").stat().st_size / steps
    counts = sorted({count for sample in later for count in sample[2]})
    outcome.note = (
        f"{first:.1f} MB at step {later[0][0]}, {last:.1f} MB at step {later[-1][0]}; descriptors {counts}; "
        f"{line:.0f} bytes of metrics a step, {logs} bytes of logs"
    )
    shutil.rmtree(run_dir)
    return outcome


def _resident_bytes(process: int) -> int:
    return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _descriptors(process: int) -> int:
    return len(os.listdir(f"/proc/{process}/fd"))
