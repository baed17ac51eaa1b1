"""Short runs of `launch/train.py` on random weights: that steps work, and what they take.

`python benchmarks/short_runs.py GROUP [--device cuda] [--quick]`, the groups being:

    first    a first step with each attention that `data.layout: auto` may come to, on a tiny model with the heads of
             Llama-3 (32 for queries, 8 for keys), which the smallest tests have not
    waits    200 quick steps of that model; in one of them every call that makes the host wait for the device is
             counted by its line (`torch.cuda.set_sync_debug_mode`)
    shape    Llama-3.1-8B cut to 8 layers, ZeRO 2 and 3, with gradient checkpointing; 16 pairs of about 850 tokens in
             one micro-batch, or two by two; stored reference or a live one. `host` is the same on pairs of 20 tokens:
             next to nothing for the device to do, so a step takes as long as the host needs to issue it
    compile  the same model at ZeRO 3, layers compiled and not
    offload  the same model cut to 4 layers at ZeRO 3, weights and optimizer in host memory, pinned or not
    resume   a run that is killed in its sixth step and resumed from its fourth, beside one that is not
    trace    one profiled step of `shape`: what the device's time goes into

Each run is a process of its own, on one device; `many_ranks.py` has runs over several. Step times, rates and
utilisation are the run's own record (`metrics.jsonl`), the median of its steps but for the first, in which code is
compiled; memory is what the allocator says at the end. A run that is only measured ends before it would write its
model. A run that fails is listed with the end of its output, the others still run, and the exit code is 1. Results go
to `results/<device>/short_runs_GROUP.*`.
"""

from __future__ import annotations

import argparse
import json
import os
import runpy
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import accelerator, circumstances, cores, describe_circumstances, markdown_table, processor, write_results
from throughput_arms import generated_rows, random_model

from dpo_scale.observe.metrics_file import METRICS_FILE, read_metrics

PROJECT = Path(__file__).resolve().parents[1]
WORKER_FILE = "job.json"
# A rank's kernels add some sums in whatever order they finish (an embedding's gradient), so bf16 runs differ a little.
MAX_APART = {"cpu": 0.0, "cuda": 2e-2}
SECONDS_TO_FOLLOW = 90.0  # that the ranks of a run have to end when the first of them has
EXITS_OF_SURVIVORS = (70, 71)  # docs/checkpoints.md: a run that hangs, a rank that was lost


@dataclass(frozen=True)
class Case:
    """One run."""

    name: str
    overrides: tuple[str, ...] = ()
    shape: str = "llama-heads"
    layers: int | None = None  # instead of the shape's
    pairs: int = 4  # of a step
    tokens_per_pair: int = 60
    steps: int = 3
    watched_step: int | None = None  # the one whose waits are counted
    profiled_step: int | None = None
    ends: bool = False  # before its model is written, as soon as its steps are done
    killed_in_step: int | None = None
    killed_rank: int = 0  # the one that is
    ranks: int = 1  # a process each, without a launcher, which would end the others itself
    run_dir: str | None = None  # a name, for runs that share a folder
    arguments: tuple[str, ...] = ()  # of launch/train.py
    absent: str | None = None  # why it can't run here

    @property
    def total_steps(self) -> int:
        return self.steps + self.ends  # a run that ends early does so at the beginning of a step that it still has


def first(on_cpu: bool, quick: bool) -> list[Case]:
    def case(implementation: str, absent: str | None = None) -> Case:
        return Case(implementation, (f"model.attn_implementation={implementation}",), steps=2, absent=absent)

    no_flash = None if find_spec("flash_attn") else "flash_attn is not installed"
    return [
        case("null"),
        case("varlen_attention", "its kernels run on CUDA" if on_cpu else None),
        case("flex_attention", "FlexAttention does not train on a CPU" if on_cpu else None),
        case("sdpa"),
        case("flash_attention_2", "its kernels run on CUDA" if on_cpu else no_flash),
    ]


def waits(on_cpu: bool, quick: bool) -> list[Case]:
    steps = 10 if quick else 200
    watched = None if on_cpu else steps - 5
    return [Case("quick steps", ("logging.console_metrics=[]",), steps=steps, watched_step=watched, ends=True)]


