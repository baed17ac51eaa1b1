"""What a rank works on in each micro-step, put together on the host before the step begins."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from dpo_scale.data.batching import MicroBatch, PairOrder, counted_pairs
from dpo_scale.data.dataset import PairDataset
from dpo_scale.data.layout import Layout, PairBatch
from dpo_scale.data.planning import Planner, StepPlan
from dpo_scale.distributed import ranks
from dpo_scale.models.scorer import host_batch
from dpo_scale.reference.protocol import Reference


@dataclass(frozen=True)
class MicroStep:
    """This rank's part of a micro-step.

    Attributes:
        batch: on the host, page-locked if the device is not the host.
        reference_passes: the reference's batches of the whole optimizer step, with its first micro-step; kept as
            `batch` is.
        pairs_of_ranks: how many pairs count for each rank in this micro-step (`counted_pairs`).
        is_last: of its optimizer step.
    """

    plan: StepPlan
    batch: PairBatch
    reference_passes: list[PairBatch]
    pairs_of_ranks: tuple[int, ...]
    is_last: bool


def micro_steps_of_run(
    planner: Planner,
    pair_order: PairOrder,
    dataset: PairDataset,
    steps: range,
    pad_token_id: int,
    reference: Reference,
) -> Iterator[MicroStep]:
    """This rank's micro-steps of the optimizer steps `steps` (from 0), in order, with known reference values."""

    def load(micro_batch: MicroBatch) -> PairBatch:
        return load_batch(dataset, micro_batch, pad_token_id, reference, planner.layout)

    rank, epoch, order = ranks.rank(), -1, np.empty(0, dtype=np.int64)
    for step in steps:
        if pair_order.epoch_of(step) != epoch:
            epoch = pair_order.epoch_of(step)
            order = pair_order.epoch_order(epoch)
        plan = planner.plan(pair_order.global_batch(step, order))
        passes = [load(of_ranks[rank]) for of_ranks in plan.reference_passes]
        for k, of_ranks in enumerate(plan.micro_steps):
            yield MicroStep(plan, load(of_ranks[rank]), passes, counted_pairs(of_ranks), k == len(plan.micro_steps) - 1)
            passes = []


def load_batch(
    dataset: PairDataset, micro_batch: MicroBatch, pad_token_id: int, reference: Reference, layout: Layout
) -> PairBatch:
    """One rank's micro-batch on the host, with the reference values that are known beforehand."""
    batch = host_batch(dataset, micro_batch, pad_token_id, layout)
    known = reference.look_up(dataset, micro_batch.indices)
    return batch if known is None else replace(batch, reference_logps=known)
