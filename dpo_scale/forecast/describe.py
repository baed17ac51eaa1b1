"""A forecast in words: what `launch/plan.py` prints."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence

from dpo_scale.forecast.forecast import MEMORY_ERROR, TIME_ERROR, Forecast
from dpo_scale.forecast.parts import Cluster, StepTime
from dpo_scale.forecast.solve import Proposal

GB = 1e9

# Part of a step's time -> what it says where it is the largest.
BOUNDS = {
    "layers": "computing: the products of the layers' weights",
    "attention": "computing: attention over long rows",
    "head": "computing: the head over the vocabulary",
    "waiting for the slowest rank": "waiting: micro-batches of a step differ much in length from rank to rank",
    "sharing rows": "the links: rows that ranks share are exchanged in every layer",
    "gathering weights": "the links: weights are gathered for micro-batches that compute too little to hide it",
    "reducing gradients": "the links: gradients are summed over the ranks",
    "host issues kernels": "the host, which issues kernels more slowly than the device runs them",
    "adding gradients up": "the device's memory bandwidth: gradients of many micro-batches are added up",
    "offloaded copies": "the link to host memory: offloaded states or inputs are copied",
    "reference": "the reference, which runs in every step",
    "optimizer": "the optimizer's update",
    "ZeRO's hooks": "the host, which runs ZeRO-3's hooks around each layer",
}


def describe(forecast: Forecast, price: float | None = None) -> list[str]:
    """The lines of a forecast.

    Args:
        price: of one device for an hour.
    """
    memory, workload, cluster = forecast.memory, forecast.workload, forecast.cluster
    device = cluster.device
    lines = [
        f"{forecast.config.model.path} on {_devices(cluster)}",
        f"  device    {device.memory / GB:.0f} GB; {device.source}",
        f"  pairs     {workload.origin}",
        "",
        f"memory of the fullest rank, GB of {device.memory / GB:.1f}",
        *_table(memory.device, GB),
        _sum("sum", memory.total / GB, _verdict(forecast)),
    ]
    for title, parts in (("host memory of a machine, GB", memory.host), ("disk over the run, GB", memory.disk)):
        if parts:
            lines += ["", title, *_table(parts, GB), _sum("sum", sum(parts.values()) / GB)]
    if forecast.time is not None:
        lines += ["", *_describe_time(forecast, forecast.time, price)]
    if forecast.left_out:
        lines += ["", "not modelled: " + "; ".join(forecast.left_out)]
    return lines


def describe_changes(forecast: Forecast, proposals: Sequence[Proposal]) -> list[str]:
    """The lines on single changes that would help."""
    what = "faster" if forecast.fits else "saves memory"
    if not proposals:
        return [f"no single change that was tried {'is faster and fits' if forecast.fits else what}"]
    lines = ["changes that would help, each alone, cheapest first:"]
    return lines + [f"  {_paste(proposal)}    # {_against(proposal, forecast)}" for proposal in proposals]


def describe_solution(forecast: Forecast, proposal: Proposal | None) -> list[str]:
    """The lines on the cheapest set of changes that fits, for a run that does not."""
    if proposal is None:
        return ["nothing that was tried makes it fit: it takes more or larger devices, LoRA, or shorter pairs"]
    return ["the cheapest changes that make it fit, together:", f"  {_paste(proposal)}", f"  # {_outcome(proposal)}"]


def describe_command(proposal: Proposal, config_file: str | None, overrides: Iterable[str]) -> list[str]:
    """The command of a solved run, ready to be pasted."""
    cluster = proposal.forecast.cluster
    launcher = f"deepspeed --num_gpus {cluster.per_node}"
    if cluster.nodes > 1:
        launcher = f"deepspeed --hostfile configs/hostfile --num_nodes {cluster.nodes} --num_gpus {cluster.per_node}"
    named = {override.partition("=")[0] for override in proposal.overrides}
    kept = [override for override in overrides if override.partition("=")[0] not in named]
    words = [*(["--config", config_file] if config_file else []), *kept, *proposal.overrides]
    return [
        f"the fastest settings that fit on {_devices(cluster)}: {_outcome(proposal)}",
        f"  {launcher} launch/train.py {' '.join(map(shlex.quote, words))}",
    ]


def short(forecast: Forecast) -> str:
    """One line for the start of a run."""
    device = forecast.cluster.device
    text = f"{forecast.memory.total / GB:.2f} GB of the device's {device.memory / GB:.2f} on the fullest rank"
    if forecast.time is not None:
        text += f", {_seconds(forecast.time.step)} a step, {_seconds(forecast.seconds)} in all"
    return text


def _describe_time(forecast: Forecast, time: StepTime, price: float | None) -> list[str]:
    steps = forecast.workload.steps
    measured = forecast.cluster.device.is_measured
    sure = f"within {TIME_ERROR:.0%}, where that was tried" if measured else "by rates that are assumed"
    hidden = f"; {_seconds(time.hidden)} more of traffic is hidden behind computing" if time.hidden else ""
    lines = [
        f"time of a step, seconds (by the plans of the first {len(forecast.workload.plans)} steps)",
        *_table(time.parts, 1.0),
        _sum("sum", time.step, f"{sure}{hidden}"),
        "",
        f"bound by {bound(time)}",
        "",
        f"the run: {steps:,} steps, {_seconds(steps * time.step)}",
    ]
    lines += [f"  {_seconds(seconds):>10}  {name}" for name, seconds in time.once.items()]
    total = f"  in all {forecast.seconds / 3600:.2f} hours, {forecast.gpu_hours:.1f} device-hours"
    return [*lines, total + (f", {forecast.gpu_hours * price:,.2f} at {price:g} an hour" if price is not None else "")]


def bound(time: StepTime) -> str:
    """What takes most of a step, in words, with its share."""
    part = max(time.parts, key=lambda name: time.parts[name])
    return f"{BOUNDS.get(part, part)} ({time.parts[part] / time.step:.0%} of a step)"


def _verdict(forecast: Forecast) -> str:
    room = forecast.cluster.device.memory - forecast.memory.total
    if room < 0:
        return f"DOES NOT FIT: {-room / GB:.1f} GB too much"
    close = room < MEMORY_ERROR * forecast.memory.total
    return f"fits, {room / GB:.1f} GB are left" + (", less than the planner may be wrong by" if close else "")


def _table(parts: dict[str, int] | dict[str, float], unit: float) -> list[str]:
    return [f"  {size / unit:>10.3f}  {name}" for name, size in parts.items() if round(size / unit, 3)]


def _sum(name: str, value: float, remark: str = "") -> str:
    return f"  {value:>10.3f}  {name}" + (f": {remark}" if remark else "")


def _devices(cluster: Cluster) -> str:
    machines = f"{cluster.nodes} x " if cluster.nodes > 1 else ""
    return f"{machines}{cluster.per_node} x {cluster.device.name}"


def _paste(proposal: Proposal) -> str:
    return " ".join(map(shlex.quote, proposal.overrides))


def _outcome(proposal: Proposal) -> str:
    found = proposal.forecast
    time = f", {_seconds(found.time.step)} a step, {_seconds(found.seconds)} in all" if found.time is not None else ""
    return f"{found.memory.total / GB:.1f} GB of {found.cluster.device.memory / GB:.1f}{time}"


def _against(proposal: Proposal, forecast: Forecast) -> str:
    found, before = proposal.forecast, proposal.before or forecast
    saved = (before.memory.total - found.memory.total) / GB
    ratio = found.seconds / before.seconds - 1
    fits = "" if forecast.fits else ", fits" if found.fits else ", not enough alone"
    time = f"{abs(ratio):.0%} {'slower' if ratio > 0 else 'faster'}"
    return f"{time}, {abs(saved):.1f} GB {'less' if saved >= 0 else 'more'}{fits}"


def _seconds(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
