"""Rows of reference values as arrays: keys, sums, counts, and per-token values if wanted.

All operations are on whole arrays; a row is never a Python object. N rows; a key is the 128-bit pair key as two
uint64, ordered by the first, then the second.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

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
        tokens: fp32 [counts.sum()], log-probs token by token, row by row, chosen before rejected; None if not kept.
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

    def row_bytes(self) -> np.ndarray:
        """int64 [N]: the bytes that each row takes in a shard, its part of the index included."""
        if self.tokens is None:
            return np.full(len(self), 32, np.int64)
        return 40 + 4 * self.counts.sum(axis=1, dtype=np.int64)

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


def concatenate(parts: Sequence[Rows], *, tokens: bool) -> Rows:
    """The rows of all parts, one after another."""
    no_tokens = np.zeros(0, np.float32)
    return Rows(
        np.concatenate([np.zeros((0, 2), np.uint64), *(part.keys for part in parts)]),
        np.concatenate([np.zeros((0, 2), np.float32), *(part.sums for part in parts)]),
        np.concatenate([np.zeros((0, 2), np.int32), *(part.counts for part in parts)]),
        np.concatenate([no_tokens, *(part.tokens for part in parts if part.tokens is not None)]) if tokens else None,
    )


def ragged_index(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """int64 [lengths.sum()]: starts[0], starts[0] + 1, ... for lengths[0] places, then starts[1], ..."""
    ends = np.cumsum(lengths)
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(starts - (ends - lengths), lengths)


class Merged(NamedTuple):
    """Rows sorted by key, each key once.

    Attributes:
        copies: how many rows were left out because their key was there already.
        differing: how many of these differed from the one kept, and `largest_difference` of a sum among them.
    """

    rows: Rows
    copies: int
    differing: int
    largest_difference: float


def merge(parts: Sequence[Rows], *, tokens: bool) -> Merged:
    """The rows of all parts, sorted by key, each key once.

    Of copies that differ, the one whose two sums have the smallest bits is kept. This rule looks at the values alone,
    so it gives the same whatever the order, the files, and what was merged before. (In low precision, copies from
    batches composed differently do differ a little. None is more right than the other.)
    """
    everything = concatenate(parts, tokens=tokens)
    keys, sums = everything.keys, everything.sums
    order = np.lexsort((sum_bits(sums), keys[:, 1], keys[:, 0]))
    first = np.ones(len(order), dtype=bool)
    first[1:] = (keys[order[1:]] != keys[order[:-1]]).any(axis=1)
    left_out, kept = order[~first], order[first][np.cumsum(first)[~first] - 1]
    apart = _apart(sums[left_out], sums[kept])
    differ = (apart > 0) | (everything.counts[left_out] != everything.counts[kept]).any(axis=1)
    return Merged(everything.take(order[first]), len(left_out), int(differ.sum()), float(apart.max(initial=0.0)))


def without(merged: Merged, others: Rows) -> Merged:
    """The rows whose keys are not among those of `others` (sorted); the rest count as copies of them."""
    again = contains(others.keys, merged.rows.keys)
    if not again.any():
        return merged
    places = first_not_below(others.keys, merged.rows.keys[again], 0, len(others))
    apart = _apart(merged.rows.sums[again], others.sums[places])
    return Merged(
        merged.rows.take(~again),
        merged.copies + len(apart),
        merged.differing + int((apart > 0).sum()),
        max(merged.largest_difference, float(apart.max())),
    )


def _apart(sums: np.ndarray, others: np.ndarray) -> np.ndarray:
    """fp64 [N]: by how much the sums of two copies of N rows (fp32 [N, 2] each) differ at most."""
    return np.abs(sums.astype(np.float64) - others).max(axis=1, initial=0)


def sum_bits(sums: np.ndarray) -> np.ndarray:
    """uint64 [N]: the bits of each row's two sums, an order that knows no ties between unequal values."""
    return np.ascontiguousarray(sums, dtype="<f4").view("<u8")[:, 0]


def first_not_below(table: np.ndarray, keys: np.ndarray, low: np.ndarray | int, span: int) -> np.ndarray:
    """For each key, the first row of a sorted table whose key is not smaller, int64 [M]; the table's length if none.

    All keys are searched for together: by their first halves, in steps that halve; the few rows whose first halves are
    equal are then walked over. Only the part of the table between `low` and the answers is read.

    Args:
        table: uint64 [R, 2], R > 0, sorted; may be a memory map.
        keys: uint64 [M, 2].
        low: int64 [M], or one for all: no answer lies before it.
        span: no answer lies further than this behind `low`, rows of equal first halves aside.
    """
    first, second = keys[:, 0], keys[:, 1]
    halves, last = table[:, 0], len(table) - 1
    place = np.array(np.broadcast_to(low, len(keys)), dtype=np.int64)
    step = 1 << (span - 1).bit_length()
    while step > 1:
        step //= 2
        place += step * (halves[np.minimum(place + (step - 1), last)] < first)
    np.minimum(place, len(table), out=place)
    while True:
        row = table[np.minimum(place, last)]
        below = (row[:, 0] < first) | ((row[:, 0] == first) & (row[:, 1] < second))
        below &= place <= last
        if not below.any():
            return place
        place += below


def contains(table: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """bool [M]: which of `keys` [M, 2] are in the sorted `table` [R, 2]."""
    if len(table) == 0:
        return np.zeros(len(keys), dtype=bool)
    # behind the last row it is the last that is compared, which is smaller
    return (table[np.minimum(first_not_below(table, keys, 0, len(table)), len(table) - 1)] == keys).all(axis=1)