def _shape(quick: bool, name: str, *overrides: str, stage: int, budget: int = 16384, **more: Any) -> Case:
    """A run of Llama-3.1-8B's shape, or where it is to be quick of the tiny one."""
    settings: dict[str, Any] = {"shape": "llama-3.1-8b", "layers": 8, "pairs": 16, "tokens_per_pair": 850}
    if quick:
        settings, budget = {"pairs": 4}, budget // 16
    common = (f"deepspeed.stage={stage}", f"train.max_tokens_per_micro_batch={budget}")
    common += ("model.gradient_checkpointing=true", "checkpoint.save_at_end=false", "reference.verify=0")
    return Case(name, (*common, *overrides), **{**settings, "steps": 2 if quick else 4, "ends": True, **more})


STORED, LIVE = "reference.mode=store", "reference.mode=live"


def shape(on_cpu: bool, quick: bool) -> list[Case]:
    cases = [
        _shape(quick, "ZeRO 2, stored, 16 k", STORED, stage=2),
        _shape(quick, "ZeRO 3, live, 16 k", LIVE, "reference.stage=3", stage=3),
    ]
    if quick:
        return cases
    return [
        *cases,
        _shape(quick, "ZeRO 3, stored, 16 k", STORED, stage=3),
        _shape(quick, "ZeRO 2, live, 16 k", LIVE, stage=2),
        _shape(quick, "ZeRO 2, stored, host", STORED, stage=2, tokens_per_pair=20, steps=8),
        _shape(quick, "ZeRO 3, stored, host", STORED, stage=3, tokens_per_pair=20, steps=8),
        _shape(quick, "ZeRO 2, stored, 2 k", STORED, stage=2, budget=2048),
        _shape(quick, "ZeRO 3, live, 2 k", LIVE, "reference.stage=3", stage=3, budget=2048),
    ]


def compiled(on_cpu: bool, quick: bool) -> list[Case]:
    # a compiled layer decides itself what it keeps
    ours = ("model.compile=true", "model.gradient_checkpointing=false")
    # 2 pairs at a time: without checkpointing 16 k tokens of activations would not fit beside the states of 8 layers
    budget = 2048
    plain = ("model.gradient_checkpointing=false",)
    absent = "no C++ compiler" if on_cpu and not any(map(shutil.which, ("c++", "g++", "clang++"))) else None
    cases = [
        _shape(quick, "ZeRO 3, plain layers", STORED, *plain, stage=3, budget=budget),
        _shape(quick, "ZeRO 3, compiled layers", STORED, *ours, stage=3, budget=budget, absent=absent),
    ]
    return cases if quick else [*cases, _shape(quick, "ZeRO 2, compiled layers", STORED, *ours, stage=2, budget=budget)]


def offload(on_cpu: bool, quick: bool) -> list[Case]:
    both = ("deepspeed.offload_param=cpu", "deepspeed.offload_optimizer=cpu", STORED)
    layers = None if quick else 4
    pageable = {"zero_optimization": {n: {"device": "cpu", "pin_memory": False} for n in OFFLOADS}}
    cases = [_shape(quick, "pinned", *both, stage=3, layers=layers)]
    if not quick:
        cases.append(
            _shape(quick, "pageable", *both, f"deepspeed.config={json.dumps(pageable)}", stage=3, layers=layers)
        )
    return cases


OFFLOADS = ("offload_param", "offload_optimizer")


def resume(on_cpu: bool, quick: bool) -> list[Case]:
    common = ("checkpoint.save_steps=2", "train.learning_rate=1e-4", "train.lr_scheduler_type=constant")
    return [
        Case("uninterrupted", common, steps=6),
        Case("killed", common, steps=6, killed_in_step=6, run_dir="killed"),
        Case("resumed", common, steps=6, run_dir="killed", arguments=("--resume", "auto")),
    ]


def trace(on_cpu: bool, quick: bool) -> list[Case]:
    return [_shape(quick, "ZeRO 2, stored, 16 k", STORED, stage=2, profiled_step=2)]


GROUPS: dict[str, Callable[[bool, bool], list[Case]]] = {
    "first": first, "waits": waits, "shape": shape, "compile": compiled, "offload": offload, "resume": resume,
    "trace": trace,
}  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    arguments = parse(__doc__, GROUPS, argv)
    cases = GROUPS[arguments.group](arguments.device == "cpu", arguments.quick)
    return run_group(f"short_runs_{arguments.group}", cases, arguments, finish)


def parse(about: str | None, groups: Iterable[str], argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("group", choices=list(groups))
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="the tiny model and few steps: a look, not a measurement")
    parser.add_argument("--output", type=Path, help="folder of the results (default: results/<device>)")
    arguments = parser.parse_args(argv)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU here")
    return arguments


