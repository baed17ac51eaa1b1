"""The state of a run on disk: saved whole under a temporary name, renamed when complete, found again by step.

`checkpoints/step-N/` holds DeepSpeed's shards (weights, optimizer), each rank's random state and, written last,
`state.json`: how far the run was and what it was a run of. A folder without that file, or with the suffix
`.incomplete`, is not a checkpoint.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file

from dpo_scale import engine
from dpo_scale.config import CHECKPOINTS_DIR, STATE_FILE
from dpo_scale.errors import CheckpointError

if TYPE_CHECKING:
    from dpo_scale.reference.moving import MovingReference

FORMAT_VERSION = 1
_STEP_DIR = re.compile(r"step-(\d+)")


@dataclass
class TrainState:
    """How far a run is.

    Attributes:
        step: optimizer steps done.
        pairs, tokens: pairs and data tokens seen so far (prompt once a pair, each completion once).
        best_metric, best_step: best held-out value of `checkpoint.metric_for_best_model` and where it was.
    """

    step: int = 0
    pairs: int = 0
    tokens: int = 0
    best_metric: float | None = None
    best_step: int | None = None


@dataclass(frozen=True)
class Identity:
    """What a checkpoint is a checkpoint of; a run resumes only from one with an equal identity.

    Attributes:
        model: fingerprint of the architecture (`model_fingerprint`).
        data: fingerprint of the training pairs in order.
        settings: the settings that decide what the next step computes.
        world_size, stage: DeepSpeed's shards fit only these.
    """

    model: str
    data: str
    settings: dict[str, Any]
    world_size: int
    stage: int


def model_fingerprint(model_config: Any) -> str:
    """A hash of a transformers config's architecture (sizes, vocabulary), without paths, versions and dtypes."""
    import hashlib

    volatile = {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache", "architectures"}
    described = {
        name: value
        for name, value in model_config.to_dict().items()
        if name not in volatile and "dropout" not in name and "pdrop" not in name and not name.startswith("_")
    }
    return hashlib.sha256(json.dumps(described, sort_keys=True, default=str).encode()).hexdigest()[:32]


def checkpoint_path(run_dir: Path, step: int) -> Path:
    return run_dir / CHECKPOINTS_DIR / f"step-{step}"


def complete_checkpoints(run_dir: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    folder = run_dir / CHECKPOINTS_DIR
    found = [path for path in folder.glob("step-*") if _STEP_DIR.fullmatch(path.name) and (path / STATE_FILE).exists()]
    return sorted(found, key=_step_of)


def find_checkpoint(resume: str, output_dir: Path) -> Path | None:
    """The checkpoint that `--resume` means.

    Args:
        resume: "latest" (must exist), "auto" (None if the run has none yet), a run folder, or a checkpoint folder.
        output_dir: the run that "latest" and "auto" look in.

    Raises:
        CheckpointError: if there is no complete checkpoint where one was expected.
    """
    if resume in ("latest", "auto"):
        found = complete_checkpoints(output_dir)
        if not found and resume == "latest":
            raise CheckpointError(f"{output_dir}: no complete checkpoint to resume from (expected checkpoints/step-N)")
        return found[-1] if found else None
    path = Path(resume)
    if (path / STATE_FILE).exists():
        return path
    found = complete_checkpoints(path)
    if not found:
        raise CheckpointError(f"{resume}: neither a checkpoint (no {STATE_FILE}) nor a run folder with a complete one")
    return found[-1]


def read_state(path: Path, identity: Identity) -> TrainState:
    """The state in a checkpoint, after making sure that it belongs to this run.

    Raises:
        CheckpointError: naming what differs: model, data, a setting, the number of ranks or the ZeRO stage.
    """
    try:
        record = json.loads((path / STATE_FILE).read_text(encoding="utf-8"))
        saved, state = record["identity"], record["state"]
        version = record["format_version"]
        if version != FORMAT_VERSION:
            raise CheckpointError(f"{path}: checkpoint format {version}, this version reads {FORMAT_VERSION}")
        state = TrainState(**state)
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path / STATE_FILE}: damaged: {error}") from None
    if saved["model"] != identity.model:
        raise CheckpointError(f"{path}: a checkpoint of another model; it does not fit model.path")
    differing = _differences(saved["settings"], identity.settings)
    if differing:
        raise CheckpointError(f"{path}: saved with other settings: {'; '.join(differing)}")
    if saved["data"] != identity.data:
        raise CheckpointError(f"{path}: saved with other training pairs than data.train now gives")
    for name, meaning in (("world_size", "ranks"), ("stage", "deepspeed.stage")):
        ours = getattr(identity, name)
        if saved[name] != ours:
            raise CheckpointError(f"{path}: saved with {meaning} = {saved[name]}, this run has {ours}; they must agree")
    return state


def save_checkpoint(
    policy: Any,
    state: TrainState,
    identity: Identity,
    run_dir: Path,
    *,
    keep: int | None,
    moving: MovingReference | None = None,
) -> Path:
    """Save the run's state as `checkpoints/step-N/`, then drop the oldest beyond `keep` (the best one stays).

    Frozen weights (under an adapter) are not in it: they are those of `model.path`. Every rank must call it. The
    folder has its final name only once every rank's files are complete. Checkpoints of later steps, which a run resumed
    from an earlier one leaves behind, are dropped too: they are of another course.
    """
    final = checkpoint_path(run_dir, state.step)
    temporary = final.with_name(final.name + ".incomplete")
    if engine.is_main():
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.parent.mkdir(parents=True, exist_ok=True)
    engine.barrier()
    policy.save_checkpoint(str(temporary.parent), tag=temporary.name, save_latest=False, exclude_frozen_parameters=True)
    if moving is not None:
        save_file(moving.state(), temporary / _reference_file())
    save_file(_random_state(), temporary / f"random-rank-{engine.rank()}.safetensors")
    engine.barrier()
    if engine.is_main():
        record = {"format_version": FORMAT_VERSION, "state": asdict(state), "identity": asdict(identity)}
        _write_synced(temporary / STATE_FILE, json.dumps(record, indent=1))
        shutil.rmtree(final, ignore_errors=True)
        os.replace(temporary, final)
        _drop_others(run_dir, keep, state)
    engine.barrier()
    return final


def load_checkpoint(policy: Any, path: Path, moving: MovingReference | None = None) -> None:
    """Load weights, optimizer and random state of a checkpoint into the policy's engine. Every rank must call it.

    Args:
        moving: takes its place again too, if the run has one.

    Raises:
        CheckpointError: if DeepSpeed's files are missing or can't be read.
    """
    try:
        loaded = load_weights(policy, path)
        if moving is not None:
            moving.restore(load_file(path / _reference_file()))
        _restore_random_state(load_file(path / f"random-rank-{engine.rank()}.safetensors"))
    except (OSError, EOFError, RuntimeError, ValueError, KeyError, AssertionError, pickle.PickleError) as error:
        raise CheckpointError(f"{path}: cannot be loaded: {' '.join(str(error).split())[:300]}") from None
    if loaded is None:
        raise CheckpointError(f"{path}: DeepSpeed found no state in it")


def load_weights(policy: Any, path: Path) -> str | None:
    """Load the weights and optimizer of a checkpoint into the policy's engine; None if there are none."""
    loaded, _ = policy.load_checkpoint(str(path.parent), tag=path.name, custom_load_fn=_load_module)
    return loaded


def _load_module(src: dict[str, torch.Tensor], dst: torch.nn.Module) -> None:
    """Load a module's saved weights, of which only frozen ones may be missing."""
    result = dst.load_state_dict(src, strict=False)
    trained = {name for name, parameter in dst.named_parameters() if parameter.requires_grad}
    wrong = [name for name in result.missing_keys if name in trained] + result.unexpected_keys
    if wrong:
        raise ValueError(f"weights that are missing or too many: {', '.join(wrong[:5])}")


def _reference_file() -> str:
    return f"reference-rank-{engine.rank()}.safetensors"


def _differences(saved: dict[str, Any], current: dict[str, Any]) -> list[str]:
    names = sorted(saved.keys() | current.keys())
    return [
        f"{name} was {saved.get(name)!r}, is {current.get(name)!r}"
        for name in names
        if saved.get(name) != current.get(name)
    ]


def _step_of(path: Path) -> int:
    match = _STEP_DIR.fullmatch(path.name)
    assert match
    return int(match.group(1))


def _drop_others(run_dir: Path, keep: int | None, state: TrainState) -> None:
    found = complete_checkpoints(run_dir)
    up_to_now = [path for path in found if _step_of(path) <= state.step]
    kept = up_to_now if keep is None else up_to_now[-keep:]
    for path in found:
        if path not in kept and _step_of(path) != state.best_step:
            shutil.rmtree(path)


def _write_synced(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _random_state() -> dict[str, torch.Tensor]:
    from deepspeed.accelerator import get_accelerator

    state = {"cpu": torch.get_rng_state()}
    if get_accelerator().device_name() != "cpu":
        state["accelerator"] = get_accelerator().get_rng_state().cpu()
    return state


def _restore_random_state(state: dict[str, torch.Tensor]) -> None:
    from deepspeed.accelerator import get_accelerator

    torch.set_rng_state(state["cpu"])
    if "accelerator" in state:
        get_accelerator().set_rng_state(state["accelerator"])
