"""Checkpoints are saved: complete or absent, and in the background if that is wanted.

All files of a checkpoint are written under a temporary name, synced and read back. Then one rename makes it visible. A
save that fails on any rank (a full disk, a quota, a folder that is gone) fails on all, is cleaned up and leaves the run
alive with its older checkpoints; the next one is tried when it is due.

    start    every rank hands DeepSpeed a `HeldFiles` to write into; in the background it keeps copies in host memory
    write    files, sync, read back; the ranks agree; rank 0 commits and drops what is not kept
    wait     for the result, before the next start at the latest

In the background `write` runs in a thread of each rank, and the threads agree over a group of their own.
"""

from __future__ import annotations

import os
import shutil
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from dpo_scale import __version__
from dpo_scale.checkpoint.compatibility import Identity
from dpo_scale.checkpoint.load import FORMAT_VERSION, TrainState, checkpoint_folders, checkpoint_path, listed, step_of
from dpo_scale.disk.atomic import sync_folder
from dpo_scale.disk.sealed_folder import damage, write_manifest
from dpo_scale.distributed import ranks
from dpo_scale.distributed.random_state import random_state
from dpo_scale.models.scorer import Policy
from dpo_scale.reference.protocol import Reference
from dpo_scale.settings.resume import CHECKPOINTS_DIR, MANIFEST_FILE

_LEFTOVERS = (".incomplete", ".replaced", ".removed")
THREAD_NAME = "checkpoint"  # of those that save in the background
LAG_SECONDS = 65.0  # how late a network file system may show a file of another machine
_POLL_SECONDS = 0.2


class Saver:
    """Saves the checkpoints of one run, one at a time. Every rank has one and calls it alike.

    Args:
        keep: checkpoints that stay beside the best one; None: all.
        in_background: copy the state to host memory and write it while training goes on.
        timeout_minutes: how long a rank may wait in the background for the others.
    """

    def __init__(
        self,
        run_dir: Path,
        identity: Identity,
        *,
        keep: int | None,
        in_background: bool = False,
        timeout_minutes: float = 30.0,
    ) -> None:
        self._run_dir, self._identity, self._keep = run_dir, identity, keep
        self.in_background = in_background
        self._thread = ThreadPoolExecutor(1, THREAD_NAME) if in_background else None
        self._group = ranks.new_group(timeout_minutes) if in_background else None
        self._begun: Future[bool] | None = None

    def start(self, policy: Policy, state: TrainState, reference: Reference) -> None:
        """Begin to save the run's state as `checkpoints/step-N/`, after the save before is done.

        Frozen weights (under an adapter) are not in it: they are those of `model.path`. Checkpoints of later steps are
        dropped once it is there: the run was resumed from before them and has taken another course. So are the oldest
        beyond `keep`, but for the best. Nothing is dropped before the new one has been read back from the disk.
        """
        from dpo_scale.checkpoint.deepspeed_files import HeldFiles, own_file

        self.wait()
        began = time.monotonic()
        final = checkpoint_path(self._run_dir, state.step)
        temporary = final.with_name(f"{final.name}.incomplete")
        files = HeldFiles(hold=self._thread is not None)
        if ranks.is_main():
            remove_leftovers(self._run_dir)
            files.makedirs(str(temporary), exist_ok=True)
        ranks.barrier()
        policy.checkpoint_engine = files
        # DeepSpeed's scripts are of no use here, and an error in copying them would leave the other ranks in a barrier
        policy._copy_recovery_script = lambda folder: None
        policy.save_checkpoint(
            str(temporary.parent), tag=temporary.name, save_latest=False, exclude_frozen_parameters=True
        )
        if kept := reference.state():
            files.save(kept, str(temporary / own_file("reference")))
        files.save(random_state(), str(temporary / own_file("random")))
        save = _Save(temporary, final, replace(state), files, began)
        if self._thread is None:
            self._begun = Future()
            self._begun.set_result(write(save, self._identity, self._run_dir, self._keep, None))
        else:
            files.finish_copies()
            save.stood_still = time.monotonic() - began
            self._begun = self._thread.submit(write, save, self._identity, self._run_dir, self._keep, self._group)

    def wait(self) -> bool:
        """Wait for the save that was begun last; whether it is on the disk, True if none was begun."""
        return self._begun is None or self._begun.result()


