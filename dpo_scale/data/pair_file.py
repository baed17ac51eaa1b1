"""The tokenized pairs of one source in an Arrow file: written in batches, read through a memory map.

Opening touches list offsets and keys but no token. Some 24 bytes a pair are held in memory; the rest is in the page
cache, which all processes of a host share. A pair's key is a hash of its ids, so reading a pair checks it: a damaged
file is an error that names it, never other tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

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
    keys = [pair_key(*of_pair) for of_pair in zip(*ids, strict=True)]
    columns = [*ids, keys, prompt_hashes, [file] * len(pairs), rows]
    return pa.record_batch([pa.array(c, kind) for c, kind in zip(columns, SCHEMA.types, strict=True)], schema=SCHEMA)


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
        table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        if table.schema != SCHEMA:
            raise ValueError(f"{path}: not a file of tokenized pairs")
        table.validate(full=True)
        self._ids = [table[name] for name in ID_COLUMNS]
        self._keys, self._rows = table["pair_key"], table["row"]
        self._files = table["file"].to_numpy()
        self.prompt_hashes = table["prompt_hash"].to_numpy()
        self.lengths = np.stack([pc.list_value_length(column).to_numpy() for column in self._ids], axis=1)
        if self.lengths.min(initial=1) < 1:
            raise ValueError(f"{path}: a list of tokens is empty")
        digest = hashlib.blake2b(digest_size=16)
        for chunk in self._keys.chunks:
            digest.update(np.ascontiguousarray(_key_bytes(chunk)).data)
        self.keys_digest = digest.hexdigest()

    def __len__(self) -> int:
        return len(self.lengths)

    def pair_keys(self) -> np.ndarray:
        """uint8 [M, 16]."""
        return np.concatenate([np.zeros((0, 16), dtype=np.uint8), *map(_key_bytes, self._keys.chunks)])

    def read(self, i: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, bytes]:
        """(prompt_ids, chosen_ids, rejected_ids, pair_key) of pair i; ids are read-only int32 views of the file.

        Raises:
            DataError: if the ids are not those that the key was made of.
        """
        prompt, chosen, rejected = (column[i].values.to_numpy() for column in self._ids)
        key = self._keys[i].as_py()
        if pair_key(prompt, chosen, rejected) != key:
            raise DataError(f"{self.path.parent}: the tokenized data is damaged (pair {i}); delete this folder")
        return prompt, chosen, rejected, key

    def describe(self, i: int) -> str:
        """Where pair i came from, as messages about rows say it: `train.jsonl row 17`."""
        return f"{self.labels[self._files[i]]} row {self._rows[i]}"

    def origins(self) -> tuple[np.ndarray, np.ndarray]:
        """(int32 [M], int64 [M]): which of the source's files each pair came from, and its row there, from 1."""
        return self._files, self._rows.to_numpy()


def _key_bytes(array: Any) -> np.ndarray:
    data = np.frombuffer(array.buffers()[1], dtype=np.uint8)
    return data[array.offset * 16 : (array.offset + len(array)) * 16].reshape(-1, 16)
