"""Token log-probs with the head's rows split over a process group: each rank holds some of the vocabulary's rows.

Derivation. Rank r has the vocabulary's part V_r and finds, over its own logits, the largest one m_r, the sum
T_r = sum over V_r of exp(l_v - m_r), and the target's logit if the target is among its rows. With M = max_r m_r and
w_r = T_r exp(m_r - M),

    logp = (l_t - M) - log sum_r w_r

so two reductions of S numbers are all that ranks exchange: a maximum, and then a sum of what each has of l_t, w_r and
the by-products. With H_r the entropy of a rank's own soft-max and Q_r its sum of squared probabilities,

    entropy = log T + sum_r w_r (H_r - log w_r) / T,    sum of p^2 = sum_r w_r^2 Q_r / T^2,    T = sum_r w_r

Gradients: with the log-sum-exp of all ranks, d (see `chunked`) is local. Each rank makes its own rows of dW and dbias
without any exchange; dhidden = d @ W is a sum over the vocabulary, so the ranks' parts, fp32, are summed.

Exact like the local forms, of which it is made: reductions are fp32 (fp64 for fp64), and shares of the sum are added
relative to one maximum, as tiles are. A rank's cost is 1/R of theirs, 1 pass forward and up to 3 backward over its
rows; exchanged are [S] and a few times [S] numbers forward, and fp32 [S, H] backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from dpo_scale.logprobs import check_arguments, choose_implementation
from dpo_scale.logprobs.chunked import LogitGradients, head_gradients
from dpo_scale.logprobs.tiles import Tiles, default_tile_bytes, exact_bf16_products, statistics


def vocab_parallel_token_logps(
    hidden: Tensor,
    head_weight: Tensor,
    targets: Tensor,
    group: dist.ProcessGroup,
    first_row: int,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    implementation: str = "auto",
    by_products: Sequence[str] = (),
) -> tuple[Tensor, dict[str, Tensor]]:
    """Log-probs [S] and by-products as of `dpo_scale.logprobs.token_logps`; every rank of the group calls it.

    hidden [S, H] and targets [S] are the same on all ranks, and so must be what becomes of the result: each rank's
    upstream gradient is taken to be that of one loss which all of them compute.
    head_weight [V_r, H] and bias [V_r] are this rank's rows, at least one, beginning with the vocabulary's first_row;
    the ranks' parts cover the vocabulary once, in any order and sizes.

    Gradients: all of hidden's on every rank; head_weight's and bias's for this rank's rows.

    Raises ValueError as `token_logps` does, and for targets that no rank, or more than one, has a row for. On CUDA that
    fails on the device.
    """
    name, _ = choose_implementation(implementation, hidden.device, hidden.dtype)
    if name == "naive":
        raise ValueError("the vocabulary-parallel form is made of 'chunked' or 'triton', not of 'naive'")
    check_arguments(hidden, head_weight, torch.zeros_like(targets), bias, softcap, by_products)
    shard = _Shard(group, logit_scale, softcap, name)
    with torch.autocast(hidden.device.type, enabled=False):
        logps, *extras = _VocabParallel.apply(hidden, head_weight, bias, targets - first_row, shard, tuple(by_products))
    return logps, dict(zip(by_products, extras, strict=True))


class _Shard:
    """One rank's part: the local computations, by either implementation, and the exchange."""

    def __init__(self, group: dist.ProcessGroup, logit_scale: float, softcap: float | None, name: str) -> None:
        self.group, self.logit_scale, self.softcap, self.name = group, logit_scale, softcap, name

    def statistics(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, by_products: Sequence[str]
    ) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
        """This rank's largest logit, sum, and target's logit (0 for a target elsewhere); entropy, log_sum_p2."""
        names = [name for name in by_products if name in ("entropy", "log_sum_p2")]
        if self.name == "triton":
            found = self._head(hidden, weight, bias).statistics(hidden, weight, bias, targets, names)
            return found.peak, found.total, found.target_logit, {name: found.by_product(name) for name in names}
        tiles = self._tiles(hidden, weight, bias)
        peak = torch.empty(targets.shape, dtype=tiles.dtype, device=targets.device)

        def remember_peak(
            tile: Tensor, tokens: slice, vocabulary: slice, rows: Tensor, so_far: Tensor, shrink: Tensor
        ) -> None:
            peak[tokens] = so_far

        with exact_bf16_products(hidden):
            found = statistics(tiles, targets, names, keep=remember_peak)
        return peak, found.total, found.target_logit, dict(zip(names, found.by_products, strict=True))

    def gradients(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        logsumexp: Tensor,
        target_gradient: Tensor,
        upstream: Tensor,
        needs: Sequence[bool],
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """This rank's part of dhidden, in fp32 or fp64, and its rows of dW and dbias."""
        if self.name == "triton":
            head = self._head(hidden, weight, bias)
            return head.gradients(hidden, weight, bias, targets, logsumexp, target_gradient, upstream, needs)
        with exact_bf16_products(hidden):
            tiles = self._tiles(hidden, weight, bias)
            upstream = upstream.to(tiles.dtype) * self.logit_scale
            logit_gradients = LogitGradients(tiles, targets, logsumexp, target_gradient, upstream)
            return head_gradients(tiles, logit_gradients, needs)

    def reduce(self, values: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
        dist.all_reduce(values, operation, group=self.group)
        return values

    def _tiles(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tiles:
        return Tiles(hidden, weight, bias, self.logit_scale, self.softcap, default_tile_bytes(hidden.device))

    def _head(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Any:
        from dpo_scale.logprobs.triton_logps import TritonHead

        return TritonHead(hidden, weight, bias, self.logit_scale, self.softcap)


class _VocabParallel(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        shard: _Shard,
        by_products: tuple[str, ...],
    ) -> tuple[Tensor, ...]:
        peak, total, target_logit, local = shard.statistics(hidden, weight, bias, targets, by_products)
        inside = (targets >= 0) & (targets < weight.shape[0])
        highest = shard.reduce(peak.clone(), dist.ReduceOp.MAX)
        share = total * (peak - highest).exp()
        parts = {"total": share, "target": torch.where(inside, target_logit, 0.0), "owners": inside.to(share.dtype)}
        if "entropy" in local:
            # xlogy: a rank without any share adds nothing, where log 0 times 0 would be NaN
            parts["entropy"] = share * local["entropy"] - torch.xlogy(share, share)
        if "log_sum_p2" in local:
            parts["log_sum_p2"] = share.square() * local["log_sum_p2"].exp()
        whole = dict(zip(parts, shard.reduce(torch.stack(list(parts.values())), dist.ReduceOp.SUM), strict=True))
        _check_owners(whole["owners"])
        log_total = whole["total"].log()
        logps = (whole["target"] - highest) - log_total
        logsumexp = highest + log_total
        values = {
            "logsumexp": lambda: logsumexp,
            "entropy": lambda: log_total + whole["entropy"] / whole["total"],
            "log_sum_p2": lambda: whole["log_sum_p2"].log() - 2 * log_total,
            "argmax_is_target": lambda: whole["target"] >= highest,
        }
        extras = [values[name]() for name in by_products]
        target_gradient = -torch.expm1(logps)
        if shard.softcap is not None:
            target_gradient *= 1.0 - (whole["target"] / shard.softcap).square()
        ctx.save_for_backward(hidden, weight, bias, targets, logsumexp, target_gradient)
        ctx.shard = shard
        ctx.mark_non_differentiable(*extras)
        return logps, *extras

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, logsumexp, target_gradient = ctx.saved_tensors
        with torch.autocast(hidden.device.type, enabled=False):
            grad_hidden, grad_weight, grad_bias = ctx.shard.gradients(
                hidden, weight, bias, targets, logsumexp, target_gradient, grad, ctx.needs_input_grad[:3]
            )
        if grad_hidden is not None:
            grad_hidden = ctx.shard.reduce(grad_hidden, dist.ReduceOp.SUM).to(hidden.dtype)
        return grad_hidden, grad_weight, grad_bias, None, None, None


def _check_owners(owners: Tensor) -> None:
    once = (owners == 1).all()
    if once.is_cuda:
        torch._assert_async(once, "vocab_parallel: a target belongs to no rank, or to more than one")
    elif not once:
        raise ValueError(
            f"each target must belong to one rank's rows; {int((owners != 1).sum())} of {owners.numel()} do not"
        )
