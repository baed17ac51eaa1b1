"""Token log-probs in plain torch, through tiles of the logits: exact, on any device, in bounded memory.

Derivation. For token s with target t, logits l_v = z_v, or c tanh(z_v / c) under a soft-cap, with
z_v = scale * (hidden_s . w_v + bias_v):

    logp_s = l_t - lse_s,    lse_s = log sum_v exp(l_v)

The forward pass walks over tiles of the vocabulary and keeps three numbers a token: the largest logit m so
far, the sum of exp(l_v - m), and l_t once its tile has come. When m grows, the sum is multiplied by
exp(m_old - m_new). No exponent is ever above 0, so this is log_softmax up to the order of one fp32 sum. From
upstream gradients g_s,

    dlogp_s/dl_v = [v = t] - exp(l_v - lse_s),   dl_v/dz_v = 1 - (l_v / c)^2 under a soft-cap, else 1
    d_sv = scale * g_s * dlogp_s/dl_v * dl_v/dz_v
    dhidden = d @ W,   dW = d^T @ hidden,   dbias = sum_s d

and d needs only lse_s besides the inputs. So the backward pass computes each tile of logits again, turns it
into d in place, adds a product to dhidden and writes that tile's rows of dW: once, summed in fp32 over all
tokens, without an fp32 copy of [V, H]. The vocabulary is the outer loop, so that a tile of the weight is
converted once for all tokens.

What is kept of the soft-max needs no second computation: exp(l_v - m) in the operands' dtype and its m give
p_v = exp(l_v - m) * exp(m - lse). For the first H tokens it is kept in the memory of the weight's gradient, [V, H] as
well, which has no value before the backward pass: each tile is read before its rows of dW are written. Of the other
tokens the first tiles are kept, as many as `held_bytes` allows.

Where the head is not trained (LoRA), dhidden = g_s * dlogp_s/dhidden, and that direction is summed in the forward pass
(`tiles.HiddenDirection`): the backward pass is one multiplication.

Cost. A pass over (S, H, V) is 2SHV flop: 1 pass forward and 2 to 3 backward (logits of what was not kept, dhidden, dW;
only what requires a gradient is computed), beside naive's 1 + 2; with a head that is not trained 2 and 0; without a
gradient 1. Memory beyond inputs and gradients: one fp32 tile of logits and on CPU one of the weight, at most
`tile_bytes` each; d once more in the operands' dtype; what is kept, at most `held_bytes`; and fp32 [S, H] for hidden
and its gradient. Naive holds [S, V] several times.

Precision. Logits are fp32 throughout, see `tiles`. The two gradient products take d rounded to the operands' dtype
where that is the fast path, as the gradient that they make is rounded to it too; sums over tiles are fp32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dpo_scale.logprobs.tiles import (
    Head,
    HiddenDirection,
    Keep,
    Tiles,
    block_in,
    default_tile_bytes,
    exact_bf16_products,
    held_bytes,
    product_dtype,
    put_at_targets,
    requires_gradient,
    rows_in,
    statistics,
)


def chunked_token_logps(
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    by_products: Sequence[str],
    tile_bytes: int | None = None,
    max_held: int | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Arguments, checked, and results as in `dpo_scale.logprobs.token_logps`.

    tile_bytes bounds a tile, and max_held what is kept for the backward pass so as not to be computed again, beside
    what is kept in the memory of the weight's gradient; with 0 nothing is. Where that memory is used, a second backward
    pass through the same graph is refused by autograd.
    """
    if tile_bytes is None:
        tile_bytes = default_tile_bytes(hidden.device)
    if max_held is None:
        max_held = held_bytes(hidden.shape[0], head.weight.shape[0], hidden.device)
    trained = requires_gradient(hidden, head)
    mode = "direction" if trained == [True, False, False] else "hold" if any(trained) else "values"
    logps, *extras = _ChunkedTokenLogps.apply(hidden, *head, targets, tuple(by_products), tile_bytes, max_held, mode)
    return logps, dict(zip(by_products, extras, strict=True))


