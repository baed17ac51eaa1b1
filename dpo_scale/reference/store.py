"""The store: reference log-probs on disk, found by content, grown by any number of jobs, never silently wrong.

A store is a folder of books, one for each model and numerics. A book is a folder of immutable shards
(`store_shard`). Whoever computes values only adds files of their own. So jobs need no locks, a kill loses at most the
rows that were not yet flushed, and a reader needs nothing but the folder's listing. The price is that two jobs may
write the same row. It is served once, and stored once after `compact` (`store_upkeep`).

    store = ReferenceStore(folder)
    book = store.book(BookKey(fingerprint, numerics), model={"path": ...})
    found, sums, counts = book.lookup(dataset.pair_keys)
    with book.writer() as writer:
        writer.add(keys, sums, counts)
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, TypeVar

import numpy as np

from dpo_scale.disk.atomic import naming
from dpo_scale.errors import StoreError
from dpo_scale.progress import noting_activity
from dpo_scale.reference.store_manifest import MANIFEST_FILE, BookKey, Manifest, now, read_manifest, write_manifest
from dpo_scale.reference.store_rows import Rows, as_keys, merge, ragged_index, sum_bits
from dpo_scale.reference.store_shard import DamagedError, Shard, parse_name, write_shard

DAMAGED_DIR = "damaged"  # in a store: what `compact --drop-damaged` took out of its books
_BOOK_NAME = re.compile("[0-9a-f]{32}")
# Mapped pages count as a process's own memory, though all processes share them, and one touch may bring in megabytes.
# Beyond this much, shards are let go of right after use. The first ones stay, since mapping pages again takes time.
_RESIDENT_BYTES = 144 << 20
# Every map holds a file descriptor, and a process may have only 1024. Beyond this many, shards are mapped when used.
_MAX_MAPPED_SHARDS = 256
_LOOKUP_BATCH = 1 << 15
# While another process removes what it compacted, the listing changes file by file. This is about eight seconds.
_TRIES = 20
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
        self.book_folders()

    def books(self) -> list[Book]:
        """All books, opened, in the order of their creation.

        Raises:
            StoreError: as `Book`.
        """
        return sorted(map(Book, self.book_folders()), key=lambda book: (book.manifest.created, book.folder.name))

    def book(self, key: BookKey, model: dict[str, str] | None = None) -> Book:
        """The book of a key, empty if nothing was written yet.

        Args:
            model: describes the model to a reader, if the book does not exist yet.
        """
        return Book(self.folder / key.id, Manifest(key, model or {}))

    def book_folders(self) -> list[Path]:
        """The folders of all books, unopened, sorted by name."""
        if not self.folder.exists():
            return []
        entries = sorted(entry for entry in self.folder.iterdir() if not entry.name.startswith("."))
        books = [entry for entry in entries if _BOOK_NAME.fullmatch(entry.name) and entry.is_dir()]
        foreign = [entry for entry in entries if entry not in books and entry.name != DAMAGED_DIR]
        if foreign:
            raise StoreError(
                f"{self.folder}: not a reference store: {foreign[0].name} is no book of one; expected an empty "
                "folder, or one that launch/precompute.py filled"
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

        def open_all() -> dict[str, Shard]:
            names = self._list()
            opened = {name: self._shards.get(name) or Shard(self.folder / name) for name in names}
            # A listing taken while another process compacts may lack both the old shards and the new one.
            if self._list() != names:
                raise FileNotFoundError
            return opened

        self._shards = retried(self.folder, open_all)

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
        """As `lookup`, the per-token values; only rows that were written with them are found."""
        return self._with_all_shards(self._lookup_tokens, as_keys(pair_keys))

    def writer(
        self, *, tokens: bool = False, rows_per_shard: int = 65536, seconds_per_shard: float = 60.0
    ) -> BookWriter:
        """A `BookWriter`; `tokens` says that per-token values will be given with every row."""
        return BookWriter(self, tokens, rows_per_shard, seconds_per_shard)

    def write_manifest(self) -> None:
        """Bring the readable description up to date with the folder's listing."""
        created = (read_manifest(self.folder) or self.manifest).created or now()
        counts = self._list().values()
        self.manifest = replace(self.manifest, created=created, updated=now(), rows=sum(counts), shards=len(counts))
        write_manifest(self.folder, self.manifest)

    def _list(self) -> dict[str, int]:
        """The rows of all shards by name. What writing leaves in between begins with a dot and is passed over."""
        with naming(self.folder, StoreError, to="read"):
            entries = sorted(self.folder.iterdir()) if self.folder.exists() else []
        shards = [path for path in entries if not path.name.startswith(".") and path.name != MANIFEST_FILE]
        return {path.name: parse_name(path)[0] for path in shards}

    def _with_all_shards(self, look_up: Callable[[np.ndarray], _T], keys: np.ndarray) -> _T:
        def attempt() -> _T:
            try:
                return look_up(keys)
            except FileNotFoundError:
                self.refresh()
                raise

        return retried(self.folder, attempt)

    def _lookup(self, keys: np.ndarray) -> Lookup:
        served = _Served(keys)
        # A row that has tokens is the same row without them, and more.
        for tokens in (True, False):
            served.choose(self._each(has_tokens=tokens))
        return Lookup(served.found, served.sums, served.counts)

    def _lookup_tokens(self, keys: np.ndarray) -> TokenLookup:
        served = _Served(keys)
        served.choose(self._each(has_tokens=True))
        offsets = np.concatenate([[0], np.cumsum(served.counts.reshape(-1), dtype=np.int64)])
        values = np.zeros(offsets[-1], np.float32)
        for number, shard in enumerate(self._each(has_tokens=True)):
            mine = np.flatnonzero(served.sources == number)
            if len(mine):
                lengths = served.counts[mine].sum(axis=1, dtype=np.int64)
                values[ragged_index(offsets[2 * mine], lengths)] = shard.tokens(served.rows[mine])
        return TokenLookup(served.found, values, offsets)

    def _each(self, *, has_tokens: bool) -> Iterator[Shard]:
        """The shards with or without per-token values one by one, in the order of their names.

        Each is let go of when the next is asked for, as far as memory asks for it.
        """
        shards = [shard for shard in self.shards if shard.has_tokens == has_tokens]
        for shard in noting_activity(shards):
            yield shard
            if len(self._shards) > _MAX_MAPPED_SHARDS:
                shard.close()
            elif shard.in_use and sum(one.nbytes for one in self._shards.values() if one.in_use) > _RESIDENT_BYTES:
                shard.release()


