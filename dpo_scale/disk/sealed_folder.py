"""A folder with a signed manifest that vouches for every byte in it: the size and checksum of each file.

Checkpoints and exported models are such folders. Sizes are compared whenever a folder is looked at, which costs
nothing. Checksums are compared before anything in it is used. The checksum is XXH3 (128 bits), which runs at more than
10 GB/s a core, faster than the disk. It finds damage, not malice: whoever can change a file can also change the
manifest. So what is read from a folder must be harmless however it got there.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import xxhash

from dpo_scale.disk.atomic import naming
from dpo_scale.disk.signed_json import read_signed, write_signed
from dpo_scale.errors import UserError
from dpo_scale.progress import note_activity

_CHUNK = 1 << 24  # bytes between two notes of activity
_SYNC = 1 << 30  # bytes that one sync puts on the disk at most, so that none takes minutes


class SealedFile:
    """A file object that hashes what it is given. After an error of the file system it swallows the rest.

    Serializers are not made to fail halfway: torch's throws again while it unwinds. So the first error waits in `error`
    until they are done.

    Attributes:
        error: the first error of the file system, or None.
    """

    def __init__(self, path: Path):
        self._path = path
        self._hash = xxhash.xxh3_128()
        self._size = self._synced = 0
        self.error: OSError | None = None
        self._file = self._attempt(lambda: open(path, "xb"))  # noqa: SIM115 (closed by `seal`)

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        for start in range(0, view.nbytes, _CHUNK):
            chunk = view[start : start + _CHUNK]
            if self.error is None:
                self._attempt(partial(self._file.write, chunk))
                self._hash.update(chunk)
                self._size += chunk.nbytes
            if self.error is None and self._size - self._synced >= _SYNC:
                self._attempt(self._sync)
            note_activity()
        return view.nbytes

    def flush(self) -> None:
        """Nothing to do before `seal`; serializers call it."""

    def seal(self) -> dict[str, Any]:
        """Put everything on the disk and close; the entry for the manifest.

        Raises:
            OSError: the first error since the file was opened.
        """
        if self._file is not None:
            self._attempt(self._sync)
            self._attempt(self._file.close)
        if self.error is not None:
            raise self.error
        _drop_from_page_cache(self._path)
        return {"bytes": self._size, "xxh3_128": self._hash.hexdigest()}

    def _sync(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._synced = self._size
        note_activity()

    def _attempt(self, action: Callable[[], Any]) -> Any:
        try:
            return action()
        except OSError as error:
            self.error = self.error or error
            return None


def _drop_from_page_cache(path: Path) -> None:
    """Make reading the file back tell what is on the disk, and leave the page cache to the training data."""
    if hasattr(os, "posix_fadvise"):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def describe_files(folder: Path) -> dict[str, dict[str, Any]]:
    """Put all files in a folder and below it on the disk; their entries for the manifest."""
    entries = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
        note_activity()
        entries[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "xxh3_128": _checksum(path)}
    return entries


def write_manifest(path: Path, content: dict[str, Any], files: dict[str, dict[str, Any]]) -> None:
    """Write `content` and the entries of the files as a signed manifest.

    Raises:
        OSError: if it can't be written.
    """
    write_signed(path, {**content, "files": dict(sorted(files.items()))})


def read_manifest(path: Path, error: type[UserError]) -> dict[str, Any]:
    """A manifest's content, its own checksum and the form of its file entries verified.

    Raises:
        error: naming the file, if it is missing or is not what was written.
    """
    try:
        with naming(path, error, to="read"):
            if not path.exists():
                raise error(f"{path.parent}: incomplete: it has no {path.name}")
            content = read_signed(path)
        for name, entry in content["files"].items():
            if not _is_inside(name):
                raise error(f"{path}: names a file outside its folder: {name!r}")
            if not (isinstance(entry["bytes"], int) and isinstance(entry["xxh3_128"], str)):
                raise TypeError
    except error:
        raise
    except (KeyError, TypeError, AttributeError):
        raise error(f"{path}: damaged: not a manifest") from None
    except ValueError as reason:
        raise error(f"{path}: damaged: {reason}") from None
    return content


def damage(
    folder: Path, files: dict[str, dict[str, Any]], *, checksums: bool, only: Iterable[str] | None = None
) -> list[str]:
    """What is wrong with the files of a folder, each finding naming the file; empty if nothing is.

    Args:
        files: the manifest's entries.
        checksums: also read the files and compare their checksums.
        only: the names to look at, of all.
    """
    found = []
    for name in files if only is None else only:
        path, entry = folder / name, files[name]
        try:
            size = path.stat().st_size if path.is_file() else None
            if size is None:
                found.append(f"{name} is missing")
            elif size != entry["bytes"]:
                found.append(f"{name} has {size} bytes, expected {entry['bytes']}")
            elif checksums and _checksum(path) != entry["xxh3_128"]:
                found.append(f"{name} is damaged: its checksum differs")
        except OSError as error:
            found.append(f"{name} cannot be read: {error.strerror}")
    return found


def _checksum(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with open(path, "rb", buffering=0) as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            note_activity()
    return digest.hexdigest()


def _is_inside(name: str) -> bool:
    """Whether a manifest's file name stays in its folder, also on systems with other separators."""
    parts = PurePosixPath(name).parts
    return bool(parts) and not any(part in ("..", "/") or "\\" in part or ":" in part for part in parts)
