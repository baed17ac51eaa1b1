"""One shard: an immutable safetensors file of rows sorted by key, whose name vouches for every byte in it.

The rows are cut into groups. An index of each group's first key and SHA-256 stands at the front of the file,
behind the header, and the file's name carries the SHA-256 of header and index. So opening a shard reads and
verifies a few kilobytes whatever its size, a look-up verifies just the groups that it touches, the first time
it touches them, and a byte that changed anywhere is found before a value of its group is used. Since the name
follows from the content, a shard is never rewritten, and no list of shards is needed beside the folder's own.

Tensors, in the order of the file (G groups, N rows):

    group_keys      uint64 [G, 2]   first key of each group
    group_tokens    int64 [G + 1]   where each group's tokens begin; with per-token values only
    group_digests   uint8 [G, 32]   SHA-256 of the group's part of keys, sums and counts
    token_digests   uint8 [G, 32]   SHA-256 of its part of tokens; with per-token values only
    keys            uint64 [N, 2]
    sums            fp32 [N, 2]
    counts          int32 [N, 2]
    tokens          fp32 [counts.sum()]   row by row, chosen before rejected; optional

Written by hand rather than with the safetensors library because the index has to stand in front and the name has
to be known before the file is; any safetensors reader can load it.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from dpo_scale.disk.atomic import write_atomically
from dpo_scale.errors import StoreError
from dpo_scale.progress import noting_activity
from dpo_scale.reference.rows import Rows

FORMAT = "dpo_scale reference store"
FORMAT_VERSION = 1  # in the names of shards and in manifests: raise it when older code must not read them
ROWS_PER_GROUP = 1024  # 32 KiB; a power of two
ROWS_PER_GROUP_WITH_TOKENS = 256  # tokens take about 2 KB a row
_MAX_HEADER = 1 << 24

_NAME = re.compile(r"v(\d+)-(\d+)-([0-9a-f]{32})\.safetensors")
_DTYPES = {"U64": "<u8", "I64": "<i8", "I32": "<i4", "F32": "<f4", "U8": "u1"}
_INDEX = ("group_keys", "group_tokens", "group_digests", "token_digests")


class DamagedError(StoreError):
    """A file of a store that is not what it was written as; `path` is the file."""

    def __init__(self, path: Path, reason: str):
        self.path, self.reason = path, reason
        super().__init__(
            f"{path}: damaged ({reason}); nothing of it was used. What is whole is kept and the rest left to be "
            f"computed again by: python launch/store.py compact {path.parent.parent} --drop-damaged"
        )


class NewerVersionError(StoreError):
    """A file that only a newer version of this package can read."""

    def __init__(self, path: Path, version: int):
        super().__init__(
            f"{path}: written by a newer dpo_scale (store format {version}, this one reads {FORMAT_VERSION}); "
            "update dpo_scale, or use another store folder"
        )


def shard_version(name: str) -> int | None:
    """The format version in a shard's file name; None if it is not the name of a shard."""
    match = _NAME.fullmatch(name)
    return int(match[1]) if match else None


def rows_in_name(name: str) -> int:
    """The number of rows that a shard's file name states."""
    match = _NAME.fullmatch(name)
    assert match is not None, name
    return int(match[2])


