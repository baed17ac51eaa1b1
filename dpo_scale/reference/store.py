"""The store: reference log-probs on disk, found by content, grown by any number of jobs, never silently wrong.

A store is a folder of books, one for each model and numerics; a book is a folder of immutable shards
(`dpo_scale.reference.shard`). Whoever computes values only ever adds files of their own, so jobs need no locks, a
kill loses at most the rows that were not yet flushed, and a reader needs nothing but the folder's listing. What
that costs is that two jobs may write the same row; it is read once, and stored once after `compact`
(`dpo_scale.reference.upkeep`).

    store = ReferenceStore(folder)
    book = store.book(BookKey(fingerprint, numerics), model={"path": ...})
    found, sums, counts = book.lookup(dataset.pair_keys)
    with book.writer() as writer:
        writer.add(keys, sums, counts)
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, TypeVar

import numpy as np

from dpo_scale.errors import StoreError
from dpo_scale.progress import noting_activity
from dpo_scale.reference.manifest import MANIFEST_FILE, BookKey, Manifest, now, read_manifest, write_manifest
from dpo_scale.reference.rows import Rows, as_keys, merge, ragged_index, sum_bits
from dpo_scale.reference.shard import (
    FORMAT_VERSION,
    DamagedError,
    NewerVersionError,
    Shard,
    rows_in_name,
    shard_version,
    write_shard,
)

DAMAGED_DIR = "damaged"  # in a store: what `compact --drop-damaged` took out of its books
_BOOK_NAME = re.compile("[0-9a-f]{32}")
# Mapped pages count as a process's own memory, though all share them, and one touch may bring in megabytes around it.
# Beyond this much, shards are let go of right after use; the first ones stay, since mapping pages again takes time.
_RESIDENT_BYTES = 144 << 20
# Every map holds a file descriptor, of which a process may have but 1024; beyond, shards are mapped as they are used.
_MAX_MAPPED_SHARDS = 256
_LOOKUP_BATCH = 1 << 15
# While another process removes what it compacted, the listing changes file by file: about eight seconds of patience.
_LISTING_TRIES = 20
_T = TypeVar("_T")


class Lookup(NamedTuple):
    """Values of M keys, in their order.

    Attributes:
        found: bool [M].
        sums: fp32 [M, 2], summed log-probs of chosen and rejected; NaN where not found.
        counts: int32 [M, 2], their tokens; 0 where not found.
    """

    found: np.ndarray
    sums: np.ndarray
    counts: np.ndarray


class TokenLookup(NamedTuple):
    """Per-token values of M keys, in their order.

    Attributes:
        found: bool [M].
        values: fp32 [T]; completion j's (2i for pair i's chosen, 2i + 1 for its rejected) are
            `values[offsets[j]:offsets[j + 1]]`, none where not found.
        offsets: int64 [2M + 1].
    """

    found: np.ndarray
    values: np.ndarray
    offsets: np.ndarray


class ReferenceStore:
    """A folder of books; it and its folders come into being with the first rows written.

    Raises:
        StoreError: if the folder is something else.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder).expanduser()
        if self.folder.exists() and not self.folder.is_dir():
            raise StoreError(f"{self.folder}: a file, expected the folder of a reference store")
        self._book_folders()

    def books(self) -> list[Book]:
        """All books, opened, in the order of their creation.

        Raises:
            StoreError: as `Book`.
        """
        books = [Book(folder) for folder in self._book_folders()]
        return sorted(books, key=lambda book: (book.manifest.created, book.folder.name))

    def book_folders(self) -> list[Path]:
        """The folders of all books, unopened."""
        return sorted(self._book_folders())

    def book(self, key: BookKey, model: dict[str, str] | None = None) -> Book:
        """The book of a key, empty if nothing was written yet.

        Args:
            model: describes the model to a reader, if the book does not exist yet.
        """
        return Book(self.folder / key.id, Manifest(key, model or {}))

    def _book_folders(self) -> list[Path]:
        if not self.folder.exists():
            return []
        entries = [entry for entry in self.folder.iterdir() if not entry.name.startswith(".")]
        books = [entry for entry in entries if _BOOK_NAME.fullmatch(entry.name) and entry.is_dir()]
        foreign = sorted(set(entries) - set(books) - {self.folder / DAMAGED_DIR})
        if foreign:
            raise StoreError(
                f"{self.folder}: not a reference store, or not only: {foreign[0].name} is none of its books; expected "
                "an empty folder, or one that launch/precompute.py filled"
            )
        return books