def run_group(
    name: str, cases: Iterable[Case], arguments: argparse.Namespace, finish: Callable[[dict[str, Any], str], None]
) -> int:
    """Run cases one after the other; results are written after each. The exit code.

    Args:
        name: of the results.
        finish: adds to the report, for a device, what only several runs together tell.
    """
    device = processor() if arguments.device == "cpu" else accelerator()
    report = circumstances(device, "torch", "transformers", "deepspeed", "triton")
    report |= {"command": f"{Path(sys.argv[0]).name} {arguments.group}", "quick": arguments.quick, "runs": []}
    torch.cuda.empty_cache()
    with tempfile.TemporaryDirectory() as folder:
        for case in cases:
            found = {"absent": case.absent} if case.absent else run_case(case, Path(folder), arguments.device)
            report["runs"].append({"run": case.name, **found})
            finish(report, arguments.device)
            write_results(name, report, table(report), arguments.output, final=False)
    write_results(name, report, table(report), arguments.output)
    return int(any("failed" in run for run in report["runs"]) or "failed" in report)


def run_case(case: Case, folder: Path, device: str) -> dict[str, Any]:
    """What one run recorded, or {"failed": the end of its output}."""
    model = folder / f"{case.shape}-{case.layers}"
    if not model.exists():
        random_model(model, case.shape, layers=case.layers)
    if device == "cuda":
        torch.cuda.empty_cache()
    # as many rows for all runs of a group that differ in steps, so that stored values are found
    rows = folder / f"rows-{case.pairs}-{case.tokens_per_pair}-{case.total_steps}.jsonl"
    if not rows.exists():
        generated_rows(rows, case.pairs * case.total_steps, ratio=1.0, tokens=case.tokens_per_pair)
    run_dir = folder / (case.run_dir or case.name.replace(" ", "-").replace(",", ""))
    job = {
        "arguments": [*case.arguments, *settings_of(case, device, model, rows, run_dir, folder)],
        "last_step": case.steps if case.ends else None,
        "killed_in_step": case.killed_in_step,
        "killed_rank": case.killed_rank,
        "watched_step": case.watched_step,
        "result": str(folder / "result.json"),
    }
    if case.profiled_step is not None:
        job["arguments"] += ["--profile", str(case.profiled_step)]
    Path(job["result"]).unlink(missing_ok=True)
    (folder / WORKER_FILE).write_text(json.dumps(job), encoding="utf-8")
    codes, printed, seconds = run_ranks(folder / WORKER_FILE, case.ranks)
    print(printed[0], end="", file=sys.stderr, flush=True)
    for rank, code in enumerate(codes):
        expected: tuple[int, ...] = (0,)
        if case.killed_in_step:
            expected = (-signal.SIGKILL,) if rank == case.killed_rank else EXITS_OF_SURVIVORS
        if code not in expected:
            which = f"rank {rank}, " if case.ranks > 1 else ""
            return {"failed": f"{which}exit code {code}: {printed[rank][-1500:]}"}
    found = measured(case, run_dir, Path(job["result"]), printed[0])
    return found | ({"exit_codes": codes, "seconds_to_end": seconds} if case.killed_in_step and case.ranks > 1 else {})


