"""Table and plot of `throughput.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from common import describe_circumstances, markdown_table


def describe(arm: dict[str, Any]) -> str:
    if arm["work"] == "trl":
        reference = "live" if arm["reference"] == "live" else "precomputed"
        kind = {"same": "", "compiled": ", compiled", "mixed": ", fp32 weights and autocast"}[arm["kind"]]
        return f"TRL, {reference} reference, {arm['micro_batch_size']} pairs a micro-batch{kind}"
    compiled = ", compiled" if arm["compile"] else ""
    return f"dpo_scale, {arm['layout']}{compiled}, {'live' if arm['reference'] == 'live' else 'stored'} reference"


def best_of_trl(data_set: dict[str, Any], reference: str) -> dict[str, Any] | None:
    """TRL's fastest arm with a live or a precomputed reference, None where there is none."""
    arms = [arm for arm in data_set["arms"] if arm["work"] == "trl" and arm["reference"] == reference]
    return max(arms, key=lambda arm: arm["pairs_per_second"], default=None)


def table(report: dict[str, Any]) -> str:
    """All arms of all data sets, with their ratios to TRL's fastest of the same reference and with a live one."""
    lines = [
        "# Training throughput",
        "",
        f"{report['model']} in {report['dtype']}, at most {report['max_length']} tokens, {report['global_batch_size']} "
        f"pairs a step, {report['steps']} steps counted after a warm-up, median of {report['repeats']}; micro-batches "
        f"of at most {report['max_tokens']:,} tokens; {report['ranks']} process(es); gradient checkpointing "
        f"{'on' if report['gradient_checkpointing'] else 'off'}. {describe_circumstances(report)} Made by "
        "`python benchmarks/throughput.py`, whose text says what is counted.",
    ]
    head = ("arm", "pairs/s (slowest to fastest)", "tokens/s", "x TRL, live", "x TRL, precomputed", "peak memory")
    head += ("memory x TRL, same reference", "padding")
    for data_set in report["data_sets"]:
        prompt, chosen, rejected = data_set["mean_lengths"]
        lines += [
            "",
            f"## {data_set['name']}: {data_set['pairs']} pairs, on average {prompt:.0f} tokens of prompt, {chosen:.0f} "
            f"chosen, {rejected:.0f} rejected",
            "",
        ]
        rows = []
        for arm in sorted(data_set["arms"], key=lambda arm: -arm["pairs_per_second"]):
            rates = arm["all_pairs_per_second"]
            same = best_of_trl(data_set, arm["reference"])
            rows.append(
                (
                    describe(arm),
                    f"{arm['pairs_per_second']:.3f} ({min(rates):.3f} to {max(rates):.3f})",
                    f"{arm['tokens_per_second']:,.0f}",
                    *(ratio(arm, best_of_trl(data_set, name), "pairs_per_second") for name in ("live", "store")),
                    f"{arm['peak_memory_bytes'] / 1e9:.2f} GB",
                    ratio(arm, same, "peak_memory_bytes"),
                    f"{arm['extra']['padding_fraction']:.1%}" if "padding_fraction" in arm["extra"] else "",
                )
            )
        lines += markdown_table(head, rows)
        if best_of_trl(data_set, "live") is None and best_of_trl(data_set, "store") is None:
            lines += ["", "TRL: absent."]
        lines += ["", shares(data_set, report.get("peak_tflops"))]
    return "\n".join(lines) + "\n"


def ratio(arm: dict[str, Any], other: dict[str, Any] | None, what: str) -> str:
    return f"{arm[what] / other[what]:.2f}" if other is not None else ""


def shares(data_set: dict[str, Any], peak: float | None) -> str:
    """Where the fastest arm of dpo_scale spends its steps."""
    arm = max((a for a in data_set["arms"] if a["work"] != "trl"), key=lambda arm: arm["pairs_per_second"])
    spent = ", ".join(
        f"{name.removeprefix('time/')} {share:.2%}" for name, share in arm["extra"].items() if name.startswith("time/")
    )
    mfu = f"; model FLOP utilisation {arm['extra']['mfu']:.1%}" if "mfu" in arm["extra"] else ""
    of = f" of {peak:.3g} TFLOP/s, the fastest matrix product here" if mfu and peak else ""
    return f"Of a step of {describe(arm)}: {spent}{mfu}{of}."


def sweep_table(report: dict[str, Any]) -> str:
    lines = [
        "# How cost grows",
        "",
        f"dpo_scale, shared_prefix, stored reference; where nothing else is said {report['model']} in "
        f"{report['dtype']}, generated rows, {report['global_batch_size']} pairs a step, {report['ranks']} "
        f"process(es). {describe_circumstances(report)} Made by `python benchmarks/throughput.py --sweep`.",
        "",
    ]
    rows = [
        (
            point["what"],
            f"{point['value']:,}",
            f"{point['pairs_per_second']:.3f}",
            f"{point['tokens_per_second']:,.0f}",
            f"{point['peak_memory_bytes'] / 1e9:.2f} GB",
        )
        for point in report["sweep"]
    ]
    return "\n".join([*lines, *markdown_table(("what", "value", "pairs/s", "tokens/s", "peak memory"), rows)]) + "\n"


def plot(report: dict[str, Any], path: Path) -> None:
    """Bars of pairs a second, a group for each data set; needs matplotlib (`pip install 'dpo-scale[bench]'`)."""
    try:
        import matplotlib
    except ImportError:
        print("no plot: matplotlib is not installed (pip install 'dpo-scale[bench]')")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        1, len(report["data_sets"]), figsize=(max(7.0, 4.5 * len(report["data_sets"])), 4), squeeze=False
    )
    for axis, data_set in zip(axes[0], report["data_sets"], strict=True):
        arms = sorted(data_set["arms"], key=lambda arm: arm["pairs_per_second"])
        colours = ["tab:orange" if arm["work"] == "trl" else "tab:blue" for arm in arms]
        axis.barh([describe(arm) for arm in arms], [arm["pairs_per_second"] for arm in arms], color=colours)
        axis.set_title(data_set["name"], fontsize=9)
        axis.set_xlabel("pairs a second")
        axis.tick_params(axis="y", labelsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
