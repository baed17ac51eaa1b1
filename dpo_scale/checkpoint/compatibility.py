"""What a checkpoint is a checkpoint of, and what a run that resumes from it may have changed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dpo_scale.errors import CheckpointError
from dpo_scale.settings.resume import may_be_allowed


@dataclass(frozen=True)
class Identity:
    """What a checkpoint is a checkpoint of.

    Attributes:
        model: fingerprint of the architecture (`architecture_fingerprint`).
        data: fingerprint of the training pairs in order.
        settings: those that decide what the next step computes. A run resumes only with equal ones, except those that
            `checkpoint.allow_changes` names.
        length: the settings that say how long the run is; they may change.
        world_size, stage: what DeepSpeed's files were laid out for.
        versions: of the packages that compute; they may change.
    """

    model: str
    data: str
    settings: dict[str, Any]
    length: dict[str, Any]
    world_size: int
    stage: int
    versions: dict[str, str]


def architecture_fingerprint(model_config: Any) -> str:
    """A hash of a transformers config's architecture (sizes, vocabulary), without paths, versions and dtypes."""
    volatile = {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache", "architectures"}
    described = {
        name: value
        for name, value in model_config.to_dict().items()
        if name not in volatile and "dropout" not in name and "pdrop" not in name and not name.startswith("_")
    }
    return hashlib.sha256(json.dumps(described, sort_keys=True, default=str).encode()).hexdigest()[:32]


def package_versions() -> dict[str, str]:
    """Versions of the packages that decide what a step computes."""
    from importlib.metadata import version

    return {name: version(name) for name in ("torch", "deepspeed", "transformers")}


def check_identity(path: Any, saved: Identity, current: Identity, allow_changes: Sequence[str]) -> list[str]:
    """Refuse a checkpoint that does not belong to this run.

    Args:
        path: of the checkpoint, for messages.
        allow_changes: settings that may differ, such as `train.learning_rate`.

    Returns:
        What differs and may differ, for the log.

    Raises:
        CheckpointError: naming what differs and may not: the model, the data or settings.
    """
    if saved.model != current.model:
        raise CheckpointError(f"{path}: a checkpoint of another model; it does not fit model.path")
    differing = _differences(saved.settings, current.settings)
    refused = [text for name, text in differing.items() if name not in allow_changes]
    if refused:
        may = [name for name in differing if may_be_allowed(name) and name not in allow_changes]
        hint = f"; to change it on purpose: checkpoint.allow_changes=[{', '.join(may)}]" if may else ""
        raise CheckpointError(f"{path}: saved with other settings: {'; '.join(refused)}{hint}")
    if saved.data != current.data:
        raise CheckpointError(f"{path}: saved with other training pairs than data.train now gives")
    length, versions = (_differences(getattr(saved, n), getattr(current, n)) for n in ("length", "versions"))
    return [*differing.values(), *length.values(), *versions.values()]


def _differences(saved: dict[str, Any], current: dict[str, Any]) -> dict[str, str]:
    """{name: "name was 1, is 2"} of the entries that are not equal."""
    return {
        name: f"{name} was {saved.get(name)!r}, is {current.get(name)!r}"
        for name in sorted(saved.keys() | current.keys())
        if saved.get(name) != current.get(name)
    }
