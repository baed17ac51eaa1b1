"""Planning under a token budget: seconds and memory for millions of pairs, and what plans make of long rows.

    python benchmarks/planning.py [--pairs 1000000 10000000] [--ranks 1 8 64] [--output FOLDER]

draws log-normal lengths, about 600 tokens a pair, shuffles an epoch and plans each of its steps for all ranks, as a run
does step by step in the thread that makes its batches; so what a run notices is the time for one step. Each case is a
process of its own. Memory is what that process adds, at its peak, to the pairs' lengths, which a data set holds anyway.
Ranks idle is their share of waiting if FLOPs take equal time.

The second table plans the same steps of short pairs, and of pairs of which one in a hundred is 32 times as long, for
ranks that share rows: none do, all rows have N ranks (each N that holds the longest row), or as many as each pair needs
(`train.sequence_parallel_size: auto`). Its FLOPs are Llama-3.1-8B's. What it takes to share a row, an exchange between
its ranks in every layer, is in no column but the share of tokens that are exchanged.
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

from dpo_scale.data.batching import PairOrder, of_groups
from dpo_scale.data.flops import ForwardFlops
from dpo_scale.data.groups import Groups
from dpo_scale.data.layout import pair_tokens
from dpo_scale.data.planning import Planner

# of SmolLM2-135M: they decide which pairs go together, not how long planning takes
FLOPS = ForwardFlops(2 * 1.06e8, 2 * 576 * 49152, ((None, 4 * 576 * 30),))
LLAMA_8B, LLAMA_8B_HEADS = ForwardFlops(2 * 6.98e9, 2 * 4096 * 128256, ((None, 4.0 * 4096 * 32),)), 32
SETTINGS = ("batch", "max_tokens")
TIMES_AS_LONG = {"log-normal": 1, "1% 32 times as long": 32}


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
    report["long_rows"] = [
        case
        for rows in TIMES_AS_LONG
        for ranks in arguments.ranks
        if ranks > 1
        for case in plan_long_rows(rows, ranks, arguments.batch, arguments.max_tokens)
    ]
    write_results("planning", report, table(report), arguments.output)


def plan_epoch(pairs: int, ranks: int, batch: int, max_tokens: int) -> dict[str, Any]:
    draw = np.random.default_rng(0)
    lengths = np.empty((pairs, 3), dtype=np.int32)
    for start in range(0, pairs, 10_000):  # the memory of the drawing itself stays out of what is measured
        part = lengths[start : start + 10_000]
        part[:] = draw_lengths(draw, len(part))
    before = peak_bytes()
    began = time.perf_counter()
    pair_order = PairOrder(pairs, batch, 0)
    planner = Planner(lengths, "shared_prefix", Groups(ranks), 1, max_tokens, FLOPS, 3.0, 3.0)
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


def draw_lengths(draw: np.random.Generator, pairs: int) -> np.ndarray:
    """Log-normal lengths, float64 [pairs, 3]."""
    return draw.lognormal(5.2, 0.5, size=(pairs, 3)) + 1


def plan_long_rows(rows: str, ranks: int, batch: int, max_tokens: int, steps: int = 100) -> list[dict[str, Any]]:
    """Plans of the same steps by who shares rows: nobody, N ranks each row, as many as each pair needs."""
    draw = np.random.default_rng(0)
    lengths = draw_lengths(draw, batch * steps)
    lengths[draw.random(len(lengths)) < 0.01] *= TIMES_AS_LONG[rows]
    lengths = lengths.astype(np.int32)
    tokens = pair_tokens(lengths, "shared_prefix")
    sizes = [2**k for k in range(LLAMA_8B_HEADS.bit_length()) if ranks % 2**k == 0]
    choices = {str(n): (n,) for n in sizes if n == 1 or n * max_tokens >= tokens.max()} | {"auto": tuple(sizes)}
    cases = []
    for chosen, allowed in choices.items():
        planner = Planner(lengths, "shared_prefix", Groups(ranks, allowed), 1, max_tokens, LLAMA_8B, 3.0, 3.0)
        began = time.perf_counter()
        plans = [planner.plan(np.arange(k * batch, (k + 1) * batch)) for k in range(steps)]
        seconds = time.perf_counter() - began
        made = [one for plan in plans for of_ranks in plan.micro_steps for one in of_groups(of_ranks)]
        held = [(int(tokens[one.indices].sum()), one.group_size) for one in made if one.weights.any()]
        cases.append(
            {
                "rows": rows,
                "ranks": ranks,
                "sequence_parallel_size": chosen,
                "micro_steps": float(np.mean([len(plan.micro_steps) for plan in plans])),
                "idle": float(np.mean([planner.idle_fraction(plan) for plan in plans])),
                "longest_in_budgets": float(tokens.max() / max_tokens),
                "fullest_rank": max(-(-count // size) for count, size in held),
                "tokens_shared": sum(count for count, size in held if size > 1) / int(tokens.sum()),
                "seconds_per_step": seconds / steps,
            }
        )
    return cases


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
        "",
        "## Ranks that share rows",
        "",
        "As above, with Llama-3.1-8B's FLOPs.",
        "",
        *markdown_table(LONG_ROWS_HEAD, map(long_rows_row, report["long_rows"])),
    ]
    return "\n".join(lines) + "\n"


LONG_ROWS_HEAD = (
    "rows",
    "ranks",
    "share a row",
    "micro-steps",
    "ranks idle",
    "longest row, in budgets of a rank",
    "tokens of the fullest rank",
    "tokens in shared rows",
    "planning a step",
)


def long_rows_row(case: dict[str, Any]) -> tuple[str, ...]:
    return (
        case["rows"],
        str(case["ranks"]),
        case["sequence_parallel_size"],
        f"{case['micro_steps']:.2f}",
        f"{case['idle']:.1%}",
        f"{case['longest_in_budgets']:.2f}",
        f"{case['fullest_rank']:,}",
        f"{case['tokens_shared']:.1%}",
        f"{1000 * case['seconds_per_step']:.2f} ms",
    )


if __name__ == "__main__":
    main()
