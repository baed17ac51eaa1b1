"""What the log-prob benchmark shows: ratios, the Markdown table, plots, and the summary in docs/benchmarks.md.

A row is a dict: head, tokens, mode, arm, and either `absent` (why) or `seconds` (all rounds), `extra_bytes` and the
errors; `add_ratios` adds what compares rows with each other.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from common import describe_circumstances, markdown_table, median_and_spread
from logprob_arms import FORWARD, FROZEN, MODES, NAIVE, OURS, TRAIN, describe

Row = dict[str, Any]
MODE_NAMES = {FORWARD: "forward", TRAIN: "forward + backward", FROZEN: "forward + backward, frozen head"}
MARKERS = ("<!-- logprobs table -->", "<!-- end of logprobs table -->")
NO_GPU = "GPU: not measured; `bash benchmarks/gpu_suite.sh` does that."
COMMAND = "python benchmarks/logprobs.py"


def add_ratios(report: dict[str, Any]) -> None:
    """Add to each measured row its median `time` and `spread`, `time_ratio`, `memory_ratio` and `floor_share`.

    Ratios are to the fastest and to the leanest naive form of the same case, None where no naive form was measured.
    """
    for _, rows in cases(report["rows"]):
        for row in rows:
            row["time"], row["spread"] = median_and_spread(row["seconds"])
        naive = [row for row in rows if row["arm"] in NAIVE]
        fastest = min((row["time"] for row in naive), default=None)
        leanest = min((row["extra_bytes"] for row in naive), default=None)
        for row in rows:
            row["time_ratio"] = row["time"] / fastest if fastest else None
            row["memory_ratio"] = row["extra_bytes"] / leanest if leanest else None
            flops = MODES[row["mode"]] * 2 * row["tokens"] * row["hidden_size"] * row["vocabulary"]
            row["floor_share"] = flops / report["matmul_flops_per_second"] / row["time"]


def cases(rows: Iterable[Row]) -> Iterator[tuple[tuple[str, int, str], list[Row]]]:
    """The measured rows of each head, number of tokens and mode, in the order of measurement."""

    def key(row: Row) -> tuple[str, int, str]:
        return row["head"], row["tokens"], row["mode"]

    for case, group in groupby(rows, key):
        if measured := [row for row in group if "seconds" in row]:
            yield case, measured


def table(report: dict[str, Any]) -> str:
    """Everything measured, as Markdown."""
    lines = [
        "# Log-probs and preference loss from hidden states",
        "",
        f"Operands in {report['dtype']}; matrix products reach {report['matmul_flops_per_second'] / 1e12:.2f} TFLOP/s. "
        f"{describe_circumstances(report)} Made by `{COMMAND}`, whose text says what each column is.",
    ]
    head = ("implementation", "time", "spread", "x naive", "of the floor", "memory", "x naive")
    head += ("error: log-probs", "hidden gradient", "head gradient")
    for (name, tokens, mode), rows in cases(report["rows"]):
        one = rows[0]
        cap = f", soft-cap {one['softcap']:g}" if one["softcap"] else ""
        lines += [
            "",
            f"## {name} ({one['hidden_size']} x {one['vocabulary']}{cap}), {tokens:,} tokens, {MODE_NAMES[mode]}",
            "",
            *markdown_table(head, map(cells, rows)),
        ]
    lines += ["", *absences(report)]
    return "\n".join(lines).rstrip() + "\n"


def cells(row: Row) -> list[str]:
    return [
        describe(row["arm"]),
        seconds(row["time"]),
        f"{row['spread']:.0%}",
        ratio(row["time_ratio"]),
        f"{row['floor_share']:.0%}",
        megabytes(row["extra_bytes"]),
        ratio(row["memory_ratio"]),
        error(row),
        *(f"{row[name]:.0e}" if name in row else "" for name in ("hidden_grad_error", "weight_grad_error")),
    ]


def absences(report: dict[str, Any]) -> list[str]:
    """Who is missing where, and why, one line for each reason."""
    where: dict[tuple[str, str], list[tuple[str, int, str]]] = {}
    for row in report["rows"]:
        if "absent" in row:
            where.setdefault((row["arm"], row["absent"]), []).append((row["head"], row["tokens"], row["mode"]))
    everywhere = {(row["head"], row["tokens"], row["mode"]) for row in report["rows"]}
    lines = [f"- {left['head']}, {left['tokens']:,} tokens: left out, {left['reason']}." for left in report["left_out"]]
    for (arm, reason), places in where.items():
        shown = "; ".join(
            f"{head}, {', '.join(f'{tokens:,}' for tokens in dict.fromkeys(t for _, t, _ in group))} tokens"
            for head, group in ((head, list(group)) for head, group in groupby(places, key=lambda place: place[0]))
        )
        modes = [MODE_NAMES[mode] for mode in dict.fromkeys(mode for *_, mode in places)]
        among = "" if len(modes) == len({mode for *_, mode in everywhere}) else f" ({', '.join(modes)})"
        scope = "" if set(places) == everywhere else f" for {shown}{among}"
        lines.append(f"- {describe(arm)}: absent{scope}: {reason}.")
    return ["## Absent", "", *lines] if lines else []


def seconds(time: float) -> str:
    return f"{time:.2f} s" if time >= 1 else f"{1000 * time:.3g} ms"


def megabytes(nbytes: int) -> str:
    return f"{nbytes / 1e6:,.0f} MB" if nbytes >= 1e7 else f"{nbytes / 1e6:.2g} MB"


def error(row: Row) -> str:
    """Of log-probs, in brackets where only their sums are known."""
    return f"({row['logp_error']:.0e})" if row["logp_error_of_sums"] else f"{row['logp_error']:.0e}"


def ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def plot(report: dict[str, Any], folder: Path) -> None:
    """Time and memory against the number of tokens, one picture a head; a notice if matplotlib is not installed."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        print("no plots: matplotlib is not installed (pip install 'dpo-scale[bench]')", flush=True)
        return
    for head, head_rows in groupby(report["rows"], key=lambda row: row["head"]):
        rows = [row for row in head_rows if "seconds" in row]
        modes = [mode for mode in MODES if any(row["mode"] == mode for row in rows)]
        arms = list(dict.fromkeys(row["arm"] for row in rows))
        sizes = sorted({row["tokens"] for row in rows})
        if not rows:
            continue
        figure, axes = pyplot.subplots(2, len(modes), figsize=(4.2 * len(modes), 6.4), sharex=True, squeeze=False)
        for column, mode in enumerate(modes):
            for number, arm in enumerate(arms):
                ours = arm in OURS and arm not in NAIVE
                style = {"color": f"C{number % 10}", "marker": "o" if ours else "x", "lw": 2.2 if ours else 1.0}
                line = [row for row in rows if row["arm"] == arm and row["mode"] == mode]
                tokens = [row["tokens"] for row in line]
                style["linestyle"] = "-" if number < 10 else "--"
                axes[0][column].plot(tokens, [1000 * row["time"] for row in line], label=describe(arm), **style)
                axes[1][column].plot(tokens, [row["extra_bytes"] / 1e6 for row in line], **style)
            axes[0][column].set_title(MODE_NAMES[mode], fontsize=10)
            axes[1][column].set_xlabel("tokens")
            for row in (0, 1):
                axes[row][column].set_xscale("log", base=2)
                axes[row][column].set_yscale("log")
                axes[row][column].grid(alpha=0.3)
                axes[row][column].set_xticks(sizes, [str(size) for size in sizes])
        axes[0][0].set_ylabel("ms")
        axes[1][0].set_ylabel("MB beyond inputs and gradients")
        handles, labels = axes[0][-1].get_legend_handles_labels()
        figure.legend(handles, labels, loc="lower center", ncols=4, fontsize=8, frameon=False)
        figure.suptitle(f"{head}, {report['dtype']}, {report['device']}", fontsize=11)
        figure.tight_layout(rect=(0, 0.04 + 0.022 * -(-len(labels) // 4), 1, 1))
        figure.savefig(folder / f"logprobs-{head.lower().replace('.', '_')}.png", dpi=80)
        pyplot.close(figure)


def summary(reports: Iterable[dict[str, Any]]) -> list[str]:
    """One table for all devices: the fastest of ours beside the fastest naive form and the fastest peer."""
    lines, gpu = [], False
    head = ("head", "tokens", "mode", "ours", "time", "x naive", "fastest peer", "of the floor")
    head += ("memory", "x naive", "error")
    for report in reports:
        gpu = gpu or report["on_gpu"]
        shown = []
        for (name, tokens, mode), rows in cases(report["rows"]):
            ours = [row for row in rows if row["arm"] in OURS and row["arm"] not in NAIVE]
            peers = [row for row in rows if row["arm"] not in OURS and row["arm"] not in NAIVE]
            if not ours:
                continue
            best = min(ours, key=lambda row: row["time"])
            peer = min(peers, key=lambda row: row["time"], default=None)
            beside = f"{describe(peer['arm'])}: {seconds(peer['time'])}, error {error(peer)}" if peer else "none here"
            own = describe(best["arm"]).removeprefix("ours, ")
            shown.append(
                [name, f"{tokens:,}", MODE_NAMES[mode], own, seconds(best["time"]), ratio(best["time_ratio"]), beside]
                + [f"{best['floor_share']:.0%}", megabytes(best["extra_bytes"]), ratio(best["memory_ratio"])]
                + [error(best)]
            )
        lines += ["", f"{report['device']}, {report['dtype']}, {report['date']}:", "", *markdown_table(head, shown)]
    return lines if gpu else [*lines, "", NO_GPU]


def update_readme(readme: Path, results: Path) -> None:
    """Put the summary of all `results/*/logprobs.json` between the markers of `readme`, replacing what is there.

    Raises ValueError if the file lacks a marker.
    """
    text = readme.read_text(encoding="utf-8")
    before, begin, rest = text.partition(MARKERS[0])
    _, end, after = rest.partition(MARKERS[1])
    if not (begin and end):
        raise ValueError(f"{readme}: the lines {MARKERS[0]} and {MARKERS[1]} expected, between which the table goes")
    reports = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(results.glob("*/logprobs.json"))]
    table = "\n".join(summary(reports))
    readme.write_text(f"{before}{begin}\n{table.strip()}\n\n{end}{after}", encoding="utf-8")
