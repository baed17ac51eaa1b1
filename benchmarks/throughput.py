"""A training step beside TRL's: pairs a second, tokens a second, memory. `python benchmarks/throughput.py`.

Arms are dpo_scale with each layout, its reference live or stored, and with `model.compile` for `--compiled-layouts`;
TRL's `DPOTrainer` (whose head computes log-probs in chunks), its reference live or precomputed, at each of
`--trl-batch-sizes`. Same weights, token ids, order of pairs, global batch, precision of matrix products, gradient
checkpointing and threads for all; each measurement is a process of its own, and arms take turns, `--repeats` times. A
run is `--steps` + 1 optimizer steps, of which the first, a warm-up, is not counted. Between the ends of two steps
everything counts: loading batches, the reference or fetching its values, forward, backward, optimizer, metrics. What is
stored or precomputed was so before, for both (`benchmarks/precompute.py` measures that).

In bfloat16 dpo_scale trains with fp32 master weights and fp32 optimizer states. TRL's arms (`--trl-kinds`) are `same`,
all in bf16, optimizer states too, which is its leanest way, but small updates round to nothing in it; `compiled`, the
same with its `torch_compile`; and `mixed`, fp32 weights under autocast, which keeps what dpo_scale keeps. Ratios are to
the fastest of them.

Tokens are those of the data: a pair's prompt once, its two completions once, no padding. Peak memory is a GPU's
allocator's, or on a CPU the process's resident set, libraries included. Rows are those of `--data`; or, with
`--data generated`, made up with log-normal lengths, for each of `--ratios` of prompt to completion tokens (by default
those of UltraFeedback 0.4, Capybara 1, HH-RLHF 2, HelpSteer 6, TL;DR 11, as arXiv 2410.20305 states them). A
`--max-length` of 2.5 times `--tokens-per-pair` cuts nearly none of them.

`--sweep` measures dpo_scale alone: how the cost of a step grows with tokens, pairs, vocabulary and ranks, and that ten
times the data takes ten times the time in the same memory. Results go to `benchmarks/results/<device>/`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, circumstances, cores, folder_name, matmul_flops_per_second, processor, write_results
from throughput_arms import SHAPES
from throughput_report import plot, sweep_table, table

DEMO_DATA = Path(__file__).resolve().parents[2] / "shared" / "data" / "dpo_en_demo.json"
LAYOUTS = ("padded", "packed", "shared_prefix")
RATIOS = (0.4, 1.0, 2.0, 6.0, 11.0)
QUICK = {
    "global_batch_size": 4, "steps": 1, "repeats": 1, "compiled_layouts": [], "trl_kinds": ["same"],
}  # fmt: skip
SWEPT = ("tokens", "pairs", "vocabulary", "ranks", "steps")
WORKER = Path(__file__).resolve().parent / "throughput_arms.py"


def main() -> None:
    arguments = parse()
    device = accelerator_name() if arguments.device == "cuda" else processor()
    report = circumstances(device, "torch", "transformers", "deepspeed", "trl")
    report |= {name: getattr(arguments, name) for name in SHOWN}
    arguments.peak_tflops = None
    if arguments.device == "cpu":  # no data sheet states it, so it is measured
        flops = matmul_flops_per_second("cpu", getattr(torch, arguments.dtype), 3.0)
        arguments.peak_tflops = report["peak_tflops"] = flops / 1e12 / arguments.ranks
    with tempfile.TemporaryDirectory() as folder:
        if arguments.sweep is not None:
            report["sweep"] = sweep(arguments, Path(folder))
            write_results("throughput_sweep", report, sweep_table(report), arguments.output)
            return
        name = arguments.name or ("throughput_generated" if arguments.data == "generated" else "throughput")
        output, report["data_sets"] = arguments.output or RESULTS / folder_name(device), []
        for data in data_sets(arguments):
            report["data_sets"].append(compare(arguments, data, Path(folder)))
            write_results(name, report, table(report), output, final=False)
    write_results(name, report, table(report), output)
    plot(report, output / f"{name}.png")


SHOWN = (
    "model", "dtype", "gradient_checkpointing", "global_batch_size", "steps", "repeats", "max_length",
    "max_tokens", "ranks",
)  # fmt: skip


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    shapes = ", ".join(f"shape:{name}" for name in SHAPES)
    parser.add_argument(
        "--model",
        default="builtin:smollm2-135m-instruct",
        help=f"builtin: name, folder, hub id, or for generated data random weights: {shapes}",
    )
    parser.add_argument("--data", default=str(DEMO_DATA) if DEMO_DATA.exists() else "builtin:plain_sentence_train")
    parser.add_argument("--ratios", type=float, nargs="+", default=list(RATIOS), help="of generated data")
    parser.add_argument("--tokens-per-pair", type=int, default=600, help="of generated data, on average")
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--global-batch-size", type=int, default=6, help="pairs an optimizer step")
    parser.add_argument("--steps", type=int, default=2, help="optimizer steps that count")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--ranks", type=int, default=1, help="processes, which share the cores of a CPU")
    parser.add_argument("--max-tokens", type=int, default=2048, help="of a micro-batch of dpo_scale")
    parser.add_argument("--trl-batch-sizes", type=int, nargs="+", default=[2], help="pairs a micro-batch of TRL")
    parser.add_argument("--layouts", nargs="+", default=list(LAYOUTS), choices=LAYOUTS)
    parser.add_argument("--compiled-layouts", nargs="*", default=["shared_prefix"], choices=LAYOUTS)
    parser.add_argument(
        "--trl-kinds",
        nargs="*",
        default=["same", "compiled", "mixed"],
        choices=["same", "compiled", "mixed"],
        help="see above",
    )
    parser.add_argument("--references", nargs="+", default=["live", "store"], choices=["live", "store"])
    parser.add_argument("--quick", action="store_true", help="few pairs, once: a look, not a measurement")
    parser.add_argument(
        "--sweep", nargs="*", choices=SWEPT, help="dpo_scale alone, over these quantities, or over all of them"
    )
    parser.add_argument("--output", type=Path, help="folder of the results")
    parser.add_argument("--name", help="of the results' files (default: throughput, or throughput_generated)")
    arguments = parser.parse_args()
    if arguments.quick:
        for name, value in QUICK.items():
            setattr(arguments, name, value)
    for size in arguments.trl_batch_sizes:
        if arguments.global_batch_size % (size * arguments.ranks):
            parser.error(
                f"--global-batch-size {arguments.global_batch_size}: TRL can't make it of micro-batches of {size}"
            )
    return arguments


def accelerator_name() -> str:
    if not torch.cuda.is_available():
        raise SystemExit("--device cuda: there is none")
    return torch.cuda.get_device_name()


def data_sets(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """What is trained on: {"name", "path"}, or {"name", "ratio"} for rows to make up."""
    if arguments.data != "generated":
        return [{"name": Path(arguments.data).name, "path": arguments.data}]
    return [{"name": f"prompt / completion = {ratio:g}", "ratio": ratio} for ratio in arguments.ratios]


def compare(arguments: argparse.Namespace, data: dict[str, Any], folder: Path) -> dict[str, Any]:
    """All arms on one data set."""
    common = common_job(arguments, folder) | {"data": data, "compiled": bool(arguments.compiled_layouts)}
    prepared = in_processes({**common, "work": "prepare", "folder": str(folder / str(len(list(folder.iterdir()))))})
    common |= {"folder": prepared["folder"], "model": prepared["model"], "data": {**data, "path": prepared["rows"]}}
    layouts = [(layout, False) for layout in arguments.layouts]
    layouts += [(layout, True) for layout in arguments.compiled_layouts]
    arms = [
        {"work": "dpo_scale", "layout": layout, "compile": compiled, "reference": reference}
        for layout, compiled in layouts
        for reference in arguments.references
    ]
    theirs = [
        {"work": "trl", "reference": reference, "kind": kind, "micro_batch_size": size}
        for kind in arguments.trl_kinds
        for reference in arguments.references
        for size in arguments.trl_batch_sizes
        if kind != "mixed" or arguments.dtype != "float32"
    ]
    if not prepared["trl"]:
        theirs = []
    # ours and theirs take turns, so that a slow spell of the machine meets both
    between = -(-len(theirs) // len(arms))
    arms = [arm for i, ours in enumerate(arms) for arm in (ours, *theirs[i * between : (i + 1) * between])]
    runs: list[list[dict[str, Any]]] = [[] for _ in arms]
    for _ in range(arguments.repeats):
        for arm, results in zip(arms, runs, strict=True):
            results.append(in_processes({**common, **arm}))
            print(f"{data['name']}: {arm}: {results[-1]['pairs_per_second']:.3f} pairs/s", file=sys.stderr, flush=True)
    return {
        "name": data["name"],
        "pairs": prepared["pairs"],
        "mean_lengths": prepared["mean_lengths"],
        "arms": [{**arm, **summary(results)} for arm, results in zip(arms, runs, strict=True)],
    }


def summary(results: list[dict[str, Any]]) -> dict[str, Any]:
    """One arm's repeats: medians of rates, the largest memory; what only dpo_scale reports comes from the last."""
    rates = [result["pairs_per_second"] for result in results]
    return {
        "pairs_per_second": statistics.median(rates),
        "all_pairs_per_second": rates,
        "tokens_per_second": statistics.median(result["tokens_per_second"] for result in results),
        "peak_memory_bytes": max(result["peak_memory_bytes"] for result in results),
        "first_losses": [result["losses"][0] for result in results],
        "extra": results[-1].get("extra", {}),
    }