class _Held:
    """What is kept of the soft-max, exp(l - peak) * dl/dz in the operands' dtype, and the peaks.

    The first tokens in the memory of the weight's gradient; of the others the first tiles, as many as fit.
    """

    def __init__(
        self, tiles: Tiles, gradient: Tensor | None, first_peaks: Tensor, tensors: Sequence[Tensor] = ()
    ) -> None:
        """Args: gradient, of the weight, not written yet; first_peaks [vocabulary runs, tokens], of what is kept there;
        tensors, those of the object that kept what is looked for now."""
        self._tiles, self._gradient, self._first_peaks = tiles, gradient, first_peaks
        self._first = first_peaks.shape[1]
        half = len(tensors) // 2
        self._exponentials, self._peaks = list(tensors[:half]), list(tensors[half:])

    @property
    def tensors(self) -> list[Tensor]:
        """What is kept outside of the gradient's memory."""
        return self._exponentials + self._peaks

    def keep_within(self, max_bytes: int) -> Keep:
        """The `keep` of `statistics`, which takes at most so much memory of its own."""
        bytes_left, last = max_bytes, -1

        def keep(tile: Tensor, tokens: slice, vocabulary: slice, _: Tensor, peak: Tensor, __: Tensor) -> None:
            nonlocal bytes_left, last
            index, dtype = self._tiles.index_of(vocabulary), self._tiles.product_dtype
            if tokens.start >= self._first and index != last:
                last = index
                shape = (self._tiles.given.shape[0] - self._first, vocabulary.stop - vocabulary.start)
                bytes_left -= shape[0] * shape[1] * dtype.itemsize
                if bytes_left >= 0:
                    self._exponentials.append(tile.new_empty(shape, dtype=dtype))
                    self._peaks.append(tile.new_empty(shape[0]))
            place = self.find(index, tokens, vocabulary)
            if place is not None:
                exponentials, peaks = place
                exponentials.copy_(tile)
                peaks.copy_(peak)

        return keep

    def find(self, index: int, tokens: slice, vocabulary: slice) -> tuple[Tensor, Tensor] | None:
        """Where a tile of the index-th run of the vocabulary is kept, and its peaks; None if it is not."""
        if tokens.start < self._first:
            assert self._gradient is not None
            block = block_in(self._gradient, vocabulary, self._first, self._tiles.product_dtype)
            return block[tokens], self._first_peaks[index, tokens]
        if index < len(self._exponentials):
            here = slice(tokens.start - self._first, tokens.stop - self._first)
            return self._exponentials[index][here], self._peaks[index][here]
        return None


class _ChunkedTokenLogps(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        logit_scale: float,
        softcap: float | None,
        targets: Tensor,
        by_products: tuple[str, ...],
        tile_bytes: int,
        max_held: int,
        mode: str,
    ) -> tuple[Tensor, ...]:
        head = Head(weight, bias, logit_scale, softcap)
        with exact_bf16_products(hidden):
            gradient, in_gradient = None, 0
            if mode == "hold" and ctx.needs_input_grad[1] and max_held and len(targets):
                gradient = torch.empty_like(weight, memory_format=torch.contiguous_format)
                in_gradient = min(rows_in(gradient, product_dtype(hidden)), len(targets))
            tiles = Tiles(hidden, head, tile_bytes, (in_gradient,))
            direction = HiddenDirection(tiles, targets) if mode == "direction" else None
            first_peaks = hidden.new_empty((len(tiles.vocabulary_runs), in_gradient), dtype=tiles.dtype)
            held = _Held(tiles, gradient, first_peaks) if mode == "hold" else None
            keep = held.keep_within(max_held) if held is not None else direction
            found = statistics(tiles, targets, by_products, keep)
        if direction is not None:
            # bf16 has the range of fp32; in fp16 a direction of a near-certain token would be lost
            kept = direction.result(found)
            ctx.save_for_backward(kept.to(torch.bfloat16) if hidden.dtype == torch.bfloat16 else kept)
        elif held is not None:
            # The parameter itself, no view or copy of it: under ZeRO-3 its storage is released after the head's
            # forward and filled again before its backward, which only the parameter follows.
            ctx.save_for_backward(
                hidden, weight, bias, targets, found.logsumexp, head.target_gradient(found.logps, found.target_logit),
                gradient, first_peaks, *held.tensors,
            )  # fmt: skip
        ctx.dtype, ctx.transform, ctx.cut = hidden.dtype, (logit_scale, softcap), (tile_bytes, (in_gradient,))
        ctx.mark_non_differentiable(*found.by_products)
        return found.logps, *found.by_products

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        if len(ctx.saved_tensors) == 1:
            (direction,) = ctx.saved_tensors
            grads: tuple[Tensor | None, ...] = ((direction * grad.unsqueeze(1)).to(ctx.dtype), None, None)
        else:
            hidden, weight, bias, targets, logsumexp, target_gradient, gradient, first_peaks, *kept = ctx.saved_tensors
            with torch.autocast(hidden.device.type, enabled=False), exact_bf16_products(hidden):
                tiles = Tiles(hidden, Head(weight, bias, *ctx.transform), *ctx.cut)
                grad = grad.to(tiles.dtype) * tiles.head.logit_scale
                held = _Held(tiles, gradient, first_peaks, kept)
                grad_hidden, *others = _head_gradients(
                    tiles, targets, logsumexp, target_gradient, grad, held, ctx.needs_input_grad[:3], gradient
                )
            grads = (None if grad_hidden is None else grad_hidden.to(ctx.dtype), *others)
        return *grads, *(None,) * 7


