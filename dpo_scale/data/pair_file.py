"""The tokenized pairs of one source in an Arrow file: written in batches, read through a memory map.

Opening touches list offsets and keys but no token: 12 bytes of lengths a pair are all that is held in memory,
and every process of a host shares the page cache. A pair's key is a hash of its ids, so reading a pair checks
it: a damaged file is an error that names it, never other tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from dpo_scale.data.tokenize import TokenizedPair, pair_key
from dpo_scale.errors import DataError

ID_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")
SCHEMA = pa.schema(
    [(name, pa.list_(pa.int32())) for name in ID_COLUMNS]
    + [
        ("pair_key", pa.binary(16)),
        ("prompt_hash", pa.uint64()),  # decides which pairs are held out
        ("file", pa.int32()),  # which of the source's files
        ("row", pa.int64()),  # and which row of it, from 1
    ]
)


def record_batch(pairs: Sequence[TokenizedPair], prompt_hashes: Sequence[int], file: int, rows: Sequence[int]) -> Any:
    """An Arrow record batch of tokenized pairs that all come from the same file of a source."""
    ids = [[np.array(getattr(pair, name), dtype=np.int32) for pair in pairs] for name in ID_COLUMNS]
    columns: list[Any] = []
    for lists in ids:
        offsets = np.zeros(len(lists) + 1, dtype=np.int32)
        np.cumsum([len(one) for one in lists], out=offsets[1:])
        values = np.concatenate(lists) if lists else np.zeros(0, dtype=np.int32)
        columns.append(pa.ListArray.from_arrays(pa.array(offsets), pa.array(values)))
    columns.append(pa.array([pair_key(*lists) for lists in zip(*ids, strict=True)], type=pa.binary(16)))
    columns.append(pa.array(prompt_hashes, type=pa.uint64()))
    columns.append(pa.array(np.full(len(pairs), file, dtype=np.int32)))
    columns.append(pa.array(rows, type=pa.int64()))
    return pa.record_batch(columns, schema=SCHEMA)


class PairFile:
    """M tokenized pairs on disk.

    Attributes:
        labels: what messages call the files that the pairs came from.
        lengths: int32 [M, 3], tokens of prompt, chosen and rejected.
        prompt_hashes: uint64 [M].
        keys_digest: hash of all pair keys in order.

    Raises:
        ValueError or OSError (pyarrow's among them): if the file is not such a file.
    """

    def __init__(self, path: Path, labels: Sequence[str]):
        self.path, self.labels = path, list(labels)
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
        if reader.schema != SCHEMA:
            raise ValueError(f"{path}: not a file of tokenized pairs")
        batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
        self._offsets = [[_to_numpy(batch.column(name).offsets) for name in ID_COLUMNS] for batch in batches]
        self._values = [[_to_numpy(batch.column(name).values) for name in ID_COLUMNS] for batch in batches]
        self._keys = [_key_bytes(batch.column("pair_key")) for batch in batches]
        self._files = _join([_to_numpy(batch.column("file")) for batch in batches], np.int32)
        self._rows = [_to_numpy(batch.column("row")) for batch in batches]
        self._starts = np.cumsum([0] + [batch.num_rows for batch in batches])
        self.prompt_hashes = _join([_to_numpy(batch.column("prompt_hash")) for batch in batches], np.uint64)
        lengths = [np.stack([np.diff(one) for one in columns], axis=1) for columns in self._offsets]
        self.lengths = np.concatenate([np.zeros((0, 3), dtype=np.int32), *lengths])
        for columns, values in zip(self._offsets, self._values, strict=True):
            if any(one[0] < 0 or one[-1] > len(ids) for one, ids in zip(columns, values, strict=True)):
                raise ValueError(f"{path}: list offsets beyond the tokens")
        if self.lengths.min(initial=1) < 1:
            raise ValueError(f"{path}: a list of tokens is empty")
        digest = hashlib.blake2b(digest_size=16)
        for keys in self._keys:
            digest.update(np.ascontiguousarray(keys).data)
        self.keys_digest = digest.hexdigest()

    def __len__(self) -> int:
        return int(self._starts[-1])

    def pair_keys(self) -> np.ndarray:
        """uint8 [M, 16]."""
        return np.concatenate([np.zeros((0, 16), dtype=np.uint8), *self._keys])

    def read(self, i: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, bytes]:
        """(prompt_ids, chosen_ids, rejected_ids, pair_key) of pair i; ids are read-only int32 views of the
        file.

        Raises:
            DataError: if the ids are not those that the key was made of.
        """
        batch, row = self._locate(i)
        prompt, chosen, rejected = (
            values[offsets[row] : offsets[row + 1]]
            for offsets, values in zip(self._offsets[batch], self._values[batch], strict=True)
        )
        key = self._keys[batch][row].tobytes()
        if pair_key(prompt, chosen, rejected) != key:
            raise DataError(f"{self.path.parent}: the tokenized data is damaged (pair {i}); delete this folder")
        return prompt, chosen, rejected, key

    def describe(self, i: int) -> str:
        """Where pair i came from, as messages about rows say it: `train.jsonl row 17`."""
        batch, row = self._locate(i)
        return f"{self.labels[self._files[i]]} row {self._rows[batch][row]}"

    def origins(self) -> tuple[np.ndarray, np.ndarray]:
        """(int32 [M], int64 [M]): which of the source's files each pair came from, and its row there, from 1."""
        return self._files, _join(self._rows, np.int64)

    def _locate(self, i: int) -> tuple[int, int]:
        assert 0 <= i < len(self)
        batch = int(np.searchsorted(self._starts, i, side="right")) - 1
        return batch, i - int(self._starts[batch])


def _to_numpy(array: Any) -> np.ndarray:
    return array.to_numpy(zero_copy_only=True)


def _key_bytes(array: Any) -> np.ndarray:
    data = np.frombuffer(array.buffers()[1], dtype=np.uint8)
    return data[array.offset * 16 : (array.offset + len(array)) * 16].reshape(-1, 16)


def _join(parts: list[np.ndarray], dtype: type) -> np.ndarray:
    return np.concatenate([np.zeros(0, dtype=dtype), *parts])
