"""Looking after a store: verify every byte, set aside what is damaged, make few large shards of many small ones.

All of it runs beside jobs that read and write. New shards are on the disk before old ones go, so a kill in between
leaves rows twice, never fewer. Two processes that compact at once do the same work twice at worst. Memory is bounded,
whatever the size of the store: one part of the key space is in it at a time.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dpo_scale.disk.atomic import is_abandoned, is_temporary, naming, sync_folder
from dpo_scale.errors import StoreError
from dpo_scale.progress import noting_activity
from dpo_scale.reference.store import DAMAGED_DIR, Book, retried
from dpo_scale.reference.store_manifest import MANIFEST_FILE, Manifest, now, read_manifest, write_manifest
from dpo_scale.reference.store_rows import Merged, Rows, concatenate, merge, without
from dpo_scale.reference.store_shard import DamagedError, Shard, write_shard

TARGET_SHARD_BYTES = 64 << 20  # small against the memory of a process that maps one
_PART_BYTES = 32 << 20  # of the key space that is merged at a time
_RETIRED = ".retired-"


@dataclass
class Findings:
    """What `verify_book` found.

    Attributes:
        damaged: files that cannot be used, or not wholly, and why.
        rows: different rows in the files that can be used; `copies` further ones have the key of one of these.
        differing: copies whose values differ from those that are served; `largest_difference` of a sum, in nats.
        temporary: files left by writers that are gone.
    """

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
    return retried(folder, lambda: _verify(folder))


def _verify(folder: Path) -> Findings:
    findings = Findings(temporary=sum(is_temporary(path) and is_abandoned(path) for path in _files(folder)))
    whole: list[Shard] = []
    for checked in _checked_files(folder):
        if checked.shard is not None:
            findings.shards += 1
            findings.nbytes += checked.shard.nbytes
            if checked.damage is None:
                whole.append(checked.shard)
        if checked.damage is not None:
            findings.damaged.append((checked.path, checked.damage))
    if (damage := _manifest_damage(folder, needed=findings.shards > 0)) is not None:
        findings.damaged.append((folder / MANIFEST_FILE, damage))
    for part in merged_parts(whole):
        findings.rows_with_tokens += len(part[0].rows)
        for merged in part:
            findings.rows += len(merged.rows)
            findings.copies += merged.copies
            findings.differing += merged.differing
            findings.largest_difference = max(findings.largest_difference, merged.largest_difference)
    return findings


def merged_parts(shards: Sequence[Shard]) -> Iterator[tuple[Merged, Merged]]:
    """The rows of all shards in the order of their keys, each key once, a bounded part at a time.

    Keys are hashes, so equal ranges of them hold about equally many rows.

    Returns:
        for each part the rows that have per-token values, and the others.
    """
    parts = -(-sum(shard.nbytes for shard in shards) // _PART_BYTES)
    inner = np.array([[(part << 64) // parts, 0] for part in range(1, parts)], np.uint64).reshape(-1, 2)
    edges = []
    for shard in noting_activity(shards):
        edges.append([0, *shard.lower_bound(inner).tolist(), len(shard)])
        shard.close()
    for part in range(parts):
        found: dict[bool, list[Rows]] = {True: [], False: []}
        for shard, of_shard in zip(noting_activity(shards), edges, strict=True):
            begin, end = of_shard[part : part + 2]
            if begin < end:
                found[shard.has_tokens].append(shard.rows(begin, end))
            shard.close()
        rich, plain = merge(found[True], tokens=True), merge(found[False], tokens=False)
        # a row that has tokens is the same row without them, and more: see `Book.lookup`
        yield rich, without(plain, rich.rows)


def compact_book(folder: Path, *, drop_damaged: bool = False, grace_hours: float = 0.0) -> Compaction:
    """Rewrite a book as few large shards with every row once, and remove what killed writers left.

    The result depends on the rows alone: compacting twice, or what is compact already, changes no file.

    Args:
        drop_damaged: move files that are damaged or foreign to `damaged/` in the store, after saving the rows of theirs
            that are whole. Without it they are an error, and nothing is changed.
        grace_hours: keep the old shards that long under another name. A job on this machine that has them mapped
            keeps them anyway; one on another machine, over NFS, would be cut off.

    Raises:
        DamagedError, StoreError: as opening the book, unless `drop_damaged`.
        NewerVersionError: if it holds files of a newer format.
    """
    set_aside = _set_damaged_aside(folder) if drop_damaged else []
    return retried(folder, lambda: _compact(folder, grace_hours, set_aside))


def _compact(folder: Path, grace_hours: float, set_aside: list[Path]) -> Compaction:
    book = Book(folder)
    for shard in book.shards:
        if bad := shard.damaged_groups():
            raise DamagedError(shard.path, f"checksums of {len(bad)} groups of rows")
    result = Compaction(len(book.shards), bytes_before=book.nbytes, set_aside=set_aside)
    if book.shards:
        # taken from the old shards, so that equal rows give equal files
        newest = max(book.shards, key=lambda shard: (shard.metadata["created"], shard.metadata["tool"]))
        metadata = book.manifest.shard_metadata(newest.metadata["created"], newest.metadata["tool"])
        streams = [_ShardStream(folder, metadata, tokens=tokens) for tokens in (True, False)]
        for part in merged_parts(book.shards):
            for stream, merged in zip(streams, part, strict=True):
                stream.add(merged.rows)
                result.rows += len(merged.rows)
                result.copies += merged.copies
        written = {path for stream in streams for path in stream.finish()}
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
        self._folder, self._metadata, self._tokens = folder, metadata, tokens
        self._waiting = concatenate([], tokens=tokens)
        self._paths: list[Path] = []

    def add(self, rows: Rows) -> None:
        self._waiting = concatenate([self._waiting, rows], tokens=self._tokens)
        while self._waiting.row_bytes().sum() > TARGET_SHARD_BYTES:
            ends = np.cumsum(self._waiting.row_bytes())
            self._write(max(int(np.searchsorted(ends, TARGET_SHARD_BYTES)), 1))

    def finish(self) -> list[Path]:
        if len(self._waiting):
            self._write(len(self._waiting))
        return self._paths

    def _write(self, count: int) -> None:
        self._paths.append(write_shard(self._folder, self._waiting.take(slice(0, count)), self._metadata))
        self._waiting = self._waiting.take(slice(count, None))


def _set_damaged_aside(folder: Path) -> list[Path]:
    """Save what is whole of damaged shards, move the files that are not, and mend the manifest."""
    removed: list[Path] = []
    manifest: Manifest | None = None
    saved: dict[bool, list[Rows]] = {True: [], False: []}
    for path, shard, bad, damage in _checked_files(folder):
        if shard is not None:
            manifest = manifest or Manifest.from_shard_metadata(shard.metadata)
            if damage is not None:
                whole = (group for group in range(-(-len(shard) // shard.rows_per_group)) if group not in bad)
                begins = (group * shard.rows_per_group for group in whole)
                saved[shard.has_tokens] += [shard.rows(begin, begin + shard.rows_per_group) for begin in begins]
        if damage is not None:
            removed.append(path)
    if _manifest_damage(folder, needed=manifest is not None) is not None:
        if (folder / MANIFEST_FILE).exists():
            _move_aside(folder / MANIFEST_FILE)
        if manifest is not None:
            write_manifest(folder, replace(manifest, updated=now()))
    for tokens, parts in saved.items():
        rows = merge(parts, tokens=tokens).rows
        if len(rows):
            assert manifest is not None
            write_shard(folder, rows, manifest.shard_metadata(now()))
    return [_move_aside(path) for path in removed]


class _Checked(NamedTuple):
    """A file of a book that should be a shard: what it is, the groups of rows that are damaged, and what is wrong."""

    path: Path
    shard: Shard | None
    bad_groups: list[int]
    damage: str | None


def _checked_files(folder: Path) -> Iterator[_Checked]:
    """Every file of a book but its manifest and what writing left, all its bytes read."""
    for path in _files(folder):
        if path.name.startswith(".") or path.name == MANIFEST_FILE:
            continue
        try:
            shard = Shard(path)
        except DamagedError as error:
            yield _Checked(path, None, [], error.reason)
        else:
            bad = shard.damaged_groups()
            yield _Checked(path, shard, bad, f"checksums of {len(bad)} groups of rows" if bad else None)


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
    with naming(folder, StoreError, to="read"):
        entries = sorted(folder.iterdir())
    return [
        path
        for path in entries
        if not path.name.startswith(".") or is_temporary(path) or path.name.startswith(_RETIRED)
    ]


def _manifest_damage(folder: Path, *, needed: bool) -> str | None:
    """What is wrong with the manifest; a newer version is an error that is raised."""
    try:
        missing = read_manifest(folder) is None
    except DamagedError as error:
        return error.reason
    return "it is missing" if missing and needed else None