def run_ranks(job: Path, ranks: int) -> tuple[list[int], list[str], float]:
    """Run a job on so many ranks.

    Returns:
        exit codes and what was printed, rank by rank, and the seconds between the first end and the last. What has not
        ended `SECONDS_TO_FOLLOW` after the first is killed.
    """
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    if ranks > 1:
        environment |= {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        environment["OMP_NUM_THREADS"] = str(max(1, cores() // ranks))
    processes, files = [], [job.with_name(f"output-{rank}.txt") for rank in range(ranks)]
    for rank, file in enumerate(files):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}
        with file.open("w", encoding="utf-8") as output:
            processes.append(
                subprocess.Popen(
                    [sys.executable, __file__, "--one", str(job)], env={**environment, **own}, cwd=PROJECT,
                    stdout=output, stderr=subprocess.STDOUT,
                )
            )  # fmt: skip
    first_end = None
    while any(process.poll() is None for process in processes):
        if first_end is None and any(process.poll() is not None for process in processes):
            first_end = time.monotonic()
        if first_end is not None and time.monotonic() > first_end + SECONDS_TO_FOLLOW:
            for process in processes:
                process.kill()
        time.sleep(0.05)
    seconds = 0.0 if first_end is None else time.monotonic() - first_end
    codes = [process.wait() for process in processes]
    return codes, [file.read_text(encoding="utf-8", errors="replace") for file in files], seconds


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def settings_of(case: Case, device: str, model: Path, rows: Path, run_dir: Path, folder: Path) -> list[str]:
    return [
        f"model.path={model}", f"model.dtype={'float32' if device == 'cpu' else 'bfloat16'}", f"data.train={rows}",
        "data.max_length=4096", "data.max_prompt_length=4095", f"data.cache_dir={folder}/tokenized",
        f"reference.store={folder}/store",
        "train.shuffle=false", f"train.global_batch_size={case.pairs}", f"train.max_steps={case.total_steps}",
        f"deepspeed.stage={1 if device == 'cpu' else 2}", f"output_dir={run_dir}", "logging.progress_bar=false",
        *case.overrides,
    ]  # fmt: skip


def measured(case: Case, run_dir: Path, result: Path, printed: str) -> dict[str, Any]:
    steps = [record for record in read_metrics(run_dir / METRICS_FILE) if record["phase"] == "train"]
    counted = steps[1:] or steps
    seconds = [step["step_seconds"] for step in counted]
    found: dict[str, Any] = {
        "steps": len(steps),
        "first_step_seconds": steps[0]["step_seconds"],
        "step_seconds": statistics.median(seconds),
        "tokens_per_step": (steps[-1]["tokens"] - steps[0]["tokens"]) / max(1, len(steps) - 1),
        "first_margin": steps[0].get("rewards/margins"),
        "losses": [step["loss"] for step in steps],
        "logps": [step["logps/chosen"] for step in steps],
        "shares": {name: value for name, value in counted[-1].items() if name.startswith("time/")},
        "log": [line for line in printed.splitlines() if "layout" in line or "attention" in line][:4],
    }
    if all("mfu" in step for step in counted):
        found["mfu"] = statistics.median(step["mfu"] for step in counted)
    if result.exists():
        found |= json.loads(result.read_text(encoding="utf-8"))
    for file in run_dir.glob("profile/*-rank-0.json"):
        found["profile"] = profile_summary(json.loads(file.read_text(encoding="utf-8")))
    return found


def profile_summary(profile: dict[str, Any]) -> dict[str, Any]:
    """What a trace's device, or on a CPU its operators, spent time on: milliseconds by name, the ten largest.

    Where NCCL ran, "hidden" is the share of its time in which the device also computed.
    """
    spans = [event for event in profile["traceEvents"] if event.get("ph") == "X"]
    kernels = [event for event in spans if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    events = kernels or [event for event in spans if event.get("cat") == "cpu_op"]
    by_name: Counter[str] = Counter()
    for event in events:
        by_name[event["name"][:80]] += event["dur"] / 1000
    busy = merged(events)
    whole = max(e["ts"] + e["dur"] for e in events) - min(e["ts"] for e in events)
    found = {"of": "device" if kernels else "operators", "milliseconds": by_name.most_common(10)}
    found["busy"] = sum(end - begin for begin, end in busy) / whole
    sent = merged(event for event in kernels if "nccl" in event["name"].lower())
    if sent:
        computed = merged(event for event in kernels if "nccl" not in event["name"].lower())
        both = sum(max(0.0, min(e, end) - max(b, begin)) for b, e in sent for begin, end in computed)
        found["hidden"] = both / sum(end - begin for begin, end in sent)
    return found


def merged(events: Iterable[dict[str, Any]]) -> list[tuple[float, float]]:
    """(begin, end) of the times in which at least one of these events was under way, in order."""
    spans: list[tuple[float, float]] = []
    for begin, end in sorted((event["ts"], event["ts"] + event["dur"]) for event in events):
        if spans and begin <= spans[-1][1]:
            spans[-1] = (spans[-1][0], max(end, spans[-1][1]))
        else:
            spans.append((begin, end))
    return spans


def finish(report: dict[str, Any], device: str) -> None:
    """What only several runs together tell: whether a resumed run is the uninterrupted one."""
    runs = {run["run"]: run for run in report["runs"] if "losses" in run}
    if {"uninterrupted", "resumed"} <= runs.keys():
        whole, resumed = (runs[name]["losses"] for name in ("uninterrupted", "resumed"))
        report["losses_apart"] = apart = most(abs(a - b) for a, b in zip(whole, resumed, strict=True))
        if not apart <= MAX_APART[device]:
            report["failed"] = f"losses of the resumed run are up to {apart:.3g} from the uninterrupted run's"


def most(differences: Iterable[float]) -> float:
    """The largest; not a number if one is not."""
    return float(np.max(list(differences)))


def table(report: dict[str, Any]) -> str:
    head = ("run", "first step", "a step", "tokens a step", "utilisation", "most allocated", "reserved", "retries")
    head += ("margin of step 1",)
    rows = []
    for run in report["runs"]:
        if "step_seconds" not in run:
            what = f"absent: {run['absent']}" if "absent" in run else "FAILED"
            rows.append((run["run"], what, *[""] * (len(head) - 2)))
            continue
        memory = [f"{run[n] / 1e9:.1f} GB" if n in run else "" for n in ("allocated_bytes", "reserved_bytes")]
        margin = "" if run["first_margin"] is None else f"{run['first_margin']:.1e}"
        rows.append(
            (run["run"], f"{run['first_step_seconds']:.2f} s", f"{run['step_seconds']:.3f} s")
            + (f"{run['tokens_per_step']:,.0f}", f"{run['mfu']:.1%}" if "mfu" in run else "")
            + (*memory, str(run.get("alloc_retries", "")), margin)
        )  # fmt: skip
    lines = [f"# Short runs: {report['command'].split()[-1]}", "", describe_circumstances(report)]
    lines += [f"Made by `python benchmarks/{report['command']}`, whose text says what is counted.", ""]
    lines += markdown_table(head, rows)
    if "losses_apart" in report:
        lines += ["", f"Largest difference of a loss, resumed and uninterrupted: {report['losses_apart']:.3g}."]
    for run in report["runs"]:
        if "waits" in run:
            lines += ["", f"{run['run']}: {sum(run['waits'].values())} waits in one step."]
            lines += [f"- {count} at {place}" for place, count in run["waits"].items()]
        if "profile" in run:
            found = run["profile"]
            lines += [
                "",
                f"{run['run']}: {found['of']} busy {found['busy']:.1%} of the time between first and last.",
                *([f"{found['hidden']:.1%} of NCCL's time is hidden behind computation."] if "hidden" in found else []),
                "",
            ]
            lines += markdown_table(("name", "ms"), [(f"`{n}`", f"{ms:.1f}") for n, ms in found["milliseconds"]])
        if "exit_codes" in run:
            codes = ", ".join(map(str, run["exit_codes"]))
            lines += ["", f"{run['run']}: exit codes {codes}; all ended within {run['seconds_to_end']:.1f} s."]
        if "failed" in run:
            lines += ["", f"{run['run']} failed: {run['failed'].splitlines()[-1]}"]
    lines += ["", *report["beside"]] if "beside" in report else []
    if "failed" in report:
        lines += ["", f"Failed: {report['failed']}."]
    return "\n".join(lines) + "\n"


def run_one(file: Path) -> None:
    """In a process of its own: `launch/train.py`, watched from outside its code."""
    job = json.loads(file.read_text(encoding="utf-8"))
    from dpo_scale.distributed import ranks
    from dpo_scale.training import loop as trainer

    train_step, found = trainer.train_step, {}

    def watched(run: trainer.Run, *arguments: Any) -> Any:
        number = run.state.step + 1
        if number == job["killed_in_step"] and ranks.rank() == job["killed_rank"]:
            os.kill(os.getpid(), signal.SIGKILL)
        if job["last_step"] is not None and number > job["last_step"]:
            sys.stdout.flush()
            sys.stderr.flush()
            if ranks.is_main():
                Path(job["result"]).write_text(json.dumps({**found, **memory()}), encoding="utf-8")
            ranks.barrier()  # a rank that is gone earlier would count as lost
            os._exit(0)
        with waits_counted(found) if number == job["watched_step"] else nullcontext():
            return train_step(run, *arguments)

    trainer.train_step = watched
    sys.argv = ["launch/train.py", *job["arguments"]]
    runpy.run_path(str(PROJECT / "launch" / "train.py"), run_name="__main__")


def memory() -> dict[str, int]:
    """What a GPU's allocator says; nothing on a CPU."""
    if not torch.cuda.is_available():
        return {}
    stats = torch.cuda.memory_stats()
    names = {"allocated_bytes": "allocated_bytes.all.peak", "reserved_bytes": "reserved_bytes.all.peak"}
    return {ours: stats[theirs] for ours, theirs in {**names, "alloc_retries": "num_alloc_retries"}.items()}


@contextmanager
def waits_counted(found: dict[str, Any]) -> Iterator[None]:
    """Within, every call that waits for the device is counted in found["waits"], by the line that made it."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")
    places = [f"{w.filename.removeprefix(f'{PROJECT}/')}:{w.lineno}" for w in caught if "synchroniz" in str(w.message)]
    found["waits"] = dict(Counter(places))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        run_one(Path(sys.argv[2]))
    else:
        raise SystemExit(main())
