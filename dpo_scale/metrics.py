"""Sums of metrics over micro-steps and ranks, with one synchronisation an optimizer step."""

from __future__ import annotations

import torch

from dpo_scale import engine


class MetricSums:
    """Weighted sums of per-pair metrics, kept on the device until `reduce`.

    Every rank must add the same names in the same order of micro-steps; the means are over pairs of non-zero weight
    of all ranks, so they do not depend on how pairs were spread.
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

    def reduce(self, *per_rank: float) -> tuple[dict[str, float], list[float]]:
        """Means over all ranks, and the largest of the ranks' values of each of `per_rank`.

        The largest values travel in the same all-reduce (each rank fills slots of its own), which keeps this the
        step's one synchronisation.
        """
        assert self._sums is not None
        slots = torch.zeros(engine.world_size(), len(per_rank), dtype=torch.float64, device=self._sums.device)
        slots[engine.rank()] = torch.tensor(per_rank, dtype=torch.float64)
        packed = engine.sum_over_ranks(torch.cat([self._sums, slots.flatten()])).tolist()
        count = packed[len(self._names)]
        means = {name: packed[i] / count for i, name in enumerate(self._names)}
        own = packed[len(self._names) + 1 :]
        return means, [max(own[i :: len(per_rank)]) for i in range(len(per_rank))]
