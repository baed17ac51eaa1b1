"""One long row, whole and shared by 2 or more ranks: memory and time of its forward and backward pass.

    python benchmarks/long_rows.py [--ranks 1 2 4] [--device cuda] [--checkpointing] [--output FOLDER]

A model of Llama's make, smaller, with random weights takes the sigmoid DPO loss of one pair, prompt computed once, and
its gradient, as the trainer does (fused, `dpo_scale.training.objective`). Each number of ranks is a launch of its own,
one thread a rank on a CPU, so that ranks do not take each other's cores. Memory is that of tensors on the fullest rank
above weights and inputs (see `memory.py`), weights' gradients included, which are the same for all. The first pass is
not measured; time is the median of the others, the slowest rank's. All must give the loss of the whole row.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import accelerator, circumstances, describe_circumstances, markdown_table, processor, timed, write_results
from memory import peak_bytes

PROJECT = Path(__file__).resolve().parents[1]
SHAPE = {
    "hidden_size": 512,
    "intermediate_size": 1792,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 32000,
}
PASSES = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--prompt-tokens", type=int, default=12288)
    parser.add_argument("--completion-tokens", type=int, default=2048, help="of each of the two")
    parser.add_argument("--checkpointing", action="store_true", help="keep the layers' inputs only")
    parser.add_argument("--output", type=Path, help="folder of the results (default: results/<device>)")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)  # a rank of a launch
    arguments = parser.parse_args()
    if arguments.one:
        measure(arguments)
        return
    machine = circumstances(accelerator() if arguments.device == "cuda" else processor(), "torch", "transformers")
    options = [argument for argument in sys.argv[1:] if argument]
    cases = [launch(count, options) for count in arguments.ranks]
    settings = {name: getattr(arguments, name) for name in ("prompt_tokens", "completion_tokens", "checkpointing")}
    report = {**settings, "cases": cases, **machine}
    write_results("long_rows", report, table(report), arguments.output)
    losses = [case["loss"] for case in cases]
    if max(losses) - min(losses) > 1e-4:
        sys.exit(f"the losses are not those of one row: {losses}")


def launch(count: int, options: list[str]) -> dict[str, Any]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count), __file__]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore::FutureWarning"}
    done = subprocess.run(
        [*command, "--one", *options], check=True, stdout=subprocess.PIPE, text=True, cwd=PROJECT, env=environment
    )
    return {"ranks": count, **json.loads(done.stdout.splitlines()[-1])}


def measure(arguments: argparse.Namespace) -> None:
    """One rank of a launch; rank 0 prints what was found."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from dpo_scale.data.dataset import Pair
    from dpo_scale.data.layout import make_batch
    from dpo_scale.distributed import join, ranks, sequence_parallel
    from dpo_scale.models.activations import enable_checkpointing
    from dpo_scale.models.attention_backends import use_attention
    from dpo_scale.models.scorer import PairScorer
    from dpo_scale.settings.loss import LossSettings
    from dpo_scale.training.objective import fused_by_pair

    join.join(10)
    size, device = ranks.world_size(), ranks.device()
    sequence_parallel.make_groups([size], 10)
    torch.manual_seed(0)
    on_cuda = device.type == "cuda"
    longest = arguments.prompt_tokens + arguments.completion_tokens
    with torch.device(device):
        model = LlamaForCausalLM(LlamaConfig(**SHAPE, max_position_embeddings=longest))
    model.to(torch.bfloat16 if on_cuda else torch.float32).train()
    if arguments.checkpointing:
        enable_checkpointing(model, offload=False)
    use_attention(model, "varlen" if on_cuda else "blocks")
    scorer = PairScorer(model, layout="shared_prefix")
    policy: Any = partial(scorer)  # called as an engine is
    policy.module = scorer
    draw = np.random.default_rng(0)
    sizes = (arguments.prompt_tokens, arguments.completion_tokens, arguments.completion_tokens)
    pair = Pair(*(draw.integers(0, SHAPE["vocab_size"], n) for n in sizes), b"", 0)
    share = {"group_size": size, "group_rank": ranks.rank()}
    batch = make_batch("shared_prefix", [pair], np.ones(1, dtype=np.float32), 0, **share).to(device)
    sums = torch.full((1, 2), -10.0 * arguments.completion_tokens, device=device)
    batch = replace(batch, reference_logps=sums)
    losses = []

    def step() -> None:
        scorer.zero_grad()
        total, _, _ = fused_by_pair(policy, batch, LossSettings(), 1.0, (1,))
        total.backward()
        losses.append(total.item())

    step()
    scorer.zero_grad()
    held = peak_bytes(step, device.type)
    seconds = float(np.median([timed(step, on_cuda) for _ in range(PASSES - 1)]))
    of_ranks = ranks.gather_objects((held, seconds))
    if ranks.is_main():
        most, slowest = (max(values) for values in zip(*of_ranks, strict=True))
        print(json.dumps({"bytes": most, "seconds": slowest, "loss": losses[0]}))


def table(report: dict[str, Any]) -> str:
    base = report["cases"][0]
    rows = [
        (
            str(case["ranks"]),
            f"{case['bytes'] / 1e6:,.0f} MB",
            f"{case['bytes'] / base['bytes']:.2f}",
            f"{case['seconds']:.1f} s",
            f"{case['seconds'] / base['seconds']:.2f}",
            f"{case['loss']:.6f}",
        )
        for case in report["cases"]
    ]
    tokens = report["prompt_tokens"] + 2 * report["completion_tokens"]
    kept = "layers' inputs kept" if report["checkpointing"] else "all activations kept"
    lines = [
        "# One long row, shared by ranks",
        "",
        f"A row of {tokens:,} tokens, {kept}. Ratios are to the first line. {describe_circumstances(report)} Made by "
        "`python benchmarks/long_rows.py`.",
        "",
        *markdown_table(("ranks", "memory of the fullest rank", "ratio", "a pass", "ratio", "loss"), rows),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
