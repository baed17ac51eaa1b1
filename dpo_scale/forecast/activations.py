"""Memory of a micro-step's activations, measured on tensors that have no memory. Sizes are bytes.

The model's own code runs forward and backward on fake tensors, which have shapes and lifetimes but no data
(`forecast.fake_run`). A few layers are enough, as layers of one kind keep the same. What our head takes is calculated
(`forecast.head`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dpo_scale.data.layout import Layout, Segment
from dpo_scale.data.planning import Planner, StepPlan
from dpo_scale.settings.tree import Config

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@dataclass(frozen=True)
class Rows:
    """What one rank computes in one pass.

    Attributes:
        tokens: that it holds, padding included.
        scored: tokens of each pair's two completions, of the whole row where ranks share it.
        count: of rows.
        segments: of the one row, as in `PairBatch`; None if rows are padded.
        group_size: ranks that share the row.
    """

    tokens: int
    scored: tuple[int, ...]
    count: int = 1
    segments: tuple[Segment, ...] | None = None
    group_size: int = 1


def rows_of(layout: Layout, lengths: np.ndarray, group_size: int = 1) -> Rows:
    """A micro-batch of pairs with these lengths [n, 3] of prompt, chosen and rejected."""
    raise NotImplementedError


def fullest_rows(planner: Planner, plans: Sequence[StepPlan]) -> tuple[Rows, Rows | None]:
    """The largest pass of any rank in these steps, of the policy and of a reference that runs in them, if one does."""
    raise NotImplementedError


class ActivationModel:
    """What a run's policy and reference hold beside their states, for any rows.

    Args:
        model_config: the policy's.
        reference_config: of a reference that is another model; None: as the policy.
        device_type: "cuda" or "cpu".
        liger: whether the models take Liger's kernels.
    """

    def __init__(
        self,
        config: Config,
        model_config: PreTrainedConfig,
        device_type: str,
        *,
        reference_config: PreTrainedConfig | None = None,
        liger: bool = False,
    ) -> None:
        raise NotImplementedError

    def micro_step(self, rows: Rows) -> dict[str, int]:
        """Part -> bytes, when most is held between the beginning of a forward pass and the end of its backward pass."""
        raise NotImplementedError

    def reference_pass(self, rows: Rows) -> dict[str, int]:
        """Part -> bytes, when most is held in a pass without gradient. No activations of the policy exist then."""
        raise NotImplementedError

    def host(self, rows: Rows) -> dict[str, int]:
        """Part -> bytes of a rank's activations in host memory."""
        raise NotImplementedError

    @property
    def left_out(self) -> tuple[str, ...]:
        """What of the config is not modelled, by name."""
        raise NotImplementedError
