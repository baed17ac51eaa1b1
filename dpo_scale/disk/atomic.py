"""Files that are there whole or not at all, also after a kill, a power cut, or two writers at once.

Nothing is locked: locks are unreliable on network file systems and outlive a killed process. A file is written under a
temporary name of its own, synced, renamed, and its folder synced. So a reader sees the old file, the new one, or none.
The temporary name says who writes, so what a killed process left can be told from what a living one is writing.
"""

from __future__ import annotations

import functools
import hashlib
import os
import socket
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dpo_scale.errors import UserError

_PREFIX = ".writing-"
# A temporary file lives for the seconds that writing takes. By this age its writer is gone.
_ABANDONED_SECONDS = 3600.0


def write_atomically(path: Path, parts: Iterable[Any]) -> None:
    """Put the bytes of `parts` (bytes-like) into `path`, which appears when all of them are on the disk.

    Raises:
        OSError: if the folder cannot be written or the disk is full; nothing is left behind then.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f"{_PREFIX}{machine_id()}-{os.getpid()}-{uuid.uuid4().hex}"
    try:
        with open(temporary, "xb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make renames and removals in a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def naming(path: Path, error: type[UserError], *, to: str, advice: str = "") -> Iterator[None]:
    """Turn the file system's errors within the block into one line for the user.

    Args:
        to: what was tried: "read" or "written".
        advice: what to do about it.

    Raises:
        error: "PATH: cannot be read (Permission denied); ADVICE".
    """
    try:
        yield
    except OSError as problem:
        reason = f"{path}: cannot be {to} ({problem.strerror or problem})"
        raise error(f"{reason}; {advice}" if advice else reason) from None


def is_temporary(path: Path) -> bool:
    return path.name.startswith(_PREFIX)


def is_abandoned(path: Path) -> bool:
    """Whether a temporary file's writer is gone: dead on this machine, or, wherever it ran, silent for an hour."""
    try:
        silent = time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return False
    machine, pid, *_ = path.name.removeprefix(_PREFIX).split("-") + [""]
    here = machine == machine_id() and pid.isdecimal()
    return silent > _ABANDONED_SECONDS or (here and not _is_alive(int(pid)))


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


@functools.lru_cache(maxsize=1)
def machine_id() -> str:
    """Names the space in which process ids are unique: a container has its own, whatever its host is called."""
    parts = [socket.gethostname()]
    try:
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip())
        parts.append(str(os.stat("/proc/self/ns/pid").st_ino))
    except OSError:  # not Linux: the host's name has to do
        pass
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]
