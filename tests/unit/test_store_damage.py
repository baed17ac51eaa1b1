"""Whatever byte of a store is changed, added or lost: it is noticed, named, repaired, and no wrong value is served."""

from __future__ import annotations

import json
import random
import shutil

import numpy as np
import pytest
from store_rows import KEY, add, random_rows, shard_names

from dpo_scale.errors import StoreError
from dpo_scale.reference import store_manifest as manifest_module
from dpo_scale.reference import store_shard as shard_module
from dpo_scale.reference.store import DAMAGED_DIR, Book, ReferenceStore
from dpo_scale.reference.store_manifest import MANIFEST_FILE, BookKey, Manifest, read_manifest, write_manifest
from dpo_scale.reference.store_shard import DamagedError, NewerVersionError, write_shard
from dpo_scale.reference.store_upkeep import compact_book, verify_book

ROWS = 24


@pytest.fixture(params=[False, True], ids=["sums", "tokens"])
def filled(request, tmp_path, monkeypatch):
    """A book with one shard of six groups, and its rows."""
    monkeypatch.setattr(shard_module, "ROWS_PER_GROUP", 4)
    monkeypatch.setattr(shard_module, "ROWS_PER_GROUP_WITH_TOKENS", 4)
    rows = random_rows(ROWS, tokens=request.param)
    book = ReferenceStore(tmp_path / "store").book(KEY, {"path": "m"})
    add(book, rows)
    return book, rows


def read_everything(folder, rows) -> None:
    """Look up all rows; asserts that what is served, if anything, is right."""
    book = Book(folder)
    found, sums, counts = book.lookup(rows.keys)
    assert found.all() and (sums == rows.sums).all() and (counts == rows.counts).all()
    if rows.tokens is not None:
        found, values, _ = book.lookup_tokens(rows.keys)
        assert found.all() and (values == rows.tokens).all()


def test_every_single_byte_of_a_shard_is_covered(filled):
    book, rows = filled
    path = book.folder / shard_names(book)[0]
    whole = path.read_bytes()
    rng = random.Random(0)
    for position in range(len(whole)):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(DamagedError) as caught:
            read_everything(book.folder, rows)
        assert caught.value.path == path
    path.write_bytes(whole)
    read_everything(book.folder, rows)


def test_a_damaged_key_is_no_missing_row_even_if_it_alone_is_asked_for(filled):
    book, rows = filled
    path = book.folder / shard_names(book)[0]
    whole = path.read_bytes()
    for key in rows.keys:  # first rows of groups among them, which the index has too
        damaged = bytearray(whole)
        damaged[whole.rindex(key.tobytes())] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(DamagedError):
            Book(book.folder).lookup(key[None])


def test_a_shard_that_was_cut_or_grew_is_noticed(filled):
    book, rows = filled
    path = book.folder / shard_names(book)[0]
    whole = path.read_bytes()
    for content in [*(whole[:length] for length in range(0, len(whole), 11)), whole[:-1], whole + b"\0"]:
        path.write_bytes(content)
        with pytest.raises(DamagedError, match="compact .*store --drop-damaged"):
            read_everything(book.folder, rows)


def test_a_shard_cut_while_it_is_open_is_noticed_before_it_is_read(filled):
    book, rows = filled
    opened = Book(book.folder)
    path = book.folder / shard_names(book)[0]
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(DamagedError, match="no longer has"):
        opened.lookup(rows.keys)


def test_every_single_byte_of_the_manifest_is_covered(filled):
    book, rows = filled
    path = book.folder / MANIFEST_FILE
    whole = path.read_bytes()
    rng = random.Random(0)
    for position in range(len(whole)):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << rng.randrange(8)
        for content in (bytes(damaged), whole[:position]):
            path.write_bytes(content)
            with pytest.raises(StoreError, match=MANIFEST_FILE):
                read_everything(book.folder, rows)
    path.unlink()
    with pytest.raises(DamagedError, match="missing"):
        read_everything(book.folder, rows)
    compact_book(book.folder, drop_damaged=True)
    read_everything(book.folder, rows)
    assert read_manifest(book.folder).key == KEY and read_manifest(book.folder).model == {"path": "m"}


def test_a_shard_under_another_name_or_of_another_book_is_refused(filled, tmp_path):
    book, rows = filled
    (name,) = shard_names(book)
    path = book.folder / name
    digest = name.split("-")[2]
    for other in (f"v1-{ROWS}-{'0' * 32}.safetensors", f"v1-{ROWS + 1}-{digest}"):
        path.rename(book.folder / other)
        with pytest.raises(DamagedError):
            read_everything(book.folder, rows)
        (book.folder / other).rename(path)
    stranger = ReferenceStore(tmp_path / "store").book(BookKey("a" * 64, {}))
    add(stranger, random_rows(3))
    shutil.copy(path, stranger.folder)
    with pytest.raises(DamagedError, match=f"of book {KEY.id}, not of this one"):
        Book(stranger.folder)
    compact_book(stranger.folder, drop_damaged=True)
    assert Book(stranger.folder).num_rows == 3


