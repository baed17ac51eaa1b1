"""The reference store as one process sees it: what is found, with which values, and in which files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file
from store_rows import KEY, add, random_rows, shard_names
from tiny import ROOT

from dpo_scale.errors import StoreError
from dpo_scale.reference import store as store_module
from dpo_scale.reference import store_shard as shard_module
from dpo_scale.reference import store_upkeep
from dpo_scale.reference.store import Book, ReferenceStore
from dpo_scale.reference.store_manifest import MANIFEST_FILE, BookKey
from dpo_scale.reference.store_rows import Rows, as_keys, first_not_below, merge
from dpo_scale.reference.store_shard import Shard, write_shard
from dpo_scale.reference.store_upkeep import compact_book, verify_book


@pytest.fixture
def book(tmp_path):
    return ReferenceStore(tmp_path / "store").book(KEY, {"path": "some/model"})


def test_values_come_back_in_the_order_asked_for_from_any_number_of_shards(book):
    rows = random_rows(500)
    with book.writer(rows_per_shard=70) as writer:
        for i in range(0, 500, 30):
            part = rows.take(slice(i, i + 30))
            writer.add(part.keys, part.sums, part.counts)
    assert len(book.shards) > 5
    order = np.random.default_rng(1).permutation(500)
    for opened in (book, Book(book.folder)):
        found, sums, counts = opened.lookup(rows.keys[order])
        assert found.all()
        np.testing.assert_array_equal(sums, rows.sums[order])
        np.testing.assert_array_equal(counts, rows.counts[order])


def test_pairs_that_are_not_there_are_not_found_and_have_no_usable_value(book):
    add(book, random_rows(100))
    keys = np.concatenate([random_rows(100).keys[:3], random_rows(50, seed=9).keys])
    found, sums, counts = book.lookup(keys)
    assert found[:3].all() and not found[3:].any()
    assert np.isnan(sums[3:]).all() and (counts[3:] == 0).all()
    empty = book.lookup(keys[:0])
    assert empty.found.shape == (0,) and empty.sums.shape == (0, 2)


def test_a_book_that_was_never_written_is_empty_and_leaves_no_folder(tmp_path):
    book = ReferenceStore(tmp_path / "store").book(KEY)
    assert not book.lookup(random_rows(5).keys).found.any()
    with book.writer():
        pass
    assert not (tmp_path / "store").exists()
    assert ReferenceStore(tmp_path / "store").books() == []


def test_the_key_bytes_of_a_data_set_and_the_numbers_stored_are_the_same_key(book):
    key_bytes = np.random.default_rng(0).integers(0, 256, (20, 16), dtype=np.uint8)
    expected = [
        [int.from_bytes(k[:8].tobytes(), "little"), int.from_bytes(k[8:].tobytes(), "little")] for k in key_bytes
    ]
    assert as_keys(key_bytes).tolist() == expected
    rows = random_rows(20)
    with book.writer() as writer:
        writer.add(key_bytes, rows.sums, rows.counts)
    np.testing.assert_array_equal(book.lookup(key_bytes).sums, rows.sums)


@pytest.mark.parametrize(
    "change", [{"fingerprint": "e" * 64}, {"numerics": {"dtype": "bfloat16"}}, {"source": "imported"}]
)
def test_rows_of_another_model_numerics_or_source_are_not_found(book, change):
    rows = random_rows(10)
    add(book, rows)
    other = BookKey(**{"fingerprint": KEY.fingerprint, "numerics": KEY.numerics, "source": KEY.source, **change})
    assert not ReferenceStore(book.folder.parent).book(other).lookup(rows.keys).found.any()
    reordered = BookKey(KEY.fingerprint, dict(reversed(KEY.numerics.items())))
    assert ReferenceStore(book.folder.parent).book(reordered).lookup(rows.keys).found.all()


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_search_agrees_with_a_dictionary_for_keys_with_equal_halves(tmp_path_factory, data):
    # halves from few values: first halves repeat within groups and across their edges
    half = st.integers(0, 5) | st.integers(2**64 - 3, 2**64 - 1)
    stored = sorted(data.draw(st.sets(st.tuples(half, half), min_size=1, max_size=40)))
    asked = data.draw(st.lists(st.tuples(half, half), min_size=1, max_size=40))
    sums = np.arange(2 * len(stored), dtype=np.float32).reshape(-1, 2)
    rows = Rows(np.array(stored, np.uint64).reshape(-1, 2), sums, np.ones((len(stored), 2), np.int32))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shard_module, "ROWS_PER_GROUP", 4)
        folder = tmp_path_factory.mktemp("s")
        shard = Shard(write_shard(folder, rows, {"book": folder.name}))
    keys = np.array(asked, np.uint64).reshape(-1, 2)
    known = {key: row for row, key in enumerate(stored)}
    assert shard.find(keys).tolist() == [known.get(key, -1) for key in asked]
    assert shard.lower_bound(keys).tolist() == [sum(other < key for other in stored) for key in asked]
    assert first_not_below(rows.keys, keys, 0, len(rows)).tolist() == shard.lower_bound(keys).tolist()


def test_per_token_values_come_back_ragged_and_only_where_they_were_written(book):
    rows, plain = random_rows(700, tokens=True), random_rows(30, seed=5)
    add(book, rows)
    add(book, plain)
    keys = np.concatenate([plain.keys[:2], rows.keys[::-1]])
    found, values, offsets = book.lookup_tokens(keys)
    assert found.tolist() == [False] * 2 + [True] * 700
    assert offsets[:5].tolist() == [0] * 5
    starts = np.concatenate([[0], np.cumsum(rows.counts.ravel())])
    for i in range(700):
        for side in range(2):
            mine = 2 * (len(keys) - 1 - i) + side
            expected = rows.tokens[starts[2 * i + side] : starts[2 * i + side + 1]]
            np.testing.assert_array_equal(values[offsets[mine] : offsets[mine + 1]], expected)
    assert book.lookup(keys).found.all()


def test_of_copies_that_differ_the_same_one_is_served_whatever_the_order_and_after_compaction(tmp_path):
    rows = random_rows(200)
    other = Rows(rows.keys, rows.sums + np.float32(0.25), rows.counts)
    third = Rows(rows.keys[:50], rows.sums[:50] - np.float32(0.5), rows.counts[:50])
    served = []
    for name, order in (("a", [rows, other, third]), ("b", [third, rows, other]), ("c", [other, third, rows])):
        book = ReferenceStore(tmp_path / name).book(KEY)
        for part in order:
            add(book, part)
        served.append(book.lookup(rows.keys).sums)
        compact_book(book.folder)
        served.append(Book(book.folder).lookup(rows.keys).sums)
    for sums in served[1:]:
        np.testing.assert_array_equal(sums, served[0])
    copies = {tuple(row) for part in (rows, other, third) for row in part.sums.tolist()}
    assert all(tuple(row) in copies for row in served[0].tolist())  # chosen and rejected of one copy


def test_verify_counts_copies_and_says_how_far_apart_those_that_differ_are(book):
    rows = random_rows(100)
    add(book, rows)
    add(book, rows.take(slice(0, 40)))
    add(book, Rows(rows.keys[:7], rows.sums[:7] + np.float32(0.125), rows.counts[:7]))
    findings = verify_book(book.folder)
    assert (findings.rows, findings.copies, findings.damaged) == (100, 47, [])
    assert findings.differing in (7, 14)  # the two equal copies either win or lose against the third
    assert findings.largest_difference == pytest.approx(0.125, abs=1e-5)


def test_a_row_with_per_token_values_stands_for_the_same_row_without(book):
    rows = random_rows(60, tokens=True)
    add(book, Rows(rows.keys, rows.sums - 1, rows.counts))
    add(book, rows.take(slice(0, 20)))
    for opened in (book, None):
        if opened is None:
            result = compact_book(book.folder)
            assert (result.rows, result.copies, result.shards) == (60, 20, 2)
            opened = Book(book.folder)
        sums = opened.lookup(rows.keys).sums
        np.testing.assert_array_equal(sums[:20], rows.sums[:20])
        np.testing.assert_array_equal(sums[20:], rows.sums[20:] - 1)
        assert opened.lookup_tokens(rows.keys).found.sum() == 20


@pytest.mark.parametrize("tokens", [False, True])
def test_compaction_keeps_every_row_once_in_few_shards_and_changes_nothing_twice(book, tokens, monkeypatch):
    monkeypatch.setattr(store_upkeep, "TARGET_SHARD_BYTES", 32 * 1000 * (1 + 2 * tokens))
    monkeypatch.setattr(store_upkeep, "_PART_BYTES", 32 * 300)
    rows = random_rows(3000, tokens=tokens)
    for i in range(0, 3000, 250):
        add(book, rows.take(slice(i, min(i + 500, 3000))))  # every row but the first 250 twice
    result = compact_book(book.folder)
    assert result.rows == 3000 and result.copies == 2750 and result.shards_before == 12
    names = shard_names(book)
    assert 3 <= len(names) == result.shards <= 4
    again = compact_book(book.folder)
    assert shard_names(book) == names and again.copies == 0
    opened = Book(book.folder)
    assert opened.num_rows == opened.manifest.rows == 3000 and opened.manifest.shards == len(names)
    np.testing.assert_array_equal(opened.lookup(rows.keys).sums, rows.sums)
    if tokens:
        np.testing.assert_array_equal(opened.lookup_tokens(rows.keys).values, rows.tokens)


def test_an_open_book_goes_on_after_its_shards_were_compacted_away(book, monkeypatch):
    monkeypatch.setattr(store_module, "_MAX_MAPPED_SHARDS", 2)  # so that shards are mapped anew each time
    rows = random_rows(400)
    for i in range(0, 400, 100):
        add(book, rows.take(slice(i, i + 100)))
    reader = Book(book.folder)
    reader.lookup(rows.keys)
    compact_book(book.folder)
    np.testing.assert_array_equal(reader.lookup(rows.keys).sums, rows.sums)
    assert len(reader.shards) == 1


def test_compaction_with_grace_keeps_old_shards_until_it_is_over(book):
    for seed in range(3):
        add(book, random_rows(50, seed))
    compact_book(book.folder, grace_hours=1)
    assert len(list(book.folder.glob(".retired-*"))) == 3 and len(shard_names(book)) == 1
    assert verify_book(book.folder).rows == Book(book.folder).num_rows == 150
    compact_book(book.folder)
    assert list(book.folder.glob(".retired-*")) == []


def test_rows_appear_to_others_when_flushed_and_to_an_open_book_when_it_refreshes(book):
    rows = random_rows(40)
    add(book, rows.take(slice(0, 10)))
    reader = Book(book.folder)
    with book.writer(rows_per_shard=20) as writer:
        part = rows.take(slice(10, 40))
        writer.add(part.keys[:15], part.sums[:15], part.counts[:15])
        assert Book(book.folder).num_rows == 10
        writer.add(part.keys[15:], part.sums[15:], part.counts[15:])
        assert Book(book.folder).num_rows == 40
        assert reader.lookup(rows.keys).found.sum() == 10
        reader.refresh()
        assert reader.lookup(rows.keys).found.all()


def test_a_shard_is_written_after_its_time_even_if_it_is_small(book):
    rows = random_rows(2)
    with book.writer(seconds_per_shard=0.05) as writer:
        time.sleep(0.06)
        writer.add(rows.keys, rows.sums, rows.counts)
        assert Book(book.folder).num_rows == 2


def test_rows_added_before_an_error_are_kept(book):
    rows = random_rows(10)
    with pytest.raises(RuntimeError), book.writer() as writer:
        writer.add(rows.keys, rows.sums, rows.counts)
        raise RuntimeError
    assert Book(book.folder).lookup(rows.keys).found.all()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_are_refused(book, value):
    rows = random_rows(3, tokens=True)
    sums = rows.sums.copy()
    sums[1, 1] = value
    with pytest.raises(StoreError, match="not finite"), book.writer() as writer:
        writer.add(rows.keys, sums, rows.counts)
    tokens = rows.tokens.copy()
    tokens[0] = value
    with pytest.raises(StoreError, match="not finite"), book.writer(tokens=True) as writer:
        writer.add(rows.keys, rows.sums, rows.counts, tokens)
    assert not book.folder.exists()


def test_shards_are_plain_safetensors_and_the_manifest_says_what_they_are(book):
    rows = random_rows(30, tokens=True)
    add(book, rows)
    (name,) = shard_names(book)
    tensors = load_file(book.folder / name)
    order = np.lexsort((rows.keys[:, 1], rows.keys[:, 0]))
    np.testing.assert_array_equal(tensors["keys"], rows.keys[order])
    np.testing.assert_array_equal(tensors["sums"], rows.sums[order])
    np.testing.assert_array_equal(tensors["counts"], rows.counts[order])
    np.testing.assert_array_equal(tensors["tokens"], rows.take(order).tokens)
    manifest = json.loads((book.folder / MANIFEST_FILE).read_text())
    assert manifest["model"] == {"path": "some/model", "fingerprint": KEY.fingerprint}
    assert manifest["numerics"] == KEY.numerics and manifest["source"] == "computed"
    assert (manifest["rows"], manifest["shards"]) == (30, 1)
    assert manifest["tool"].startswith("dpo_scale ") and manifest["created"] <= manifest["updated"]
    umask = os.umask(0)
    os.umask(umask)
    assert (book.folder / name).stat().st_mode & 0o777 == 0o666 & ~umask  # shared as the user shares files


def test_merging_is_the_same_in_any_order():
    parts = [random_rows(50, seed=1, tokens=True), random_rows(80, seed=2, tokens=True)]
    parts.append(Rows(parts[0].keys, parts[0].sums + 1, parts[0].counts, parts[0].tokens + 1))
    forward, copies, differing, apart = merge(parts, tokens=True)
    backward = merge(parts[::-1], tokens=True)[0]
    assert (len(forward), copies, differing) == (130, 50, 50) and apart == pytest.approx(1, abs=1e-5)
    for name in ("keys", "sums", "counts", "tokens"):
        np.testing.assert_array_equal(getattr(forward, name), getattr(backward, name))


def test_more_shards_than_a_process_may_have_open_files(tmp_path):
    book = ReferenceStore(tmp_path / "store").book(KEY)
    rows = random_rows(320)
    with book.writer(rows_per_shard=1) as writer:
        for i in range(320):
            part = rows.take(slice(i, i + 1))
            writer.add(part.keys, part.sums, part.counts)
    script = (
        "import resource, sys, numpy as np\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (300, 300))\n"
        "from pathlib import Path\n"
        "from dpo_scale.reference.store import Book\n"
        "assert Book(Path(sys.argv[1])).lookup(np.load(sys.argv[2])).found.all()\n"
    )
    np.save(tmp_path / "keys.npy", rows.keys)
    command = [sys.executable, "-c", script, str(book.folder), str(tmp_path / "keys.npy")]
    subprocess.run(command, check=True, timeout=60)


def mapped_megabytes() -> int:
    """What this process has resident of files."""
    with open("/proc/self/status") as status:
        (line,) = (line for line in status if line.startswith("RssFile:"))
    return int(line.split()[1]) // 1024


def test_what_is_resident_of_a_large_book_is_bounded(book, monkeypatch):
    monkeypatch.setattr(store_upkeep, "TARGET_SHARD_BYTES", 8 << 20)
    rows = random_rows(1_000_000)  # 32 MB
    add(book, rows, rows_per_shard=10**9)
    compact_book(book.folder)
    peaks = {}
    for limit in (64 << 20, 8 << 20):
        monkeypatch.setattr(store_module, "_RESIDENT_BYTES", limit)
        opened, before, peak = Book(book.folder), mapped_megabytes(), 0
        assert len(opened.shards) == 4
        for first in range(0, len(rows), 100_000):
            part = slice(first, first + 100_000)
            np.testing.assert_array_equal(opened.lookup(rows.keys[part]).sums, rows.sums[part])
            peak = max(peak, mapped_megabytes() - before)
        peaks[limit] = peak
    assert peaks[64 << 20] >= 28 and peaks[8 << 20] <= 12


def test_a_folder_that_cannot_be_written_or_is_a_file_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="file: a file, expected the folder"):
        ReferenceStore(tmp_path / "file")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    with pytest.raises(StoreError, match="model: not a reference store.*config.json"):
        ReferenceStore(tmp_path / "model")
    book = ReferenceStore(tmp_path / "store").book(KEY)
    (tmp_path / "store").write_text("")  # stands in the way of the folder
    rows = random_rows(1)
    with pytest.raises(StoreError, match="store/.*: cannot be"), book.writer() as writer:
        writer.add(rows.keys, rows.sums, rows.counts)


def test_the_benchmark_meets_the_targets_at_a_fiftieth_of_its_size(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / "store.py"), "--quick", "--output", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True, timeout=120, env={**os.environ, "PYTHONPATH": str(ROOT)})
    report = json.loads((tmp_path / "store.json").read_text())
    assert report["pairs"] == 200_000 and report["bytes_per_pair"] < 33
    assert report["open_seconds"] < 1 and report["resident_mb"] < 300
    assert "200,000 pairs" in (tmp_path / "store.md").read_text()
