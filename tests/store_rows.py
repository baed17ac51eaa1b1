"""Rows of made-up reference values, and what tests of the store do with them."""

from __future__ import annotations

import numpy as np

from dpo_scale.reference.store import Book
from dpo_scale.reference.store_manifest import BookKey
from dpo_scale.reference.store_rows import Rows

KEY = BookKey("f" * 64, {"dtype": "float32", "attention": "sdpa"})


def random_rows(count: int, seed: int = 0, *, tokens: bool = False) -> Rows:
    rng = np.random.default_rng(seed)
    counts = rng.integers(1, 9, (count, 2)).astype(np.int32)
    values = -rng.random(counts.sum()).astype(np.float32)
    sums = np.add.reduceat(values, np.concatenate([[0], np.cumsum(counts.ravel())[:-1]])).reshape(count, 2)
    keys = rng.integers(0, 2**64, (count, 2), dtype=np.uint64)
    return Rows(keys, sums, counts, values if tokens else None)


def add(book: Book, rows: Rows, **settings) -> None:
    with book.writer(tokens=rows.tokens is not None, **settings) as writer:
        writer.add(rows.keys, rows.sums, rows.counts, rows.tokens)


def shard_names(book: Book) -> list[str]:
    return sorted(path.name for path in book.folder.glob("v*.safetensors"))