def test_repair_keeps_the_rows_that_are_whole_and_sets_the_damaged_file_aside(filled):
    book, rows = filled
    (name,) = shard_names(book)
    path = book.folder / name
    content = bytearray(path.read_bytes())
    order = np.lexsort((rows.keys[:, 1], rows.keys[:, 0]))
    lost = order[8:12]  # the third group of four
    content[content.index(rows.sums[lost[1]].tobytes())] ^= 1
    path.write_bytes(content)
    findings = verify_book(book.folder)
    assert [file for file, _ in findings.damaged] == [path]
    with pytest.raises(DamagedError):
        compact_book(book.folder)
    assert shard_names(book) == [name]

    result = compact_book(book.folder, drop_damaged=True)
    assert [moved.parent.name for moved in result.set_aside] == [DAMAGED_DIR]
    assert result.set_aside[0].read_bytes() == content
    repaired = Book(book.folder)
    found, sums, _ = repaired.lookup(rows.keys)
    assert sorted(np.flatnonzero(~found)) == sorted(lost)
    np.testing.assert_array_equal(sums[found], rows.sums[found])
    if rows.tokens is not None:
        assert repaired.lookup_tokens(rows.keys).found.sum() == ROWS - 4
    add(repaired, rows.take(np.sort(lost)))
    read_everything(book.folder, rows)
    assert verify_book(book.folder).damaged == []
    assert len(ReferenceStore(book.folder.parent).books()) == 1  # the folder for damaged files is no book


def test_repair_of_a_shard_whose_header_is_lost_leaves_the_others(filled):
    book, rows = filled
    (lost,) = shard_names(book)
    more = random_rows(ROWS, seed=7, tokens=rows.tokens is not None)
    add(book, more)
    (book.folder / lost).write_bytes(b"")
    (book.folder / MANIFEST_FILE).write_bytes(b"{}")
    assert len(verify_book(book.folder).damaged) == 2
    compact_book(book.folder, drop_damaged=True)
    read_everything(book.folder, more)
    assert not Book(book.folder).lookup(rows.keys).found.any()


@pytest.mark.parametrize("name", ["notes.txt", "model.safetensors", "v1-3-abc.safetensors", "0.pt"])
def test_foreign_files_in_a_book_are_named_and_set_aside_by_repair(filled, name):
    book, rows = filled
    (book.folder / name).write_bytes(b"something else")
    with pytest.raises(StoreError, match=f"{name}: .*not that of a file of a reference store"):
        Book(book.folder)
    result = compact_book(book.folder, drop_damaged=True)
    assert result.set_aside[0].name.endswith(name) and result.set_aside[0].read_bytes() == b"something else"
    read_everything(book.folder, rows)


def test_hidden_files_of_file_systems_and_desktops_are_passed_over(filled):
    book, rows = filled
    (book.folder / ".nfs000000000001").write_bytes(b"x")
    (book.folder.parent / ".DS_Store").write_bytes(b"x")
    read_everything(book.folder, rows)
    compact_book(book.folder)
    assert (book.folder / ".nfs000000000001").exists()
    assert len(ReferenceStore(book.folder.parent).books()) == 1


def test_files_of_a_newer_version_are_named_and_never_repaired_away(filled, monkeypatch):
    book, rows = filled
    with monkeypatch.context() as patch:
        for module in (shard_module, manifest_module):
            patch.setattr(module, "FORMAT_VERSION", 2)
        newer = write_shard(book.folder, random_rows(5), book.manifest.shard_metadata("now"))
    for action in (lambda: Book(book.folder), lambda: verify_book(book.folder)):
        with pytest.raises(NewerVersionError, match="store format 2, this one reads 1"):
            action()
    with pytest.raises(NewerVersionError):
        compact_book(book.folder, drop_damaged=True)
    assert newer.exists()
    newer.unlink()
    with monkeypatch.context() as patch:
        patch.setattr(manifest_module, "FORMAT_VERSION", 2)
        write_manifest(book.folder, Manifest(KEY))
    with pytest.raises(NewerVersionError, match=MANIFEST_FILE):
        Book(book.folder)
    with pytest.raises(NewerVersionError):
        compact_book(book.folder, drop_damaged=True)
    assert json.loads((book.folder / MANIFEST_FILE).read_text())["format_version"] == 2


def test_a_manifest_of_another_book_is_refused(filled):
    book, rows = filled
    write_manifest(book.folder, Manifest(BookKey("b" * 64, {})))
    with pytest.raises(DamagedError, match="folder of another"):
        Book(book.folder)
