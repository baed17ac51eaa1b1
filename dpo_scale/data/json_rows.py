"""JSON files cut into rows without reading them whole and without trusting them.

`datasets` and Arrow refuse a whole file for one bad row, and say neither which row nor why. Here a file is only cut
into byte strings, one a row, quickly and in bounded memory. Each is decoded and parsed later, on its own (and in
parallel), so one bad row is one bad row. Lines are easily cut. Arrays are cut by a scanner that follows strings and
brackets with one regular expression. Where a bracket or quote is missing it loses its footing. The file then ends with
an error that names the row, never silently.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import BinaryIO

from dpo_scale.errors import DataError

MAX_ROW_BYTES = 64 << 20  # a longer row means a missing bracket, quote or line end
_READ_BYTES = 1 << 20
_HEAD_BYTES = 1 << 16
_BOM = b"\xef\xbb\xbf"

# a whole string, a string still open at the buffer's end, or a structural character
_TOKEN = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"|["\[\]{},]', re.DOTALL)
_SCALAR = rb'(?:"[^"\\]*(?:\\.[^"\\]*)*"|[-+.\deE]+|true|false|null)'
# {"version": 1, "data": [{
_WRAPPED = re.compile(rb'\s*\{\s*(?:"[^"\\]*"\s*:\s*' + _SCALAR + rb'\s*,\s*)*"data"\s*:\s*\[(?=\s*[\]{])', re.DOTALL)


def read_lines(stream: BinaryIO, label: str) -> Iterator[tuple[int, bytes]]:
    """(line number from 1, bytes) of every line that isn't blank.

    Raises:
        DataError: naming `label` and the line if a line is longer than `MAX_ROW_BYTES`.
    """
    number = 0
    while line := stream.readline(MAX_ROW_BYTES + 1):
        number += 1
        if len(line) > MAX_ROW_BYTES:
            raise DataError(f"{label} row {number}: longer than {MAX_ROW_BYTES >> 20} MiB: is this JSON Lines?")
        if number == 1:
            line = line.removeprefix(_BOM)
        if line.strip():
            yield number, line.rstrip(b"\r\n")


def read_json(stream: BinaryIO, label: str) -> Iterator[tuple[int, bytes]]:
    """(row number from 1, bytes) of every row of a .json file.

    The file is an array of objects, `{"data": [...]}`, or objects one after another (JSON Lines named .json).

    Raises:
        DataError: if the file ends within a row, or goes on after its array.
    """
    head = stream.read(_HEAD_BYTES).removeprefix(_BOM)
    start = head.lstrip()
    if not start:
        return
    if start.startswith(b"["):
        yield from _read_values(stream, head[len(head) - len(start) + 1 :], label, in_array=True)
    elif wrapped := _WRAPPED.match(head):
        yield from _read_values(stream, head[wrapped.end() :], label, in_array=True, more_may_follow=True)
    elif _is_object(start.partition(b"\n")[0]):
        stream.seek(0)  # one object a line: lines are safer to cut than brackets
        yield from read_lines(stream, label)
    else:
        yield from _read_values(stream, head, label, in_array=False)


def _read_values(
    stream: BinaryIO, buffer: bytes, label: str, *, in_array: bool, more_may_follow: bool = False
) -> Iterator[tuple[int, bytes]]:
    """Cut an array's elements (the buffer starts behind its `[`) or a sequence of objects."""
    number, depth = 1, 0
    start = scan_from = 0  # of the row being read, and where to go on looking
    while True:
        for token in _TOKEN.finditer(buffer, scan_from):
            character = token.group()
            if character == b'"':
                scan_from = token.start()  # the string goes on behind the buffer
                break
            scan_from = token.end()
            ends_array = in_array and depth == 0 and character == b"]"
            ends_row = ends_array or (in_array and depth == 0 and character == b",")
            if character in (b"{", b"["):
                depth += 1
            elif character in (b"}", b"]") and depth > 0:
                depth -= 1
                ends_row = depth == 0 and not in_array
            if not ends_row:
                continue
            row = buffer[start : token.start() if in_array else token.end()]
            if row.strip() or not ends_array:
                yield number, row
            if ends_array:
                rest = b"" if more_may_follow else buffer[token.end() :] + stream.read(_HEAD_BYTES)
                if rest.strip():
                    raise DataError(
                        f"{label}: text follows the array's end (after row {number}); expected one array of objects"
                    )
                return
            number, start = number + 1, scan_from
        if len(buffer) - start > MAX_ROW_BYTES:
            raise _never_ends(label, number)
        # An open string is looked at again from its start, so reading more each time keeps the work linear.
        more = stream.read(max(_READ_BYTES, len(buffer) - start))
        if not more:
            break
        buffer = buffer[start:] + more
        scan_from, start = scan_from - start, 0
    rest = buffer[start:]
    if in_array or (depth > 0 and rest.strip()):
        raise _never_ends(label, number)
    if rest.strip():
        yield number, rest


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line.decode("utf-8")), dict)
    except (ValueError, RecursionError):
        return False


def _never_ends(label: str, number: int) -> DataError:
    return DataError(
        f"{label} row {number}: the file ends within it: a bracket, quote or the array's end is missing, "
        "and what follows cannot be cut into rows (in JSON Lines a bad row does not spoil the next)"
    )