@dataclass
class _Save:
    """A checkpoint that is to be written.

    Attributes:
        began: when, by the monotonic clock.
        stood_still: seconds that training waited; None: as long as the save takes.
    """

    temporary: Path
    final: Path
    state: TrainState
    files: Any
    began: float
    stood_still: float | None = None


def write(save: _Save, identity: Identity, run_dir: Path, keep: int | None, group: Any) -> bool:
    """Write a checkpoint's files and commit it; whether that worked on all ranks. Every rank must call it.

    Where it did not, nothing is left of it, and a warning says why.
    """
    files, temporary, step = save.files, save.temporary, save.state.step
    files.write()
    unread = [] if files.error else damage(temporary, files.written, checksums=True)
    problem = _reason(files.error) if files.error else listed(unread) if unread else None
    problems = ranks.gather_objects(problem, group)
    written = {name: entry for entries in ranks.gather_objects(files.written, group) for name, entry in entries.items()}
    if not any(problems):
        problems[0] = ranks.from_main(_commit(save, identity, written) if ranks.is_main() else None, group)
    saved = not any(problems)
    if saved:
        seconds = time.monotonic() - save.began
        stood_still = seconds if save.stood_still is None else save.stood_still
        ranks.log(f"checkpoint of step {step} saved in {seconds:.2f} s; training stood still for {stood_still:.2f} s")
    else:
        why = "; ".join(f"rank {rank}: {text}" for rank, text in enumerate(problems) if text)
        ranks.log(
            f"WARNING: the checkpoint of step {step} could not be saved ({why}); nothing is left of it. "
            "The run goes on and tries again when the next one is due"
        )
    if ranks.is_main():
        if saved:
            _drop_others(run_dir, keep, save.state)
        remove_leftovers(run_dir)
    ranks.barrier(group)
    return saved


def _commit(save: _Save, identity: Identity, files: dict[str, dict[str, Any]]) -> str | None:
    """Write the manifest and give the folder its final name; what went wrong, if anything did."""
    if unseen := _not_seen(save.temporary, files):
        return f"files of other ranks are not in {save.temporary.parent} here: {listed(unseen)}"
    record = {
        "about": "A checkpoint of a training run; launch/train.py --resume reads it.",
        "format_version": FORMAT_VERSION,
        "tool": f"dpo_scale {__version__}",
        "state": asdict(save.state),
        "identity": asdict(identity),
    }
    final = save.final
    try:
        write_manifest(save.temporary / MANIFEST_FILE, record, files)
        if final.exists():  # of a course that was left, or damaged
            os.replace(final, final.with_name(f"{final.name}.replaced"))
        os.replace(save.temporary, final)
        sync_folder(final.parent)
    except OSError as error:
        return _reason(error)
    return None


def _not_seen(folder: Path, files: dict[str, dict[str, Any]]) -> list[str]:
    """The files that are not there in their sizes, after as long as a network file system may lag."""
    until = time.monotonic() + LAG_SECONDS
    while (found := damage(folder, files, checksums=False)) and time.monotonic() < until:
        time.sleep(_POLL_SECONDS)
        os.listdir(folder)  # makes NFS ask the server again
    return found


def remove_leftovers(run_dir: Path) -> None:
    """Remove what saves that were killed or failed have left. Rank 0 alone may call it."""
    for suffix in _LEFTOVERS:
        for path in (run_dir / CHECKPOINTS_DIR).glob(f"step-*{suffix}"):
            shutil.rmtree(path, ignore_errors=True)


def _reason(error: OSError) -> str:
    return f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}"


def _drop_others(run_dir: Path, keep: int | None, state: TrainState) -> None:
    found = checkpoint_folders(run_dir)
    up_to_now = [path for path in found if step_of(path) <= state.step]
    kept = up_to_now if keep is None else up_to_now[-keep:]
    for path in found:
        if path not in kept and step_of(path) != state.best_step:
            # renamed first, so that no half of it is ever taken for a checkpoint
            os.replace(path, path.with_name(f"{path.name}.removed"))
