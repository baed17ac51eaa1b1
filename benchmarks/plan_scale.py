"""Where scaling ends, calculated: 8B, 70B and 235B-A22B on 8 to 4,096 GPUs. `python benchmarks/plan_scale.py`.

For each model, number of GPUs and way of running it the planner lays out the same global batches, and formulas give the
time of a step (`dpo_scale.forecast.speed`), its parts, and memory. Nothing is run and nothing
measured: the machine that calculates does not matter. Assumptions are printed with the tables. The global batch stays
the same, so this is strong scaling, which is what a user with one data set and more GPUs sees.

Results go to `results/simulated/plan_scale.{md,json,png}`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from common import RESULTS, markdown_table, versions, write_results

from dpo_scale.data.batching import PairOrder
from dpo_scale.data.flops import ForwardFlops, forward_flops
from dpo_scale.data.groups import Groups
from dpo_scale.data.planning import make_planner
from dpo_scale.forecast.cluster import cluster_of
from dpo_scale.forecast.parts import Workload
from dpo_scale.forecast.shape import ModelShape, shape_of
from dpo_scale.forecast.speed import DISK_BANDWIDTH, GATHERS, HOST_BANDWIDTH, time_of
from dpo_scale.settings.tree import Config, load_config

GPUS = tuple(2**k for k in range(3, 13))
PER_NODE = 8
PAIRS, BATCH, STEPS_PLANNED = 61_440, 256, 4
TOKENS = {"prompt": 512, "completion": 768}  # means of log-normal lengths
SPREAD = 0.4  # of their logarithms
BUDGET = 16_384  # tokens of a rank's micro-batch
# A doubling of the GPUs that takes less than this off a step is where scaling ends.
WORTH = 0.25
LLAMA: dict[str, Any] = {"vocab_size": 128256, "num_key_value_heads": 8, "max_position_embeddings": 131072}


def llama_8b() -> Any:
    """meta-llama/Llama-3.1-8B's config.json."""
    from transformers import LlamaConfig

    shape = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
    return LlamaConfig(**LLAMA, **shape)


def llama_70b() -> Any:
    """meta-llama/Llama-3.1-70B's."""
    from transformers import LlamaConfig

    shape = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64}
    return LlamaConfig(**LLAMA, **shape)


def qwen_235b() -> Any:
    """Qwen/Qwen3-235B-A22B's."""
    from transformers import Qwen3MoeConfig

    return Qwen3MoeConfig(
        vocab_size=151936, hidden_size=4096, intermediate_size=12288, moe_intermediate_size=1536, num_hidden_layers=94,
        num_attention_heads=64, num_key_value_heads=4, head_dim=128, num_experts=128, num_experts_per_tok=8,
        decoder_sparse_step=1, max_position_embeddings=40960,
    )  # fmt: skip


MODELS = {"Llama-3.1-8B": llama_8b, "Llama-3.1-70B": llama_70b, "Qwen3-235B-A22B": qwen_235b}


@dataclass(frozen=True)
class Arm:
    """A way of running a model."""

    name: str
    overrides: tuple[str, ...]
    hpz: bool = False

    def settings(self) -> list[str]:
        zero: dict[str, Any] = {"zero_hpz_partition_size": PER_NODE} if self.hpz else {}
        return [*self.overrides, f"deepspeed.config={json.dumps({'zero_optimization': zero})}"]


