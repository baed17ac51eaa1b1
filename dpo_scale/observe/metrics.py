"""Sums of metrics over micro-steps and ranks, with one synchronisation an optimizer step."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from dpo_scale.distributed import ranks


class MetricSums:
    """Weighted sums of per-pair metrics, kept on the device until `reduce`.

    Every rank must add the same names in each micro-step. The means are over all ranks' pairs of non-zero weight, so
    they do not depend on how pairs were spread.
    """

    def __init__(self) -> None:
        self._names: list[str] = []
        self._sums: torch.Tensor | None = None

    def add(self, metrics: dict[str, torch.Tensor], weights: torch.Tensor) -> None:
        """Add per-pair values, each [P], weighted by `weights` [P]."""
        names = sorted(metrics)
        assert not self._names or names == self._names
        self._names = names
        weights = weights.double()
        # where, not a product alone: a filler's value may be anything, even NaN, and must not count
        columns = [torch.where(weights > 0, metrics[name].detach().double() * weights, 0.0).sum() for name in names]
        sums = torch.stack([*columns, weights.sum()])
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
        return Reduction(self._names, ranks.sum_over_ranks(packed), len(per_rank))


@dataclass(frozen=True)
class Reduction:
    """Sums over all ranks that the device may still be working on."""

    names: list[str]
    values: torch.Tensor
    num_per_rank: int

    def read(self, *more: torch.Tensor) -> tuple[dict[str, float], np.ndarray, list[float]]:
        """Wait for the device and read everything at once.

        Args:
            more: further scalars; those that are on the device come in the same transfer.

        Returns:
            Means over the pairs of all ranks, the ranks' own values [n, ranks], and the values of `more`.
        """
        device = self.values.device
        # one on the host, as an offloaded optimizer's norm is, would have to be copied to the device first
        scalars = [value.detach().double().reshape(1) for value in more if value.device == device]
        values = torch.cat([self.values, *scalars]).tolist()
        split, end = len(self.names) + 1, len(self.values)
        means = {name: value / values[split - 1] for name, value in zip(self.names, values, strict=False)}
        per_rank = np.array(values[split:end]).reshape(ranks.world_size(), self.num_per_rank)
        transferred = iter(values[end:])
        others = [next(transferred) if value.device == device else value.item() for value in more]
        return means, per_rank.T, others
