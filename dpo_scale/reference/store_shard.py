"""One shard: an immutable safetensors file of rows sorted by key, whose name vouches for every byte in it.

The rows are cut into groups. An index at the front of the file, behind the header, has each group's first key and
SHA-256. The file's name carries the SHA-256 of header and index. So opening a shard reads and verifies a few kilobytes,
whatever its size. A look-up verifies the groups that it touches, the first time it touches them, so a byte that changed
anywhere is found before a value of its group is used. Since the name follows from the content, a shard is never
rewritten, and no list of shards is needed beside the folder's own.

Tensors, in the order of the file (G groups, N rows):

    group_keys      uint64 [G, 2]   first key of each group
    group_tokens    int64 [G + 1]   where each group's tokens begin; with per-token values only
    group_digests   uint8 [G, 32]   SHA-256 of the group's part of keys, sums and counts
    token_digests   uint8 [G, 32]   SHA-256 of its part of tokens; with per-token values only
    keys            uint64 [N, 2]
    sums            fp32 [N, 2]
    counts          int32 [N, 2]
    tokens          fp32 [counts.sum()]   row by row, chosen before rejected; optional

Any safetensors reader can load it. It is written by hand because the safetensors library would not put the index in
front, and because the name has to be known before the file is written.
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

from dpo_scale.disk.atomic import naming, write_atomically
from dpo_scale.errors import StoreError
from dpo_scale.progress import noting_activity
from dpo_scale.reference.store_rows import Rows, first_not_below, ragged_index

FORMAT = "dpo_scale reference store"
FORMAT_VERSION = 1  # in the names of shards and in manifests: raise it when older code must not read them
ROWS_PER_GROUP = 1024  # 32 KiB; a power of two
ROWS_PER_GROUP_WITH_TOKENS = 256  # tokens take about 2 KB a row
_MAX_HEADER = 1 << 24

_NAME = re.compile(r"v(\d+)-(\d+)-([0-9a-f]{32})\.safetensors")
_DTYPES = {"U64": "<u8", "I64": "<i8", "I32": "<i4", "F32": "<f4", "U8": "u1"}
_ROW_TENSORS = ("keys", "sums", "counts")


class DamagedError(StoreError):
    """A file of a store that is not what it was written as; `path` is the file."""

    def __init__(self, path: Path, reason: str):
        self.path, self.reason = path, reason
        super().__init__(
            f"{path}: damaged ({reason}); nothing of it was used. To keep what is whole, and to have the rest computed "
            f"again, run: python launch/store.py compact {path.parent.parent} --drop-damaged"
        )


class NewerVersionError(StoreError):
    """A file that only a newer version of this package can read."""

    def __init__(self, path: Path, version: int):
        super().__init__(
            f"{path}: written by a newer dpo_scale (store format {version}, this one reads {FORMAT_VERSION}); "
            "update dpo_scale, or use another store folder"
        )


def parse_name(path: Path) -> tuple[int, str]:
    """What a shard's name states: its rows, and the first 32 hex digits of the SHA-256 of header and index.

    Raises:
        DamagedError: if it is not the name of a shard.
        NewerVersionError: if it is that of a shard of a newer format.
    """
    match = _NAME.fullmatch(path.name)
    if match is None:
        raise DamagedError(path, "its name is not that of a file of a reference store")
    if int(match[1]) != FORMAT_VERSION:
        raise NewerVersionError(path, int(match[1]))
    return int(match[2]), match[3]


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
    edges = np.minimum(np.arange(0, len(rows) + step, step), len(rows))
    data = {name: np.ascontiguousarray(getattr(rows, name)) for name in _ROW_TENSORS}
    index = {"group_keys": data["keys"][edges[:-1]]}
    if rows.tokens is not None:
        index["group_tokens"] = rows.token_starts()[edges]
    index["group_digests"] = _digests(list(data.values()), edges)
    if rows.tokens is not None:
        data["tokens"] = np.ascontiguousarray(rows.tokens)
        index["token_digests"] = _digests([data["tokens"]], index["group_tokens"])

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
    for name, tensor in (index | data).items():
        offsets = [offset, offset + tensor.nbytes]
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        offset += tensor.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    front = [len(text).to_bytes(8, "little"), text, *map(_bytes, index.values())]
    path = folder / f"v{FORMAT_VERSION}-{len(rows)}-{_sha256(front).hex()[:32]}.safetensors"
    if not path.exists():
        with naming(folder, StoreError, to="written"):
            write_atomically(path, [*front, *map(_bytes, data.values())])
    return path


def _digests(tensors: list[np.ndarray], edges: np.ndarray) -> np.ndarray:
    """uint8 [G, 32]: SHA-256 of the part of all tensors between each two edges."""
    parts = zip(edges[:-1], edges[1:], strict=True)
    joined = b"".join(_sha256(_bytes(tensor[a:b]) for tensor in tensors) for a, b in parts)
    return np.frombuffer(joined, np.uint8).reshape(-1, 32)


def _sha256(parts: Iterable[Any]) -> bytes:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.digest()


def _bytes(tensor: np.ndarray) -> memoryview:
    return tensor.reshape(-1).view(np.uint8).data


class Shard:
    """A shard on disk, its index verified, its rows mapped into memory when first asked for.

    Attributes:
        metadata: the header's, as it was written.
        has_tokens: whether it holds per-token values.
        nbytes: the file's size.
        in_use: whether pages of the map may be resident in this process.

    Raises:
        DamagedError: if header or index are not what the name vouches for, bytes are missing or added, or the shard
            belongs to another book than the one whose folder it is in.
        NewerVersionError: if it is of a newer format.
        FileNotFoundError: if it is gone (another process compacted it away).
    """

    def __init__(self, path: Path):
        self.path = path
        self._rows, digest = parse_name(path)
        try:
            self._read_front(digest)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise StoreError(f"{path}: cannot be read ({error.strerror})") from None
        if self.metadata["book"] != path.parent.name:
            raise DamagedError(path, f"it is a shard of book {self.metadata['book']}, not of this one")
        self._map: mmap.mmap | None = None
        self._verified = np.zeros(len(self._group_keys), dtype=bool)
        self._tokens_verified = np.zeros(len(self._group_keys), dtype=bool)
        self.in_use = False

    def _read_front(self, digest: str) -> None:
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
                index = file.read(min(max(header["keys"]["data_offsets"][0], 0), size))
            except (ValueError, KeyError, TypeError, IndexError, RecursionError):
                raise DamagedError(self.path, "its header cannot be read") from None
        front = length + text + index
        if _sha256([front]).hex()[:32] != digest:
            raise DamagedError(self.path, "header or index differ from what its name vouches for")
        self.metadata: dict[str, str] = header.pop("__metadata__")
        if int(self.metadata["rows"]) != self._rows:
            raise DamagedError(self.path, f"its name states {self._rows} rows, its header {self.metadata['rows']}")
        begin = 8 + header_bytes
        self.nbytes = begin + max(entry["data_offsets"][1] for entry in header.values())
        if size != self.nbytes:
            raise DamagedError(self.path, f"it has {size} bytes, expected {self.nbytes}")
        self._layout = {
            name: (_DTYPES[entry["dtype"]], tuple(entry["shape"]), begin + entry["data_offsets"][0])
            for name, entry in header.items()
        }
        self.has_tokens = "tokens" in header
        self.rows_per_group = int(self.metadata["rows_per_group"])
        self._group_keys = self._view("group_keys", front).copy()
        self._group_digests = self._view("group_digests", front).copy()
        if self.has_tokens:
            self._group_tokens = self._view("group_tokens", front).copy()
            self._token_digests = self._view("token_digests", front).copy()
        self._last_key = np.array(self.metadata["last_key"].split(","), dtype=np.uint64)

    def __len__(self) -> int:
        return self._rows

    def find(self, keys: np.ndarray) -> np.ndarray:
        """The row of each key, int64 [M]; -1 where it has none. Rows found are verified.

        Args:
            keys: uint64 [M, 2].
        """
        rows = np.full(len(keys), -1, dtype=np.int64)
        inside = np.flatnonzero((keys[:, 0] >= self._group_keys[0, 0]) & (keys[:, 0] <= self._last_key[0]))
        if len(inside) == 0:
            return rows
        keys = keys[inside]
        place = self.lower_bound(keys)
        here = (self._array("keys")[np.minimum(place, len(self) - 1)] == keys).all(axis=1)
        rows[inside[here]] = place[here]
        return rows

    def lower_bound(self, keys: np.ndarray) -> np.ndarray:
        """The number of rows whose key is smaller than each of `keys` (uint64 [M, 2]), int64 [M].

        The index tells the group. Only this group is searched, and read.
        """
        group = np.maximum(np.searchsorted(self._group_keys[:, 0], keys[:, 0]) - 1, 0)
        self._verify(group)
        place = first_not_below(self._array("keys"), keys, group * self.rows_per_group, self.rows_per_group)
        self._verify(np.minimum(place, len(self) - 1) // self.rows_per_group)  # it may be the next group's first
        return place

    def values(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(sums fp32 [M, 2], counts int32 [M, 2]) of `rows`, copied out of the file."""
        self._verify(rows // self.rows_per_group)
        return self._array("sums")[rows], self._array("counts")[rows]

    def tokens(self, rows: np.ndarray) -> np.ndarray:
        """Per-token values of `rows` (int64 [M]), fp32 [T], row by row, copied out of the file."""
        groups = rows // self.rows_per_group
        self._verify(groups)
        self._verify(groups, tokens=True)
        counts = self._array("counts")
        starts, lengths = np.zeros(len(rows), np.int64), np.zeros(len(rows), np.int64)
        for group in np.unique(groups):
            first = int(group) * self.rows_per_group
            of_group = counts[first : first + self.rows_per_group].sum(axis=1, dtype=np.int64)
            begins = self._group_tokens[group] + np.cumsum(of_group) - of_group
            mine = groups == group
            starts[mine], lengths[mine] = begins[rows[mine] - first], of_group[rows[mine] - first]
        return self._array("tokens")[ragged_index(starts, lengths)]

    def rows(self, begin: int, end: int) -> Rows:
        """Rows begin .. end, as far as there are, with all that is kept of them, verified and copied."""
        step = self.rows_per_group
        groups = np.arange(begin // step, -(-end // step))
        self._verify(groups)
        part = slice(begin, end)
        keys, sums, counts = (self._array(name)[part].copy() for name in _ROW_TENSORS)
        tokens = None
        if self.has_tokens:
            self._verify(groups, tokens=True)
            first = self._group_tokens[groups[0]] + self._array("counts")[groups[0] * step : begin].sum(dtype=np.int64)
            tokens = self._array("tokens")[first : first + counts.sum(dtype=np.int64)].copy()
        return Rows(keys, sums, counts, tokens)

    def damaged_groups(self) -> list[int]:
        """Verify everything anew; the groups whose bytes are not what was written."""
        bad = []
        for group in noting_activity(range(len(self._group_keys))):
            self._verified[group] = self._tokens_verified[group] = False
            try:
                self._verify(np.array([group]))
                if self.has_tokens:
                    self._verify(np.array([group]), tokens=True)
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

    def _verify(self, groups: np.ndarray, *, tokens: bool = False) -> None:
        """Compare the checksums of groups, those of their tokens with `tokens`, where that was not done yet."""
        verified = self._tokens_verified if tokens else self._verified
        if verified.all():
            return
        for group in np.unique(groups[~verified[groups]]):
            first = int(group) * self.rows_per_group
            if tokens:
                begin, end = self._group_tokens[group : group + 2]
                data, digest = [self._array("tokens")[begin:end]], self._token_digests[group]
            else:
                data = [self._array(name)[first : first + self.rows_per_group] for name in _ROW_TENSORS]
                digest = self._group_digests[group]
            if _sha256(map(_bytes, data)) != digest.tobytes():
                raise DamagedError(self.path, f"checksum of rows {first} to {first + self.rows_per_group - 1}")
            verified[group] = True

    def _array(self, name: str) -> np.ndarray:
        if self._map is None:
            with open(self.path, "rb") as file:
                if os.fstat(file.fileno()).st_size != self.nbytes:
                    raise DamagedError(self.path, f"it no longer has {self.nbytes} bytes")
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.in_use = True
        return self._view(name, self._map)

    def _view(self, name: str, buffer: Any) -> np.ndarray:
        dtype, shape, offset = self._layout[name]
        return np.frombuffer(buffer, dtype, math.prod(shape), offset).reshape(shape)