def _head_gradients(
    tiles: Tiles,
    targets: Tensor,
    logsumexp: Tensor,
    target_gradient: Tensor,
    grad: Tensor,
    held: _Held,
    needs: Sequence[bool],
    grad_weight: Tensor | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of hidden, in fp32 or fp64, and of weight and bias in their own dtypes; None for those not needed.

    grad: [S] of the log-probs, times the logit scale.
    grad_weight: memory for that of the weight, if there is any yet.
    """
    hidden, weight, bias = tiles.given, tiles.head.weight, tiles.head.bias
    needs_hidden, needs_weight, needs_bias = needs
    grad_hidden = torch.zeros(hidden.shape, dtype=tiles.dtype, device=hidden.device) if needs_hidden else None
    # every row is written below, once; without tokens there is nothing to write
    make = torch.empty_like if hidden.shape[0] else torch.zeros_like
    if needs_weight and grad_weight is None:
        grad_weight = make(weight, memory_format=torch.contiguous_format)
    grad_bias = torch.zeros_like(bias) if needs_bias and bias is not None else None
    at_target = grad * target_gradient
    for index, vocabulary in enumerate(tiles.vocabulary_runs):
        weight_rows = tiles.weight_rows(vocabulary)
        weight_sum, bias_sum = None, None
        for tokens in tiles.token_runs:
            kept = held.find(index, tokens, vocabulary)
            if kept is not None:
                block, peaks = kept
                d = tiles.scale_kept(block, peaks, logsumexp[tokens], grad[tokens], torch.empty_like(block))
            else:  # from logits that are computed again
                tile = tiles.logits(tokens, vocabulary, weight_rows)
                slope = tiles.slope(tile)
                d = tile.sub_(logsumexp[tokens].unsqueeze(1)).exp_().mul_(-grad[tokens].unsqueeze(1))
                d = (d if slope is None else d.mul_(slope)).to(tiles.product_dtype)
            put_at_targets(d, targets[tokens], vocabulary, at_target[tokens])
            if grad_hidden is not None:
                grad_hidden[tokens] += tiles.product(d, tiles.product_weight(vocabulary))
            if grad_weight is not None and d.dtype == weight.dtype and len(tiles.token_runs) == 1:
                torch.mm(d.t(), tiles.product_hidden, out=grad_weight[vocabulary])
            elif grad_weight is not None:
                weight_sum = _sum(weight_sum, tiles.product(d.t(), tiles.product_hidden[tokens]), tiles.dtype)
            if grad_bias is not None:
                bias_sum = _sum(bias_sum, d.sum(0, dtype=tiles.dtype), tiles.dtype)
        if grad_weight is not None and weight_sum is not None:
            grad_weight[vocabulary] = weight_sum
        if grad_bias is not None and bias_sum is not None:
            grad_bias[vocabulary] = bias_sum
    return grad_hidden, grad_weight, grad_bias


def _sum(total: Tensor | None, term: Tensor, dtype: torch.dtype) -> Tensor:
    """total + term in dtype; a first term is kept as it is, so that a lone one is not converted."""
    return term if total is None else total.to(dtype) + term
