"""The GPU suite: everything that needs a GPU, part by part, each with its own limit. See `gpu_suite.sh`.

Parts are those of `gpu_parts.py`. As soon as one is done, a line of JSON with its outcome is added to
`gpu_suite.jsonl` in the folder of results, so that a host that is taken away early leaves what was done until then:

    {"part", "status": passed | failed | timed out | left out, "reason", "seconds", "figures", "output": its end, ...}

A part that fails or takes too long is reported, and the others still run. What does not begin within `--minutes` is
left out; `--only` takes it up later, on another host too. Of each part the last line counts. The first line of a run
says where and with what it ran.

The exit code is 0 if no part failed, 1 if one did, 2 if nothing could be run.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

from gpu_parts import BENCHMARKS, PROJECT, Part, all_parts, read_reports
from gpu_report import update_page
from gpu_wheels import install, list_wheels, missing

RECORD = "gpu_suite.jsonl"
NEEDED = ("numpy", "torch", "transformers", "yaml")  # without which nothing runs
MINUTES = 24.0
LEAST_SECONDS = 20.0  # a part does not begin with less
SECONDS_TO_END = 10.0
LINES_KEPT = 25


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    wheels = Path(os.environ["WHEELS"]) if os.environ.get("WHEELS") else None
    if arguments.list_wheels:
        return list_wheels(wheels)
    if arguments.readme is not None:
        try:
            update_page(arguments.readme, BENCHMARKS / "results")
        except (OSError, ValueError) as error:
            refuse(f"--readme: {error}")
        return 0
    end_on_signals()
    with tempfile.TemporaryDirectory() as target:
        if wheels is not None:
            try:
                install(wheels, Path(target))
            except ValueError as error:
                refuse(str(error))
        return run_suite(arguments)


def run_suite(arguments: argparse.Namespace) -> int:
    """Run the parts that were asked for; the exit code."""
    if lacking := [name for name in NEEDED if find_spec(name) is None]:
        refuse(f"not installed here: {', '.join(lacking)}; --list-wheels says what a host needs and how to bring it")
    import torch

    on_gpu = torch.cuda.is_available()
    if not on_gpu and not arguments.dry_run:
        refuse("torch finds no GPU here; --dry-run goes through all parts on a CPU")
    output = output_folder(arguments)
    parts = all_parts("cuda" if on_gpu else "cpu", arguments.dry_run, output)
    if arguments.only:
        parts = [part for part in parts if part.name in arguments.only]
    if absent := missing():
        print(f"not installed: {', '.join(absent.values())}; --list-wheels says how to bring them", flush=True)
    record = output / RECORD
    begin_record(record, arguments.dry_run)
    outcomes = run_parts(parts, output, record, time.monotonic() + 60 * arguments.minutes)
    print(f"\nresults in {output}")
    for outcome in outcomes:
        print(f"{outcome['part']:<12} {outcome['status']:<10} {outcome['seconds']:5.0f} s  {outcome.get('reason', '')}")
    return int(any(outcome["status"] in ("failed", "timed out") for outcome in outcomes))


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="gpu_suite.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", metavar="PART", help="these parts, in the suite's order")
    parser.add_argument("--minutes", type=float, default=MINUTES, help=f"in all (default {MINUTES:g})")
    parser.add_argument("--dry-run", action="store_true", help="the smallest case of each part, on a CPU too")
    parser.add_argument("--output", type=Path, help="of results (default: results/<device>, or a temporary folder)")
    parser.add_argument(
        "--readme",
        type=Path,
        nargs="?",
        const=PROJECT / "docs" / "gpus.md",
        help="run nothing: put the tables of stored results between the markers of this page",
    )
    parser.add_argument(
        "--list-wheels", action="store_true", help="run nothing: what has to be brought, and its weight"
    )
    arguments = parser.parse_args(argv)
    if not arguments.minutes > 0:
        refuse(f"--minutes {arguments.minutes:g}: expected more than 0")
    known = [part.name for part in all_parts("cpu", True, Path())]
    if unknown := [name for name in arguments.only or () if name not in known]:
        refuse(f"--only: no part is called {unknown[0]!r}; the parts are {', '.join(known)}")
    return arguments


def refuse(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def output_folder(arguments: argparse.Namespace) -> Path:
    """Where results go; those of a dry run never among the stored ones."""
    from common import RESULTS, accelerator, folder_name

    folder = arguments.output
    if folder is None:
        folder = Path(tempfile.mkdtemp()) if arguments.dry_run else RESULTS / folder_name(accelerator())
    folder = folder.absolute()
    if arguments.dry_run and folder.is_relative_to(RESULTS):
        refuse(f"--output {folder}: a dry run measures nothing; take a folder outside {RESULTS}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        refuse(f"--output {folder}: cannot be made: {error.strerror}")
    return folder


def begin_record(record: Path, dry_run: bool) -> None:
    from common import accelerator, circumstances

    found = circumstances(accelerator(), "torch", "triton", "transformers", "deepspeed", "trl", "liger-kernel")
    append(record, {"run": "dry run" if dry_run else "measured", **found})


def run_parts(parts: Iterable[Part], output: Path, record: Path, deadline: float) -> list[dict[str, Any]]:
    """Run parts in order until `deadline` (of `time.monotonic`); a line of `record` each, as soon as it is done."""
    outcomes = []
    for part in parts:
        print(f"\n[{time.strftime('%H:%M:%S')}] {part.name}: {part.subject}", flush=True)
        left = deadline - time.monotonic()
        lacking = [name for name in part.needs if find_spec(name) is None]
        if part.gpus > (there := gpus_here() if part.gpus else 0):
            outcome = {"status": "left out", "reason": f"needs {part.gpus} GPUs, {there} here", "seconds": 0.0}
        elif lacking:
            outcome = {"status": "left out", "reason": f"{', '.join(lacking)} not installed", "seconds": 0.0}
        elif left < min(LEAST_SECONDS, part.limit):
            outcome = {"status": "left out", "reason": "no time left", "seconds": 0.0}
        else:
            outcome = run_part(part, output, min(part.limit, left))
        outcome = {"part": part.name, **outcome, "ended": time.strftime("%Y-%m-%dT%H:%M:%S")}
        print(f"{part.name}: {outcome['status']} {outcome.get('reason', '')}", flush=True)
        append(record, outcome)
        outcomes.append(outcome)
    return outcomes


def gpus_here() -> int:
    import torch

    return int(torch.cuda.device_count())


def run_part(part: Part, output: Path, limit: float) -> dict[str, Any]:
    """All commands of a part, within so many seconds together."""
    began, wall = time.monotonic(), time.time()
    status, reasons, tails = "passed", [], []
    for command in part.commands:
        left = limit - (time.monotonic() - began)
        code, tail = run_command(command, left) if left > 0 else (None, "")
        if code != 0:
            name = " ".join(Path(word).name for word in command[1:4])
            reasons.append(f"{name}: " + (f"not done within {limit:.0f} s" if code is None else f"exit code {code}"))
            tails.append(tail)
            status = "timed out" if code is None else status if status == "timed out" else "failed"
    outcome: dict[str, Any] = {"status": status, "seconds": round(time.monotonic() - began, 1)}
    reports = read_reports(output, part.results, wall)
    outcome |= {"figures": part.figures(reports)} if reports else {}
    if reasons:
        outcome |= {"reason": "; ".join(reasons), "output": "\n".join(tails)[-4000:]}
    return outcome


def run_command(command: tuple[str, ...], limit: float) -> tuple[int | None, str]:
    """Exit code, None if the command was ended after so many seconds, and the end of what it printed, which is shown.

    It is a process group of its own, so that what it started ends with it.
    """
    process = subprocess.Popen(
        command, cwd=PROJECT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        errors="replace", start_new_session=True,
    )  # fmt: skip
    lines: deque[str] = deque(maxlen=LINES_KEPT)

    def show() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            print(line, end="", flush=True)

    reader = threading.Thread(target=show, daemon=True)
    reader.start()
    code: int | None = None
    try:
        code = process.wait(limit)
    except subprocess.TimeoutExpired:
        pass
    finally:
        end_group(process)
    reader.join(SECONDS_TO_END)
    return code, "".join(lines)


def end_group(process: subprocess.Popen[str]) -> None:
    """End what is left of a process group: politely, then for good."""
    for how, seconds in ((signal.SIGTERM, SECONDS_TO_END), (signal.SIGKILL, SECONDS_TO_END)):
        try:
            os.killpg(process.pid, how)
            process.wait(seconds)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


def end_on_signals() -> None:
    """A host that is taken away says so: leave at once, and with us the part that runs."""

    def leave(number: int, _: Any) -> None:
        raise SystemExit(128 + number)

    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, leave)


def append(record: Path, line: dict[str, Any]) -> None:
    """Add a line, on the disk before anything else happens."""
    with record.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
        file.flush()
        os.fsync(file.fileno())


if __name__ == "__main__":
    raise SystemExit(main())
