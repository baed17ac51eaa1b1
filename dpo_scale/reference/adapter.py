"""The reference as the policy's own weights with its adapter off, or with a frozen adapter in its place.

No second model is in memory. The policy's engine runs the pass, so the weights are sharded, gathered and offloaded as
in training, at every ZeRO stage.
"""

from __future__ import annotations

from typing import Any

import torch

from dpo_scale.models.lora import in_reference_state


class AdapterReference:
    """Stands where a reference's engine would: called with a batch's tensors, returns its log-probs."""

    def __init__(self, policy: Any) -> None:
        """Args: policy, the engine around a `PairScorer` of a peft model."""
        self.policy = policy

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        module = self.policy.module
        was_training = module.training
        self.policy.eval()  # a reference has no dropout
        with torch.no_grad(), in_reference_state(module.model):
            scored = self.policy(*inputs, **named)
        self.policy.train(was_training)
        return scored
