"""Reference values out of a store and into it: parquet for anyone to read, columns that others have computed.

What comes in goes to a book of its own, marked as imported. Nobody here knows how it was computed, so it never answers
for values of this package's numerics.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dpo_scale.data.cache import tokenize_source
from dpo_scale.data.dataset import PairDataset
from dpo_scale.data.sources import RowProblem, find_files, parse_record
from dpo_scale.data.tokenize import PairTokenizer
from dpo_scale.disk.atomic import naming
from dpo_scale.errors import DataError, StoreError
from dpo_scale.reference.store import Book
from dpo_scale.reference.store_rows import Rows, as_keys, contains, first_not_below
from dpo_scale.reference.store_upkeep import merged_parts
from dpo_scale.settings.data import DataSettings, SourceSettings

COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")  # TRL's names
_ROWS_PER_WRITE = 1 << 16


def export_parquet(
    book: Book, path: Path, *, pairs: Sequence[PairDataset] = (), decode: Callable[[np.ndarray], str] | None = None
) -> int:
    """Write a book's rows to a parquet file, in the order of their keys, each once.

    Columns: `pair_key` (hex), `ref_chosen_logps`, `ref_rejected_logps`, `chosen_tokens`, `rejected_tokens`, and the
    per-token values as `ref_chosen_token_logps`, `ref_rejected_token_logps` where a row has them, else null. With
    `pairs`, only rows of these, with their texts as `prompt`, `chosen`, `rejected`.

    Args:
        pairs: data sets to take rows and texts from.
        decode: int32 ids to text; needed with `pairs`.

    Returns:
        The number of rows.

    Raises:
        DamagedError: if a shard is not what was written.
        StoreError: if the file cannot be written.
    """
    schema = pa.schema(
        [("pair_key", pa.string())]
        + ([(name, pa.string()) for name in ("prompt", "chosen", "rejected")] if pairs else [])
        + [(name, pa.float32()) for name in COLUMNS]
        + [(name, pa.int32()) for name in ("chosen_tokens", "rejected_tokens")]
        + [(name, pa.list_(pa.float32())) for name in ("ref_chosen_token_logps", "ref_rejected_token_logps")]
    )
    texts = _TextsByKey(pairs, decode) if pairs and decode is not None else None
    written = 0
    with naming(path, StoreError, to="written"), pq.ParquetWriter(path, schema) as writer:
        for part in merged_parts(book.shards):
            for rows, *_ in part:
                chosen = rows if texts is None else rows.take(contains(texts.keys, rows.keys))
                for begin in range(0, len(chosen), _ROWS_PER_WRITE):
                    some = chosen.take(slice(begin, begin + _ROWS_PER_WRITE))
                    writer.write_table(pa.table(_columns(some, texts), schema=schema))
                    written += len(some)
    return written


def _columns(rows: Rows, texts: _TextsByKey | None) -> dict[str, Any]:
    columns: dict[str, Any] = {"pair_key": [key.tobytes().hex() for key in rows.keys.astype("<u8")]}
    if texts is not None:
        columns |= texts.of(rows.keys)
    for side, name in enumerate(("chosen", "rejected")):
        columns[f"ref_{name}_logps"] = rows.sums[:, side]
        columns[f"{name}_tokens"] = rows.counts[:, side]
        values: list[Any] = [None] * len(rows)
        if rows.tokens is not None:
            ends = np.cumsum(rows.counts.ravel(), dtype=np.int64)
            values = np.split(rows.tokens, ends[:-1])[side::2]
        columns[f"ref_{name}_token_logps"] = values
    return columns


class _TextsByKey:
    """The texts of pairs, by key. `keys` is uint64 [M, 2], sorted."""

    def __init__(self, datasets: Sequence[PairDataset], decode: Callable[[np.ndarray], str]):
        keys = np.concatenate([as_keys(data.pair_keys) for data in datasets])
        numbers = [(which, i) for which, data in enumerate(datasets) for i in range(len(data))]
        order = np.lexsort((keys[:, 1], keys[:, 0]))
        self.keys, self._places = keys[order], np.array(numbers, dtype=np.int64)[order]
        self._datasets, self._decode = datasets, decode

    def of(self, keys: np.ndarray) -> dict[str, list[str]]:
        places = self._places[first_not_below(self.keys, keys, 0, len(self.keys))].tolist()
        found = [self._datasets[which][i] for which, i in places]
        return {
            name: [self._decode(getattr(pair, f"{name}_ids")) for pair in found]
            for name in ("prompt", "chosen", "rejected")
        }


def column_rows(
    sources: Sequence[SourceSettings], settings: DataSettings, encoder: PairTokenizer, log: Callable[[str], None]
) -> Iterator[Rows]:
    """The values of the columns `ref_chosen_logps` and `ref_rejected_logps` of data files, a source at a time.

    Args:
        sources: files with these columns, tokenized as the whole `data:` section says.

    Raises:
        DataError: naming file and row where a value is missing or not a finite number, and whatever reading and
            tokenizing may raise.
    """
    for source in sources:
        pairs = tokenize_source(source, settings, encoder, log).pairs
        files, rows = pairs.origins()
        sums = np.empty((len(rows), 2), dtype=np.float32)
        for number, file in enumerate(find_files(settings.for_source(source))):
            mine = np.flatnonzero(files == number)
            wanted = dict(zip(rows[mine].tolist(), mine.tolist(), strict=True))
            for row, content in file.records():
                if row in wanted:  # the others were left out, as bad or too long
                    sums[wanted[row]] = _values(file.label, row, content)
        yield Rows(as_keys(pairs.pair_keys()), sums, np.ascontiguousarray(pairs.lengths[:, 1:]))


def _values(label: str, row: int, content: Any) -> list[float]:
    """What a row states in the two columns."""
    try:
        record = parse_record(content)
    except RowProblem as problem:
        raise DataError(f"{label} row {row}: {problem}") from None
    values = []
    for name in COLUMNS:
        value = record.get(name)
        try:
            number = math.nan if value is None or isinstance(value, bool) else float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not np.isfinite(np.float32(number)):
            raise DataError(
                f"{label} row {row}: {name} = {str(value)[:40]!r}, expected the completion's summed log-prob"
            )
        values.append(number)
    return values
