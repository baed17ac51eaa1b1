"""The random generators of a rank, saved and put back, so that what is drawn after a resume is what would have been."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

from dpo_scale.distributed import ranks


def random_state() -> dict[str, Any]:
    """The states of every generator of this rank, in plain types and tensors."""
    from deepspeed.accelerator import get_accelerator

    numpy_state = np.random.get_state(legacy=False)
    assert isinstance(numpy_state, dict)
    key = torch.from_numpy(numpy_state["state"]["key"].astype(np.int64))
    state = {
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": {**numpy_state, "state": {**numpy_state["state"], "key": key}},
    }
    if get_accelerator().device_name() != "cpu":
        state["accelerator"] = get_accelerator().get_rng_state().cpu()
    return state


def restore_random_state(state: dict[str, Any]) -> None:
    """Let this rank's generators go on from what `random_state` gave."""
    from deepspeed.accelerator import get_accelerator

    torch.set_rng_state(state["torch"])
    random.setstate(state["python"])
    numpy_state = dict(state["numpy"])
    numpy_state["state"] = {**numpy_state["state"], "key": numpy_state["state"]["key"].numpy().astype(np.uint32)}
    np.random.set_state(numpy_state)
    if "accelerator" in state:
        get_accelerator().set_rng_state(state["accelerator"])


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch alike on every rank (dropout, if on, is drawn per rank from `seed + rank`)."""
    random.seed(seed + ranks.rank())
    np.random.seed((seed + ranks.rank()) % 2**32)
    torch.manual_seed(seed + ranks.rank())
