"""How an optimizer step's global batch is laid out over micro-steps and ranks, and what it holds: pure arithmetic."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dpo_scale.data.batching import (
    MicroBatch,
    PairOrder,
    of_groups,
    regroup_for_forward,
    split_among_ranks,
)
from dpo_scale.data.dataset import PairDataset
from dpo_scale.data.flops import ForwardFlops
from dpo_scale.data.groups import Groups
from dpo_scale.data.layout import Layout, pair_tokens, row_widths, slots
from dpo_scale.data.packing import pack_among_ranks
from dpo_scale.settings.tree import Config

# Steps whose plans are summed up at the start of a run.
STEPS_DESCRIBED = 100


@dataclass(frozen=True)
class StepPlan:
    """A global batch of G pairs over micro-steps and ranks, and what it holds.

    Attributes:
        pairs: [G] indices into the dataset.
        micro_steps: `micro_steps[k][rank]`.
        reference_passes: `reference_passes[k][rank]`, over each rank's pairs of all micro-steps, in their order; none
            where no reference runs.
        tokens: of the data: each prompt once, each completion once.
        padding_fraction: share of the token slots of the policy's forward passes that hold no token of a pair that
            counts; rows that ranks share are padded to a multiple of them.
        useful_flops: what the step needs if each prompt is computed once and nothing is padded or recomputed.
        mean_chosen_tokens: mean length of the chosen completions.
    """

    pairs: np.ndarray
    micro_steps: list[list[MicroBatch]]
    reference_passes: list[list[MicroBatch]]
    tokens: int
    padding_fraction: float
    useful_flops: float
    mean_chosen_tokens: float


@dataclass(frozen=True)
class Planner:
    """Plans the steps of a run; a pure function of its fields and the pairs.

    Attributes:
        lengths: [N, 3] tokens of prompt, chosen and rejected of the dataset.
        layout: how pairs become rows (`dpo_scale.data.layout`).
        groups: the ranks that may share a row.
        micro_batch_size: most pairs of a micro-batch, where `max_tokens` is None.
        max_tokens: most tokens of a micro-batch that one rank holds.
        flops: of the model.
        weight_passes, attention_passes: what a step does to each pair, in forward passes (`passes_of`).
        reference_tokens: most tokens that one rank holds in a pass of a reference that runs in the step; None: there
            is none.
    """

    lengths: np.ndarray
    layout: Layout
    groups: Groups
    micro_batch_size: int
    max_tokens: int | None
    flops: ForwardFlops
    weight_passes: float
    attention_passes: float
    reference_tokens: int | None = None

    def plan(self, pairs: np.ndarray) -> StepPlan:
        """The plan of a global batch [G]."""
        lengths, groups = self.lengths, self.groups
        if self.max_tokens is None:
            micro_steps = split_among_ranks(pairs, lengths, micro_batch_size=self.micro_batch_size, groups=groups)
        else:
            micro_steps = pack_among_ranks(
                pairs,
                lengths,
                max_tokens=self.max_tokens,
                groups=groups,
                layout=self.layout,
                flops=self.flops,
            )
        reference_passes = []
        if self.reference_tokens is not None:
            reference_passes = regroup_for_forward(
                micro_steps, lengths, max_tokens=self.reference_tokens, layout=self.layout
            )
        computed = sum(self._slots(micro_batch) for of_ranks in micro_steps for micro_batch in of_groups(of_ranks))
        of_pairs = lengths[pairs]
        useful = self.flops.of_pairs(
            of_pairs, "shared_prefix", weights=self.weight_passes, attention=self.attention_passes
        )
        return StepPlan(
            pairs,
            micro_steps,
            reference_passes,
            int(of_pairs.sum()),
            1.0 - int(pair_tokens(lengths[pairs], self.layout).sum()) / computed,
            float(useful.sum()),
            float(of_pairs[:, 1].mean()),
        )

    def idle_fraction(self, plan: StepPlan) -> float:
        """Share of the ranks' time that they wait for the slowest of each micro-step, if FLOPs take equal time."""
        costs = np.array([self._costs(of_ranks) for of_ranks in plan.micro_steps])
        return float(1.0 - costs.mean(axis=1).sum() / costs.max(axis=1).sum())

    def _slots(self, micro_batch: MicroBatch) -> int:
        """Token slots of a micro-batch's row or rows on all ranks that share it."""
        computed, size = slots(self.layout, micro_batch.indices, self.lengths), micro_batch.group_size
        return -(-computed // size) * size

    def flops_of(self, micro_batches: Sequence[MicroBatch]) -> np.ndarray:
        """Forward FLOPs of micro-batches, float64 [n, 3]: of the layers' weights, of attention, of the head.

        They are those of all ranks that share a row. A filler computes a pair as others do.
        """
        indices = np.concatenate([micro_batch.indices for micro_batch in micro_batches])
        sizes = [len(micro_batch.indices) for micro_batch in micro_batches]
        starts = np.concatenate([[0], np.cumsum(sizes[:-1])]).astype(np.int64)
        lengths = self.lengths[indices]
        scored = self.flops.per_scored_token * lengths[:, 1:].sum(axis=1)
        if self.layout == "padded":  # every row of a micro-batch is as wide as its longest
            widths = np.maximum.reduceat(row_widths(lengths), starts).astype(np.int64)
            rows = 2.0 * np.array(sizes)
            weights = rows * self.flops.per_token * widths
            attention = rows * self.flops.of_sequences(widths) - weights
        else:
            weights = np.add.reduceat(self.flops.per_token * pair_tokens(lengths, self.layout), starts)
            attention = np.add.reduceat(self.flops.of_pairs(lengths, self.layout, weights=0.0), starts)
        return np.stack([weights, attention, np.add.reduceat(scored, starts)], axis=1)

    def _costs(self, of_ranks: list[MicroBatch]) -> np.ndarray:
        """FLOPs of each rank in a micro-step; a filler's count as none."""
        of_rows = of_groups(of_ranks)
        sizes = np.array([micro_batch.group_size for micro_batch in of_rows])
        counts = np.array([micro_batch.weights.any() for micro_batch in of_rows])
        return np.repeat(self.flops_of(of_rows).sum(axis=1) * counts / sizes, sizes)

    def first_plans(self, pair_order: PairOrder, total_steps: int) -> list[StepPlan]:
        """The plans of a run's first steps, at least one and at most `STEPS_DESCRIBED`."""
        order = pair_order.epoch_order(0)
        steps = range(max(1, min(STEPS_DESCRIBED, total_steps, pair_order.steps_per_epoch)))
        return [self.plan(pair_order.global_batch(step, order)) for step in steps]

    def describe(self, plans: list[StepPlan], dataset: PairDataset) -> str:
        """For the log: micro-steps, padding and balance of some plans, pairs over the budget, reference passes."""
        padding = np.mean([plan.padding_fraction for plan in plans])
        idle = np.mean([self.idle_fraction(plan) for plan in plans])
        size = f"{self.micro_batch_size} pairs" if self.max_tokens is None else f"{self.max_tokens} tokens"
        micro_steps = _span([len(plan.micro_steps) for plan in plans])
        text = (
            f"{micro_steps} micro-steps x {self.groups.world_size} ranks of at most {size}{self._shared(plans)}; by "
            f"the plans of the first {len(plans)} steps {padding:.1%} is padding and ranks are idle for {idle:.1%}"
        )
        if self.max_tokens is not None:
            tokens = pair_tokens(self.lengths, self.layout)
            longest = int(tokens.argmax())
            largest = self.groups.largest
            over = int((tokens > largest * self.max_tokens).sum())
            if over:
                than = "that" if largest == 1 else f"{largest} ranks hold together"
                text += (
                    f"; {over} pairs are longer than {than} and get micro-batches of their own, the longest "
                    f"{dataset.describe(longest)} with {tokens[longest]} tokens"
                )
        if self.reference_tokens is not None:
            passes = _span([len(plan.reference_passes) for plan in plans])
            text += f"; reference passes a step: {passes} of at most {self.reference_tokens} tokens"
        return text

    def _shared(self, plans: list[StepPlan]) -> str:
        """For the log: how many ranks share a row; nothing where none do."""
        largest = self.groups.largest
        if largest == 1:
            return ""
        if len(self.groups.sizes) == 1:
            return f"; rows are shared by {largest} ranks"
        sizes = Counter(
            micro_batch.group_size
            for plan in plans
            for of_ranks in plan.micro_steps
            for micro_batch in of_groups(of_ranks)
            if micro_batch.weights.any()
        )
        shared = [f"{sizes[size]} by {size}" for size in sorted(sizes, reverse=True) if size > 1]
        return f"; of {sizes.total()} micro-batches are shared by several ranks: {', '.join(shared) or 'none'}"


def _span(counts: list[int]) -> str:
    return str(counts[0]) if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"


def make_planner(config: Config, layout: Layout, groups: Groups, flops: ForwardFlops, lengths: np.ndarray) -> Planner:
    """The planner of a run's training steps."""
    train, budget = config.train, config.reference.max_tokens_per_micro_batch
    return Planner(
        lengths,
        layout,
        groups,
        train.micro_batch_size,
        train.max_tokens_per_micro_batch,
        flops,
        *passes_of(config),
        reference_tokens=budget if runs_reference(config) else None,
    )


def runs_reference(config: Config) -> bool:
    """Whether a step runs the reference; otherwise its values are known, or the loss needs none."""
    return config.loss.needs_reference and config.reference.mode in ("live", "adapter")


def passes_of(config: Config) -> tuple[float, float]:
    """What a step does to each pair, counted in forward passes: (over the weights, over attention).

    The policy's forward pass and a backward pass of twice that; under LoRA no gradient of the frozen weights is
    computed. A reference that runs in the step adds its forward pass.
    """
    weights, attention = (2.0, 3.0) if config.lora.enabled else (3.0, 3.0)
    of_reference = float(runs_reference(config))
    return weights + of_reference, attention + of_reference
