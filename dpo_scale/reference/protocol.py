"""What training asks of a reference: the log-probs that the policy's are compared with.

There are five: a second model (`live`), one that moves towards the policy (`moving`), the policy with its adapter off
(`adapter`), the store (`stored`) and the data's own columns (`columns`). `modes` builds the one that a config names.

Values that are known beforehand come with a batch out of `look_up`, as it is put together in a thread ahead of the
step. Those that a model has to compute come in `attach`.

Shapes: P pairs, column 0 chosen, 1 rejected; summed log-probs in fp32.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np
from torch import Tensor

from dpo_scale.data.dataset import PairDataset
from dpo_scale.data.layout import PairBatch


class Reference(Protocol):
    """A reference inherits from this and overrides what it does; the rest does nothing."""

    def look_up(self, dataset: PairDataset, indices: np.ndarray) -> Tensor | None:
        """Values [P, 2] of a dataset's pairs on the host, if they are known without running a model."""
        return None

    def attach(self, batch: PairBatch, passes: Sequence[PairBatch] = ()) -> PairBatch:
        """The batch, on the device, with `reference_logps` where the loss needs them.

        Args:
            passes: batches on the host to score first, pair for pair those of this call and of the calls after it
                that bring none. At stage 3 every rank must make as many.
        """
        return batch

    def after_step(self, step: int) -> None:
        """The policy's optimizer step `step` (from 1) is done. Every rank must call it."""
        return

    def state(self) -> dict[str, Tensor]:
        """This rank's part, on the host, of what a checkpoint has to keep; empty if nothing."""
        return {}

    def load_state(self, states: Iterable[dict[str, Tensor]]) -> None:
        """Take what `state` gave on all ranks, as many as there were then. Every rank must call it."""
        return


class NoReference(Reference):
    """For a loss that needs none."""


class KnownReference(Reference, Protocol):
    """A reference whose values were computed before the run.

    Attributes:
        origin: where the values come from, for messages.
    """

    origin: str

    def logps(self, dataset: PairDataset, indices: np.ndarray, ld_alpha: float | None = None) -> Tensor:
        """Values [P, 2]; with `ld_alpha` LD-DPO's weights are applied to their tokens."""
        ...
