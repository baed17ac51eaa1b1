"""Which folder a run writes to, and one run at a time in it.

A queue may start a job again while the ranks of the last try are still saving, and a person may start it twice. So
rank 0 holds a lock on `logs/lock` for as long as its process lives; the kernel gives it back whatever happens to the
process. Across nodes it works where the file system has `flock` (NFS does, Lustre if it is mounted with it).

A run that is refused before its first step takes the folder that it made away again.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from dpo_scale.checkpoint.load import Checkpoint, find_checkpoints
from dpo_scale.distributed import ranks
from dpo_scale.distributed.folders import require_shared
from dpo_scale.errors import ConfigError, UserError
from dpo_scale.run.rank_files import LOGS_DIR
from dpo_scale.settings.resume import CONFIG_FILE
from dpo_scale.settings.tree import Config

LOCK_FILE = "lock"
POLL_SECONDS = 0.2

_held: tuple[Path, IO[str]] | None = None
_made: list[Path] = []  # the folders that this process has made for its run, the outermost first


def agree_on_run_dir(config: Config, resume: str | None) -> tuple[Path, list[Checkpoint]]:
    """The run folder, made by rank 0, and the checkpoints that the run may start from, the best first."""
    # ranks that start in different seconds would name different folders
    config.output_dir = ranks.from_main(config.output_dir)
    assert config.output_dir is not None
    run_dir = Path(config.output_dir)
    grace = config.checkpoint.preempt_grace_seconds
    if resume and ranks.is_main() and run_dir.is_dir():
        hold_run_dir(run_dir, grace)  # until a run that is saving its last checkpoint is done
    ranks.barrier()
    found = find_checkpoints(resume, run_dir) if resume else []
    in_run_dir = bool(found) and found[0].path.resolve().parents[1] == run_dir.resolve()
    continues = in_run_dir or resume in ("latest", "auto")
    if ranks.is_main():
        if not continues and (run_dir / CONFIG_FILE).exists():
            raise ConfigError(
                f"output_dir = {config.output_dir!r}: there is a run in it already; give another folder, or --resume"
            )
        hold_run_dir(run_dir, grace if continues else 0.0)
    try:
        require_shared(run_dir, "output_dir")
    except ConfigError:
        _take_away(run_dir)
        raise
    return run_dir, found


def hold_run_dir(run_dir: Path, wait_seconds: float) -> None:
    """Lock a run folder, made if it is not there, until this process ends or locks another one.

    Args:
        wait_seconds: how long a run that is ending there may take.

    Raises:
        ConfigError: if another process keeps its lock for longer, naming it; or if the folder can't be made.
    """
    global _held
    if _held is not None:
        if _held[0] == run_dir:
            return
        _held[1].close()
        _held = None
    try:
        _made[:] = [path for path in (*reversed(run_dir.parents), run_dir) if not path.exists()]
        (run_dir / LOGS_DIR).mkdir(parents=True, exist_ok=True)
        file = open(run_dir / LOGS_DIR / LOCK_FILE, "a+")  # noqa: SIM115 (open while the run lasts)
    except OSError as error:
        raise ConfigError(f"output_dir = {str(run_dir)!r}: cannot be made: {error.strerror}") from None
    until = time.monotonic() + wait_seconds
    while not _try(file):
        if time.monotonic() >= until:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise ConfigError(f"output_dir = {str(run_dir)!r}: a run is going on in it ({holder})")
        time.sleep(POLL_SECONDS)
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    _held = run_dir, file


def _try(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextmanager
def removed_if_refused(run_dir: Path) -> Iterator[None]:
    """Take the run folder away again if this launch made it and a `UserError` ends what is done inside."""
    try:
        yield
        _made.clear()
    except UserError:
        _take_away(run_dir)
        raise


def _take_away(run_dir: Path) -> None:
    """Remove the run folder, and those that it was made in, if they are this process's and nothing has begun there."""
    if run_dir not in _made or (run_dir / CONFIG_FILE).exists():
        return
    for _ in range(10):  # another rank may write its position meanwhile
        shutil.rmtree(run_dir, ignore_errors=True)
        if not run_dir.exists():
            break
    for path in reversed(_made[: _made.index(run_dir)]):
        try:
            path.rmdir()
        except OSError:  # something else is in it by now
            break


@contextmanager
def writing_into(run_dir: Path) -> Iterator[None]:
    """Rank 0's writes of its first files: an `OSError` becomes a `ConfigError` that names the folder."""
    try:
        yield
    except OSError as error:
        raise ConfigError(f"output_dir = {str(run_dir)!r}: cannot be written: {error.strerror}") from None
