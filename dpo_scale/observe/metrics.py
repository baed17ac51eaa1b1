"""Sums of metrics over micro-steps and ranks, with one synchronisation an optimizer step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from dpo_scale.distributed import ranks


class MetricSums:
    """Weighted sums of per-pair metrics, kept on the device until `reduce`.

    Every rank must add the same names, of the same shapes, in each micro-step. The means are over all ranks' pairs of
    non-zero weight, so they do not depend on how pairs were spread.
    """

    def __init__(self) -> None:
        self._shapes: dict[str, torch.Size] = {}
        self._sums: torch.Tensor | None = None

    def add(self, metrics: dict[str, torch.Tensor], weights: torch.Tensor) -> None:
        """Add per-pair values, each [P] or [P, ...], weighted by `weights` [P]."""
        shapes = {name: metrics[name].shape[1:] for name in sorted(metrics)}
        assert not self._shapes or shapes == self._shapes
        self._shapes = shapes
        columns = [_weighted_sum(metrics[name].detach().double(), weights.double()) for name in shapes]
        sums = torch.cat([*(column.flatten() for column in columns), weights.double().sum().reshape(1)])
        self._sums = sums if self._sums is None else self._sums + sums

    def reduce(self, *per_rank: float) -> Reduction:
        """Sum over all ranks, without waiting for the result; every rank must call it.

        Args:
            per_rank: this rank's own values of something. They travel in the same all-reduce, in slots of their own.
        """
        assert self._sums is not None
        slots = self._sums.new_zeros(ranks.world_size(), len(per_rank))
        for column, value in enumerate(per_rank):  # filled in on the device: a copy from the host might be waited for
            slots[ranks.rank(), column] = value
        packed = torch.cat([self._sums, slots.flatten()])
        return Reduction(self._shapes, ranks.sum_over_ranks(packed), len(per_rank))


def _weighted_sum(values: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    weights = weights.view(-1, *[1] * (values.ndim - 1))
    # where, not a product alone: a filler's value may be anything, even NaN, and must not count
    return torch.where(weights > 0, values * weights, 0.0).sum(dim=0)


@dataclass(frozen=True)
class Reduction:
    """Sums over all ranks that the device may still be working on."""

    shapes: dict[str, torch.Size]
    values: torch.Tensor
    num_per_rank: int

    def read(self, *more: torch.Tensor) -> tuple[dict[str, Any], np.ndarray, list[float]]:
        """Wait for the device and read everything at once.

        Args:
            more: further scalars; those that are on the device come in the same transfer.

        Returns:
            Means over the pairs of all ranks, each a float or, where pairs have arrays, an array; the ranks' own values
            [n, ranks]; and the values of `more`.
        """
        device = self.values.device
        # one on the host, as an offloaded optimizer's norm is, would have to be copied to the device first
        scalars = [value.detach().double().reshape(1) for value in more if value.device == device]
        values = torch.cat([self.values, *scalars]).tolist()
        split, end = sum(shape.numel() for shape in self.shapes.values()) + 1, len(self.values)
        unread = iter([value / values[split - 1] for value in values[: split - 1]])
        means = {
            name: np.array([next(unread) for _ in range(shape.numel())]).reshape(shape) if shape else next(unread)
            for name, shape in self.shapes.items()
        }
        per_rank = np.array(values[split:end]).reshape(ranks.world_size(), self.num_per_rank)
        transferred = iter(values[end:])
        others = [next(transferred) if value.device == device else value.item() for value in more]
        return means, per_rank.T, others
