"""The GPU suite's results as tables, and where the docs show them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import describe_circumstances, markdown_table

MARKERS = ("<!-- gpu-suite: begin -->", "<!-- gpu-suite: end -->")
NOT_MEASURED = "not measured"
WHOLE_ROWS = "rows whole"  # the run of `many_ranks.py split` that others are compared with
RECORD = "gpu_suite.jsonl"
Figures = dict[str, dict[str, Any]]  # of each part, as its line has them


def update_page(page: Path, results: Path) -> None:
    """Put the tables of all `results/*/gpu_suite.jsonl` between the markers of `page`, replacing what is there.

    Raises:
        ValueError: if the page lacks a marker; OSError if it can't be read or written.
    """
    text = page.read_text(encoding="utf-8")
    before, begin, rest = text.partition(MARKERS[0])
    _, end, after = rest.partition(MARKERS[1])
    if not (begin and end):
        raise ValueError(f"{page}: the lines {MARKERS[0]} and {MARKERS[1]} expected, between which the tables go")
    tables = "\n".join(tables_of(results))
    page.write_text(f"{before}{begin}\n{tables}\n{end}{after}", encoding="utf-8")


def tables_of(results: Path) -> list[str]:
    """For each device the targets and the parts, or the targets alone where no device has results."""
    records = [(file, read_record(file)) for file in sorted(results.glob(f"*/{RECORD}"))]
    records = [(file, run, parts) for file, (run, parts) in records if run is not None]
    if not records:
        return [f"No GPU has run the suite yet: {NOT_MEASURED}.", "", *targets_table({}), ""]
    lines = []
    for file, run, parts in records:
        lines += [f"### {run['device']}", "", describe_circumstances(run), ""]
        figures = {name: part.get("figures", {}) for name, part in parts.items()}
        lines += [*targets_table(figures), "", *parts_table(parts), ""]
        tables = sorted(f.name for f in file.parent.glob("*.md"))
        lines += [f"All tables: `benchmarks/results/{file.parent.name}/` ({', '.join(tables)}).", ""]
    return lines


def read_record(file: Path) -> tuple[dict[str, Any] | None, dict[str, dict[str, Any]]]:
    """(the last run's circumstances, the last line of each part); None if the file holds no measured run."""
    run, parts = None, {}
    for line in map(json.loads, file.read_text(encoding="utf-8").splitlines()):
        if "run" in line:
            run = line if line["run"] == "measured" else run
        elif line["status"] != "left out" or line["part"] not in parts:
            parts[line["part"]] = line
    return run, parts


def parts_table(parts: dict[str, dict[str, Any]]) -> list[str]:
    rows = [
        (name, part["status"], f"{part['seconds']:.0f} s", part.get("reason", "").replace("|", "/"))
        for name, part in parts.items()
    ]
    return markdown_table(("part", "outcome", "took", ""), rows)


def targets_table(figures: Figures) -> list[str]:
    rows = []
    for text, measure in TARGETS:
        try:
            value = measure(figures)
        except (KeyError, StopIteration, ValueError):  # that part has not run, or not to its end
            value = NOT_MEASURED
        rows.append((text, value))
    return markdown_table(("target, on H100s", "measured"), rows)


def llama_head(figures: Figures) -> dict[str, Any]:
    return figures["heads"]["Llama-3-8B, 8192 tokens"]


def beside_others(figures: Figures) -> str:
    head = llama_head(figures)
    name, seconds = min(head["others"].items(), key=lambda item: item[1])
    return f"{1000 * head['seconds']:.1f} ms; the fastest other is {name}, {1000 * seconds:.1f} ms"


def throughput_of(figures: Figures, shape: str) -> dict[str, Any]:
    return next(iter(figures["throughput"][f"throughput_{shape}"].values()))


def times_trl(figures: Figures) -> str:
    return ", ".join(f"{throughput_of(figures, shape)['times_trl']:.2f}" for shape in ("llama-3.2-1b", "qwen2.5-3b"))


def utilisation(figures: Figures) -> str:
    return ", ".join(f"{throughput_of(figures, shape)['mfu']:.1%}" for shape in ("llama-3.2-1b", "qwen2.5-3b"))


def shared_over_packed(figures: Figures) -> str:
    found = []
    for data_set in figures["ratios"].values():
        rates = data_set["pairs_per_second"]
        found.append(f"{rates['shared_prefix'] / rates['packed']:.2f}")
    return ", ".join(found)


def largest_margin(figures: Figures) -> str:
    margins = [abs(run["first_margin"]) for run in figures["shape"].values() if run.get("first_margin") is not None]
    return f"{max(margins):.1e} at most"


def host_time(figures: Figures) -> str:
    runs = figures["shape"]
    return "; ".join(
        f"ZeRO {stage}: {runs[f'ZeRO {stage}, stored, host']['step_seconds']:.2f} s of "
        f"{runs[f'ZeRO {stage}, stored, 16 k']['step_seconds']:.2f} s"
        for stage in (2, 3)
    )


def split_rows(figures: Figures) -> str:
    return "; ".join(
        f"{name}: {run['times_step']:.2f} of the time, {run['times_memory']:.2f} of the memory"
        for name, run in figures["ranks"]["split"].items()
        if name != WHOLE_ROWS
    )


def hidden(figures: Figures) -> str:
    return ", ".join(f"{name}: {run['hidden']:.0%}" for name, run in figures["ranks"]["overlap"].items())


def end_of_survivors(figures: Figures) -> str:
    killed = figures["ranks"]["deaths"]["killed"]
    return f"exit codes {', '.join(map(str, killed['exit_codes']))} within {killed['seconds_to_end']:.0f} s"


TARGETS: tuple[tuple[str, Callable[[Figures], str]], ...] = (
    (
        "head of 128,256 x 4,096 at 8,192 tokens, forward and backward: at least 75% of the three-pass floor",
        lambda figures: f"{llama_head(figures)['floor_share']:.0%}",
    ),
    (
        "the same: at most 0.6 GB beyond gradients",
        lambda figures: f"{llama_head(figures)['extra_bytes'] / 1e9:.2f} GB",
    ),
    ("the same: faster than naive, TRL, Liger, CCE", beside_others),
    ("training, Llama-3.2-1B's and Qwen2.5-3B's shape: at least 2 times TRL's pairs a second", times_trl),
    ("the same: at least 45% utilisation with stored reference values", utilisation),
    (
        "`shared_prefix` over `packed` at ratios of 0.4, 1, 2, 6, 11: at least 1.17, 1.34, 1.41, 1.48, 1.35",
        shared_over_packed,
    ),
    ("margins of step 1: 0 within rounding", largest_margin),
    ("host time of a step below its device time at 16 k tokens", host_time),
    ("several GPUs: rows split, beside whole ones, numbers equal and less memory", split_rows),
    ("several GPUs: share of NCCL's time that computation hides at ZeRO 3", hidden),
    ("several GPUs: a rank is killed, the others end with 70 or 71 within 90 s", end_of_survivors),
)
