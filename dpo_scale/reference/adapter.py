"""The reference as the policy's own weights with its adapter off, or with a frozen adapter in its place.

No second model is in memory. The policy's engine runs the pass, so the weights are sharded, gathered and offloaded as
in training, at every ZeRO stage.
"""

from __future__ import annotations

from torch import Tensor

from dpo_scale.data.layout import PairBatch
from dpo_scale.models.lora import in_reference_state
from dpo_scale.reference.live import LiveReference


class AdapterReference(LiveReference):
    """A live reference inside the policy, whose engine it is made with."""

    def token_logps(self, batch: PairBatch) -> Tensor:
        module = self.scorer.module
        was_training = module.training
        self.scorer.eval()  # a reference has no dropout
        with in_reference_state(module.model):
            scored = super().token_logps(batch)
        self.scorer.train(was_training)
        return scored