class _Served:
    """The copy of each of M keys that is served, of all copies in the shards seen so far."""

    def __init__(self, keys: np.ndarray):
        self.keys = keys
        self.found = np.zeros(len(keys), bool)
        self.sums = np.full((len(keys), 2), np.nan, np.float32)
        self.counts = np.zeros((len(keys), 2), np.int32)
        self.sources = np.full(len(keys), -1)  # which of the shards last given to `choose` the copy is in
        self.rows = np.full(len(keys), -1)  # and in which of its rows

    def choose(self, shards: Iterable[Shard]) -> None:
        """Take the keys that are not found yet from these shards; of copies that differ always the same one."""
        left = np.flatnonzero(~self.found)
        for number, shard in enumerate(shards):
            rows = shard.find(self.keys[left])
            asked, rows = left[rows >= 0], rows[rows >= 0]
            if len(rows) == 0:
                continue
            sums, counts = shard.values(rows)
            better = ~self.found[asked] | (sum_bits(sums) < sum_bits(self.sums[asked]))
            chosen = asked[better]
            self.sums[chosen], self.counts[chosen], self.rows[chosen] = sums[better], counts[better], rows[better]
            self.found[chosen], self.sources[chosen] = True, number


def retried(folder: Path, action: Callable[[], _T]) -> _T:
    """What `action` returns, tried again where another process compacted away what it was looking at.

    Raises:
        StoreError: if it happens again and again.
    """
    for attempt in range(_TRIES):
        try:
            return action()
        except FileNotFoundError:
            time.sleep(min(0.5, 0.005 * 2**attempt))
    raise StoreError(f"{folder}: its files keep changing; is something else than dpo_scale writing there?")


class BookWriter:
    """Adds rows to a book, in shards that are on the disk for good as soon as they have their name.

    A context manager: leaving it writes what is buffered, also after an error, since rows that were added are whole.
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
        tokens = None if tokens is None else np.array(tokens, np.float32)
        rows = Rows(as_keys(pair_keys).copy(), np.array(sums, np.float32), np.array(counts, np.int32), tokens)
        if not all(np.isfinite(values).all() for values in (rows.sums, rows.tokens) if values is not None):
            raise StoreError(
                f"{self._book.folder.parent}: the reference gave a log-prob that is not finite; it was not stored"
            )
        self._waiting.append(rows)
        full = sum(map(len, self._waiting)) >= self._rows_per_shard
        if full or time.monotonic() - self._last_flush >= self._seconds_per_shard:
            self._flush()

    def _flush(self) -> None:
        rows = merge(self._waiting, tokens=self._tokens).rows
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
        self._flush()
        if self._book.folder.exists():
            self._book.write_manifest()
            self._book.refresh()
