"""Tokenizes a source once and keeps the result on disk under a hash of everything that decides it.

The hash covers the files' bytes, the tokenizer, the chat template, the settings that matter and this code's version.
Nothing else counts: a renamed or moved file hits; a changed row, template or length misses. A cache is built under a
temporary name and renamed when it is complete, so a reader sees all of it or nothing, and of two builders at once one
wins. Rows stream through in chunks, in order. So memory does not grow with the data, and the result is the same for any
number of processes.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pyarrow as pa

from dpo_scale.data.pair_file import SCHEMA, PairFile
from dpo_scale.data.schemas import SCHEMAS, Columns, columns_of, detect_schema
from dpo_scale.data.sources import DataFile, RowProblem, find_files, parse_record
from dpo_scale.data.tokenize import PairTokenizer
from dpo_scale.data.workers import RowTokenizer, read_chunks, run_chunks
from dpo_scale.disk.atomic import naming
from dpo_scale.disk.cache import cache_folder
from dpo_scale.errors import DataError
from dpo_scale.progress import note_activity
from dpo_scale.settings.data import DataSettings, SourceSettings

CACHE_VERSION = 1  # of the reading, rendering, tokenizing and file format: raise it when any of these changes
_DETECT_ROWS = 64
_CHUNKS_PER_BATCH = 16
_PROGRESS_SECONDS = 15.0
_STALE_SECONDS = 24 * 3600

PAIRS_FILE, META_FILE, BAD_ROWS_FILE = "pairs.arrow", "meta.json", "bad_rows.jsonl"
COUNTS = (
    *("rows", "kept", "bad", "prompt_cut", "completion_cut", "overlong"),
    *("identical_after_cut", "multi_turn", "generation_prompt_differs"),
)


@dataclass(frozen=True)
class BadRow:
    """A row that was left out, and why."""

    file: str
    row: int
    reason: str


@dataclass(frozen=True)
class TokenizedSource:
    """A source's pairs, and what became of its rows.

    Attributes:
        schema, columns: as detected or named.
        counts: of rows, by what became of them (`COUNTS`).
        cached: whether the pairs were there already.
    """

    pairs: PairFile
    schema: str
    columns: tuple[str, str, str]
    counts: dict[str, int]
    bad_rows: list[BadRow]
    cached: bool
    seconds: float


def tokenize_source(
    source: SourceSettings, settings: DataSettings, tokenizer: PairTokenizer, log: Callable[[str], None]
) -> TokenizedSource:
    """The tokenized pairs of a source, from the cache or made now.

    Raises:
        DataError: for a source that cannot be read, rows of no known schema, a bad row under `on_bad_row: error`, or
            no usable row at all.
    """
    began = time.monotonic()
    source = settings.for_source(source)
    files = find_files(source)
    folder = tokenized_folder(settings) / _cache_key(source, files, tokenizer)
    result = _open(folder, files, log, began, cached=True)
    if result is None:
        with _building_folder(folder) as building:
            _build(building, source, files, settings, tokenizer, log)
        result = _open(folder, files, log, began, cached=False)
        assert result is not None, f"{folder} was just built"
    if result.bad_rows and settings.on_bad_row == "error":
        raise _bad_row_error(result.bad_rows[0])
    if len(result.pairs) == 0:
        raise _nothing_left(source.path, result)
    return result


def tokenized_folder(settings: DataSettings) -> Path:
    root = Path(settings.cache_dir).expanduser() if settings.cache_dir else cache_folder()
    return root / "tokenized"


def _cache_key(source: SourceSettings, files: list[DataFile], tokenizer: PairTokenizer) -> str:
    columns = [source.schema, source.prompt_column, source.chosen_column, source.rejected_column]
    parts = [CACHE_VERSION, columns, [file.identity for file in files], tokenizer.identity]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _open(
    folder: Path, files: list[DataFile], log: Callable[[str], None], began: float, *, cached: bool
) -> TokenizedSource | None:
    """The cache in a folder; None if there is none, or it is damaged (and then removed)."""
    if not folder.exists():
        return None
    labels = [file.label for file in files]
    try:
        meta = json.loads((folder / META_FILE).read_text(encoding="utf-8"))
        pairs = PairFile(folder / PAIRS_FILE, labels)
        with open(folder / BAD_ROWS_FILE, encoding="utf-8") as stream:
            bad = [json.loads(line) for line in stream]
        bad_rows = [BadRow(labels[item["file"]], item["row"], item["reason"]) for item in bad]
        found = {"kept": len(pairs), "bad": len(bad_rows), "keys": pairs.keys_digest}
        expected = {"kept": meta["counts"]["kept"], "bad": meta["counts"]["bad"], "keys": meta["keys_digest"]}
        if found != expected:
            raise ValueError(f"it holds {found}, expected {expected}")
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        log(f"tokenized data in {folder} is damaged and made anew: {' '.join(str(error).split())[:200]}")
        shutil.rmtree(folder, ignore_errors=True)
        return None
    columns, seconds = tuple(meta["columns"]), time.monotonic() - began
    return TokenizedSource(pairs, meta["schema"], columns, meta["counts"], bad_rows, cached, seconds)


@contextmanager
def _building_folder(final: Path) -> Iterator[Path]:
    """A temporary folder that takes the name `final` on success, unless another process was quicker."""
    root = final.parent
    with naming(root, DataError, to="written", advice="set data.cache_dir to a folder that can"):
        root.mkdir(parents=True, exist_ok=True)
        for left in root.glob("building-*"):  # by processes that were killed
            if time.time() - left.stat().st_mtime > _STALE_SECONDS:
                shutil.rmtree(left, ignore_errors=True)
        building = root / f"building-{uuid.uuid4().hex}"
        building.mkdir()
        try:
            yield building
            try:
                building.rename(final)
            except OSError:
                if not final.exists():
                    raise
        finally:
            shutil.rmtree(building, ignore_errors=True)


def _build(
    folder: Path,
    source: SourceSettings,
    files: list[DataFile],
    settings: DataSettings,
    tokenizer: PairTokenizer,
    log: Callable[[str], None],
) -> None:
    columns, found_columns = _find_schema(source, files)
    if SCHEMAS[columns.schema].of_messages and not tokenizer.chat:
        raise DataError(
            f"{files[0].label}: rows are messages (schema {columns.schema}), which need a chat template, but "
            "the tokenizer has none or data.chat_template is 'none'; set data.chat_template"
        )
    counts: Counter[str] = Counter()
    last_line = time.monotonic()
    with (
        pa.OSFile(str(folder / PAIRS_FILE), "wb") as sink,
        pa.ipc.new_file(sink, SCHEMA) as writer,
        open(folder / BAD_ROWS_FILE, "w", encoding="utf-8") as bad_rows,
    ):
        waiting: list[Any] = []
        for result in run_chunks(read_chunks(files), RowTokenizer(tokenizer, columns), settings.num_proc):
            note_activity()
            for row, reason in result.bad:
                if settings.on_bad_row == "error":
                    raise _bad_row_error(BadRow(files[result.file].label, row, reason))
                bad_rows.write(json.dumps({"file": result.file, "row": row, "reason": reason}) + "\n")
            counts.update(result.counts)
            waiting.append(result.batch)
            if len(waiting) == _CHUNKS_PER_BATCH:
                _write(writer, waiting)
            if time.monotonic() - last_line > _PROGRESS_SECONDS:
                last_line = time.monotonic()
                log(f"{source.path}: {counts['rows']} rows tokenized")
        _write(writer, waiting)
    if counts["rows"] == 0:
        raise DataError(f"{files[0].label}: holds no rows")
    digest = PairFile(folder / PAIRS_FILE, [file.label for file in files]).keys_digest
    meta = {
        "schema": columns.schema,
        "columns": found_columns,
        "counts": {name: counts[name] for name in COUNTS},
        "keys_digest": digest,
    }
    (folder / META_FILE).write_text(json.dumps(meta, indent=1), encoding="utf-8")


def _write(writer: Any, waiting: list[Any]) -> None:
    """Write the waiting chunks as one record batch: fewer, larger batches open faster."""
    for batch in pa.Table.from_batches(waiting, schema=SCHEMA).combine_chunks().to_batches():
        if batch.num_rows:
            writer.write_batch(batch)
    waiting.clear()


def _find_schema(source: SourceSettings, files: list[DataFile]) -> tuple[Columns, list[str]]:
    """The schema of a source, from its settings or its first rows, and the columns it is read from."""
    rows: list[dict[str, Any]] = []
    problem: tuple[int, str] | None = None
    for number, content in islice(chain.from_iterable(file.records() for file in files), _DETECT_ROWS):
        try:
            rows.append(parse_record(content))
        except RowProblem as error:  # reported with the others when its turn comes, if some row can be read
            problem = problem or (number, str(error))
    schema = source.schema if source.schema != "auto" else detect_schema(rows, source)
    found = list(dict.fromkeys(name for row in rows for name in row))
    if schema is None:
        if not rows:
            if problem is None:
                raise DataError(f"{files[0].label}: holds no rows")
            raise DataError(f"{files[0].label} row {problem[0]}: {problem[1]}; nor can the rows after it be read")
        known = "; ".join(f"{name} ({known.meaning})" for name, known in SCHEMAS.items())
        raise DataError(
            f"{files[0].label}: the rows have no known schema; columns found: {', '.join(found)}; expected "
            f"one of: {known}. Columns of other names are given by data.prompt_column, chosen_column and "
            "rejected_column"
        )
    columns = columns_of(source, schema)
    missing = [name for name in columns.required if rows and name not in found]
    if missing:
        raise DataError(
            f"{files[0].label}: no column {', '.join(map(repr, missing))}, which schema {schema} takes; "
            f"columns found: {', '.join(found)}"
        )
    return columns, [name for name in SCHEMAS[schema].optional if name in found] + columns.required


def _bad_row_error(bad: BadRow) -> DataError:
    return DataError(f"{bad.file} row {bad.row}: {bad.reason} (data.on_bad_row=skip leaves such rows out)")


def _nothing_left(path: str, result: TokenizedSource) -> DataError:
    counts = result.counts
    bad = result.bad_rows[0] if result.bad_rows else None
    first = f"; the first is {bad.file} row {bad.row}: {bad.reason}" if bad else ""
    return DataError(
        f"{path}: none of the {counts['rows']} rows can be used ({counts['bad']} bad, {counts['overlong']} "
        f"longer than data.max_length, {counts['identical_after_cut']} with equal completions after cutting)" + first
    )
