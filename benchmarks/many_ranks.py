"""Short runs over several ranks, one a GPU, or two on a CPU: rows that are split, gathers in the background, a death.

`python benchmarks/many_ranks.py GROUP [--device cuda] [--quick]`, the groups being:

    split    Llama-3.1-8B cut to 4 layers at ZeRO 3, pairs of about 16 k tokens, as many a step as there are ranks: each
             row whole on one rank, split over two, over all, and over as many as a budget asks for (`auto`). All make
             the same steps, so losses and log-probs must agree; step time and memory are given beside those of whole
             rows, and has to be less where all rows are split
    overlap  the same model with 8 layers, 16 k tokens a rank in pairs of about 850, with `overlap_comm` and without; a
             step of each is traced: of the time that NCCL takes, how much the device computes in
    deaths   a run whose second rank is killed as it begins its sixth step, while the others are in it. They must end by
             themselves, with exit code 70 or 71 and within the hang timeout and half a minute. The run is then resumed
             from its fourth step, beside one that was not interrupted

Ranks are started without a launcher, which would end the others itself. They are a power of two, at most 8. The rest is
as `short_runs.py` says. Results go to `results/<device>/many_ranks_GROUP.*`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import short_runs
import torch
from common import markdown_table
from gpu_report import WHOLE_ROWS
from short_runs import STORED, Case, most

RANKS_ON_A_CPU = 2
MOST_RANKS = 8
# bf16 sums over other numbers of ranks have another order; on a CPU all is fp32.
MAX_LOSSES_APART = {"cpu": 1e-5, "cuda": 2e-2}
MAX_LOGPS_APART = {"cpu": 1e-5, "cuda": 2e-3}  # of their size
WHOLE, AUTO = WHOLE_ROWS, "auto"


def ranks_here(on_cpu: bool) -> int:
    """The largest power of two of GPUs that are here, at most `MOST_RANKS`."""
    there = RANKS_ON_A_CPU if on_cpu else min(MOST_RANKS, torch.cuda.device_count())
    return 1 << (max(1, there).bit_length() - 1)


def absent(ranks: int) -> str | None:
    return "needs more than one GPU" if ranks < 2 else None


def split(on_cpu: bool, quick: bool) -> list[Case]:
    ranks = ranks_here(on_cpu)
    tokens, held = (60, 128) if quick else (16384, 32768)  # of a pair; of the longest micro-batch

    def case(name: str, size: int | str, budget: int) -> Case:
        overrides = (
            f"train.sequence_parallel_size={size}", f"train.max_tokens_per_micro_batch={budget}", STORED,
            "deepspeed.stage=3", "reference.stage=3", "model.gradient_checkpointing=true", "reference.verify=0",
            "train.learning_rate=1e-4", "train.lr_scheduler_type=constant", "checkpoint.save_at_end=false",
            f"data.max_length={4 * tokens}", f"data.max_prompt_length={4 * tokens - 1}",
        )  # fmt: skip
        shape: dict[str, Any] = {} if quick else {"shape": "llama-3.1-8b", "layers": 4}
        steps = 3 if quick else 4
        return Case(
            name, overrides, pairs=ranks, tokens_per_pair=tokens, steps=steps, ranks=ranks, ends=True,
            absent=absent(ranks), **shape,
        )  # fmt: skip

    sizes = dict.fromkeys((2, ranks))
    cases = [case(WHOLE, 1, held), *(case(f"over {size} ranks", size, held // size) for size in sizes)]
    return cases if quick else [*cases, case(AUTO, AUTO, held // 2)]


def overlap(on_cpu: bool, quick: bool) -> list[Case]:
    ranks = ranks_here(on_cpu)
    settings: dict[str, Any] = {"shape": "llama-3.1-8b", "layers": 8, "pairs": 16 * ranks, "tokens_per_pair": 850}

    def case(name: str, overlap_comm: bool) -> Case:
        deepspeed = json.dumps({"zero_optimization": {"overlap_comm": overlap_comm}})
        overrides = (
            f"deepspeed.config={deepspeed}", f"train.max_tokens_per_micro_batch={1024 if quick else 16384}", STORED,
            "deepspeed.stage=3", "reference.stage=3", "model.gradient_checkpointing=true", "reference.verify=0",
            "checkpoint.save_at_end=false",
        )  # fmt: skip
        steps = 2 if quick else 5
        return Case(
            name, overrides, steps=steps, profiled_step=2, ranks=ranks, ends=True, absent=absent(ranks),
            **({} if quick else settings),
        )  # fmt: skip

    return [case("overlap_comm", True), *([] if quick else [case("no overlap_comm", False)])]


def deaths(on_cpu: bool, quick: bool) -> list[Case]:
    ranks = ranks_here(on_cpu)
    common = ("checkpoint.save_steps=2", "train.learning_rate=1e-4", "train.lr_scheduler_type=constant")
    common += ("train.hang_timeout_minutes=1", "deepspeed.stage=2")
    shared: dict[str, Any] = {"steps": 6, "pairs": 4 * ranks, "ranks": ranks, "absent": absent(ranks)}
    return [
        Case("uninterrupted", common, **shared),
        Case("killed", common, killed_in_step=6, killed_rank=1, run_dir="killed", **shared),
        Case("resumed", common, run_dir="killed", arguments=("--resume", "auto"), **shared),
    ]


GROUPS: dict[str, Callable[[bool, bool], list[Case]]] = {"split": split, "overlap": overlap, "deaths": deaths}


def main(argv: list[str] | None = None) -> int:
    arguments = short_runs.parse(__doc__, GROUPS, argv)
    cases = GROUPS[arguments.group](arguments.device == "cpu", arguments.quick)
    finish = compare if arguments.group == "split" else short_runs.finish
    return short_runs.run_group(f"many_ranks_{arguments.group}", cases, arguments, finish)


def compare(report: dict[str, Any], device: str) -> None:
    """What splitting rows changes: nothing in the numbers; step time and memory as ratios to those of whole rows."""
    runs = {run["run"]: run for run in report["runs"] if "losses" in run}
    whole = runs.pop(WHOLE, None)
    if whole is None:
        return
    rows, failures = [], []
    for name, run in runs.items():
        run["losses_apart"] = most(abs(a - b) for a, b in zip(whole["losses"], run["losses"], strict=True))
        run["logps_apart"] = most(abs(1 - b / a) for a, b in zip(whole["logps"], run["logps"], strict=True))
        run["times_step"] = run["step_seconds"] / whole["step_seconds"]
        if "allocated_bytes" in run:
            run["times_memory"] = run["allocated_bytes"] / whole["allocated_bytes"]
        if not (run["losses_apart"] <= MAX_LOSSES_APART[device] and run["logps_apart"] <= MAX_LOGPS_APART[device]):
            failures.append(
                f"{name}: losses are up to {run['losses_apart']:.3g} and log-probs {run['logps_apart']:.3g} of their "
                f"size from those of whole rows"
            )
        if name != AUTO and run.get("times_memory", 0.0) >= 1:
            failures.append(f"{name}: most allocated is {run['times_memory']:.2f} times that of whole rows, not less")
        memory = f"{run['times_memory']:.2f}" if "times_memory" in run else ""
        rows.append(
            (name, f"{run['times_step']:.2f}", memory, f"{run['losses_apart']:.1e}", f"{run['logps_apart']:.1e}")
        )
    if rows:
        head = ("beside whole rows", "x step time", "x most allocated", "losses apart", "log-probs apart, relative")
        report["beside"] = markdown_table(head, rows)
    if failures:
        report["failed"] = "; ".join(failures)


if __name__ == "__main__":
    raise SystemExit(main())
