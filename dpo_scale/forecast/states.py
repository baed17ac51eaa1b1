"""Memory of weights, gradients and optimizer states by formula, as DeepSpeed 0.19 lays them out. Sizes are bytes.

The activations of a micro-batch come on top in the moment `backward`; tests compare every formula with live tensors.
"""

from __future__ import annotations

from typing import Literal

from dpo_scale.forecast.shape import ModelShape
from dpo_scale.settings.tree import Config

# rest: between steps, as in an evaluation or a pass of the reference.
# backward: the fullest point of the last backward pass of a step.
# step: the fullest point of the optimizer's step, when no activations exist.
Moment = Literal["rest", "backward", "step"]


def policy_states(
    config: Config,
    shape: ModelShape,
    world_size: int,
    moment: Moment = "backward",
    *,
    micro_steps: int = 2,
    device_type: str = "cuda",
) -> dict[str, int]:
    """Bytes of the policy on one rank's device by part, without activations.

    Args:
        micro_steps: of a step, at most.
        device_type: what the run computes on. On "cpu" what is offloaded stays in the same memory.
    """
    raise NotImplementedError


def policy_host_states(config: Config, shape: ModelShape, world_size: int, *, micro_steps: int = 2) -> dict[str, int]:
    """Bytes of the policy in host memory by part, for one rank."""
    raise NotImplementedError


def reference_states(config: Config, shape: ModelShape, world_size: int) -> dict[str, int]:
    """Bytes of a live reference on one rank's device by part; nothing for one that is no model of its own."""
    raise NotImplementedError


def reference_host_states(config: Config, shape: ModelShape, world_size: int) -> dict[str, int]:
    """Bytes of a live reference in host memory by part, for one rank."""
    raise NotImplementedError


def states_left_out(config: Config) -> tuple[str, ...]:
    """What of the config these formulas do not cover, by name."""
    raise NotImplementedError


def disk_bytes(
    config: Config, shape: ModelShape, world_size: int, *, pairs: int, tokens: int, completion_tokens: int
) -> dict[str, int]:
    """Bytes on the disk at most over a run, by part.

    Args:
        pairs: training and held-out ones.
        tokens: of all of them: prompts and both completions, each once.
        completion_tokens: of these.
    """
    raise NotImplementedError
