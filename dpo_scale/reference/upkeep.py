"""Looking after a store: verify every byte, set aside what is damaged, make few large shards of many small ones.

All of it runs beside jobs that read and write. New shards are on the disk before old ones go, so a kill in between
leaves rows twice, never fewer; two processes that compact at once at worst do the same work twice. Memory is
bounded by a part of the key space at a time, whatever the size of the store.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from dpo_scale.disk.atomic import is_abandoned, is_temporary, sync_folder
from dpo_scale.errors import StoreError
from dpo_scale.progress import noting_activity
from dpo_scale.reference.manifest import (
    MANIFEST_FILE,
    Manifest,
    now,
    read_manifest,
    write_manifest,
)
from dpo_scale.reference.rows import Rows, concatenate, contains, empty_rows, first_not_below, merge
from dpo_scale.reference.shard import (
    FORMAT_VERSION,
    DamagedError,
    NewerVersionError,
    Shard,
    shard_version,
    write_shard,
)
from dpo_scale.reference.store import DAMAGED_DIR, Book

TARGET_SHARD_BYTES = 64 << 20  # small against the memory of a process that maps one
_PART_BYTES = 32 << 20  # of the key space that is merged at a time
_RETIRED = ".retired-"
_TRIES = 10


@dataclass
class Findings:
    """What `verify_book` found.

    Attributes:
        damaged: files that cannot be used, or not wholly, and why.
        rows: different rows in the files that can be used; `copies` further ones have the key of one of these.
        differing: copies whose values differ from those that are served; `largest_difference` of a sum, in nats.
        temporary: files left by writers that are gone.
    """

    folder: Path
    shards: int = 0
    nbytes: int = 0
    rows: int = 0
    rows_with_tokens: int = 0
    copies: int = 0
    differing: int = 0
    largest_difference: float = 0.0
    temporary: int = 0
    damaged: list[tuple[Path, str]] = field(default_factory=list)


@dataclass
class Compaction:
    """What `compact_book` did: shards and bytes before and after, rows kept, copies and temporary files removed,
    and where damaged files were moved to."""

    folder: Path
    shards_before: int = 0
    shards: int = 0
    bytes_before: int = 0
    nbytes: int = 0
    rows: int = 0
    copies: int = 0
    temporary: int = 0
    set_aside: list[Path] = field(default_factory=list)


def verify_book(folder: Path) -> Findings:
    """Read every byte of a book, and say what is wrong instead of stopping at it.

    Raises:
        NewerVersionError: if it holds files of a newer format.
    """
    findings = Findings(folder)
    whole: list[Shard] = []
    for path in _files(folder):
        if is_temporary(path):
            findings.temporary += is_abandoned(path)
        elif path.name.startswith(_RETIRED):
            continue
        elif shard_version(path.name) is None and path.name != MANIFEST_FILE:
            findings.damaged.append((path, "its name is not that of a file of a reference store"))
        elif path.name != MANIFEST_FILE:
            try:
                shard = _open_shard(path)
                findings.shards += 1
                findings.nbytes += shard.nbytes
                if bad := shard.damaged_groups():
                    raise DamagedError(path, f"checksums of {len(bad)} groups of rows")
                whole.append(shard)
            except DamagedError as error:
                findings.damaged.append((path, error.reason))
    manifest_error = _manifest_error(folder, needed=findings.shards > 0)
    if manifest_error is not None:
        findings.damaged.append((folder / MANIFEST_FILE, manifest_error))
    for part in merged_parts(whole):
        findings.rows += part.num_rows
        findings.rows_with_tokens += len(part.with_tokens)
        findings.copies += part.copies
        findings.differing += part.differing
        findings.largest_difference = max(findings.largest_difference, part.largest_difference)
    return findings


@dataclass(frozen=True)
class MergedPart:
    """The rows of a range of keys, sorted, each key once: those that have per-token values, and the others."""

    with_tokens: Rows
    without_tokens: Rows
    copies: int
    differing: int
    largest_difference: float

    @property
    def num_rows(self) -> int:
        return len(self.with_tokens) + len(self.without_tokens)


def merged_parts(shards: Sequence[Shard]) -> Iterator[MergedPart]:
    """The rows of all shards in the order of their keys, a bounded part at a time.

    Keys are hashes, so equal ranges of them hold about equally many rows.
    """
    total = sum(shard.nbytes for shard in shards)
    parts = -(-total // _PART_BYTES)
    for part in range(parts):
        found: dict[bool, list[Rows]] = {True: [], False: []}
        for shard in noting_activity(shards):
            begin, end = (
                0 if edge == 0 else len(shard) if edge == parts else _rows_below(shard, (edge << 64) // parts)
                for edge in (part, part + 1)
            )
            if begin < end:
                found[shard.has_tokens].append(shard.rows(begin, end, tokens=shard.has_tokens))
            shard.close()
        merged = {tokens: merge(rows, tokens=tokens) for tokens, rows in found.items()}
        with_tokens, plain = merged[True][0], merged[False][0]
        # a row that has tokens is the same row without them, and more: see `Book.lookup`
        again = contains(with_tokens.keys, plain.keys)
        apart = _differences(with_tokens, plain.take(again))
        yield MergedPart(
            with_tokens,
            plain.take(~again),
            merged[True][1] + merged[False][1] + int(again.sum()),
            merged[True][2] + merged[False][2] + int((apart > 0).sum()),
            max(merged[True][3], merged[False][3], float(apart.max(initial=0.0))),
        )


def compact_book(folder: Path, *, drop_damaged: bool = False, grace_hours: float = 0.0) -> Compaction:
    """Rewrite a book as few large shards with every row once, and remove what killed writers left.

    The result depends on the rows alone: compacting twice, or what is compact already, changes no file.

    Args:
        drop_damaged: move files that are damaged or foreign to `damaged/` in the store, after saving the rows of theirs
            that are whole; without it they are an error, and nothing is changed.
        grace_hours: keep the old shards that long under another name. A job on this machine that has them mapped
            keeps them anyway; one on another machine, over NFS, would be cut off.

    Raises:
        DamagedError, StoreError: as opening the book, unless `drop_damaged`.
        NewerVersionError: if it holds files of a newer format.
    """
    set_aside = _set_damaged_aside(folder) if drop_damaged else []
    for _ in range(_TRIES):
        try:
            return _compact(folder, grace_hours, set_aside)
        except FileNotFoundError:  # another process compacts: begin again with what it made
            continue
    raise StoreError(f"{folder}: its files keep changing; it is being compacted by others")


def _compact(folder: Path, grace_hours: float, set_aside: list[Path]) -> Compaction:
    result = Compaction(folder, set_aside=set_aside)
    book = Book(folder)
    for shard in book.shards:
        if bad := shard.damaged_groups():
            raise DamagedError(shard.path, f"checksums of {len(bad)} groups of rows")
    result.shards_before, result.bytes_before = len(book.shards), book.nbytes
    if book.shards:
        # taken from the old shards, so that equal rows give equal files
        newest = max(book.shards, key=lambda shard: (shard.metadata["created"], shard.metadata["tool"]))
        metadata = book.manifest.shard_metadata(newest.metadata["created"], newest.metadata["tool"])
        streams = {tokens: _ShardStream(folder, metadata, tokens=tokens) for tokens in (True, False)}
        for part in merged_parts(book.shards):
            streams[True].add(part.with_tokens)
            streams[False].add(part.without_tokens)
            result.copies += part.copies
        written = {path for stream in streams.values() for path in stream.finish()}
        result.rows = sum(stream.rows for stream in streams.values())
        _retire([shard.path for shard in book.shards if shard.path not in written], keep=grace_hours > 0)
    for path in _files(folder):
        old = path.name.startswith(_RETIRED) and _hours_since_renamed(path) >= grace_hours
        if (is_temporary(path) and is_abandoned(path)) or old:
            path.unlink(missing_ok=True)
            result.temporary += is_temporary(path)
    book.refresh()
    listed = (book.manifest.rows, book.manifest.shards)
    if book.shards and (listed != (book.num_rows, len(book.shards)) or not (folder / MANIFEST_FILE).exists()):
        book.write_manifest()
    result.shards, result.nbytes = len(book.shards), book.nbytes
    return result


class _ShardStream:
    """Sorted rows in, shards of about `TARGET_SHARD_BYTES` out."""

    def __init__(self, folder: Path, metadata: dict[str, str], *, tokens: bool):
        self._folder, self._metadata = folder, metadata
        self._tokens = tokens
        self._waiting = empty_rows(tokens=tokens)
        self._paths: list[Path] = []
        self.rows = 0

    def add(self, rows: Rows) -> None:
        self.rows += len(rows)
        self._waiting = concatenate([self._waiting, rows], tokens=self._tokens)
        while self._waiting.nbytes > TARGET_SHARD_BYTES:
            ends = 32 * np.arange(1, len(self._waiting) + 1)
            if self._waiting.tokens is not None:
                ends += 8 * np.arange(1, len(ends) + 1) + 4 * self._waiting.token_starts()[1:]
            cut = max(int(np.searchsorted(ends, TARGET_SHARD_BYTES)), 1)
            self._write(self._waiting.take(slice(0, cut)))
            self._waiting = self._waiting.take(slice(cut, None))

    def finish(self) -> list[Path]:
        if len(self._waiting):
            self._write(self._waiting)
        return self._paths

    def _write(self, rows: Rows) -> None:
        self._paths.append(write_shard(self._folder, rows, self._metadata))


def _set_damaged_aside(folder: Path) -> list[Path]:
    """Save what is whole of damaged shards, move the files that are not, and mend the manifest."""
    removed: list[Path] = []
    manifest: Manifest | None = None
    saved: list[Rows] = []
    for path in _files(folder):
        if is_temporary(path) or path.name.startswith(_RETIRED) or path.name == MANIFEST_FILE:
            continue
        try:
            if shard_version(path.name) is None:
                raise DamagedError(path, "its name is not that of a file of a reference store")
            shard = _open_shard(path)
            manifest = manifest or Manifest.from_shard_metadata(shard.metadata)
            if bad := shard.damaged_groups():
                saved += _whole_rows(shard, bad)
                raise DamagedError(path, "checksums")
        except DamagedError:
            removed.append(path)
    if _manifest_error(folder, needed=manifest is not None) is not None:
        if (folder / MANIFEST_FILE).exists():
            _move_aside(folder / MANIFEST_FILE)
        if manifest is not None:
            write_manifest(folder, replace(manifest, updated=now()))
    for tokens in (True, False):
        rows, *_ = merge([part for part in saved if (part.tokens is not None) == tokens], tokens=tokens)
        if len(rows):
            assert manifest is not None
            write_shard(folder, rows, manifest.shard_metadata(now()))
    return [_move_aside(path) for path in removed]


def _whole_rows(shard: Shard, bad: Sequence[int]) -> list[Rows]:
    """The rows of a shard's other groups."""
    step = shard.rows_per_group
    return [
        shard.rows(begin, min(begin + step, len(shard)), tokens=shard.has_tokens)
        for group, begin in enumerate(range(0, len(shard), step))
        if group not in set(bad)
    ]


