"""Planning an epoch under a token budget: seconds and memory for a million and ten million pairs.

    python benchmarks/planning.py [--pairs 1000000 10000000] [--ranks 1 8 64] [--output FOLDER]

draws log-normal lengths, about 600 tokens a pair, shuffles an epoch and plans each of its steps for all ranks, as a run
does step by step in the thread that makes its batches; so what a run notices is the time for one step. Each case is a
process of its own. Memory is what that process adds, at its peak, to the pairs' lengths, which a data set holds anyway.
Ranks idle is their share of waiting if FLOPs take equal time.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import time
from pathlib import Path
from typing import Any

import numpy as np
from common import circumstances, describe_circumstances, markdown_table, processor, write_results

from dpo_scale.data.batching import PairOrder
from dpo_scale.data.flops import ForwardFlops
from dpo_scale.training.plan import Planner

# of SmolLM2-135M: they decide which pairs go together, not how long planning takes
FLOPS = ForwardFlops(2 * 1.06e8, 2 * 576 * 49152, ((None, 4 * 576 * 30),))
SETTINGS = ("batch", "max_tokens")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, nargs="+", default=[1_000_000, 10_000_000])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--batch", type=int, default=256, help="pairs an optimizer step, over all ranks")
    parser.add_argument("--max-tokens", type=int, default=8192, help="of a micro-batch")
    parser.add_argument("--output", type=Path, help="folder of the results")
    arguments = parser.parse_args()
    report = circumstances(processor(), "numpy") | {name: getattr(arguments, name) for name in SETTINGS}
    cases = [
        (pairs, ranks, arguments.batch, arguments.max_tokens) for pairs in arguments.pairs for ranks in arguments.ranks
    ]
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        report["cases"] = pool.starmap(plan_epoch, cases, chunksize=1)
    write_results("planning", report, table(report), arguments.output)


def plan_epoch(pairs: int, ranks: int, batch: int, max_tokens: int) -> dict[str, Any]:
    draw = np.random.default_rng(0)
    lengths = np.empty((pairs, 3), dtype=np.int32)
    for start in range(0, pairs, 10_000):  # the memory of the drawing itself stays out of what is measured
        part = lengths[start : start + 10_000]
        part[:] = draw.lognormal(5.2, 0.5, size=part.shape) + 1
    before = peak_bytes()
    began = time.perf_counter()
    pair_order = PairOrder(pairs, batch, 0)
    planner = Planner(lengths, "shared_prefix", ranks, 1, max_tokens, FLOPS, 3.0, 3.0)
    order = pair_order.epoch_order(0)
    idle = []
    for step in range(pair_order.steps_per_epoch):
        plan = planner.plan(pair_order.global_batch(step, order))
        if step % 1000 == 0:
            idle.append(planner.idle_fraction(plan))
    seconds = time.perf_counter() - began
    return {
        "pairs": pairs,
        "ranks": ranks,
        "seconds": seconds,
        "seconds_per_step": seconds / pair_order.steps_per_epoch,
        "added_bytes": peak_bytes() - before,
        "idle": float(np.mean(idle)),
    }


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def table(report: dict[str, Any]) -> str:
    head = ("pairs", "ranks", "an epoch", "a step", "memory added", "ranks idle")
    rows = [
        (
            f"{case['pairs']:,}",
            str(case["ranks"]),
            f"{case['seconds']:.1f} s",
            f"{1000 * case['seconds_per_step']:.2f} ms",
            f"{case['added_bytes'] / 1e6:.0f} MB",
            f"{case['idle']:.1%}",
        )
        for case in report["cases"]
    ]
    lines = [
        "# Planning an epoch",
        "",
        f"{report['batch']} pairs a step, micro-batches of at most {report['max_tokens']:,} tokens, layout "
        f"shared_prefix. {describe_circumstances(report)} Made by `python benchmarks/planning.py`.",
        "",
        *markdown_table(head, rows),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
