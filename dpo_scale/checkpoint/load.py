"""Checkpoints on the disk: found again by step, verified, loaded.

`checkpoints/step-N/` holds DeepSpeed's files (weights, optimizer), each rank's random state and a manifest. The
manifest says how far the run was, what it was a run of, and the size and checksum of every file. A folder with that
name is a whole checkpoint, whatever was killed when it was written (`checkpoint.save`). If the disk damages it later,
the manifest tells.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dpo_scale.checkpoint.compatibility import Identity, check_identity
from dpo_scale.disk.sealed_folder import damage, read_manifest
from dpo_scale.distributed import ranks
from dpo_scale.distributed.random_state import restore_random_state, seed_everything
from dpo_scale.errors import CheckpointError
from dpo_scale.models.scorer import Policy
from dpo_scale.reference.protocol import Reference
from dpo_scale.settings.resume import CHECKPOINTS_DIR, MANIFEST_FILE

FORMAT_VERSION = 2
_STEP_DIR = re.compile(r"step-\d+")
_WRITER = re.compile(r"rank[-_](\d+)")


@dataclass
class TrainState:
    """How far a run is.

    Attributes:
        step: optimizer steps done.
        pairs, tokens: pairs and data tokens seen so far; of a pair, the prompt counts once and each completion once.
        best_metric, best_step: best held-out value of `checkpoint.metric_for_best_model`, and the step it was at.
        nonfinite_steps: steps left out because their loss or gradient was not finite (`train.on_nonfinite`).
        evaluation_due: whether the held-out pairs are still to be evaluated after this step.
    """

    step: int = 0
    pairs: int = 0
    tokens: int = 0
    best_metric: float | None = None
    best_step: int | None = None
    nonfinite_steps: int = 0
    evaluation_due: bool = False


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose manifest is whole and whose files all have their sizes; `files` are the manifest's entries."""

    path: Path
    state: TrainState
    identity: Identity
    files: dict[str, dict[str, Any]]


def checkpoint_path(run_dir: Path, step: int) -> Path:
    return run_dir / CHECKPOINTS_DIR / f"step-{step}"


def checkpoint_folders(run_dir: Path) -> list[Path]:
    """The folders with a checkpoint's name, by step, whole or damaged."""
    folder = run_dir / CHECKPOINTS_DIR
    return sorted((path for path in folder.glob("step-*") if _STEP_DIR.fullmatch(path.name)), key=step_of)


def open_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint's manifest and compare the sizes of its files.

    Raises:
        CheckpointError: naming what is missing, damaged, of another size or of another version.
    """
    manifest = read_manifest(path / MANIFEST_FILE, CheckpointError)
    version = manifest.get("format_version")
    if version != FORMAT_VERSION:
        raise CheckpointError(f"{path}: checkpoint format {version}, this version reads {FORMAT_VERSION}")
    try:
        state, identity = TrainState(**manifest["state"]), Identity(**manifest["identity"])
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{path / MANIFEST_FILE}: not of this version: {error}") from None
    _refuse_damaged(path, damage(path, manifest["files"], checksums=False))
    return Checkpoint(path, state, identity, manifest["files"])


def find_checkpoints(resume: str, output_dir: Path) -> list[Checkpoint]:
    """The checkpoints that `--resume` may mean, best first; those passed over are logged with the reason.

    Rank 0 looks and tells the others. Every rank must call it.

    Args:
        resume: "latest" (must exist), "auto" (empty if the run has none yet), a run folder, or a checkpoint folder.
        output_dir: the run that "latest" and "auto" look in.

    Raises:
        CheckpointError: if there is no checkpoint where one was expected, or if all are damaged.
    """
    found: list[Checkpoint] | CheckpointError = []
    if ranks.is_main():
        try:
            found = _find(resume, output_dir)
        except CheckpointError as error:
            found = error
    found = ranks.from_main(found)
    if isinstance(found, CheckpointError):
        raise found
    return found


def _find(resume: str, output_dir: Path) -> list[Checkpoint]:
    if names_a_checkpoint(resume):
        return [open_checkpoint(Path(resume))]
    run_dir = output_dir if resume in ("latest", "auto") else Path(resume)
    found, passed_over = [], []
    for path in reversed(checkpoint_folders(run_dir)):
        try:
            found.append(open_checkpoint(path))
        except CheckpointError as error:
            passed_over.append(error)
            ranks.log(f"not resuming from {error}")
    if not found and passed_over:
        raise CheckpointError(
            f"{run_dir}: none of its {len(passed_over)} checkpoints can be used; the newest: {passed_over[0]}; "
            "to start afresh all the same, move the folder away or name another output_dir"
        )
    if not found and resume != "auto":
        raise CheckpointError(
            f"{run_dir}: no complete checkpoint to resume from "
            f"(expected {CHECKPOINTS_DIR}/step-N with a {MANIFEST_FILE})"
        )
    return found


def names_a_checkpoint(resume: str) -> bool:
    """Whether `--resume` names one checkpoint: a folder with a manifest or, if that is missing, a checkpoint's name."""
    path = Path(resume)
    return (path / MANIFEST_FILE).exists() or (path.is_dir() and _STEP_DIR.fullmatch(path.name) is not None)


