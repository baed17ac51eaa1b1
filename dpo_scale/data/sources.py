"""Any preference file to rows: where a source's files are, what they hold, and their rows one by one.

A row leaves here as a `Record`: its number, and its undecoded JSON, its columns, or why it cannot be read. So bad rows
of every format are counted, reported and skipped in one place, `data.cache`.

JSON and CSV have tolerant readers of our own, since Arrow's refuse a whole file for one row. Parquet, saved folders and
hub names go through pyarrow and `datasets`.
"""

from __future__ import annotations

import csv
import difflib
import glob
import gzip
import hashlib
import io
import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, cast

from dpo_scale.data.json_rows import MAX_ROW_BYTES, read_json, read_lines
from dpo_scale.errors import DataError
from dpo_scale.settings.data import SourceSettings

FORMATS = {f".{name}": name for name in ("json", "jsonl", "csv", "tsv", "parquet")} | {".ndjson": "jsonl"}
FORMATS_TEXT = ".json, .jsonl, .ndjson, .csv, .tsv (each also as .gz) or .parquet"
BUILTIN = "builtin:"
_UNDECODED = re.compile("[\udc80-\udcff]")  # what `surrogateescape` makes of bytes that aren't UTF-8
_ARROW_ROWS = 256  # rows of an Arrow table turned into Python objects at a time


class RowProblem(Exception):
    """Why one row cannot be used. Who catches it adds the file and the row's number."""


# row number from 1 (line number in JSON Lines), content
Record = tuple[int, bytes | dict[str, Any] | RowProblem]


@dataclass(frozen=True)
class DataFile:
    """One file (or saved or hub data set) of a source.

    Attributes:
        label: how messages name it.
        format: `json`, `jsonl`, `csv`, `tsv`, `parquet` or `datasets`.
        identity: hash of what it holds, apart from its name and place.
    """

    label: str
    format: str
    identity: str
    path: Path | None = None
    gzipped: bool = False
    dataset: Any = None  # of `datasets`, for that format

    def records(self) -> Iterator[Record]:
        """The rows in order, numbered from 1.

        Raises:
            DataError: naming the file if it cannot be read on.
        """
        number = 0
        try:
            for record in self._records():
                number = record[0]
                yield record
        except DataError:
            raise
        except (OSError, EOFError, zlib.error, ValueError) as error:  # pyarrow's are ValueErrors and OSErrors
            after = f" (after row {number})" if number else ""
            kind = f"gzipped {self.format}" if self.gzipped else self.format
            raise DataError(f"{self.label}: cannot be read as {kind}{after}: {_one_line(error)}") from None

    def _records(self) -> Iterator[Record]:
        if self.format == "datasets":
            yield from _table_rows(self.dataset.with_format("arrow").iter(batch_size=_ARROW_ROWS))
        elif self.format == "parquet":
            import pyarrow.parquet as pq

            with pq.ParquetFile(self.path) as file:
                yield from _table_rows(file.iter_batches(batch_size=_ARROW_ROWS))
        else:
            with self._open() as stream:
                if self.format == "json":
                    yield from read_json(stream, self.label)
                elif self.format == "jsonl":
                    yield from read_lines(stream, self.label)
                else:
                    yield from _csv_rows(stream, self.label, "\t" if self.format == "tsv" else ",")

    def _open(self) -> BinaryIO:
        assert self.path is not None
        return cast(BinaryIO, gzip.open(self.path, "rb") if self.gzipped else open(self.path, "rb"))