def _move_aside(path: Path) -> Path:
    target = path.parent.parent / DAMAGED_DIR / f"{path.parent.name}-{time.time_ns()}-{path.name}"
    target.parent.mkdir(exist_ok=True)
    path.rename(target)
    return target


def _retire(paths: Sequence[Path], *, keep: bool) -> None:
    for path in paths:
        try:
            if keep:
                path.rename(path.with_name(_RETIRED + path.name))
            else:
                path.unlink()
        except FileNotFoundError:  # another process that compacts was quicker
            pass
    if paths:
        sync_folder(paths[0].parent)


def _hours_since_renamed(path: Path) -> float:
    try:
        return (time.time() - path.stat().st_ctime) / 3600
    except FileNotFoundError:
        return 0.0


def _files(folder: Path) -> list[Path]:
    """Everything in a book's folder, but for what the system puts there (`.nfs...`, `.DS_Store`)."""
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        raise StoreError(f"{folder}: cannot be read: {error.strerror}") from None
    return [
        path
        for path in entries
        if not path.name.startswith(".") or is_temporary(path) or path.name.startswith(_RETIRED)
    ]


def _open_shard(path: Path) -> Shard:
    version = shard_version(path.name)
    if version != FORMAT_VERSION:
        assert version is not None
        raise NewerVersionError(path, version)
    shard = Shard(path)
    if shard.metadata["book"] != path.parent.name:
        raise DamagedError(path, f"it is a shard of book {shard.metadata['book']}")
    return shard


def _manifest_error(folder: Path, *, needed: bool) -> str | None:
    """What is wrong with the manifest; a newer version is an error that is raised."""
    try:
        missing = read_manifest(folder) is None
    except DamagedError as error:
        return error.reason
    return "it is missing" if missing and needed else None


def _rows_below(shard: Shard, first_half: int) -> int:
    return int(shard.lower_bound(np.array([[first_half, 0]], dtype=np.uint64))[0])


def _differences(kept: Rows, copies: Rows) -> np.ndarray:
    """fp64 [len(copies)]: by how much their sums differ from those of the rows kept, which have all their keys."""
    if len(copies) == 0:
        return np.zeros(0)
    place = first_not_below(kept.keys, copies.keys, 0, len(kept))
    return np.abs(kept.sums[place].astype(np.float64) - copies.sums).max(axis=1)
