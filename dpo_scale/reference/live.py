"""A reference that runs: a second model.

It does not score the policy's micro-batches one by one. What limits those is what they keep for their backward pass; a
pass without one keeps nothing, so several times the tokens fit in. And each pass of a sharded model gathers all of its
weights. So a step's pairs are scored in a few large passes (`StepPlan.reference_passes`), before the policy's first
micro-step, when none of its activations exist. What stays of them is two numbers a pair.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from dpo_scale.data.layout import PairBatch
from dpo_scale.distributed import ranks
from dpo_scale.losses import sum_token_logps
from dpo_scale.models.scorer import Scorer
from dpo_scale.progress import heartbeat
from dpo_scale.reference.protocol import Reference


class LiveReference(Reference):
    """Scores pairs with a model.

    Args:
        scorer: the model's engine.
        ld_alpha: LD-DPO's weight of the tokens beyond the shorter completion; None: all weigh 1.
    """

    def __init__(self, scorer: Scorer, ld_alpha: float | None = None) -> None:
        self.scorer, self._ld_alpha = scorer, ld_alpha
        self._scored: Tensor | None = None  # [n, 2] of pairs whose batches are still to come in this step

    def attach(self, batch: PairBatch, passes: Sequence[PairBatch] = ()) -> PairBatch:
        for k, scored in enumerate(passes):
            heartbeat(f"reference pass {k + 1} of {len(passes)}")
            before = self._scored
            self.score(scored.to(ranks.device()))
            if not scored.weights.any():  # a filler, whose values no batch asks for; other passes may follow
                self._scored = before
        if self._scored is None:
            self.score(batch)
        assert self._scored is not None and len(self._scored) >= batch.num_pairs
        values, rest = self._scored.tensor_split([batch.num_pairs])
        self._scored = rest if len(rest) else None
        return replace(batch, reference_logps=values)

    def after_step(self, step: int) -> None:
        self._scored = None  # a rank with fewer pairs than others has scored some of them again

    @torch.no_grad()
    def score(self, batch: PairBatch) -> None:
        """One pass of the model, over pairs whose own batches come to `attach` later, in this order."""
        sums = sum_token_logps(
            self.token_logps(batch), batch.score_segments, batch.num_pairs, batch.lengths, ld_alpha=self._ld_alpha
        )
        self._scored = sums if self._scored is None else torch.cat([self._scored, sums])

    def token_logps(self, batch: PairBatch) -> Tensor:
        """Log-probs of the batch's completion tokens, fp32 [S]."""
        return self.scorer(**batch.scorer_inputs)