def choose_checkpoint(found: list[Checkpoint], identity: Identity, allow_changes: list[str]) -> Checkpoint | None:
    """The first checkpoint that has every byte it was written with; None if there are no checkpoints.

    Every rank must call it. Each reads the files of its own rank, so that they are in its page cache.

    Raises:
        CheckpointError: if one does not belong to this run, naming what differs, or if all are damaged.
    """
    for checkpoint in found:
        changed = check_identity(checkpoint.path, checkpoint.identity, identity, allow_changes)
        wrong = verify(checkpoint)
        if not wrong:
            for text in changed:
                ranks.log(f"changed since {checkpoint.path.name}: {text}")
            return checkpoint
        reason = f"{checkpoint.path}: damaged: {listed(wrong)}"
        if checkpoint is found[-1]:
            raise CheckpointError(f"{reason}; there is no older one to take instead")
        ranks.log(f"not resuming from {reason}")
    return None


def verify(checkpoint: Checkpoint) -> list[str]:
    """What is wrong with a checkpoint's bytes, on whichever rank; empty if nothing is. Every rank must call it."""
    writers = {name: int(match[1]) if (match := _WRITER.search(name)) else 0 for name in checkpoint.files}
    own = [name for name, rank in writers.items() if rank % ranks.world_size() == ranks.rank()]
    found = damage(checkpoint.path, checkpoint.files, checksums=True, only=own)
    return [text for texts in ranks.gather_objects(found) for text in texts]


def require_whole(checkpoint: Checkpoint) -> None:
    """Refuse a checkpoint that is not as it was written. Every rank must call it.

    Raises:
        CheckpointError: naming the files.
    """
    _refuse_damaged(checkpoint.path, verify(checkpoint))


def _refuse_damaged(path: Path, found: list[str]) -> None:
    if found:
        raise CheckpointError(f"{path}: damaged: {listed(found)}")


def load_checkpoint(policy: Policy, checkpoint: Checkpoint, reference: Reference) -> None:
    """Load weights, optimizer and random state into the policy's engine. Every rank must call it.

    On another number of ranks than the checkpoint's, the random state can't be taken over; dropout then draws anew.

    Args:
        checkpoint: verified (`choose_checkpoint`).
        reference: takes back what it keeps in checkpoints, if anything.

    Raises:
        CheckpointError: if DeepSpeed can't load it.
    """
    from dpo_scale.checkpoint.deepspeed_files import load_file, own_file

    path, saved_ranks = checkpoint.path, checkpoint.identity.world_size
    with _named_errors(path):
        load_weights(policy, checkpoint)
        reference.load_state(load_file(path / own_file("reference", rank), mmap=True) for rank in range(saved_ranks))
        if saved_ranks == ranks.world_size():
            restore_random_state(load_file(path / own_file("random")))
        else:
            seed_everything(checkpoint.state.step)


def load_weights(policy: Policy, checkpoint: Checkpoint) -> None:
    """Load weights and optimizer state, whatever number of ranks and stage they were saved at. Every rank must call it.

    Raises:
        CheckpointError: if they do not fit the engine.
    """
    from dpo_scale.checkpoint.deepspeed_files import DeepspeedFiles
    from dpo_scale.checkpoint.reshard import load_resharded

    saved, stage = checkpoint.identity, policy.zero_optimization_stage()
    same_ranks = saved.world_size == ranks.world_size() or stage == 0  # at stage 0 every rank has everything
    if saved.stage != stage or not same_ranks:
        ranks.log(
            f"{checkpoint.path.name} was saved on {saved.world_size} ranks at stage {saved.stage}; "
            f"cutting it anew for {ranks.world_size()} at stage {stage}"
        )
        return load_resharded(policy, checkpoint.path, saved.world_size, saved.stage)
    policy.checkpoint_engine = DeepspeedFiles()
    path = checkpoint.path
    loaded, _ = policy.load_checkpoint(str(path.parent), tag=path.name, custom_load_fn=_load_module)
    if loaded is None:
        raise CheckpointError(f"{path}: DeepSpeed found no state in it")


def _load_module(src: dict[str, torch.Tensor], dst: torch.nn.Module) -> None:
    """Load a module's saved weights, of which only frozen ones may be missing."""
    result = dst.load_state_dict(src, strict=False)
    trained = {name for name, parameter in dst.named_parameters() if parameter.requires_grad}
    wrong = [name for name in result.missing_keys if name in trained] + result.unexpected_keys
    if wrong:
        raise ValueError(f"weights are missing, or the model has none of their name: {', '.join(wrong[:5])}")


@contextmanager
def _named_errors(path: Path) -> Iterator[None]:
    """Turn what DeepSpeed and torch raise on a checkpoint that does not fit into one line that names it."""
    try:
        yield
    except CheckpointError:
        raise
    except (OSError, EOFError, RuntimeError, ValueError, KeyError, AssertionError, pickle.PickleError) as error:
        raise CheckpointError(f"{path}: cannot be loaded: {' '.join(str(error).split())[:300]}") from None


def listed(found: list[str]) -> str:
    more = f" and {len(found) - 3} more" if len(found) > 3 else ""
    return ", ".join(found[:3]) + more


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))
