"""Rows of reference values as arrays: keys, sums, counts, and per-token values if wanted.

All operations are on whole arrays; a row is never a Python object. N rows; a key is the 128-bit pair key as two
uint64, ordered by the first, then the second.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


def as_keys(pair_keys: np.ndarray) -> np.ndarray:
    """Pair keys as uint64 [N, 2], from uint8 [N, 16] (as `PairDataset.pair_keys`) or from uint64 [N, 2]."""
    pair_keys = np.ascontiguousarray(pair_keys)
    if pair_keys.dtype == np.uint8 and pair_keys.shape[1:] == (16,):
        return pair_keys.view("<u8").reshape(-1, 2)
    assert pair_keys.dtype == np.uint64 and pair_keys.shape[1:] == (2,), (pair_keys.dtype, pair_keys.shape)
    return pair_keys


@dataclass(frozen=True)
class Rows:
    """N rows of values.

    Attributes:
        keys: uint64 [N, 2].
        sums: fp32 [N, 2], summed log-probs of the chosen and the rejected completion.
        counts: int32 [N, 2], tokens of the two.
        tokens: fp32 [counts.sum()], log-probs token by token: row by row, chosen before rejected. None if not
            kept.
    """

    keys: np.ndarray
    sums: np.ndarray
    counts: np.ndarray
    tokens: np.ndarray | None = None

    def __post_init__(self) -> None:
        n = len(self.keys)
        assert self.keys.shape == (n, 2) and self.keys.dtype == np.uint64
        assert self.sums.shape == (n, 2) and self.sums.dtype == np.float32
        assert self.counts.shape == (n, 2) and self.counts.dtype == np.int32
        if self.tokens is not None:
            assert self.tokens.shape == (self.counts.sum(dtype=np.int64),) and self.tokens.dtype == np.float32

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def nbytes(self) -> int:
        return 32 * len(self) + (0 if self.tokens is None else self.tokens.nbytes + 8 * len(self))

    def token_starts(self) -> np.ndarray:
        """int64 [N + 1], where each row's tokens begin, and the end of the last."""
        return np.concatenate([[0], np.cumsum(self.counts.sum(axis=1, dtype=np.int64))])

    def take(self, index: np.ndarray | slice) -> Rows:
        """The rows at `index` (integers, a mask, or a slice), in that order."""
        tokens = None
        if self.tokens is not None:
            starts, lengths = self.token_starts()[:-1][index], self.counts[index].sum(axis=1, dtype=np.int64)
            tokens = self.tokens[ragged_index(starts, lengths)]
        return Rows(self.keys[index], self.sums[index], self.counts[index], tokens)


def empty_rows(*, tokens: bool) -> Rows:
    return Rows(
        np.zeros((0, 2), np.uint64),
        np.zeros((0, 2), np.float32),
        np.zeros((0, 2), np.int32),
        np.zeros(0, np.float32) if tokens else None,
    )


def concatenate(parts: Sequence[Rows], *, tokens: bool) -> Rows:
    """The rows of all parts, one after another."""
    parts = [empty_rows(tokens=tokens), *parts]
    return Rows(
        np.concatenate([part.keys for part in parts]),
        np.concatenate([part.sums for part in parts]),
        np.concatenate([part.counts for part in parts]),
        np.concatenate([part.tokens for part in parts if part.tokens is not None]) if tokens else None,
    )


def ragged_index(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """int64 [lengths.sum()]: starts[0], starts[0] + 1, ... for lengths[0] places, then starts[1], ..."""
    ends = np.cumsum(lengths)
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(starts - (ends - lengths), lengths)


def merge(parts: Sequence[Rows], *, tokens: bool) -> tuple[Rows, int, int, float]:
    """The rows of all parts, sorted by key, each key once.

    Of copies that differ, the one whose two sums have the smallest bits is kept: a rule on the values alone, so
    that it gives the same whatever the order, the files, and what was merged before. (In low precision, copies
    from batches composed differently do differ a little; none is more right than the other.)

    Returns:
        the rows, how many copies were left out, how many of these differed from the one kept, and by how much
        at most.
    """
    everything = concatenate(parts, tokens=tokens)
    keys = everything.keys
    order = np.lexsort((sum_bits(everything.sums), keys[:, 1], keys[:, 0]))
    first = np.ones(len(order), dtype=bool)
    first[1:] = (keys[order[1:]] != keys[order[:-1]]).any(axis=1)
    winners = order[first]
    copies = np.flatnonzero(~first)
    kept = winners[np.cumsum(first)[copies] - 1]
    left_out = order[copies]
    apart = np.abs(everything.sums[left_out].astype(np.float64) - everything.sums[kept]).max(axis=1, initial=0)
    differ = (apart > 0) | (everything.counts[left_out] != everything.counts[kept]).any(axis=1)
    return everything.take(winners), len(copies), int(differ.sum()), float(apart.max(initial=0.0))


def sum_bits(sums: np.ndarray) -> np.ndarray:
    """uint64 [N]: the bits of each row's two sums, an order that knows no ties between unequal values."""
    return np.ascontiguousarray(sums, dtype="<f4").view("<u8")[:, 0]


def first_not_below(table: np.ndarray, keys: np.ndarray, low: np.ndarray | int, high: np.ndarray | int) -> np.ndarray:
    """For each key, the first row of low .. high of a sorted table whose key is not smaller; high if there is none.

    All keys are searched for together, halving their ranges in step; only those ranges of the table are read.

    Args:
        table: uint64 [R, 2], sorted; may be a memory map.
        keys: uint64 [M, 2].
        low, high: int64 [M], or one for all.
    """
    low = np.array(np.broadcast_to(low, len(keys)), dtype=np.int64)
    high = np.array(np.broadcast_to(high, len(keys)), dtype=np.int64)
    first, second = keys[:, 0], keys[:, 1]
    for _ in range(int((high - low).max(initial=0)).bit_length()):
        middle = (low + high) >> 1
        probe = table[np.minimum(middle, len(table) - 1)]
        below = (probe[:, 0] < first) | ((probe[:, 0] == first) & (probe[:, 1] < second))
        below &= middle < high  # a closed range stays where it is
        low = np.where(below, middle + 1, low)
        high = np.where(below, high, np.minimum(middle, high))
    return low


def contains(table: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """bool [M]: which of `keys` [M, 2] are in the sorted `table` [R, 2]."""
    if len(table) == 0:
        return np.zeros(len(keys), dtype=bool)
    place = first_not_below(table, keys, 0, len(table))
    return (table[np.minimum(place, len(table) - 1)] == keys).all(axis=1) & (place < len(table))
