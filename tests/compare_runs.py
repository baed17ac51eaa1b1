"""Did a change move a number? Small runs before it and after it, compared bit by bit.

    git stash / git checkout BEFORE;  python tests/compare_runs.py record /tmp/before
    git checkout AFTER;               python tests/compare_runs.py record /tmp/after --since /tmp/before
    python tests/compare_runs.py compare /tmp/before /tmp/after

`record` trains the runs below on 2 CPU ranks through the real launcher, in a minute or two: ZeRO stages 0 to 3, live,
stored, adapter and moving references, LoRA, layouts, token budgets, evaluation. With `--since` it takes model and data
from there, resumes the checkpoints that were written there, and reads the store that was filled there: formats are
compared too. `compare` prints a line a run and exits with 1 if any differs. What measures time or memory is left out.

For a change that should not alter numerics every line must say "identical". Where only the order of sums changed, the
largest relative difference tells how much.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
from pathlib import Path

from tiny import read_metrics, run_named_jobs, run_overrides, without_timings

COMMON = [
    "train.max_steps=4",
    "train.eval_on_start=true",
    "checkpoint.save_steps=2",
    "checkpoint.save_total_limit=null",
]
RUNS = {
    "stage0_live": ["deepspeed.stage=0"],
    "stage1_padded": ["deepspeed.stage=1", "data.layout=padded"],
    "stage2_stored": ["deepspeed.stage=2", "reference.mode=store"],
    "stage2_bf16": ["deepspeed.stage=2", "reference.mode=store", "model.dtype=bfloat16"],
    "stage3_live": ["deepspeed.stage=3", "reference.stage=3", "model.gradient_checkpointing=true"],
    "stage3_tokens": [
        "deepspeed.stage=3",
        "reference.mode=store",
        "train.micro_batch_size=1",
        "train.max_tokens_per_micro_batch=128",
    ],
    "lora_adapter": ["deepspeed.stage=2", "lora.r=2", "reference.mode=adapter"],
    "moving": ["deepspeed.stage=3", "reference.sync_steps=2", "reference.sync_mixup=0.5"],
    "per_token": ["deepspeed.stage=1", "loss.ld_alpha=0.5", "logprobs.pair_loss=tokens"],
}
RESUMED = ("stage2_stored", "stage3_live", "lora_adapter", "moving")
STORE, OVERRIDES, COMPLETE = "reference_store", "overrides.json", "complete"
STORED_EARLIER = "stored_earlier"  # a run that reads the store of the earlier checkout


def record(folder: Path, since: Path | None) -> None:
    """Train all runs in `folder`; with `since` also go on from what was written there."""
    folder.mkdir(parents=True)
    if since is None:
        overrides = run_overrides(folder)
        (folder / OVERRIDES).write_text(json.dumps(overrides))
    else:  # the same model and data, by the same paths: they are part of a run's identity
        overrides = json.loads((since / OVERRIDES).read_text())
    jobs: dict[str, list[str] | dict] = {
        name: [*extra, f"reference.store={folder / STORE}"] if "reference.mode=store" in extra else extra
        for name, extra in RUNS.items()
    }
    if since is not None:
        shutil.copytree(since / STORE, folder / "earlier_store")
        earlier = [f"reference.store={folder / 'earlier_store'}", "reference.on_missing=error"]
        jobs[STORED_EARLIER] = [*RUNS["stage2_stored"], *earlier]
        for name in RESUMED:
            run = shutil.copytree(since / name, folder / f"{name}_resumed")
            shutil.rmtree(run / "checkpoints" / "step-4")
            (run / "finished.json").unlink()
            jobs[run.name] = {"overrides": jobs[name], "resume": "auto"}
    run_named_jobs(folder, [*overrides, *COMMON], jobs)
    (folder / COMPLETE).touch()


def largest_difference(before: list[dict], after: list[dict]) -> float:
    """Largest relative difference of two runs' numbers; 0 if they are identical, inf if other things were measured."""
    if len(before) != len(after):
        return math.inf
    worst = 0.0
    for old, new in zip(before, after, strict=True):
        if old.keys() != new.keys():
            return math.inf
        for name, value in old.items():
            if value == new[name]:
                continue
            if not isinstance(value, float | int) or not isinstance(new[name], float | int):
                return math.inf
            # rewards and margins are small differences of large sums: a scale of 1 keeps them from looking large
            worst = max(worst, abs(value - new[name]) / max(abs(value), abs(new[name]), 1.0))
    return worst


def numbers(run: Path, first_step: int = 0) -> list[dict]:
    records = read_metrics(run) + read_metrics(run, "eval")
    return without_timings([record for record in records if record["step"] > first_step or first_step == 0])


def compare(before: Path, after: Path) -> bool:
    """Print a line a run; True if all are identical."""
    for folder in (before, after):
        if not (folder / COMPLETE).exists():
            raise SystemExit(f"{folder}: not recorded, or not to its end")
    pairs = [(name, name, 0) for name in RUNS]
    if (after / STORED_EARLIER).exists():
        pairs += [("stage2_stored", STORED_EARLIER, 0), *((name, f"{name}_resumed", 2) for name in RESUMED)]
    same = True
    for old, new, step in pairs:
        difference = largest_difference(numbers(before / old, step), numbers(after / new, step))
        same &= difference == 0
        print(f"{new:<24} {'identical' if difference == 0 else f'differs by up to {difference:.1e}'}")
    return same


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    recording = commands.add_parser("record", help="train the runs of this checkout")
    recording.add_argument("folder", type=Path, help="a new folder")
    recording.add_argument("--since", type=Path, help="a folder that an earlier checkout recorded")
    comparing = commands.add_parser("compare", help="hold two recorded folders side by side")
    comparing.add_argument("before", type=Path)
    comparing.add_argument("after", type=Path)
    arguments = parser.parse_args()
    if arguments.command == "record":
        if arguments.folder.exists():
            parser.error(f"{arguments.folder}: exists already")
        record(arguments.folder.resolve(), arguments.since and arguments.since.resolve())
        return 0
    return 0 if compare(arguments.before, arguments.after) else 1


if __name__ == "__main__":
    sys.exit(main())