def write_shard(folder: Path, rows: Rows, metadata: dict[str, str]) -> Path:
    """Write rows as a shard; equal rows and metadata give the same name.

    Args:
        rows: at least one, sorted by key, each key once.
        metadata: text for the header: `book` and whatever tells a reader what this is.

    Raises:
        StoreError: if the folder cannot be written.
    """
    assert len(rows) > 0
    step = ROWS_PER_GROUP if rows.tokens is None else ROWS_PER_GROUP_WITH_TOKENS
    starts = np.arange(0, len(rows), step)
    ends = np.minimum(starts + step, len(rows))
    data = [np.ascontiguousarray(rows.keys, "<u8"), np.ascontiguousarray(rows.sums, "<f4")]
    data.append(np.ascontiguousarray(rows.counts, "<i4"))
    tensors: dict[str, np.ndarray] = {"group_keys": data[0][starts]}
    digests = [_sha256(part[a:b] for part in data) for a, b in zip(starts, ends, strict=True)]
    if rows.tokens is not None:
        tokens = np.ascontiguousarray(rows.tokens, "<f4")
        token_starts = rows.token_starts().astype("<i8")
        tensors["group_tokens"] = token_starts[np.append(starts, len(rows))]
        bounds = zip(tensors["group_tokens"][:-1], tensors["group_tokens"][1:], strict=True)
        token_digests = [_sha256([tokens[a:b]]) for a, b in bounds]
    tensors["group_digests"] = _stack(digests)
    if rows.tokens is not None:
        tensors["token_digests"] = _stack(token_digests)
    index = [np.ascontiguousarray(tensor) for tensor in tensors.values()]
    tensors |= {"keys": data[0], "sums": data[1], "counts": data[2]}
    if rows.tokens is not None:
        tensors["tokens"] = tokens
        data.append(tokens)

    header: dict[str, Any] = {
        "__metadata__": {
            **metadata,
            "format": FORMAT,
            "format_version": str(FORMAT_VERSION),
            "rows": str(len(rows)),
            "rows_per_group": str(step),
            "last_key": ",".join(str(int(part)) for part in rows.keys[-1]),
        }
    }
    offset = 0
    names = {np.dtype(dtype): name for name, dtype in _DTYPES.items()}
    for name, tensor in tensors.items():
        end = offset + tensor.nbytes
        entry = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        header[name] = entry
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    front = [len(text).to_bytes(8, "little"), text, *index]
    path = folder / f"v{FORMAT_VERSION}-{len(rows)}-{_sha256(front).hex()[:32]}.safetensors"
    if not path.exists():
        write_atomically(path, [_bytes(part) for part in (*front, *data)])
    return path


def _sha256(parts: Iterable[Any]) -> bytes:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(_bytes(part))
    return digest.digest()


def _bytes(part: Any) -> Any:
    return part.reshape(-1).view(np.uint8).data if isinstance(part, np.ndarray) else part


def _stack(digests: list[bytes]) -> np.ndarray:
    return np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 32)


