"""Every file of a checkpoint, a reference store and an exported model, damaged in five ways: is it noticed?"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

from faults.cases import Outcome
from faults.rig import finish, fresh, overrides, uninterrupted

from dpo_scale.checkpoint.load import open_checkpoint, verify
from dpo_scale.data.dataset import load_pairs
from dpo_scale.errors import CheckpointError, ModelError, StoreError
from dpo_scale.models.files import check_model_folder
from dpo_scale.models.load import load_tokenizers
from dpo_scale.reference.store import ReferenceStore
from dpo_scale.reference.store_upkeep import verify_book
from dpo_scale.settings.tree import load_config


def _flip(path: Path, rng: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def _cut(path: Path, rng: random.Random) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: rng.randrange(1, len(data))])


def _empty(path: Path, rng: random.Random) -> None:
    path.write_bytes(b"")


def _lengthen(path: Path, rng: random.Random) -> None:
    with open(path, "ab") as file:
        file.write(rng.randbytes(rng.randint(1, 5000)))


def _zero_a_block(path: Path, rng: random.Random) -> None:
    """As a file system leaves a file whose end was not on the disk yet; noise where it is zero already."""
    data = bytearray(path.read_bytes())
    start = rng.randrange(len(data))
    end = min(len(data), start + 4096)
    data[start:end] = bytes(end - start) if any(data[start:end]) else b"\xff" * (end - start)
    path.write_bytes(data)


WAYS: list[Callable[[Path, random.Random], None]] = [_flip, _cut, _empty, _lengthen, _zero_a_block]


def check_checkpoint(path: Path) -> str:
    """What is said of a checkpoint's damage; empty if nothing is."""
    try:
        return "; ".join(verify(open_checkpoint(path)))
    except CheckpointError as error:
        return str(error)


def check_model(path: Path) -> str:
    try:
        check_model_folder(path)
    except ModelError as error:
        return str(error)
    return ""


def damages(folder: Path, rng: random.Random, rounds: int) -> Outcome:
    """Damage files one at a time, each in all ways: it must be named, and no store may give a wrong value."""
    outcome = Outcome("a damaged file of a checkpoint, store or model")
    whole = uninterrupted(folder)
    store = _filled_store(folder, rng)
    newest = max(whole.glob("checkpoints/step-*"), key=lambda path: int(path.name[5:]))
    for kind, original, check in (
        ("checkpoint", newest, check_checkpoint),
        ("model", whole / "model", check_model),
        ("store", store, lambda path: check_store(folder, path)),
    ):
        assert check(original) == ""
        copy = fresh(folder, "damaged", rng)
        shutil.copytree(original, copy)
        for file in sorted(path for path in copy.rglob("*") if path.is_file() and path.name != "README.md"):
            kept = file.read_bytes()
            for way in WAYS * rounds:
                name = f"{kind}: {file.relative_to(copy)}: {way.__name__[1:]}"

                def one() -> None:
                    way(file, rng)
                    said = check(copy)
                    assert file.name in said or copy.name in said, f"said {said!r}"

                outcome.attempt(name, one)
                file.write_bytes(kept)
        assert check(copy) == ""
        shutil.rmtree(copy)
    return outcome


def _filled_store(folder: Path, rng: random.Random) -> Path:
    store = folder / "store"
    if not store.exists():
        run_dir = fresh(folder, "fills", rng)
        more = ("reference.mode=store", f"reference.store={store}", "train.max_steps=1", "checkpoint.save_at_end=false")
        finish(folder, overrides(folder, f"output_dir={run_dir}", *more))
        shutil.rmtree(run_dir)
    return store


def check_store(folder: Path, store: Path) -> str:
    """What a store says of damage when it is verified, after making sure that looking values up gives no wrong one."""
    said = []
    try:
        books = ReferenceStore(store).books()
        if not books:
            return store.name
        for book in books:
            said += [str(problem) for problem in verify_book(book.folder).damaged]
    except StoreError as error:
        said.append(str(error))
    keys, sums = _true_values(folder)
    try:
        for book in ReferenceStore(store).books():
            found, values, _ = book.lookup(keys)
            assert (values[found] == sums[found]).all(), "a damaged store gave another value"
    except StoreError as error:
        said.append(str(error))
    return "; ".join(said)


_truth: dict[Path, tuple] = {}


def _true_values(folder: Path) -> tuple:
    if folder not in _truth:
        config = load_config(None, overrides(folder))
        data = load_pairs(config.data, load_tokenizers(config)[0], seed=config.train.seed, log=lambda line: None)
        (book,) = ReferenceStore(folder / "store").books()
        found, sums, _ = book.lookup(data.train.pair_keys)
        assert found.any()
        _truth[folder] = data.train.pair_keys, sums
    return _truth[folder]