class Book:
    """The rows of one model and numerics.

    Opening reads the listing, the manifest, and each shard's header and index: a few kilobytes a shard.

    Attributes:
        folder: named after the key.
        manifest: what the book is.

    Raises:
        DamagedError, NewerVersionError: naming a file that cannot be used.
        StoreError: naming a foreign file, or a folder without anything that says what it is.
    """

    def __init__(self, folder: Path, expected: Manifest | None = None):
        self.folder = folder
        self._shards: dict[str, Shard] = {}
        self.refresh()
        found = read_manifest(folder)
        if found is None and self._shards:
            raise DamagedError(folder / MANIFEST_FILE, "it is missing")
        if found is None and expected is None:
            raise StoreError(f"{folder}: holds neither manifest nor shards; it can be deleted")
        manifest = found or expected
        assert manifest is not None and manifest.key.id == folder.name
        self.manifest = manifest

    @property
    def shards(self) -> list[Shard]:
        """Those with per-token values first, then by name."""
        return sorted(self._shards.values(), key=lambda shard: (not shard.has_tokens, shard.path.name))

    @property
    def num_rows(self) -> int:
        """Rows in all shards; those that two jobs wrote count twice until they are compacted."""
        return sum(map(len, self._shards.values()))

    @property
    def nbytes(self) -> int:
        return sum(shard.nbytes for shard in self._shards.values())

    def refresh(self) -> None:
        """See the shards that were added, by this process or others, and not those that were compacted away."""
        for attempt in range(_LISTING_TRIES):
            if attempt:
                time.sleep(min(0.5, 0.005 * 2**attempt))
            names = self._list()
            try:
                opened = {name: self._shards.get(name) or self._open(self.folder / name) for name in names}
            except FileNotFoundError:
                continue
            # A listing taken while another process compacts may lack both the old shards and the new one.
            if self._list() == names:
                self._shards = opened
                return
        raise StoreError(f"{self.folder}: its files keep changing; is something else than dpo_scale writing there?")

    def lookup(self, pair_keys: np.ndarray) -> Lookup:
        """The values of pairs.

        Args:
            pair_keys: uint8 [M, 16] or uint64 [M, 2].

        Raises:
            DamagedError: if a file that is needed for the answer is not what was written.
        """
        keys = as_keys(pair_keys)
        parts = [
            self._with_all_shards(self._lookup, keys[i : i + _LOOKUP_BATCH])
            for i in range(0, max(len(keys), 1), _LOOKUP_BATCH)
        ]
        return Lookup(*map(np.concatenate, zip(*parts, strict=True)))

    def lookup_tokens(self, pair_keys: np.ndarray) -> TokenLookup:
        """The per-token values of pairs; only rows that were written with them are found.

        Args:
            pair_keys: uint8 [M, 16] or uint64 [M, 2].

        Raises:
            DamagedError: if a file that is needed for the answer is not what was written.
        """
        return self._with_all_shards(self._lookup_tokens, as_keys(pair_keys))

    def writer(
        self, *, tokens: bool = False, rows_per_shard: int = 65536, seconds_per_shard: float = 60.0
    ) -> BookWriter:
        """A `BookWriter`; `tokens` says that per-token values will be given with every row."""
        return BookWriter(self, tokens, rows_per_shard, seconds_per_shard)

    def write_manifest(self) -> None:
        """Bring the readable description up to date with the folder's listing."""
        known = read_manifest(self.folder) or self.manifest
        names = self._list()
        self.manifest = replace(
            self.manifest,
            created=known.created or now(),
            updated=now(),
            rows=sum(map(rows_in_name, names)),
            shards=len(names),
        )
        write_manifest(self.folder, self.manifest)

    def _list(self) -> list[str]:
        """The names of all shards. What writing leaves in between begins with a dot and is passed over."""
        try:
            names = sorted(entry.name for entry in self.folder.iterdir() if not entry.name.startswith("."))
        except FileNotFoundError:
            return []
        except OSError as error:
            raise StoreError(f"{self.folder}: cannot be read: {error.strerror}") from None
        shards = [name for name in names if name != MANIFEST_FILE]
        for name in shards:
            version = shard_version(name)
            if version is None:
                raise DamagedError(self.folder / name, "its name is not that of a file of a reference store")
            if version != FORMAT_VERSION:
                raise NewerVersionError(self.folder / name, version)
        return shards

    def _open(self, path: Path) -> Shard:
        shard = Shard(path)
        if shard.metadata["book"] != self.folder.name:
            raise DamagedError(path, f"it is a shard of book {shard.metadata['book']}, not of this one")
        return shard

    def _with_all_shards(self, look_up: Callable[[np.ndarray], _T], keys: np.ndarray) -> _T:
        for _ in range(_LISTING_TRIES):
            try:
                return look_up(keys)
            except FileNotFoundError:  # compacted away by another process since the listing was read
                self.refresh()
        raise StoreError(f"{self.folder}: its files keep changing; is something else than dpo_scale writing there?")

    def _each(self, shards: list[Shard]) -> Iterator[Shard]:
        """The shards one by one, each let go of when the next is asked for, as far as memory asks for it."""
        for shard in noting_activity(shards):
            yield shard
            if len(shards) > _MAX_MAPPED_SHARDS:
                shard.close()
            elif shard.in_use and sum(one.nbytes for one in shards if one.in_use) > _RESIDENT_BYTES:
                shard.release()

    def _lookup(self, keys: np.ndarray) -> Lookup:
        found, with_tokens = np.zeros(len(keys), bool), np.zeros(len(keys), bool)
        sums = np.full((len(keys), 2), np.nan, np.float32)
        counts = np.zeros((len(keys), 2), np.int32)
        for shard in self._each(self.shards):
            # all shards are asked for every key, so that of copies that differ always the same one is served
            asked = np.flatnonzero(~with_tokens) if not shard.has_tokens else np.arange(len(keys))
            rows = shard.find(keys[asked])
            asked, rows = asked[rows >= 0], rows[rows >= 0]
            if len(rows) == 0:
                continue
            new_sums, new_counts = shard.values(rows)
            better = ~found[asked] | (sum_bits(new_sums) < sum_bits(sums[asked]))
            sums[asked[better]], counts[asked[better]] = new_sums[better], new_counts[better]
            found[asked] = True
            with_tokens[asked] |= shard.has_tokens
        return Lookup(found, sums, counts)

    def _lookup_tokens(self, keys: np.ndarray) -> TokenLookup:
        found = np.zeros(len(keys), bool)
        sums, counts = np.zeros((len(keys), 2), np.float32), np.zeros((len(keys), 2), np.int32)
        source, starts = np.full(len(keys), -1), np.zeros(len(keys), np.int64)
        shards = [shard for shard in self.shards if shard.has_tokens]
        for number, shard in enumerate(self._each(shards)):
            rows = shard.find(keys)
            asked = np.flatnonzero(rows >= 0)
            rows = rows[asked]
            if len(rows) == 0:
                continue
            new_sums, new_counts = shard.values(rows)
            better = ~found[asked] | (sum_bits(new_sums) < sum_bits(sums[asked]))
            asked, rows = asked[better], rows[better]
            sums[asked], counts[asked] = new_sums[better], new_counts[better]
            starts[asked] = shard.token_ranges(rows)[0]
            source[asked], found[asked] = number, True
        offsets = np.concatenate([[0], np.cumsum(counts.reshape(-1), dtype=np.int64)])
        values = np.zeros(offsets[-1], np.float32)
        for number, shard in enumerate(self._each(shards)):
            mine = np.flatnonzero(source == number)
            if len(mine) == 0:
                continue
            lengths = counts[mine].sum(axis=1, dtype=np.int64)
            places = ragged_index(starts[mine], lengths)
            values[ragged_index(offsets[2 * mine], lengths)] = shard.tokens(places)
        return TokenLookup(found, values, offsets)