def common_job(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    names = (
        "device", "model", "dtype", "gradient_checkpointing", "global_batch_size", "steps", "max_length", "max_tokens",
        "ranks", "tokens_per_pair", "peak_tflops",
    )  # fmt: skip
    return {name: getattr(arguments, name) for name in names} | {"folder": str(folder)}


def sweep(arguments: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """One quantity at a time changed from a base case, layout `shared_prefix`, stored reference."""
    base = common_job(arguments, folder) | {
        "layout": "shared_prefix", "reference": "store", "compile": False, "compiled": False, "vocabulary": None,
    }  # fmt: skip

    shape = {"model": "shape:smollm2-135m"}
    tiny = {"model": "shape:tiny", "dtype": "float32", "global_batch_size": 32, "tokens_per_pair": 60}
    cases: dict[str, tuple[str, list[dict[str, Any]]]] = {
        "tokens": ("tokens a pair", [{"tokens_per_pair": n} for n in (150, 300, 600)]),
        "pairs": ("pairs a step", [{"global_batch_size": n} for n in (4, 8, 16)]),
        "vocabulary": ("vocabulary", [{**shape, "vocabulary": n} for n in (49152, 98304, 151936)]),
        "ranks": ("ranks", [{"ranks": n} for n in (1, 2)]),
        "steps": ("steps of 32 pairs, tiny model", [{**tiny, "steps": n} for n in (200, 2000)]),
    }
    points = []
    for what, settings in (cases[name] for name in arguments.sweep or cases):
        for changed in settings:
            job = {**base, **changed, "folder": str(folder / str(len(points)))}
            prepared = in_processes({**job, "work": "prepare", "data": {"name": "generated", "ratio": 1.0}})
            data = {"name": "generated", "ratio": 1.0, "path": prepared["rows"]}
            job |= {"model": prepared["model"], "data": data, "folder": prepared["folder"]}
            results = [in_processes({**job, "work": "dpo_scale"}) for _ in range(arguments.repeats)]
            points.append({"what": what, "value": next(reversed(changed.values())), **summary(results)})
            print(f"{what} {points[-1]['value']}: {points[-1]['pairs_per_second']:.3f} pairs/s", file=sys.stderr)
    return points


def in_processes(job: dict[str, Any]) -> dict[str, Any]:
    """Run one job of `throughput_arms.py` in `ranks` processes that share the cores; what rank 0 returns."""
    Path(job["folder"]).mkdir(parents=True, exist_ok=True)
    ranks = job["ranks"] if job["work"] == "dpo_scale" or job["work"] == "trl" else 1
    with tempfile.TemporaryDirectory(dir=job["folder"]) as place:
        job = {**job, "place": place, "output": f"{place}/result.json"}
        file = Path(place) / "job.json"
        file.write_text(json.dumps(job), encoding="utf-8")
        start = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)] if ranks > 1 else []
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(max(1, cores() // ranks)),
            "TOKENIZERS_PARALLELISM": "false",
            "TQDM_DISABLE": "1",
            "HF_HUB_OFFLINE": "1",
        }
        command = [sys.executable, *start, str(WORKER), str(file)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode != 0:
            raise SystemExit(f"{job} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
        return json.loads(Path(job["output"]).read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