class Shard:
    """A shard on disk, its index verified, its rows mapped into memory when first asked for.

    Attributes:
        metadata: the header's, as it was written.
        has_tokens: whether it holds per-token values.

    Raises:
        DamagedError: if header or index are not what the name vouches for, or bytes are missing or added.
        NewerVersionError: if it is of a newer format.
        FileNotFoundError: if it is gone (another process compacted it away).
    """

    def __init__(self, path: Path):
        self.path = path
        match = _NAME.fullmatch(path.name)
        assert match is not None, path
        if int(match[1]) != FORMAT_VERSION:
            raise NewerVersionError(path, int(match[1]))
        try:
            self._read_front(int(match[2]), match[3])
        except FileNotFoundError:
            raise
        except OSError as error:
            raise StoreError(f"{path}: cannot be read: {error.strerror}") from None
        self._map: mmap.mmap | None = None
        self._verified = np.zeros(len(self._group_keys), dtype=bool)
        self._tokens_verified = np.zeros(len(self._group_keys), dtype=bool)
        self.in_use = False  # whether pages of the map may be resident in this process

    def _read_front(self, rows: int, digest: str) -> None:
        """Read header and index and hold them against the name; only then is anything in them believed."""
        with open(self.path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = file.read(8)
            header_bytes = int.from_bytes(length, "little")
            if len(length) < 8 or header_bytes > min(size - 8, _MAX_HEADER):
                raise DamagedError(self.path, "its header is cut off")
            text = file.read(header_bytes)
            try:
                header = json.loads(text)
                ends = [header[name]["data_offsets"][1] for name in _INDEX if name in header]
                index = file.read(min(max(ends), size))
            except (ValueError, KeyError, TypeError, IndexError, OverflowError, RecursionError):
                raise DamagedError(self.path, "its header cannot be read") from None
        if _sha256([length, text, index]).hex()[:32] != digest:
            raise DamagedError(self.path, "header or index differ from what its name vouches for")
        self.metadata: dict[str, str] = header.pop("__metadata__")
        self._layout = {
            name: (_DTYPES[e["dtype"]], tuple(e["shape"]), 8 + header_bytes + e["data_offsets"][0])
            for name, e in header.items()
        }
        self._rows = int(self.metadata["rows"])
        if self._rows != rows:
            raise DamagedError(self.path, f"its name states {rows} rows, its header {self._rows}")
        self._bytes = 8 + header_bytes + max(entry["data_offsets"][1] for entry in header.values())
        if size != self._bytes:
            raise DamagedError(self.path, f"it has {size} bytes, expected {self._bytes}")
        self.has_tokens = "tokens" in header
        self.rows_per_group = int(self.metadata["rows_per_group"])
        front = length + text + index
        self._group_keys = self._view("group_keys", front).copy()
        self._group_digests = self._view("group_digests", front).copy()
        if self.has_tokens:
            self._group_tokens = self._view("group_tokens", front).copy()
            self._token_digests = self._view("token_digests", front).copy()
        last = [int(part) for part in self.metadata["last_key"].split(",")]
        self._last_key = np.array([last], dtype=np.uint64)

    def __len__(self) -> int:
        return self._rows

    @property
    def nbytes(self) -> int:
        return self._bytes

    def find(self, keys: np.ndarray) -> np.ndarray:
        """The row of each key, int64 [M]; -1 where it has none. Rows found are verified.

        Args:
            keys: uint64 [M, 2].
        """
        rows = np.full(len(keys), -1, dtype=np.int64)
        inside = np.flatnonzero(_not_below(keys, self._group_keys[:1]) & _not_below(self._last_key, keys))
        if len(inside) == 0:
            return rows
        keys = keys[inside]
        place = self.lower_bound(keys)
        here = (self._array("keys")[np.minimum(place, len(self) - 1)] == keys).all(axis=1)
        rows[inside[here]] = place[here]
        return rows

    def lower_bound(self, keys: np.ndarray) -> np.ndarray:
        """The number of rows whose key is smaller than each of `keys` (uint64 [M, 2]), int64 [M].

        The group comes from the index. Within it the first half of the key is searched for, all keys in step, each
        step half as wide as the last; what little is left to go is where first halves are equal.
        """
        first, second = keys[:, 0], keys[:, 1]
        heads = self._group_keys
        group = np.searchsorted(heads[:, 0], first, side="right") - 1
        while (behind := (heads[group, 0] == first) & (heads[group, 1] > second) & (group >= 0)).any():
            group -= behind
        group = np.maximum(group, 0)
        self._verify(group)
        table = self._array("keys")
        column, last = table[:, 0], len(self) - 1
        place = group * self.rows_per_group
        step = self.rows_per_group
        while step > 1:
            step //= 2
            place += step * (column[np.minimum(place + (step - 1), last)] < first)
        place = np.minimum(place, len(self))
        while True:
            row = table[np.minimum(place, last)]
            below = (row[:, 0] < first) | ((row[:, 0] == first) & (row[:, 1] < second))
            below &= place <= last
            if not below.any():
                return place
            place += below

    def values(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(sums fp32 [M, 2], counts int32 [M, 2]) of `rows`, copied out of the file."""
        self._verify(rows // self.rows_per_group)
        return self._array("sums")[rows], self._array("counts")[rows]

    def token_ranges(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(starts, lengths), int64 [M] each: where the tokens of `rows` are in `tokens`; these are verified."""
        groups = rows // self.rows_per_group
        self._verify(groups)
        self._verify_tokens(groups)
        counts = self._array("counts")
        starts, lengths = np.zeros(len(rows), np.int64), np.zeros(len(rows), np.int64)
        for group in np.unique(groups):
            first = int(group) * self.rows_per_group
            of_group = counts[first : first + self.rows_per_group].sum(axis=1, dtype=np.int64)
            begins = self._group_tokens[group] + np.cumsum(of_group) - of_group
            mine = groups == group
            starts[mine], lengths[mine] = begins[rows[mine] - first], of_group[rows[mine] - first]
        return starts, lengths

    def tokens(self, places: np.ndarray) -> np.ndarray:
        """Per-token values at `places` (int64 [T], within what `token_ranges` gave)."""
        return self._array("tokens")[places]

    def rows(self, begin: int, end: int, *, tokens: bool) -> Rows:
        """Rows begin .. end, verified and copied; `tokens` takes their per-token values along."""
        groups = np.arange(begin // self.rows_per_group, -(-end // self.rows_per_group))
        self._verify(groups)
        part = slice(begin, end)
        keys, sums, counts = (self._array(name)[part].copy() for name in ("keys", "sums", "counts"))
        if not tokens or begin == end:
            return Rows(keys, sums, counts, np.zeros(0, np.float32) if tokens else None)
        self._verify_tokens(groups)
        starts, lengths = self.token_ranges(np.array([begin, end - 1]))
        values = self._array("tokens")[starts[0] : starts[1] + lengths[1]].copy()
        return Rows(keys, sums, counts, values)

    def damaged_groups(self) -> list[int]:
        """Verify everything anew; the groups whose bytes are not what was written."""
        bad = []
        for group in noting_activity(range(len(self._group_keys))):
            self._verified[group] = self._tokens_verified[group] = False
            try:
                self._verify(np.array([group]))
                if self.has_tokens:
                    self._verify_tokens(np.array([group]))
            except DamagedError:
                bad.append(group)
        self.release()
        return bad

    def release(self) -> None:
        """Give the mapped pages back to the page cache, where every process of the host finds them."""
        if self._map is not None:
            self._map.madvise(mmap.MADV_DONTNEED)
        self.in_use = False

    def close(self) -> None:
        """Drop the map; the next use maps the file again."""
        self._map = None
        self.in_use = False

    def _verify(self, groups: np.ndarray) -> None:
        for group in np.unique(groups[~self._verified[groups]]):
            part = slice(int(group) * self.rows_per_group, (int(group) + 1) * self.rows_per_group)
            data = [self._array(name)[part] for name in ("keys", "sums", "counts")]
            self._check(data, self._group_digests[group], part.start)
            self._verified[group] = True

    def _verify_tokens(self, groups: np.ndarray) -> None:
        for group in np.unique(groups[~self._tokens_verified[groups]]):
            begin, end = self._group_tokens[group : group + 2]
            values = self._array("tokens")[begin:end]
            self._check([values], self._token_digests[group], int(group) * self.rows_per_group)
            self._tokens_verified[group] = True

    def _check(self, data: list[np.ndarray], digest: np.ndarray, row: int) -> None:
        if _sha256(data) != digest.tobytes():
            raise DamagedError(self.path, f"checksum of rows {row} to {row + self.rows_per_group - 1}")

    def _array(self, name: str) -> np.ndarray:
        if self._map is None:
            with open(self.path, "rb") as file:
                if os.fstat(file.fileno()).st_size != self._bytes:
                    raise DamagedError(self.path, f"it no longer has {self._bytes} bytes")
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.in_use = True
        return self._view(name, self._map)

    def _view(self, name: str, buffer: Any) -> np.ndarray:
        dtype, shape, offset = self._layout[name]
        return np.frombuffer(buffer, dtype, math.prod(shape), offset).reshape(shape)


def _not_below(keys: np.ndarray, other: np.ndarray) -> np.ndarray:
    """bool: key >= other, row by row, one of the two may have a single row."""
    return (keys[:, 0] > other[:, 0]) | ((keys[:, 0] == other[:, 0]) & (keys[:, 1] >= other[:, 1]))