def _copy(tokens: np.ndarray | None) -> np.ndarray | None:
    return None if tokens is None else np.array(tokens, np.float32)


class BookWriter:
    """Adds rows to a book, in shards that are on the disk for good as soon as they have their name.

    A context manager: leaving it writes what is buffered, also after an error, since rows that were added are
    whole.
    """

    def __init__(self, book: Book, tokens: bool, rows_per_shard: int, seconds_per_shard: float):
        self._book, self._tokens = book, tokens
        self._rows_per_shard, self._seconds_per_shard = rows_per_shard, seconds_per_shard
        self._waiting: list[Rows] = []
        self._last_flush = time.monotonic()

    def add(
        self, pair_keys: np.ndarray, sums: np.ndarray, counts: np.ndarray, tokens: np.ndarray | None = None
    ) -> None:
        """Take N rows; they are written with the next shard.

        Args:
            pair_keys: uint8 [N, 16] or uint64 [N, 2].
            sums: fp32 [N, 2].
            counts: integers [N, 2].
            tokens: fp32 [counts.sum()], row by row, chosen before rejected, if the writer was made for them.

        Raises:
            StoreError: if a value is not finite, or a shard cannot be written.
        """
        assert (tokens is not None) == self._tokens, "per-token values go with all rows of a writer, or with none"
        sums = np.asarray(sums, dtype=np.float32)
        for values in (sums, tokens):
            if values is not None and not np.isfinite(values).all():
                raise StoreError(
                    f"{self._book.folder.parent}: the reference gave a log-prob that is not finite; it was not stored"
                )
        rows = Rows(as_keys(pair_keys).copy(), sums.copy(), np.array(counts, np.int32), _copy(tokens))
        self._waiting.append(rows)
        full = sum(map(len, self._waiting)) >= self._rows_per_shard
        if full or time.monotonic() - self._last_flush >= self._seconds_per_shard:
            self.flush()

    def flush(self) -> None:
        """Put all rows that were added onto the disk.

        Raises:
            StoreError: if the folder cannot be written; the rows stay waiting.
        """
        rows, *_ = merge(self._waiting, tokens=self._tokens)
        if len(rows):
            if not (self._book.folder / MANIFEST_FILE).exists():
                self._book.write_manifest()
            write_shard(self._book.folder, rows, self._book.manifest.shard_metadata(now()))
        self._waiting.clear()
        self._last_flush = time.monotonic()

    def __enter__(self) -> BookWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.flush()
        if self._book.folder.exists():
            self._book.write_manifest()
            self._book.refresh()
