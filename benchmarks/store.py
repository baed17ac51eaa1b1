"""The reference store at size: opening, memory, look-ups, bytes on disk. `python benchmarks/store.py [--pairs N]`.

Fills a store with N random pairs (sums only, as for DPO and its relatives), compacts it, and reads it in a process of
its own, because the memory of the process that made it would be counted otherwise. Writes a table and JSON to
`benchmarks/results/<device>/store.{md,json}`.

`open` is the time until a book answers; `first look-ups` verifies checksums on the way; `look-ups` are batches of
random pairs, nine in ten of them in the store. The files are in the page cache, as they are for all ranks of a host
but the first. Resident memory is the reading process's peak, with all that it has imported, and without.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from common import circumstances, describe_circumstances, markdown_table, processor, write_results

from dpo_scale.reference.store import Book, ReferenceStore
from dpo_scale.reference.store_manifest import BookKey
from dpo_scale.reference.store_upkeep import compact_book, verify_book

QUICK_PAIRS = 200_000
FILL_BATCH = 1_000_000
READ_BATCH = 50_000
BATCHES = (64, 1024, 16384)
SECONDS_PER_BATCH_SIZE, QUICK_SECONDS = 3.0, 0.2
SEED = 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=10_000_000)
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_PAIRS} pairs")
    parser.add_argument(
        "--output", type=Path, help="folder of the results (default: results/<device> beside this file)"
    )
    parser.add_argument("--read", type=Path, help=argparse.SUPPRESS)  # the reading process
    arguments = parser.parse_args()
    pairs = QUICK_PAIRS if arguments.quick else arguments.pairs
    seconds = QUICK_SECONDS if arguments.quick else SECONDS_PER_BATCH_SIZE
    if arguments.read is not None:
        print(json.dumps(read(arguments.read, pairs, seconds)))
        return
    machine = circumstances(processor(), "numpy")
    with tempfile.TemporaryDirectory() as folder:
        results = fill(Path(folder), pairs)
        size = ["--quick"] if arguments.quick else ["--pairs", str(pairs)]
        command = [sys.executable, __file__, *size, "--read", str(ReferenceStore(folder).book_folders()[0])]
        results |= json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    report = {"pairs": pairs, **results, **machine}
    write_results("store", report, table(report), arguments.output)


def keys_of(numbers: np.ndarray) -> np.ndarray:
    """uint64 [N, 2]: the keys of the pairs with these numbers, well mixed, the same in every process."""
    keys = numbers.astype(np.uint64)[:, None] * np.uint64(2) + np.arange(1, 3, dtype=np.uint64)
    keys *= np.uint64(0x9E3779B97F4A7C15)  # the steps of splitmix64, a bijection
    keys = (keys ^ (keys >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    keys = (keys ^ (keys >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return keys ^ (keys >> np.uint64(31))


def sums_of(keys: np.ndarray) -> np.ndarray:
    """fp32 [N, 2], values that follow from the keys, so that every answer can be checked."""
    return -(keys >> np.uint64(50)).astype(np.float32) / 16


def fill(folder: Path, pairs: int) -> dict[str, Any]:
    book = ReferenceStore(folder).book(BookKey("0" * 64, {"dtype": "bfloat16"}), {"path": "synthetic"})
    began = time.perf_counter()
    with book.writer() as writer:
        for first in range(0, pairs, FILL_BATCH):
            keys = keys_of(np.arange(first, min(first + FILL_BATCH, pairs)))
            writer.add(keys, sums_of(keys), np.full((len(keys), 2), 200))
    write_seconds = time.perf_counter() - began
    began = time.perf_counter()
    compaction = compact_book(book.folder)
    compact_seconds = time.perf_counter() - began
    began = time.perf_counter()
    findings = verify_book(book.folder)
    assert findings.rows == pairs and not findings.damaged
    return {
        "write_seconds": write_seconds,
        "compact_seconds": compact_seconds,
        "verify_seconds": time.perf_counter() - began,
        "shards_before": compaction.shards_before,
        "shards": findings.shards,
        "bytes_per_pair": findings.nbytes / pairs,
        "gigabytes": findings.nbytes / 1e9,
    }


def read(folder: Path, pairs: int, seconds: float) -> dict[str, Any]:
    """What one process that reads the book measures."""
    imported = peak_memory()
    began = time.perf_counter()
    book = Book(folder)
    results: dict[str, Any] = {"open_seconds": time.perf_counter() - began}
    rng = np.random.default_rng(SEED)
    began = time.perf_counter()
    look_up(book, rng, pairs, 64)
    results["first_batch_seconds"] = time.perf_counter() - began
    began = time.perf_counter()
    for first in range(0, pairs, READ_BATCH):
        assert book.lookup(keys_of(np.arange(first, min(first + READ_BATCH, pairs)))).found.all()
    results["all_pairs_seconds"] = time.perf_counter() - began
    results["lookups_per_second"] = {}
    for batch in BATCHES:
        spent, done = 0.0, 0
        while spent < seconds:
            spent += look_up(book, rng, pairs, batch)
            done += batch
        results["lookups_per_second"][str(batch)] = done / spent
    results["resident_mb"] = peak_memory() / 1e6
    results["resident_mb_of_store"] = (peak_memory() - imported) / 1e6
    return results


def look_up(book: Book, rng: np.random.Generator, pairs: int, batch: int) -> float:
    """Look up random pairs, a tenth of them not in the store; checks the answer and returns the seconds it took."""
    numbers = rng.integers(0, pairs + pairs // 9, batch)
    keys = keys_of(numbers)
    began = time.perf_counter()
    found, sums, _ = book.lookup(keys)
    seconds = time.perf_counter() - began
    assert (found == (numbers < pairs)).all() and (sums[found] == sums_of(keys)[found]).all()
    return seconds


def peak_memory() -> int:
    """The most bytes that this process ever had resident, mapped files included."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status states no VmHWM")


def table(report: dict[str, Any]) -> str:
    rows = [
        ("size on disk", f"{report['bytes_per_pair']:.1f} bytes a pair, {report['gigabytes']:.2f} GB"),
        ("shards, after compaction", f"{report['shards']}"),
        ("open", f"{1000 * report['open_seconds']:.1f} ms"),
        ("first 64 random pairs, checksums verified", f"{1000 * report['first_batch_seconds']:.1f} ms"),
        ("all pairs once, all checksums verified", f"{report['all_pairs_seconds']:.2f} s"),
        *(
            (f"random look-ups, {int(batch):,} pairs a batch", f"{rate:,.0f} pairs/s")
            for batch, rate in report["lookups_per_second"].items()
        ),
        ("resident memory, peak of the process", f"{report['resident_mb']:.0f} MB"),
        ("... of which by the store", f"{report['resident_mb_of_store']:.0f} MB"),
        ("write", f"{report['write_seconds']:.1f} s"),
        (f"compact {report['shards_before']} shards", f"{report['compact_seconds']:.1f} s"),
        ("verify everything", f"{report['verify_seconds']:.1f} s"),
    ]
    lines = [
        f"# Reference store, {report['pairs']:,} pairs",
        "",
        f"{describe_circumstances(report)} Made by `python benchmarks/store.py`.",
        "",
        *markdown_table(("what", "measured"), rows),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
