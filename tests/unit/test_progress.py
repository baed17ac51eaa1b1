"""Long work on files says that it goes on, at least once for each chunk, so that nobody takes it for a hang."""

import os

import torch
from safetensors.torch import save_file
from store_rows import KEY, add, random_rows

from dpo_scale.checkpoint.deepspeed_files import DeepspeedFiles, load_file
from dpo_scale.checkpoint.reshard import Partition, fill, whole_pieces
from dpo_scale.disk import sealed_folder
from dpo_scale.progress import note_activity, patience, progress
from dpo_scale.reference import fingerprint, store_upkeep
from dpo_scale.reference.store import ReferenceStore

MEGABYTES = 4


def activity_of(action):
    before = progress().activity
    action()
    return progress().activity - before


def test_writing_syncing_reading_back_and_loading_a_checkpoint_file(tmp_path, monkeypatch):
    monkeypatch.setattr(sealed_folder, "_CHUNK", 1 << 20)
    monkeypatch.setattr(sealed_folder, "_SYNC", 1 << 20)
    syncs = []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: (syncs.append(os.fstat(descriptor).st_size), real(descriptor)))
    files, tensors = DeepspeedFiles(), {"flat": torch.arange(MEGABYTES << 18, dtype=torch.float32)}
    path = tmp_path / "a.pt"
    # one note for each chunk that is written, one for each sync
    assert activity_of(lambda: files.save(tensors, str(path))) >= 2 * MEGABYTES
    assert max(b - a for a, b in zip([0, *syncs], syncs, strict=False)) <= (1 << 20) + 4096
    assert activity_of(lambda: sealed_folder.damage(tmp_path, files.written, checksums=True)) >= MEGABYTES
    monkeypatch.setattr("dpo_scale.checkpoint.deepspeed_files._READ_BYTES", 1 << 20)
    assert activity_of(lambda: load_file(path)) >= MEGABYTES
    assert torch.equal(load_file(path)["flat"], tensors["flat"])
    assert torch.equal(load_file(path, mmap=True)["flat"], tensors["flat"])


def test_cutting_a_checkpoint_anew():
    pieces = whole_pieces([(str(k), 4) for k in range(7)])
    own, saved = (Partition(pieces, [torch.full((4,), value) for _ in range(7)]) for value in (0.0, 1.0))
    assert activity_of(lambda: fill(own, [saved])) >= 7
    assert all((flat == 1).all() for flat in own.flats)


def test_looking_after_a_store_and_asking_it(tmp_path):
    book = ReferenceStore(tmp_path).book(KEY, {"path": "m"})
    for seed in range(5):
        add(book, random_rows(10, seed))
    keys = random_rows(10, 0).keys
    assert activity_of(lambda: book.lookup(keys)) >= 5
    assert activity_of(lambda: store_upkeep.verify_book(book.folder)) >= 10  # each shard is checked, then merged
    assert activity_of(lambda: store_upkeep.compact_book(book.folder)) >= 10


def test_fingerprinting_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(fingerprint, "CHUNK_BYTES", 1 << 20)
    save_file({"a": torch.zeros(MEGABYTES << 18)}, tmp_path / "a.safetensors")
    assert activity_of(lambda: fingerprint.hash_tensors(tmp_path / "a.safetensors")) >= MEGABYTES


def test_patience_ends_with_its_block_also_within_another():
    note_activity()
    with patience("outer"):
        with patience("inner"):
            assert progress().is_patient and progress().where == "inner"
        assert progress().is_patient
    assert not progress().is_patient
