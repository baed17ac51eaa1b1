"""`launch/precompute.py` through the launcher: both splits, nothing twice, and kills that cost no row and no value.

The budget of token slots is 1, so every pair is a forward pass of its own, and every pass is on the disk before the
next one. There are many moments for a kill to hit then, and values do not depend on which rows were left over: the
completed store must equal the uninterrupted one bit for bit. (Where pairs share a pass, its composition moves fp32 by
rounding, within `TOLERANCE_PER_TOKEN`.)

The long form, by hand: `DPO_SCALE_KILL_ROUNDS=20 DPO_SCALE_KILL_PAIRS=400 pytest tests/distributed/test_precompute.py`.
"""

import os
import random
import re
import shutil
import signal
import time

import numpy as np
import psutil
import pytest
from tiny import end_group, launch, preference_rows, run_overrides, start, write_rows

from dpo_scale.config import load_config
from dpo_scale.data.dataset import load_pairs
from dpo_scale.models.load import load_tokenizers
from dpo_scale.reference.manifest import MANIFEST_FILE
from dpo_scale.reference.shard import rows_in_name
from dpo_scale.reference.store import ReferenceStore
from dpo_scale.reference.upkeep import compact_book, verify_book

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

ROUNDS = int(os.environ.get("DPO_SCALE_KILL_ROUNDS", "3"))
PAIRS = int(os.environ.get("DPO_SCALE_KILL_PAIRS", "120"))
HELD_OUT = 20
SEED = 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Tiny model and data, with `whole`: a store that 2 ranks filled in one go; what they printed is `printed.txt`."""
    folder = tmp_path_factory.mktemp("precompute")
    run_overrides(folder)
    write_rows(folder / "train.jsonl", preference_rows(PAIRS - HELD_OUT))
    write_rows(folder / "heldout.jsonl", preference_rows(HELD_OUT, seed=1))
    done = launch("launch/precompute.py", *overrides(folder, "whole"))
    assert done.returncode == 0, done.stderr[-3000:]
    (folder / "printed.txt").write_text(done.stdout)
    return folder


def overrides(folder, store):
    return [
        f"model.path={folder / 'start'}", "model.dtype=float32", f"data.train={folder / 'train.jsonl'}",
        f"data.eval={folder / 'heldout.jsonl'}", f"data.cache_dir={folder / 'cache'}",
        f"reference.store={folder / store}", "reference.max_tokens_per_micro_batch=1", "reference.seconds_per_shard=0",
    ]  # fmt: skip


def all_keys(folder):
    config = load_config(None, overrides(folder, "whole"))
    data = load_pairs(config.data, load_tokenizers(config)[0], seed=config.train.seed, log=lambda line: None)
    assert (len(data.train), len(data.eval)) == (PAIRS - HELD_OUT, HELD_OUT)
    return np.concatenate([data.train.pair_keys, data.eval.pair_keys])


def shards(store):
    return [] if not store.exists() else [path.name for path in store.glob("*/*.safetensors")]


def ranks_of(process):
    """The processes of the ranks that a launcher has started so far."""
    ranks = []
    for child in psutil.Process(process.pid).children(recursive=True):
        try:
            ranks += [child] if "RANK" in child.environ() else []
        except psutil.Error:  # ended in between
            pass
    return ranks


def kill_at(folder, store, new_shards, rng, *, whole_group):
    """Precompute on 2 ranks and kill -9 a random one of them once so many shards were added, 0: as it starts.

    With `whole_group` the rest follows within moments, as when a machine goes down; otherwise the other rank goes on
    and the launcher ends it.
    """
    until = len(shards(store)) + new_shards
    launcher = "torchrun" if whole_group else "deepspeed"  # torchrun starts sooner
    process = start("launch/precompute.py", *overrides(folder, store.name), launcher=launcher)
    try:
        while len(ranks := ranks_of(process)) < 2 or len(shards(store)) < until:
            assert process.poll() is None, f"ended before the kill: {process.communicate()[1][-3000:]}"
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.01) if new_shards else rng.uniform(0, 3))
        rng.choice(ranks).send_signal(signal.SIGKILL)
        if whole_group:
            time.sleep(rng.uniform(0, 0.02))
            end_group(process)
        process.communicate(timeout=120)
        assert process.returncode != 0
    finally:
        end_group(process)


def the_book(store):
    (book,) = ReferenceStore(store).books()
    return book


def test_both_splits_are_filled_by_both_ranks(folder):
    book = the_book(folder / "whole")
    assert book.lookup(all_keys(folder)).found.all() and book.num_rows == PAIRS
    assert f"{PAIRS} pairs computed, 0 were there" in (folder / "printed.txt").read_text()
    assert len(shards(folder / "whole")) == PAIRS, "seconds_per_shard=0 puts every micro-batch on the disk"


def test_a_second_run_computes_nothing(folder):
    before = sorted(shards(folder / "whole"))
    done = launch("launch/precompute.py", *overrides(folder, "whole"), launcher="python")
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"0 pairs computed, {PAIRS} were there" in done.stdout
    assert sorted(shards(folder / "whole")) == before


def test_kills_cost_no_row_and_change_no_value(folder):
    rng = random.Random(SEED)
    store, keys = folder / "killed", all_keys(folder)
    expected = the_book(folder / "whole").lookup(keys)
    there = 0
    for left in range(ROUNDS, 0, -1):
        mean = (PAIRS - there) / (left + 1)
        kill_at(folder, store, rng.randint(0, int(1.5 * mean)), rng, whole_group=left > 1)
        found = np.zeros(PAIRS, bool)
        if shards(store):
            book = the_book(store)
            assert not verify_book(book.folder).damaged
            found, sums, _ = book.lookup(keys)
            np.testing.assert_array_equal(sums[found], expected.sums[found])
        assert there <= found.sum() < PAIRS, "a kill lost rows, or came too late to show anything"
        assert found.sum() == sum(map(rows_in_name, shards(store))), "a row that was there was computed again"
        there = int(found.sum())
    assert there > 0

    done = launch("launch/precompute.py", *overrides(folder, "killed"), launcher="python")
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.search(rf"{PAIRS - there} pairs computed, {there} were there", done.stdout), done.stdout
    compact_book(the_book(store).folder)  # what `launch/store.py compact` does with each book
    book = the_book(store)
    assert book.num_rows == PAIRS
    found, sums, counts = book.lookup(keys)
    assert found.all()
    np.testing.assert_array_equal(sums, expected.sums)
    np.testing.assert_array_equal(counts, expected.counts)
    assert sorted(path.name for path in book.folder.iterdir()) == sorted([MANIFEST_FILE, *shards(store)])
    assert len(shards(store)) == 1
    shutil.rmtree(store)
