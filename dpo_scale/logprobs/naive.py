"""The yardstick: all logits at once, log_softmax, gather; every other implementation is tested against it.

It holds [S, V] logits in fp32 (fp64 for fp64 inputs) several times over and lets autograd do the rest. That
makes it easy to trust and dear to run: at S = 8192 and V = 128256 one copy of the logits is 4.2 GB.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dpo_scale.logprobs.tiles import Head


def naive_token_logps(
    hidden: Tensor, head: Head, targets: Tensor, by_products: Sequence[str]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Arguments, checked, and results as in `dpo_scale.logprobs.token_logps`."""
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    logits = hidden.to(dtype) @ head.weight.to(dtype).t()
    if head.bias is not None:
        logits = logits + head.bias.to(dtype)
    logits = logits * head.logit_scale
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    logps = torch.log_softmax(logits, dim=1)
    target_logps = logps.gather(1, targets.unsqueeze(1)).squeeze(1)
    with torch.no_grad():
        return target_logps, {name: _by_product(name, logits, logps, target_logps) for name in by_products}


def _by_product(name: str, logits: Tensor, logps: Tensor, target_logps: Tensor) -> Tensor:
    if name == "logsumexp":
        return torch.logsumexp(logits, dim=1)
    if name == "entropy":
        return -(logps.exp() * logps).sum(1)
    if name == "log_sum_p2":
        return torch.logsumexp(2 * logps, dim=1)
    assert name == "argmax_is_target", name
    return target_logps >= logps.amax(1)
