"""The parts of the GPU suite: what each runs, what it needs, how long it may take, which of its results matter.

In the order in which they are worth having, should the host be taken away: first that steps work at all, then that
they are right, then what they take. `gpu_suite.py` runs them.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parents[1]
BENCHMARKS = PROJECT / "benchmarks"
RANK_GROUPS = ("deaths", "split", "overlap")  # of many_ranks.py
TRAINING = ("transformers", "accelerate", "datasets", "deepspeed")


@dataclass(frozen=True)
class Part:
    """One part.

    Attributes:
        limit: seconds after which it is ended.
        commands: run one after the other, all of them, whatever the others do.
        needs: modules without which it is left out.
        gpus: without so many it is left out.
        figures: those that matter, from what the commands wrote into the folder of results.
        results: names of the files NAME.json that it reads, from this run and no earlier one.
    """

    name: str
    subject: str
    limit: float
    commands: tuple[tuple[str, ...], ...]
    needs: tuple[str, ...] = ()
    results: tuple[str, ...] = ()
    figures: Callable[[dict[str, Any]], dict[str, Any]] = lambda reports: {}
    gpus: int = 0


def all_parts(device: str, dry_run: bool, output: Path) -> list[Part]:
    """Every part, for a device and a folder of results; a dry run takes the smallest case of each."""
    where = ("--device", device, "--output", str(output))
    quick = ("--quick",) if dry_run else ()

    def script(name: str, *arguments: str) -> tuple[str, ...]:
        return (sys.executable, str(BENCHMARKS / f"{name}.py"), *arguments, *where)

    def short_runs(name: str, subject: str, limit: float) -> Part:
        result, commands = f"short_runs_{name}", (script("short_runs", name, *quick),)
        return Part(name, subject, limit, commands, TRAINING, (result,), lambda found: of_runs(found[result]))

    return [
        short_runs("first", "a first step with each attention", 150),
        Part("kernels", "the kernels' tests", 270, (kernel_tests(dry_run),), ("pytest", "triton", "transformers")),
        Part(
            "layouts", "rows of many sequences, forward and backward in bf16", 150, (script("layouts", *quick),),
            ("transformers", "deepspeed"), ("layouts",), lambda found: of_layouts(found["layouts"]),
        ),
        short_runs("waits", "200 quick steps; what the host waits for", 90),
        Part(
            "ranks", "rows split over GPUs, communication in the background, a rank that dies", 420,
            tuple(script("many_ranks", group, *quick) for group in RANK_GROUPS),
            TRAINING, tuple(f"many_ranks_{group}" for group in RANK_GROUPS), of_ranks, 2 if device == "cuda" else 0,
        ),
        short_runs("shape", "Llama-3.1-8B's shape, 8 layers, ZeRO 2 and 3", 360),
        Part(
            "leaves", "ZeRO 3: decoder layers as leaves, compiled and not", 180,
            (
                script("zero3_hooks", *(("--layers", "1", "--repeats", "1") if dry_run else ())),
                script("short_runs", "compile", *quick),
            ),
            TRAINING, ("zero3_hooks", "short_runs_compile"), of_leaves,
        ),
        Part(
            "attention", "attention back ends beside each other", 90, (script("attention", *quick),),
            ("deepspeed",), ("attention",), lambda found: of_attention(found["attention"]),
        ),
        Part(
            "heads", "log-probs beside every peer; memory of a step", 270, tuple(heads(script, dry_run)),
            ("transformers",), ("logprobs",), lambda found: of_heads(found["logprobs"]),
        ),
        Part(
            "throughput", "training beside TRL", 360, tuple(throughput(script, dry_run)), TRAINING,
            tuple(f"throughput_{shape}" for shape in SHAPES_BESIDE_TRL),
            lambda found: {name: of_throughput(report) for name, report in found.items()},
        ),
        short_runs("offload", "weights and optimizer in host memory", 150),
        short_runs("resume", "a run that is killed and resumed", 90),
        Part(
            "ratios", "prompts once, over ratios of prompt to completion", 360, (ratios(script, dry_run),), TRAINING,
            ("throughput_ratios",), lambda found: of_throughput(found["throughput_ratios"]),
        ),
        short_runs("trace", "a profiler's trace of a step of 16 k tokens", 90),
    ]  # fmt: skip


def kernel_tests(dry_run: bool) -> tuple[str, ...]:
    # Settings of the tools that may be missing here (pytest-timeout) would be errors, so the project's are left aside.
    pytest = (sys.executable, "-m", "pytest", "-c", "/dev/null", "--rootdir", str(PROJECT), "--import-mode=importlib")
    pytest += ("-p", "no:cacheprovider", "-q", "-W", "ignore::pytest.PytestUnknownMarkWarning")
    if dry_run:  # in Triton's interpreter all of them take minutes
        return (*pytest, "tests/unit/test_triton_logprobs.py", "-k", "saves or of_no_tokens")
    unit = PROJECT / "tests" / "unit"
    files = [
        f for name in ("test_triton*", "test_pair_loss*", "test_logprobs*") for f in sorted(unit.glob(f"{name}.py"))
    ]
    # compiling for GPUs that are not there is the CPU's part of the suite
    return (*pytest, *map(str, files), "-k", "not compile")


def heads(script: Callable[..., tuple[str, ...]], dry_run: bool) -> list[tuple[str, ...]]:
    if dry_run:
        small = ("--shapes", "64x4096", "--tokens", "64", "--repeats", "2")
        return [
            script("logprobs", *small, "--implementations", "naive", "chunked", "log_softmax", "trl"),
            script("step_memory", "--layers", "1", "--completion-tokens", "8", "--implementations", "chunked"),
        ]
    shapes = ("--shapes", "Llama-3-8B", "Qwen2.5-7B", "SmolLM2-135M", "--tokens", "8192", "2048")
    return [
        script("logprobs", *shapes, "--minutes", "2.5", "--case-seconds", "3"),
        script("step_memory", "--pairs", "4", "--completion-tokens", "512"),
    ]


SHAPES_BESIDE_TRL = ("llama-3.2-1b", "qwen2.5-3b")
GENERATED = ("--data", "generated", "--references", "store", "--repeats", "1", "--compiled-layouts")
# rows, and micro-batches, as on a GPU of 80 GB
LARGE = ("--tokens-per-pair", "2000", "--max-length", "4096", "--max-tokens", "16384", "--global-batch-size", "32")
TINY = ("--model", "shape:tiny", "--dtype", "float32", "--ratios", "1", "--global-batch-size", "4", "--steps", "1")


def throughput(script: Callable[..., tuple[str, ...]], dry_run: bool) -> list[tuple[str, ...]]:
    """Both shapes beside TRL."""
    names = [f"throughput_{shape}" for shape in SHAPES_BESIDE_TRL]
    if dry_run:
        arms = (*GENERATED, *TINY, "--layouts", "shared_prefix", "--trl-kinds", "same")
        return [script("throughput", *arms, "--name", names[0])]
    arms = (*GENERATED, *LARGE, "--ratios", "1", "--layouts", "shared_prefix")
    arms += ("--trl-kinds", "same", "--trl-batch-sizes", "4")
    # 3 billion weights with their optimizer's states leave no room for 16 k tokens of activations
    more: tuple[tuple[str, ...], ...] = ((), ("--gradient-checkpointing",))
    return [
        script("throughput", *arms, *options, "--model", f"shape:{shape}", "--name", name)
        for shape, name, options in zip(SHAPES_BESIDE_TRL, names, more, strict=True)
    ]


def ratios(script: Callable[..., tuple[str, ...]], dry_run: bool) -> tuple[str, ...]:
    """The smaller shape, packed and with shared prefixes, over the ratios of `throughput.py`."""
    if dry_run:  # the dry run of `throughput` has shared prefixes
        return script(
            "throughput", *GENERATED, *TINY, "--layouts", "packed", "--trl-kinds", "--name", "throughput_ratios"
        )
    model = (*LARGE, "--trl-batch-sizes", "4", "--model", f"shape:{SHAPES_BESIDE_TRL[0]}")
    layouts = ("--layouts", "packed", "shared_prefix", "--trl-kinds")
    return script("throughput", *GENERATED, *model, *layouts, "--name", "throughput_ratios")


def of_runs(report: dict[str, Any]) -> dict[str, Any]:
    """Of short runs: what a step took, memory, waits; and what failed or is absent."""
    kept = ("step_seconds", "mfu", "reserved_bytes", "alloc_retries", "first_margin", "waits", "absent", "failed")
    kept += ("exit_codes", "seconds_to_end", "losses_apart", "logps_apart", "times_step", "times_memory")
    found = {run["run"]: {name: run[name] for name in kept if name in run} for run in report["runs"]}
    return found | {name: report[name] for name in ("losses_apart", "failed") if name in report}


def of_ranks(found: dict[str, Any]) -> dict[str, Any]:
    """Of runs over several ranks, group by group; with the share of NCCL's time that is hidden, where it was traced."""
    figures = {name.removeprefix("many_ranks_"): of_runs(report) for name, report in found.items()}
    for name, report in found.items():
        for run in report["runs"]:
            if "hidden" in run.get("profile", {}):
                figures[name.removeprefix("many_ranks_")][run["run"]]["hidden"] = run["profile"]["hidden"]
    return figures


