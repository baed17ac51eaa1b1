"""Which ranks see a folder that rank 0 sees: on several machines, whether they share it."""

from __future__ import annotations

import errno
import os
import socket
import time
import uuid
from pathlib import Path

from dpo_scale.disk.atomic import machine_id
from dpo_scale.distributed import ranks
from dpo_scale.errors import ConfigError

# Network file systems may show a new file late. Nobody has asked for this one before it is there, so NFS has not noted
# that there was none.
LAG_SECONDS = 20.0
_POLL_SECONDS = 0.1


def sees_folder_of_main(folder: Path, wait_seconds: float = LAG_SECONDS) -> list[bool]:
    """By rank, whether it finds in `folder` a file that rank 0 has just written there. Every rank must call it.

    Args:
        folder: made on rank 0 if it is not there.
        wait_seconds: how long a rank looks for the file.

    Raises:
        OSError: on every rank, if rank 0 can't write there.
    """
    if len(set(ranks.gather_objects(machine_id()))) == 1:
        return [True] * ranks.world_size()
    mark, error = folder / f".do-the-ranks-see-this-{uuid.uuid4().hex}", None
    if ranks.is_main():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            mark.write_text("A file that the ranks of a run look for, to find out whether they share this folder.\n")
        except OSError as failed:
            error = failed
    mark, error = ranks.from_main((mark, error))
    if error is not None:
        raise error
    until = time.monotonic() + wait_seconds
    while not (seen := _is_there(mark)) and time.monotonic() < until:
        time.sleep(_POLL_SECONDS)
    found = ranks.gather_objects(seen)
    if ranks.is_main():
        mark.unlink(missing_ok=True)
    return found


def _is_there(mark: Path) -> bool:
    """Whether a file is there. Listing its folder makes NFS ask the server again."""
    try:
        return mark.exists() or mark.name in os.listdir(mark.parent)
    except OSError:
        return False


def require_shared(
    folder: Path, setting: str, wait_seconds: float = LAG_SECONDS, *, may_be_read_only: bool = False
) -> None:
    """Refuse a folder that not every rank shares with rank 0. Every rank must call it.

    Args:
        setting: that names the folder, for the message.
        may_be_read_only: leave a folder that rank 0 may not write into unchecked, rather than refuse it.

    Raises:
        ConfigError: naming the folder and the machines that see another one.
    """
    try:
        seen = sees_folder_of_main(folder, wait_seconds)
    except OSError as error:
        if may_be_read_only and error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
            return
        raise ConfigError(f"{setting} = {str(folder)!r}: cannot be written: {error.strerror}") from None
    hosts = ranks.gather_objects(socket.gethostname())
    if not all(seen):
        blind = list(dict.fromkeys(host for host, sees in zip(hosts, seen, strict=True) if not sees))
        first = seen.index(False)
        more = f" and {len(blind) - 3} more" if len(blind) > 3 else ""
        raise ConfigError(
            f"{setting} = {str(folder)!r}: not the same folder on {', '.join(blind[:3])}{more} as on {hosts[0]}: rank "
            f"{first} does not see a file that rank 0 has written there, after {wait_seconds:g} s; give a folder that "
            "all machines share"
        )