STORED, LIVE = ("reference.mode=store", "reference.stage=3"), ("reference.mode=live", "reference.stage=3")
SHARED = f"train.sequence_parallel_size={PER_NODE}"
ARMS = (
    Arm("stage 2, stored", ("deepspeed.stage=2", *STORED)),
    Arm("stage 3, stored", ("deepspeed.stage=3", *STORED)),
    Arm("stage 3, live", ("deepspeed.stage=3", *LIVE)),
    Arm("stage 3, stored, hpZ", ("deepspeed.stage=3", *STORED), hpz=True),
    Arm("stage 3, stored, rows over 8", ("deepspeed.stage=3", *STORED, SHARED)),
    Arm("stage 3, stored, hpZ, rows over 8", ("deepspeed.stage=3", *STORED, SHARED), hpz=True),
)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="h100")
    parser.add_argument("--interconnect", default="nvlink+ib400")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--gpus", nargs="+", type=int, default=list(GPUS), help=f"multiples of {PER_NODE}")
    parser.add_argument("--output", type=Path, default=RESULTS / "simulated", help="folder of the results")
    arguments = parser.parse_args(argv)
    lengths = draw_lengths()
    cases = []
    for model in arguments.models:
        model_config = MODELS[model]()
        flops = forward_flops(model_config)
        for arm in ARMS:
            config = load_config(None, [*COMMON, *arm.settings()])
            shape = shape_of(config, model_config)
            for gpus in arguments.gpus:
                found = simulate(config, shape, flops, lengths, gpus, arguments, arm)
                cases.append({"model": model, "parameters": shape.total, "arm": arm.name, "gpus": gpus, **found})
    report = {"device": arguments.device, "interconnect": arguments.interconnect, "cases": cases}
    report |= {"assumptions": assumptions(arguments), "versions": versions("transformers", "deepspeed")}
    write_results("plan_scale", report, table(report), arguments.output)
    plot(report, arguments.output / "plan_scale.png")


COMMON = [
    "model.path=simulated", "data.train=[simulated]", "model.gradient_checkpointing=true",
    f"train.global_batch_size={BATCH}", f"train.max_tokens_per_micro_batch={BUDGET}",
    f"reference.max_tokens_per_micro_batch={BUDGET}", "train.eval_steps=null", "checkpoint.save_at_end=true",
]  # fmt: skip


def draw_lengths() -> np.ndarray:
    draw = np.random.default_rng(0)
    means = [TOKENS["prompt"], TOKENS["completion"], TOKENS["completion"]]
    drawn = draw.lognormal(np.log(means) - SPREAD**2 / 2, SPREAD, (PAIRS, 3))
    return np.maximum(1, drawn).astype(np.int32)


