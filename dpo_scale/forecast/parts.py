"""What a forecast is made of.

All sizes are bytes and all times are seconds. Parts have names for people, in the order in which they are shown.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from dpo_scale.data.batching import PairOrder
from dpo_scale.data.planning import Planner, StepPlan


@dataclass(frozen=True)
class Device:
    """What one rank runs on.

    Attributes:
        memory: what can be allocated on it.
        flops: that matrix products of the run's dtype reach at most, a second.
        efficiency: share of these that a training step's products reach, by measurement or assumption.
        bandwidth: of its memory, bytes a second.
        host_link: between it and host memory, bytes a second and direction.
        context: held beside tensors by the driver, libraries and communicators.
        source: of the figures, for people.
        is_measured: whether they were measured on the device itself (`calibrate`).
    """

    name: str
    memory: int
    flops: float
    efficiency: float
    bandwidth: float
    host_link: float
    context: int
    source: str
    is_measured: bool = False


@dataclass(frozen=True)
class Cluster:
    """The machines of a run, all alike.

    Attributes:
        per_node: devices of a machine.
        within, between: what a device sends to others of its machine, and to other machines, bytes a second.
        latency: of a collective, beside the time for its bytes.
    """

    device: Device
    per_node: int
    nodes: int
    within: float
    between: float
    latency: float

    @property
    def world_size(self) -> int:
        return self.per_node * self.nodes


@dataclass(frozen=True)
class Workload:
    """The pairs of a run and how its first steps are planned for the cluster's ranks.

    Attributes:
        steps: optimizer steps of the run.
        plans: of its first steps.
        held_out: number of held-out pairs, and tokens a rank computes of them in an evaluation.
        origin: where lengths come from, for people: the data, or what is assumed of it.
    """

    planner: Planner
    pair_order: PairOrder
    steps: int
    plans: Sequence[StepPlan]
    held_out: int
    held_out_tokens: int
    origin: str


@dataclass(frozen=True)
class Memory:
    """Memory of the fullest rank when it is fullest, and what else is needed.

    Attributes:
        device: part -> bytes on the device.
        host: part -> bytes of host memory on one machine.
        disk: part -> bytes on the disk at most, over the run.
        left_out: what of the config is not modelled, by name.
    """

    device: dict[str, int]
    host: dict[str, int] = field(default_factory=dict)
    disk: dict[str, int] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()

    @property
    def total(self) -> int:
        """Bytes on the device."""
        return sum(self.device.values())


@dataclass(frozen=True)
class StepTime:
    """Where the time of a mean step goes, and of what comes once or now and then.

    Attributes:
        parts: part -> seconds of a step; what is hidden behind other parts is not in them.
        once: part -> seconds over the whole run beside its steps (filling the store, evaluations, saves).
        hidden: seconds of a step's communication and copies that overlap with computing.
        left_out: what of the config is not modelled, by name.
    """

    parts: dict[str, float]
    once: dict[str, float] = field(default_factory=dict)
    hidden: float = 0.0
    left_out: tuple[str, ...] = ()

    @property
    def step(self) -> float:
        """Seconds of a step."""
        return sum(self.parts.values())
