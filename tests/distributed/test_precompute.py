"""`launch/precompute.py` through the launcher: both splits, nothing twice, and kills that cost no row and no value.

The budget of token slots is 1, so every pair is a forward pass of its own, and every pass is on the disk before the
next one. There are many moments for a kill to hit then, and values do not depend on which rows were left over: the
completed store must equal the uninterrupted one bit for bit. (Where pairs share a pass, its composition moves fp32 by
rounding, within `TOLERANCE_PER_ROOT_TOKEN`.)

The uninterrupted store comes from DeepSpeed's launcher; the ranks that are killed are forks that run the same code, so
that a kill costs seconds. The long form, by hand:
`DPO_SCALE_KILL_ROUNDS=20 DPO_SCALE_KILL_PAIRS=400 pytest tests/distributed/test_precompute.py`;
another `DPO_SCALE_KILL_SEED` draws other moments.
"""

import multiprocessing
import os
import random
import signal
import time

import numpy as np
import pytest
import torch
from tiny import free_port, launch, preference_rows, run_overrides, write_rows

from dpo_scale.data.dataset import load_pairs
from dpo_scale.models.load import load_tokenizers
from dpo_scale.reference.store import ReferenceStore
from dpo_scale.reference.store_manifest import MANIFEST_FILE
from dpo_scale.reference.store_shard import parse_name
from dpo_scale.reference.store_upkeep import compact_book, verify_book
from dpo_scale.settings.tree import load_config

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

ROUNDS = int(os.environ.get("DPO_SCALE_KILL_ROUNDS", "4"))
PAIRS = int(os.environ.get("DPO_SCALE_KILL_PAIRS", "120"))
HELD_OUT = 20
SEED = int(os.environ.get("DPO_SCALE_KILL_SEED", "0"))


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
    return [] if not store.exists() else [path.name for path in store.glob("*/v*.safetensors")]


def fill_store(rank, ranks, port, settings, result):
    """What a rank of `launch/precompute.py` does; the number of computed rows goes to the file `result`."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    from dpo_scale.training.precompute import precompute

    computed = precompute(load_config(None, settings))
    if rank == 0:
        result.write_text(str(computed))


def start_ranks(folder, store, ranks):
    """Start ranks as forks of a process that has imported the libraries: imports are most of a launch."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "deepspeed", "transformers", "datasets"])
    port = free_port()
    started = []
    for rank in range(ranks):
        arguments = (rank, ranks, port, overrides(folder, store), folder / f"{store}.computed")
        started.append(context.Process(target=fill_store, args=arguments))
        started[-1].start()
    return started


def complete(folder, store):
    """Precompute on one rank; returns how many rows were computed."""
    (process,) = start_ranks(folder, store, 1)
    process.join(120)
    assert process.exitcode == 0
    return int((folder / f"{store}.computed").read_text())


def kill_at(folder, store, new_shards, rng):
    """Precompute on 2 ranks, kill -9 a random one once so many shards were added (0: as it starts), soon the other."""
    until = len(shards(store)) + new_shards
    ranks = start_ranks(folder, store.name, 2)
    try:
        while len(shards(store)) < until:
            assert all(rank.is_alive() for rank in ranks), "ended before the kill"
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.01) if new_shards else rng.uniform(0, 3))
        rng.shuffle(ranks)
        ranks[0].kill()
        time.sleep(rng.uniform(0, 0.02))
    finally:
        for rank in ranks:
            rank.kill()
            rank.join()
    assert ranks[0].exitcode == -signal.SIGKILL


def the_book(store):
    (book,) = ReferenceStore(store).books()
    return book


def test_both_splits_are_filled_by_both_ranks(folder):
    book = the_book(folder / "whole")
    assert book.lookup(all_keys(folder)).found.all() and book.num_rows == PAIRS
    assert f"{PAIRS} pairs computed, 0 were there" in (folder / "printed.txt").read_text()
    # seconds_per_shard=0 puts every micro-batch on the disk
    printed = (folder / "printed.txt").read_text()
    assert f"{PAIRS} shards compacted into 1" in printed, printed
    assert len(shards(folder / "whole")) == 1


def test_a_second_run_computes_nothing(folder):
    before = sorted(shards(folder / "whole"))
    assert complete(folder, "whole") == 0
    assert sorted(shards(folder / "whole")) == before


def test_kills_cost_no_row_and_change_no_value(folder):
    rng = random.Random(SEED)
    store, keys = folder / "killed", all_keys(folder)
    expected = the_book(folder / "whole").lookup(keys)
    there = 0
    for left in range(ROUNDS, 0, -1):
        mean = (PAIRS - there) / (left + 1)
        kill_at(folder, store, rng.randint(0, int(1.5 * mean)), rng)
        found = np.zeros(PAIRS, bool)
        if shards(store):
            book = the_book(store)
            assert not verify_book(book.folder).damaged
            found, sums, _ = book.lookup(keys)
            np.testing.assert_array_equal(sums[found], expected.sums[found])
        assert there <= found.sum() < PAIRS, "a kill lost rows, or came too late to show anything"
        stated = sum(parse_name(path)[0] for path in store.glob("*/v*.safetensors"))
        assert found.sum() == stated, "a row that was there was computed again"
        there = int(found.sum())
    assert there > 0

    assert complete(folder, "killed") == PAIRS - there
    compact_book(the_book(store).folder)  # what `launch/store.py compact` does with each book
    book = the_book(store)
    assert book.num_rows == PAIRS
    found, sums, counts = book.lookup(keys)
    assert found.all()
    np.testing.assert_array_equal(sums, expected.sums)
    np.testing.assert_array_equal(counts, expected.counts)
    assert sorted(path.name for path in book.folder.iterdir()) == sorted([MANIFEST_FILE, *shards(store)])
    assert len(shards(store)) == 1
