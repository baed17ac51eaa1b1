"""What the benchmarks share: naming the machine, timing its matrix products, writing results.

Every benchmark writes `NAME.json`, with all that was measured, and `NAME.md`, with the table made from it, into
`results/<device>/` beside this file, so that figures of different machines never mix. The scripts run from anywhere;
their own folder is the first place that Python looks for `common`.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from dpo_scale import __version__

RESULTS = Path(__file__).resolve().parent / "results"


def cores() -> int:
    """How many processor cores this process may use."""
    return len(os.sched_getaffinity(0))


def processor() -> str:
    """The processor's name."""
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def accelerator() -> str:
    """The first GPU's name, or the processor's where there is none."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else processor()


def folder_name(device: str) -> str:
    return re.sub("[^a-z0-9]+", "-", device.lower()).strip("-")


def versions(*packages: str) -> dict[str, str]:
    """Of dpo_scale, Python and those packages that are installed."""
    found = {"dpo_scale": __version__, "python": platform.python_version()}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            pass
    return found


def circumstances(device: str, *packages: str) -> dict[str, Any]:
    """Where and when something was measured, for its JSON. Take it before the work: it notes the machine's load."""
    return {
        "device": device,
        "cores": cores(),
        "load_before": os.getloadavg()[0],
        "date": datetime.date.today().isoformat(),
        "versions": versions(*packages),
    }


def describe_circumstances(report: dict[str, Any]) -> str:
    """The same as a line of the table's heading."""
    numbers = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    machine = f"{report['device']}, {report['cores']} cores (load {report['load_before']:.1f} before)"
    return f"{machine}, {report['date']}; {numbers}."


def write_results(
    name: str, report: dict[str, Any], table: str, folder: Path | None = None, *, final: bool = True
) -> Path:
    """Write `name`.json and `name`.md, print the table, and return the folder: the device's own if none is given.

    Args:
        final: False if there is more to come: the files are written, in case that the machine is taken away before,
            but the table is not printed.
    """
    folder = folder or RESULTS / folder_name(report["device"])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (folder / f"{name}.md").write_text(table, encoding="utf-8")
    if final:
        print(table, end="", flush=True)
    return folder


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [
        "| " + " | ".join(head) + " |",
        "|" + "---|" * len(head),
        *("| " + " | ".join(row) + " |" for row in rows),
    ]


def median_and_spread(seconds: Sequence[float]) -> tuple[float, float]:
    """The median, and how far apart the fastest and the slowest are, as a share of it."""
    middle = statistics.median(seconds)
    return middle, (max(seconds) - min(seconds)) / middle


def timed(work: Callable[[], Any], on_cuda: bool) -> float:
    """Seconds that `work` takes, until the device has done it."""
    import torch

    if on_cuda:
        torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    if on_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - began


def matmul_flops_per_second(device: str, dtype: Any, seconds: float) -> float:
    """The most FLOPs a second that a large product of square matrices reaches, trying for so many seconds."""
    import torch

    on_cuda = device == "cuda"
    size = 8192 if on_cuda else 2048
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    torch.mm(left, right)
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        best = min(best, timed(lambda: torch.mm(left, right), on_cuda))
    return 2 * size**3 / best
