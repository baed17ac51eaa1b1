"""Attention back ends beside each other, on rows of many pairs and of one. `python benchmarks/attention.py [--quick]`.

What a layer of the layout `shared_prefix` computes: queries [1, H, T, D] and keys of a row of T tokens, in which each
pair's completions follow its prompt (`dpo_scale.models.attention`). Rows are pairs of 850 tokens (a third of them the
prompt), and one pair that fills the row. Arms take turns, in each round each once, and what a plan of the row derives
is derived before the first, as it is for all layers but the first of a model.

    forward, both   median of the rounds, spread in brackets; both is forward and backward
    TFLOP/s         4HD FLOPs for each query and key that see each other, 3.5 times that for both
    memory          highest tensor memory during both, beyond what was there and the gradients that stay
    error           norm of the difference from `blocks` in fp32 over the norm: output, and gradient of queries

Results go to `results/<device>/attention.{md,json}`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import (
    accelerator,
    circumstances,
    describe_circumstances,
    markdown_table,
    median_and_spread,
    processor,
    timed,
    write_results,
)
from memory import extra_peak_bytes
from torch import Tensor

from dpo_scale.data.dataset import Pair
from dpo_scale.data.layout import PairBatch, make_batch
from dpo_scale.models.attention import AttentionPlan
from dpo_scale.models.attention_backends import BACKENDS, attention_function


@dataclass(frozen=True)
class Shape:
    heads: int
    key_heads: int
    width: int  # of a head


SHAPES = {"Llama-3-8B": Shape(32, 8, 128), "Llama-3.2-1B": Shape(32, 8, 64), "tiny": Shape(4, 2, 16)}
TOKENS, PAIR_TOKENS = 16384, 850
QUICK_TOKENS, QUICK_PAIR_TOKENS = 512, 128


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--backends", nargs="+", choices=list(BACKENDS), metavar="NAME")
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=["Llama-3-8B", "Llama-3.2-1B"])
    parser.add_argument("--tokens", type=int, default=TOKENS, help="of a row")
    parser.add_argument("--pair-tokens", type=int, default=PAIR_TOKENS)
    parser.add_argument("--repeats", type=int, default=10, help="rounds")
    parser.add_argument("--quick", action="store_true", help="one tiny shape, a short row, two rounds")
    parser.add_argument("--output", type=Path, help="folder of the results (default: results/<device>)")
    arguments = parser.parse_args(argv)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU here")
    if arguments.quick:
        arguments.shapes, arguments.repeats = ["tiny"], 2
        arguments.tokens, arguments.pair_tokens = QUICK_TOKENS, QUICK_PAIR_TOKENS
    if arguments.pair_tokens < 3 or arguments.tokens < arguments.pair_tokens:
        parser.error(
            f"--tokens {arguments.tokens}, --pair-tokens {arguments.pair_tokens}: a row holds a pair, a pair 3"
        )
    on_cuda = arguments.device == "cuda"
    report = circumstances(accelerator() if on_cuda else processor(), "torch", "triton", "flash-attn")
    report |= {"tokens": arguments.tokens, "repeats": arguments.repeats, "rows": []}
    report["dtype"] = "bfloat16" if on_cuda else "float32"  # without matrix units for bf16 it is only slower
    for name in arguments.shapes:
        for pair_tokens in (arguments.pair_tokens, arguments.tokens):
            report["rows"] += measure(arguments, name, pair_tokens)
            write_results("attention", report, table(report), arguments.output, final=False)
    write_results("attention", report, table(report), arguments.output)
    return int(any("failed" in row for row in report["rows"]))


def why_absent(backend: str, device: str) -> str | None:
    """Why a back end can't be trained with here; None if it can."""
    return BACKENDS[backend].why_not(device)