def of_leaves(found: dict[str, Any]) -> dict[str, Any]:
    """Milliseconds of a pass without ZeRO 3 and with its hooks; what steps took."""
    passes = found.get("zero3_hooks", {"seconds": {}})["seconds"]
    hooks = {
        name: {arm: round(1000 * statistics.median(seconds), 2) for arm, seconds in arms.items()}
        for name, arms in passes.items()
    }
    return hooks | (of_runs(found["short_runs_compile"]) if "short_runs_compile" in found else {})


def of_layouts(report: dict[str, Any]) -> dict[str, Any]:
    """Of each back end: on how many rows it agrees, the largest distance, and the graphs that were compiled."""
    found: dict[str, Any] = {}
    for backend in dict.fromkeys(row["backend"] for row in report["rows"]):
        rows = [row for row in report["rows"] if row["backend"] == backend]
        ran = [row for row in rows if "logps" in row]
        if not ran:
            found[backend] = {name: rows[0][name] for name in ("absent", "failed") if name in rows[0]}
            continue
        found[backend] = {
            "agree": sum(row["agrees"] for row in ran),
            "of": len(rows),
            "logps": max(row["logps"] for row in ran),
            "gradients": max(row["gradients"] for row in ran),
            "graphs": max(row["graphs"] for row in ran),
        }
    return found


