"""How a batch gets its reference values: they came with it out of a store, or a model that runs scores its pairs.

A model does not score the policy's micro-batches one by one. What limits those is what they keep for their backward
pass; a pass without one keeps nothing, so several times the tokens fit in. And each pass of a sharded model gathers all
of its weights. So a step's pairs are scored in a few large passes (`steps.StepPlan.reference_passes`), before the
policy's first micro-step, when none of its activations exist. What stays of them is two numbers a pair.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from dpo_scale.data.layout import PairBatch
from dpo_scale.losses import sum_token_logps
from dpo_scale.reference.columns import ColumnReference
from dpo_scale.reference.stored import StoredReference
from dpo_scale.settings.loss import LossSettings


class ReferenceValues:
    """Attaches reference values to batches.

    Args:
        reference: what `modes.make_reference` gives: None, stored values, which came with the batches, or what is
            called like an engine around a `PairScorer` and runs.
        settings: LD-DPO's weights of tokens are part of the values.
    """

    def __init__(self, reference: Any, settings: LossSettings) -> None:
        runs = reference is not None and not isinstance(reference, (StoredReference, ColumnReference))
        self._model, self._ld_alpha = reference if runs else None, settings.ld_alpha
        self._scored: torch.Tensor | None = None  # [n, 2] of pairs whose batches are still to come

    @torch.no_grad()
    def score(self, batch: PairBatch) -> None:
        """Score pairs whose own batches come to `attach` later, pair for pair in this order; a pass of the model."""
        assert self._model is not None
        sums = sum_token_logps(
            self._model(**batch.scorer_inputs),
            batch.score_segments,
            batch.num_pairs,
            batch.lengths,
            ld_alpha=self._ld_alpha,
        )
        self._scored = sums if self._scored is None else torch.cat([self._scored, sums])

    def attach(self, batch: PairBatch) -> PairBatch:
        """The batch with `reference_logps`, where the loss needs them; a batch not scored before is scored now."""
        if self._model is None:
            return batch
        if self._scored is None:
            self.score(batch)
        assert self._scored is not None and len(self._scored) >= batch.num_pairs
        values, rest = self._scored.tensor_split([batch.num_pairs])
        self._scored = rest if len(rest) else None
        return replace(batch, reference_logps=values)