def row_of(tokens: int, pair_tokens: int, vocabulary: int = 384) -> PairBatch:
    """One row of exactly so many tokens: pairs of `pair_tokens`, and a last one of what is left and half that."""
    draw, pairs, left = np.random.default_rng(0), [], tokens
    while left:
        size = left if left < 1.5 * pair_tokens + 3 else pair_tokens
        prompt, chosen = max(1, size // 3), max(1, size // 3)
        ids = [draw.integers(0, vocabulary, n) for n in (prompt, chosen, size - prompt - chosen)]
        pairs.append(Pair(*ids, b"", len(pairs)))
        left -= size
    return make_batch("shared_prefix", pairs, np.ones(len(pairs), dtype=np.float32), 0)


def pairs_that_attend(batch: PairBatch) -> int:
    """How many (query, key) of a row see each other."""
    return sum(tokens * shared + tokens * (tokens + 1) // 2 for tokens, shared in batch.segments)


def measure(arguments: argparse.Namespace, name: str, pair_tokens: int) -> list[dict[str, Any]]:
    """A row of the table for each back end on one row of tokens: what was measured, or why it is absent."""
    shape, device = SHAPES[name], arguments.device
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    batch = row_of(arguments.tokens, pair_tokens).to(device)
    plan = AttentionPlan(batch.position_ids, batch.document_ids, batch.branch_ids, batch.segments)
    torch.manual_seed(0)

    def heads(count: int) -> Tensor:  # as projections make them: [1, T, H, D], transposed
        values = torch.randn(1, arguments.tokens, count, shape.width, device=device, dtype=dtype)
        return values.transpose(1, 2).requires_grad_()

    inputs = [heads(shape.heads), heads(shape.key_heads), heads(shape.key_heads)]
    upstream = torch.randn(1, arguments.tokens, shape.heads, shape.width, device=device, dtype=dtype)
    truth = once(attention_function("blocks"), [t.detach().float().requires_grad_() for t in inputs], plan, upstream)
    flops = 4 * shape.heads * shape.width * pairs_that_attend(batch)
    rows: dict[str, dict[str, Any]] = {}
    for backend in arguments.backends or BACKENDS:
        rows[backend] = {"shape": name, "pair_tokens": pair_tokens, "backend": backend, "flops": flops}
        if (reason := why_absent(backend, device)) is not None:
            rows[backend]["absent"] = reason
            continue
        try:
            rows[backend] |= observed(backend, inputs, plan, upstream, truth, device)
        except Exception as error:  # the others are still to be measured
            rows[backend]["failed"] = f"{type(error).__name__}: {error}"[:500]
    works = {
        mode: {
            backend: work_of(backend, inputs, plan, upstream, mode) for backend, row in rows.items() if "bytes" in row
        }
        for mode in ("forward", "both")
    }
    for mode, arms in works.items():
        seconds: dict[str, list[float]] = {backend: [] for backend in arms}
        for turn in range(arguments.repeats):
            order = list(arms)[turn % max(1, len(arms)) :] + list(arms)[: turn % max(1, len(arms))]
            for backend in order:
                seconds[backend].append(timed(arms[backend], device == "cuda"))
        for backend, times in seconds.items():
            rows[backend][mode] = times
    return list(rows.values())


def once(function: Callable[..., Any], inputs: list[Tensor], plan: AttentionPlan, upstream: Tensor) -> list[Tensor]:
    """The output and the inputs' gradients."""
    output = attend(function, inputs, plan)
    return [output.detach(), *torch.autograd.grad(output, inputs, upstream.to(output.dtype))]


def attend(function: Callable[..., Any], inputs: list[Tensor], plan: AttentionPlan) -> Tensor:
    return function(torch.nn.Module(), *inputs, None, attention_plan=plan)[0]


def work_of(backend: str, inputs: list[Tensor], plan: AttentionPlan, upstream: Tensor, mode: str) -> Callable[[], None]:
    function = attention_function(backend)

    def forward() -> None:
        with torch.no_grad():
            attend(function, inputs, plan)

    return forward if mode == "forward" else lambda: once(function, inputs, plan, upstream)


def observed(
    backend: str, inputs: list[Tensor], plan: AttentionPlan, upstream: Tensor, truth: list[Tensor], device: str
) -> dict[str, Any]:
    """Memory and errors; a first run, in which code is compiled, counts for nothing."""
    function = attention_function(backend)
    found = once(function, inputs, plan, upstream)
    work_of(backend, inputs, plan, upstream, "forward")()

    def both() -> None:
        attend(function, inputs, plan).backward(upstream)

    extra = extra_peak_bytes(both, inputs, device)
    for tensor in inputs:
        tensor.grad = None
    errors = [((ours.float() - true).norm() / true.norm()).item() for ours, true in zip(found, truth, strict=True)]
    return {"bytes": extra, "output_error": errors[0], "query_gradient_error": errors[1]}


def table(report: dict[str, Any]) -> str:
    lines = [
        "# Attention",
        "",
        f"Rows of {report['tokens']:,} tokens in {report['dtype']}, {report['repeats']} rounds. "
        f"{describe_circumstances(report)} Made by `python benchmarks/attention.py`, whose text says what is counted.",
    ]
    head = (
        "back end",
        "forward",
        "both",
        "TFLOP/s forward",
        "TFLOP/s both",
        "memory",
        "output's error",
        "gradient's error",
    )
    for name, pair_tokens in dict.fromkeys((row["shape"], row["pair_tokens"]) for row in report["rows"]):
        here = [row for row in report["rows"] if (row["shape"], row["pair_tokens"]) == (name, pair_tokens)]
        what = "one pair" if pair_tokens == report["tokens"] else f"pairs of {pair_tokens:,} tokens"
        shape = SHAPES[name]
        lines += ["", f"## {name} ({shape.heads}/{shape.key_heads} heads of {shape.width}), {what}", ""]
        rows = []
        for row in here:
            if "both" not in row:
                why = (
                    f"absent: {row['absent']}" if "absent" in row else f"FAILED: {row['failed'].splitlines()[0][:100]}"
                )
                rows.append((row["backend"], why, *[""] * (len(head) - 2)))
                continue
            times = [median_and_spread(row[mode]) for mode in ("forward", "both")]
            rates = [row["flops"] * factor / t / 1e12 for (t, _), factor in zip(times, (1, 3.5), strict=True)]
            rows.append(
                (row["backend"], *(f"{1000 * t:.2f} ms ({spread:.0%})" for t, spread in times))
                + (*(f"{rate:.3g}" for rate in rates), f"{row['bytes'] / 1e6:,.0f} MB")
                + (f"{row['output_error']:.0e}", f"{row['query_gradient_error']:.0e}")
            )
        lines += markdown_table(head, rows)
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