def of_attention(report: dict[str, Any]) -> dict[str, Any]:
    """Milliseconds of forward and backward, by shape, row and back end."""
    found: dict[str, Any] = {}
    for row in report["rows"]:
        what = "one pair" if row["pair_tokens"] == report["tokens"] else "many pairs"
        value = round(1000 * statistics.median(row["both"]), 2) if "both" in row else row.get("absent", "failed")
        found.setdefault(f"{row['shape']}, {what}", {})[row["backend"]] = value
    return found


def of_heads(report: dict[str, Any]) -> dict[str, Any]:
    """Of each head at its most tokens, forward and backward: our fastest arm, and the fastest of the others."""
    from logprob_arms import NAIVE, OURS  # brings torch

    found: dict[str, Any] = {}
    for head in dict.fromkeys(row["head"] for row in report["rows"]):
        rows = [r for r in report["rows"] if r["head"] == head and r["mode"] == "forward_backward" and "seconds" in r]
        rows = [row for row in rows if row["tokens"] == max(r["tokens"] for r in rows)]
        ours = [row for row in rows if row["arm"] in OURS and row["arm"] not in NAIVE]
        others = [row for row in rows if row not in ours]
        if not ours:
            continue
        best = min(ours, key=lambda row: row["time"])
        found[f"{head}, {best['tokens']} tokens"] = {
            "arm": best["arm"], "seconds": best["time"], "floor_share": best["floor_share"],
            "extra_bytes": best["extra_bytes"],
            "others": {row["arm"]: row["time"] for row in others},
        }  # fmt: skip
    return found


def of_throughput(report: dict[str, Any]) -> dict[str, Any]:
    """Of each data set: pairs a second of our arms, the fastest over TRL's fastest, utilisation."""
    found = {}
    for data_set in report["data_sets"]:
        ours = [arm for arm in data_set["arms"] if arm["work"] != "trl"]
        theirs = [arm["pairs_per_second"] for arm in data_set["arms"] if arm["work"] == "trl"]
        best = max(ours, key=lambda arm: arm["pairs_per_second"])
        rates = {f"{arm['layout']}{' compiled' if arm['compile'] else ''}": arm["pairs_per_second"] for arm in ours}
        found[data_set["name"]] = {
            "pairs_per_second": rates,
            **({"times_trl": best["pairs_per_second"] / max(theirs)} if theirs else {}),
            **({"mfu": best["extra"]["mfu"]} if "mfu" in best["extra"] else {}),
        }
    return found


def read_reports(folder: Path, names: tuple[str, ...], since: float) -> dict[str, Any]:
    """Those results of these names that were written since then."""
    files = {name: folder / f"{name}.json" for name in names}
    new = {name: file for name, file in files.items() if file.exists() and file.stat().st_mtime >= since}
    return {name: json.loads(file.read_text(encoding="utf-8")) for name, file in new.items()}
