"""Several processes at one store: killed at any moment, filling the same rows at once, compacting meanwhile."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from store_rows import KEY, random_rows, shard_names

from dpo_scale.disk.atomic import is_abandoned, is_temporary, write_atomically
from dpo_scale.reference.store import Book, ReferenceStore
from dpo_scale.reference.store_upkeep import compact_book, verify_book

ROWS = 400
KILLS = 20

# Fills a store with what it lacks, in an order of its own, as fast as it can, a row and a shard at a time.
FILLER = """
import sys
import numpy as np
from store_rows import KEY, random_rows
from dpo_scale.reference.store import ReferenceStore
from dpo_scale.reference.store_upkeep import compact_book

folder, rows_per_shard, compact_every, seed = sys.argv[1], *map(int, sys.argv[2:])
rows = random_rows(400, tokens=True)
book = ReferenceStore(folder).book(KEY)
missing = np.flatnonzero(~book.lookup_tokens(rows.keys).found)
np.random.default_rng(seed).shuffle(missing)
print("ready", flush=True)
sys.stdin.readline()
with book.writer(tokens=True, rows_per_shard=rows_per_shard) as writer:
    for done, row in enumerate(missing.tolist(), 1):
        part = rows.take(np.array([row]))
        writer.add(part.keys, part.sums, part.counts, part.tokens)
        print(end=".", flush=True)
        if compact_every and done % compact_every == 0:
            compact_book(book.folder)
"""


def start_filler(folder: Path, *, rows_per_shard: int, compact_every: int = 0, seed: int = 0) -> subprocess.Popen:
    """A filler that waits for a line on its input before it writes."""
    filler = subprocess.Popen(
        [sys.executable, "-c", FILLER, str(folder), *map(str, (rows_per_shard, compact_every, seed))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert filler.stdout.readline() == b"ready\n"
    return filler


def go(filler: subprocess.Popen) -> None:
    filler.stdin.write(b"\n")
    filler.stdin.flush()


def finish(filler: subprocess.Popen) -> None:
    filler.communicate(timeout=60)
    assert filler.returncode == 0


def assert_complete(folder: Path) -> None:
    rows = random_rows(ROWS, tokens=True)
    book = Book(folder)
    found, sums, counts = book.lookup(rows.keys)
    assert found.all() and (sums == rows.sums).all() and (counts == rows.counts).all()
    assert (book.lookup_tokens(rows.keys).values == rows.tokens).all()


def temporaries(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if is_temporary(path)]


def test_kills_at_random_moments_leave_whole_shards_only_and_the_rest_can_be_completed(tmp_path):
    store = tmp_path / "store"
    folder = ReferenceStore(store).book(KEY).folder
    rng = random.Random(0)
    rows_before = 0
    for kill in range(KILLS):
        filler = start_filler(store, rows_per_shard=1, compact_every=rng.choice([0, 2, 5]), seed=kill)
        go(filler)
        filler.stdout.read(rng.randrange(16))
        time.sleep(rng.uniform(0.0, 0.004))  # a row, its fsyncs and its rename take about a millisecond
        filler.send_signal(signal.SIGKILL)
        filler.communicate()
        if folder.exists():
            findings = verify_book(folder)
            assert findings.damaged == [] and findings.differing == 0
            assert findings.rows >= rows_before  # nothing that was there is lost
            rows_before = findings.rows
    assert 0 < rows_before < ROWS, "the kills came too early or too late to say anything"
    filler = start_filler(store, rows_per_shard=50)
    go(filler)
    finish(filler)
    assert_complete(folder)
    result = compact_book(folder)
    assert result.rows == ROWS and result.shards == 1 and temporaries(folder) == []
    assert_complete(folder)


def test_two_fillers_at_once_lose_nothing_and_leave_no_row_twice_after_compaction(tmp_path):
    fillers = [start_filler(tmp_path, rows_per_shard=7, seed=seed) for seed in range(2)]
    for filler in fillers:
        go(filler)
    for filler in fillers:
        finish(filler)
    folder = ReferenceStore(tmp_path).book(KEY).folder
    assert verify_book(folder).copies == ROWS
    assert_complete(folder)
    result = compact_book(folder)
    assert (result.rows, result.copies, len(shard_names(Book(folder)))) == (ROWS, ROWS, 1)
    assert_complete(folder)


def test_compacting_beside_fillers_and_readers_loses_nothing(tmp_path):
    fillers = [start_filler(tmp_path, rows_per_shard=2, compact_every=9, seed=seed) for seed in range(3)]
    for filler in fillers:
        go(filler)
    book, rows, seen = ReferenceStore(tmp_path).book(KEY), random_rows(ROWS), 0
    while any(filler.poll() is None for filler in fillers):
        book.refresh()
        found, sums, _ = book.lookup(rows.keys)
        assert found.sum() >= seen and (sums[found] == rows.sums[found]).all()
        seen = found.sum()
    for filler in fillers:
        finish(filler)
    assert_complete(book.folder)
    assert compact_book(book.folder).rows == ROWS


def test_only_temporary_files_whose_writer_is_gone_are_removed(tmp_path):
    folder = tmp_path / "store" / KEY.id
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(folder / "x")],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    writer.stdout.readline()
    (living,) = temporaries(folder)
    assert not is_abandoned(living)
    compact_book_of_nothing(folder)
    assert living.exists()
    writer.kill()
    writer.communicate()
    assert is_abandoned(living)
    elsewhere = folder / living.name.replace(living.name.split("-")[1], "0" * 12)  # of another machine
    elsewhere.write_bytes(b"")
    assert not is_abandoned(elsewhere)
    compact_book_of_nothing(folder)
    assert temporaries(folder) == [elsewhere]
    os.utime(elsewhere, (time.time() - 7200,) * 2)
    compact_book_of_nothing(folder)
    assert temporaries(folder) == []


# Stops in the middle of writing a file.
WRITER = """
import sys, time
from pathlib import Path
from dpo_scale.disk.atomic import write_atomically

def parts():
    yield b"half"
    print("half", flush=True)
    time.sleep(600)

write_atomically(Path(sys.argv[1]), parts())
"""


def compact_book_of_nothing(folder: Path) -> None:
    book = ReferenceStore(folder.parent).book(KEY)
    book.write_manifest()
    compact_book(folder)


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    write_atomically(tmp_path / "file", [b"old"])

    def parts():
        yield b"new"
        raise KeyboardInterrupt

    try:
        write_atomically(tmp_path / "file", parts())
    except KeyboardInterrupt:
        pass
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"old"]


def test_two_processes_that_compact_at_once_end_with_every_row_once(tmp_path):
    filler = start_filler(tmp_path, rows_per_shard=3)
    go(filler)
    finish(filler)
    folder = ReferenceStore(tmp_path).book(KEY).folder
    script = "import sys; from pathlib import Path; from dpo_scale.reference.store_upkeep import compact_book\n"
    script += "print('ready', flush=True); sys.stdin.readline(); compact_book(Path(sys.argv[1]))"
    compacting = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        for _ in range(3)
    ]
    for process in compacting:
        process.stdout.readline()
    for process in compacting:
        go(process)
    for process in compacting:
        finish(process)
    assert_complete(folder)
    assert Book(folder).num_rows == ROWS
    assert np.all([shard.path.exists() for shard in Book(folder).shards])
