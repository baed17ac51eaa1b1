"""Where a run's reference values come from: a second model, the store, or the policy with its adapter off.

The reference is always the one that the config names, or the weights that the run started from (`model.path`); a
checkpoint never becomes a reference, so a resumed run and the store agree with the first start.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dpo_scale import engine
from dpo_scale.cache_folder import cache_folder
from dpo_scale.config import Config
from dpo_scale.data.dataset import PairDataset
from dpo_scale.errors import StoreError
from dpo_scale.models.builtin import resolve_model_path
from dpo_scale.models.load import load_reference
from dpo_scale.reference.fingerprint import fingerprint_model
from dpo_scale.reference.manifest import BookKey
from dpo_scale.reference.numerics import numerics_of
from dpo_scale.reference.store import Book, ReferenceStore
from dpo_scale.reference.stored import StoredReference, fill, missing_rows, verify


def reference_path(config: Config) -> tuple[str, str | None]:
    """Path and revision of the reference's weights."""
    if config.reference.model is not None:
        return config.reference.model, config.reference.revision
    return config.model.path, config.model.revision


def open_book(config: Config) -> Book:
    """The part of the store that belongs to this config's reference and numerics. Every rank calls it.

    Raises:
        StoreError: if the store can't be used.
        ModelError: if the reference's weights can't be fingerprinted.
    """
    path, revision = reference_path(config)
    fingerprint = engine.from_main(
        fingerprint_model(resolve_model_path(path), revision=revision) if engine.is_main() else None
    )
    folder = config.reference.store or str(cache_folder() / "reference_store")
    key = BookKey(fingerprint, numerics_of(config))
    return ReferenceStore(folder).book(key, model={"path": path, "revision": revision or ""})


def fill_for(config: Config, book: Book, datasets: Sequence[PairDataset], pad_token_id: int) -> int:
    """Compute what the book lacks of a config's data; the reference's engine is gone afterwards. Every rank calls it.

    Returns:
        The number of rows computed.
    """
    held: list[Any] = []

    def load() -> Any:
        held.append(load_reference(config))
        return held[-1]

    computed = fill(
        book,
        datasets,
        load,
        pad_token_id=pad_token_id,
        max_tokens=config.reference.max_tokens_per_micro_batch,
        tokens=config.loss.ld_alpha is not None,
    )
    while held:
        engine.release(held.pop())
    return computed


def stored_reference(config: Config, datasets: Sequence[PairDataset], pad_token_id: int) -> StoredReference:
    """The store as the run's reference, every row of the data sets in it; no reference model stays in memory.

    Raises:
        StoreError: with `reference.on_missing: error`, if rows are missing, saying how many and what computes them.
    """
    book = open_book(config)
    tokens = config.loss.ld_alpha is not None
    missing = missing_rows(book, datasets, tokens=tokens)
    count = sum(map(len, missing))
    if count and config.reference.on_missing == "error":
        first = next(data.describe(int(rows[0])) for data, rows in zip(datasets, missing, strict=True) if len(rows))
        raise StoreError(
            f"{book.folder}: {count} of {sum(map(len, datasets))} pairs have no stored reference log-probs for this "
            f"model and numerics, first {first}; compute them with launch/precompute.py and the same config, or set "
            "reference.on_missing=compute"
        )
    if count:
        engine.log(f"reference store {book.folder}: {count} pairs are not there yet")
        fill_for(config, book, datasets, pad_token_id)
    else:
        engine.log(f"reference store {book.folder}: all {sum(map(len, datasets))} pairs are there")
    return StoredReference(book)


def verify_start(config: Config, stored: StoredReference, policy: Any, dataset: PairDataset, pad_token_id: int) -> None:
    """Let the policy, which is the reference before the first step, compute some stored rows again."""
    rows = config.reference.verify
    if rows == 0:
        return
    if config.reference.model not in (None, config.model.path):
        engine.log(
            "reference.verify: the policy starts from another model than the reference; stored rows not verified"
        )
        return
    was_training = policy.module.training
    policy.eval()
    verify(stored, policy, dataset, rows, dtype=config.model.dtype, seed=config.train.seed, pad_token_id=pad_token_id)
    policy.train(was_training)