def parse_record(content: bytes | dict[str, Any] | RowProblem) -> dict[str, Any]:
    """A record's columns.

    Raises:
        RowProblem: if it is not UTF-8, not JSON, or no object.
    """
    if isinstance(content, dict):
        return content
    if isinstance(content, RowProblem):
        raise content
    try:
        row = json.loads(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise RowProblem(f"not UTF-8: byte 0x{content[error.start]:02x} at byte {error.start + 1} of it") from None
    except json.JSONDecodeError as error:
        raise RowProblem(f"malformed JSON: {error.msg} (character {error.pos + 1})") from None
    except (ValueError, RecursionError) as error:
        raise RowProblem(f"malformed JSON: {_one_line(error)}") from None
    if not isinstance(row, dict):
        raise RowProblem(f"expected an object with prompt, chosen and rejected, found {type_name(row)}")
    return row


def find_files(source: SourceSettings) -> list[DataFile]:
    """The files that a source stands for, in a fixed order.

    Raises:
        DataError: if there are none, one is empty or of an unknown kind, or a folder or hub name cannot be loaded.
    """
    path = source.path
    if path.startswith(BUILTIN):
        return [_builtin_file(path)]
    local = Path(path).expanduser()
    if local.is_dir():
        return _folder(local, source)
    if local.exists():
        return [_local_file(local, path)]
    if any(character in path for character in "*?["):
        matches = sorted(match for match in glob.glob(str(local), recursive=True) if Path(match).is_file())
        if not matches:
            raise DataError(f"{path}: no file matches this pattern")
        return [_local_file(Path(match), match) for match in matches]
    if re.fullmatch(r"[\w.-]+/[\w.-]+|[\w-]+", path) and _format_of(local)[0] is None:
        return [_hub_dataset(source)]
    raise DataError(f"{path}: no such file or folder{_nearest_name(local)}")


def type_name(value: Any) -> str:
    """A JSON value's type as a message names it."""
    names = {dict: "an object", list: "a list", str: "text", bool: "true/false", int: "a number", float: "a number"}
    return "null" if value is None else names.get(type(value), type(value).__name__)


def _one_line(error: object) -> str:
    return " ".join(str(error).split())[:300]


def _format_of(path: Path) -> tuple[str | None, bool]:
    gzipped = path.suffix.lower() == ".gz"
    name = FORMATS.get((path.with_suffix("") if gzipped else path).suffix.lower())
    return (None, gzipped) if gzipped and name == "parquet" else (name, gzipped)


def _local_file(path: Path, label: str) -> DataFile:
    kind, gzipped = _format_of(path)
    if kind is None:
        raise DataError(f"{label}: unknown kind of file; expected {FORMATS_TEXT}")
    if path.stat().st_size == 0:
        raise DataError(f"{label}: the file is empty")
    return DataFile(label, kind, f"{kind}{'.gz' if gzipped else ''}:{_hash_files([path])}", path, gzipped)


def _builtin_file(path: str) -> DataFile:
    folder = resources.files("dpo_scale") / "builtin_data"
    known = sorted(item.name.removesuffix(".jsonl") for item in folder.iterdir() if item.name.endswith(".jsonl"))
    name = path.removeprefix(BUILTIN)
    if name not in known:
        raise DataError(f"{path}: no such built-in data; there are {', '.join(BUILTIN + item for item in known)}")
    return _local_file(Path(str(folder / f"{name}.jsonl")), path)


def _folder(folder: Path, source: SourceSettings) -> list[DataFile]:
    if not any((folder / name).exists() for name in ("dataset_dict.json", "state.json")):
        files = sorted(item for item in folder.iterdir() if item.is_file() and _format_of(item)[0])
        if not files:
            raise DataError(f"{source.path}: neither saved by `datasets` nor a folder with {FORMATS_TEXT} files")
        return [_local_file(item, str(item)) for item in files]
    import datasets

    label = source.path
    try:
        dataset = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{label}: cannot be loaded as a folder saved by `datasets`: {_one_line(error)}") from None
    if isinstance(dataset, datasets.DatasetDict):
        if source.split not in dataset:
            raise DataError(f"{label}: no split {source.split!r}; there are {', '.join(dataset)}")
        dataset, folder, label = dataset[source.split], folder / source.split, f"{label} [{source.split}]"
    identity = _hash_files(sorted(item for item in folder.rglob("*") if item.is_file()))
    return [DataFile(label, "datasets", f"datasets:{identity}", dataset=dataset)]


def _hub_dataset(source: SourceSettings) -> DataFile:
    import datasets

    try:
        dataset = datasets.load_dataset(source.path, source.name, split=source.split)
    except Exception as error:  # the hub client raises errors of many libraries, all of them about this name
        raise DataError(
            f"{source.path}: no such file or folder, and it cannot be loaded from the hub "
            f"(split {source.split!r}): {_one_line(error)}"
        ) from None
    # `datasets` derives the fingerprint from the revision, files and split that it loaded
    subset = f"/{source.name}" if source.name else ""
    label = f"{source.path}{subset} [{source.split}]"
    return DataFile(label, "datasets", f"hub:{source.path}:{source.name}:{dataset._fingerprint}", dataset=dataset)


def _hash_files(paths: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        if len(paths) > 1:
            digest.update(f"{path.name}:{path.stat().st_size}\n".encode())
        try:
            with open(path, "rb") as stream:
                while block := stream.read(1 << 20):
                    digest.update(block)
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    return digest.hexdigest()


def _nearest_name(path: Path) -> str:
    if not path.parent.is_dir():
        return f"; the folder {path.parent} does not exist either"
    near = difflib.get_close_matches(path.name, [item.name for item in path.parent.iterdir()], n=1)
    return f"; did you mean {path.parent / near[0]}?" if near else ""


def _table_rows(batches: Iterator[Any]) -> Iterator[Record]:
    """Rows of Arrow record batches or tables. Text that isn't UTF-8 spoils its own row only."""
    rows = chain.from_iterable(map(_rows_of_batch, batches))
    return enumerate(rows, start=1)


def _rows_of_batch(batch: Any) -> list[Any]:
    try:
        return batch.to_pylist()
    except UnicodeDecodeError as error:
        if batch.num_rows == 1:
            return [RowProblem(f"not UTF-8: {error.reason}")]
        return [row for i in range(batch.num_rows) for row in _rows_of_batch(batch.slice(i, 1))]


def _csv_rows(stream: BinaryIO, label: str, delimiter: str) -> Iterator[Record]:
    """Rows of a CSV file with a header. Cells that hold a JSON list of messages become that list."""
    csv.field_size_limit(MAX_ROW_BYTES)
    # bytes that aren't UTF-8 become lone surrogates, which are found row by row
    text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
    reader = csv.reader(text, delimiter=delimiter)
    header: list[str] | None = None
    number = 0
    while True:
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            number += 1
            yield number, RowProblem(f"malformed CSV: {error}")
            continue
        if header is None:
            header = cells
            if len(set(header)) < len(header):
                raise DataError(f"{label}: a column is named twice in the header: {', '.join(header)}")
            continue
        if not cells:
            continue
        number += 1
        if len(cells) != len(header):
            yield number, RowProblem(f"{len(cells)} fields where the header has {len(header)}")
        elif any(map(_UNDECODED.search, cells)):
            yield number, RowProblem("not UTF-8")
        else:
            yield number, dict(zip(header, map(_messages_or_text, cells), strict=True))


def _messages_or_text(cell: str) -> Any:
    if not cell.lstrip().startswith(("[", "{")):
        return cell
    try:
        value = json.loads(cell)
    except (ValueError, RecursionError):
        return cell
    items = value if isinstance(value, list) else [value]
    is_message = [isinstance(item, dict) and ("role" in item or "from" in item) for item in items]
    return value if is_message and all(is_message) else cell