def simulate(
    config: Config,
    shape: ModelShape,
    flops: ForwardFlops,
    lengths: np.ndarray,
    gpus: int,
    arguments: argparse.Namespace,
    arm: Arm,
) -> dict[str, Any]:
    nodes = -(-gpus // PER_NODE)
    cluster = cluster_of(f"{nodes}x{gpus // nodes}", arguments.device, arguments.interconnect, "bfloat16")
    size = config.train.sequence_parallel_size
    assert isinstance(size, int)
    planner = make_planner(config, "shared_prefix", Groups(gpus, (size,)), flops, lengths)
    order = PairOrder(len(lengths), BATCH, seed=0)
    in_order = order.epoch_order(0)
    plans = [planner.plan(order.global_batch(step, in_order)) for step in range(STEPS_PLANNED)]
    steps = order.steps_per_epoch
    time = time_of(config, cluster, Workload(planner, order, steps, plans, 0, 0, "log-normal lengths"), shape)
    useful = float(np.mean([plan.useful_flops for plan in plans]))
    tokens = max(
        float(planner.flops_of([row])[0, 0]) / flops.per_token / row.group_size
        for plan in plans
        for row in plan.micro_steps[0]
    )
    epoch = time.step * steps + sum(time.once.values())
    return {
        "step_seconds": time.step,
        "parts": time.parts,
        "hidden_seconds": time.hidden,
        "once": time.once,
        "epoch_hours": epoch / 3600,
        "gpu_hours": epoch / 3600 * gpus,
        "mfu": useful / time.step / gpus / cluster.device.flops,
        "micro_steps": float(np.mean([len(plan.micro_steps) for plan in plans])),
        "memory": memory(config, shape, gpus, tokens, hpz=arm.hpz),
        "device_memory": cluster.device.memory,
    }


def memory(config: Config, shape: ModelShape, gpus: int, tokens: float, *, hpz: bool) -> float:
    """Bytes on a GPU by the formulas of docs/scale.md, whose letters these are."""
    p, bucket, live = shape.total, 2e8, 1e9
    layer = shape.largest_layer
    if config.deepspeed.stage == 3:
        states = 18 * p / gpus + 2 * (max(layer, live) + bucket) + 2 * layer + 2 * p / PER_NODE * hpz
    else:
        states = 2 * p + 16 * p / gpus
    reference = 0.0 if config.reference.mode != "live" else 2 * p / gpus + 2 * (max(layer, live) + bucket)
    buckets = 4 * bucket + 4 * shape.vocab * shape.hidden
    activations = (2 * shape.layers + (95 if shape.experts else 65)) * shape.hidden * tokens
    return 1.05 * (states + reference + buckets + activations + 0.6e9) + 3e9


def assumptions(arguments: argparse.Namespace) -> list[str]:
    cluster = cluster_of(f"2x{PER_NODE}", arguments.device, arguments.interconnect, "bfloat16")
    device = cluster.device
    return [
        f"{device.name}: {device.flops / 1e12:,.0f} TFLOP/s, {device.memory / 1e9:.0f} GB. {device.source}.",
        f"{arguments.interconnect}, {PER_NODE} GPUs a machine: {cluster.within / 1e9:.0f} GB/s within and "
        f"{cluster.between / 1e9:.0f} GB/s a GPU between machines, each with its own adapter, all used at "
        "once; no congestion. Latency of a ring grows with its ranks, by NCCL's own constants.",
        f"{BATCH} pairs a step, log-normal lengths, {TOKENS['prompt']} tokens of prompt and {TOKENS['completion']} of "
        f"each completion on average, prompts shared; micro-batches of at most {BUDGET:,} tokens a GPU; an epoch of "
        f"{PAIRS:,} pairs.",
        f"bf16, gradient checkpointing, Adam; gradients are summed in bf16. Stage 3 gathers {GATHERS} times the "
        "weights a micro-step, all of it beside the computation as far as that lasts. Stage 2 reduces in each "
        "micro-step, beside nothing, as DeepSpeed's default is.",
        f"Disks: {DISK_BANDWIDTH / 1e9:g} GB/s a machine; host memory: {HOST_BANDWIDTH / 1e9:g} GB/s a machine. No "
        "failures, no stragglers, no time to start.",
        "Memory: the formulas of docs/scale.md. Cases that do not fit stay in the tables, in brackets.",
    ]


def table(report: dict[str, Any]) -> str:
    lines = [
        "# Where scaling ends, calculated",
        "",
        "**Calculated, not measured.** No GPU ran any of this. Assumptions:",
        "",
    ]
    lines += [f"- {line}" for line in report["assumptions"]]
    numbers = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    lines += [
        "",
        f"Made by `python benchmarks/plan_scale.py`; {numbers}.",
        "",
        "![step time, utilisation, memory](plan_scale.png)",
    ]
    for model, cases in grouped(report["cases"], "model"):
        gpus = sorted({case["gpus"] for case in cases})
        lines += ["", f"## {model}, {cases[0]['parameters'] / 1e9:.1f} B parameters"]
        for heading, show in COLUMNS.items():
            rows = [
                (arm, *(bracketed(case, show(case)) for case in sorted(of_arm, key=lambda case: case["gpus"])))
                for arm, of_arm in grouped(cases, "arm")
            ]
            lines += ["", f"**{heading}** by number of GPUs", "", *markdown_table(("", *map(str, gpus)), rows)]
        lines += ["", "Where it ends:", "", *(f"- {arm}: {ending(of_arm)}" for arm, of_arm in grouped(cases, "arm"))]
    return "\n".join(lines) + "\n"


COLUMNS = {
    "Seconds a step": lambda case: f"{case['step_seconds']:.2f}",
    "Utilisation (useful FLOPs of the peak)": lambda case: f"{case['mfu']:.0%}",
    "GPU-hours an epoch, the store's filling and a checkpoint included": lambda case: f"{case['gpu_hours']:,.0f}",
    "GB on a GPU": lambda case: f"{case['memory'] / 1e9:,.0f}",
}


def grouped(cases: Iterable[dict[str, Any]], key: str) -> list[tuple[str, list[dict[str, Any]]]]:
    groups: dict[str, list[dict[str, Any]]] = {}
    for case in cases:
        groups.setdefault(case[key], []).append(case)
    return list(groups.items())


def fits(case: dict[str, Any]) -> bool:
    return case["memory"] <= case["device_memory"]


def bracketed(case: dict[str, Any], text: str) -> str:
    return text if fits(case) else f"({text})"


def ending(cases: list[dict[str, Any]]) -> str:
    """The first number of GPUs whose doubling takes too little off a step, and the largest parts of what is left."""
    possible = [case for case in sorted(cases, key=lambda case: case["gpus"]) if fits(case)]
    if not possible:
        return "does not fit on any of these"
    for case, doubled in zip(possible, possible[1:], strict=False):
        saved = 1 - doubled["step_seconds"] / case["step_seconds"]
        if saved < WORTH:
            parts = sorted(doubled["parts"].items(), key=lambda part: -part[1])[:2]
            shares = " and ".join(f"{seconds / doubled['step_seconds']:.0%} {name}" for name, seconds in parts)
            change = f"take {saved:.0%} off" if saved > 0 else f"add {-saved:.0%}"
            return f"at {case['gpus']} GPUs, {case['step_seconds']:.2f} s; {doubled['gpus']} {change}: {shares} then"
    last = possible[-1]
    return f"not by {last['gpus']} GPUs, {last['step_seconds']:.2f} s"


def plot(report: dict[str, Any], path: Path) -> None:
    """Step time, utilisation and memory over GPUs, a column for each model; needs matplotlib."""
    try:
        import matplotlib
    except ImportError:
        print("no plot: matplotlib is not installed (pip install 'dpo-scale[bench]')")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    models = grouped(report["cases"], "model")
    values = {
        "seconds a step": lambda case: case["step_seconds"],
        "utilisation": lambda case: case["mfu"],
        "GB on a GPU": lambda case: case["memory"] / 1e9,
    }
    figure, axes = pyplot.subplots(3, len(models), figsize=(4.6 * len(models), 9.5), squeeze=False, sharex=True)
    for column, (model, cases) in enumerate(models):
        axes[0][column].set_title(model)
        for row, (label, value) in enumerate(values.items()):
            axis = axes[row][column]
            for arm, of_arm in grouped(cases, "arm"):
                shown = [case for case in of_arm if fits(case)] if row < 2 else of_arm
                axis.plot(
                    [case["gpus"] for case in shown], [value(case) for case in shown], marker="o", ms=3, label=arm
                )
            axis.set_xscale("log", base=2)
            axis.xaxis.set_major_formatter("{x:,.0f}")
            if row != 1:
                axis.set_yscale("log")
                axis.yaxis.set_major_formatter("{x:g}")
                axis.yaxis.set_minor_formatter("{x:g}")
            if column == 0:
                axis.set_ylabel(label)
            axis.tick_params(which="both", labelsize=7)
            axis.grid(alpha=0.3)
        axes[2][column].axhline(cases[0]["device_memory"] / 1e9, color="black", lw=1, ls="--")
        axes[2][column].set_xlabel("GPUs")
    axes[0][0].legend(fontsize=7)
    figure.suptitle(f"Calculated, not measured: {report['device']}, {report['interconnect']}, {BATCH} pairs a step")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
