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
    HiddenDirection,
    Tiles,
    block_in,
    default_tile_bytes,
    exact_bf16_products,
    held_bytes,
    in_tile,
    product_dtype,
    rows_in,
    statistics,
)


def chunked_token_logps(
    hidden: Tensor,
    head_weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float | None,
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
        max_held = held_bytes(hidden.shape[0], head_weight.shape[0], hidden.device)
    trained = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in (hidden, head_weight, bias)]
    mode = "direction" if trained == [True, False, False] else "hold" if any(trained) else "values"
    logps, *extras = _ChunkedTokenLogps.apply(
        hidden, head_weight, bias, targets, logit_scale, softcap, tuple(by_products), tile_bytes, max_held, mode
    )
    return logps, dict(zip(by_products, extras, strict=True))


class _Held:
    """What is kept of the soft-max, exp(l - peak) * dl/dz in the operands' dtype, and the peaks.

    The first tokens in the memory of the weight's gradient; of the others the first tiles, as many as fit.
    """

    def __init__(self, tiles: Tiles, gradient: Tensor | None, in_gradient: int, max_bytes: int) -> None:
        self._tiles, self._gradient, self._first, self._bytes_left = tiles, gradient, in_gradient, max_bytes
        self.first_peaks = tiles.given.new_empty((len(tiles.vocabulary_runs), in_gradient), dtype=tiles.dtype)
        self.exponentials: list[Tensor] = []
        self.peaks: list[Tensor] = []
        self._vocabulary: slice | None = None

    def __call__(
        self, tile: Tensor, tokens: slice, vocabulary: slice, weight_rows: Tensor, peak: Tensor, shrink: Tensor
    ) -> None:
        dtype = self._tiles.product_dtype
        if tokens.start < self._first:
            assert self._gradient is not None
            block_in(self._gradient, vocabulary, self._first, dtype)[tokens] = tile
            self.first_peaks[vocabulary.start // self._tiles.vocabulary_runs[0].stop, tokens] = peak
            return
        if vocabulary != self._vocabulary:
            self._vocabulary = vocabulary
            shape = (self._tiles.given.shape[0] - self._first, vocabulary.stop - vocabulary.start)
            self._bytes_left -= shape[0] * shape[1] * dtype.itemsize
            if self._bytes_left >= 0:
                self.exponentials.append(tile.new_empty(shape, dtype=dtype))
                self.peaks.append(tile.new_empty(shape[0]))
        if self._bytes_left >= 0:
            here = slice(tokens.start - self._first, tokens.stop - self._first)
            self.exponentials[-1][here] = tile
            self.peaks[-1][here] = peak


class _ChunkedTokenLogps(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        logit_scale: float,
        softcap: float | None,
        by_products: tuple[str, ...],
        tile_bytes: int,
        max_held: int,
        mode: str,
    ) -> tuple[Tensor, ...]:
        with exact_bf16_products(hidden):
            gradient, in_gradient = None, 0
            if mode == "hold" and ctx.needs_input_grad[1] and max_held and len(targets):
                gradient = torch.empty_like(weight, memory_format=torch.contiguous_format)
                in_gradient = min(rows_in(gradient, product_dtype(hidden)), len(targets))
            tiles = Tiles(hidden, weight, bias, logit_scale, softcap, tile_bytes, (in_gradient,))
            direction = HiddenDirection(tiles, targets) if mode == "direction" else None
            held = _Held(tiles, gradient, in_gradient, max_held) if mode == "hold" else None
            found = statistics(tiles, targets, by_products, keep=direction or held)
        if direction is not None:
            # bf16 has the range of fp32; in fp16 a direction of a near-certain token would be lost
            kept = direction.result(found)
            ctx.save_for_backward(kept.to(torch.bfloat16) if hidden.dtype == torch.bfloat16 else kept)
        elif held is not None:
            # The parameter itself, no view or copy of it: under ZeRO-3 its storage is released after the head's
            # forward and filled again before its backward, which only the parameter follows.
            ctx.save_for_backward(
                hidden, weight, bias, targets, found.logsumexp, found.target_gradient(softcap),
                gradient, held.first_peaks, *held.exponentials, *held.peaks,
            )  # fmt: skip
        ctx.dtype, ctx.options = hidden.dtype, (logit_scale, softcap, tile_bytes, (in_gradient,))
        ctx.mark_non_differentiable(*found.by_products)
        return found.logps, *found.by_products

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        if len(ctx.saved_tensors) == 1:
            (direction,) = ctx.saved_tensors
            grads: tuple[Tensor | None, ...] = ((direction * grad.unsqueeze(1)).to(ctx.dtype), None, None)
        else:
            hidden, weight, bias, targets, logsumexp, target_gradient, gradient, first_peaks, *held = ctx.saved_tensors
            with torch.autocast(hidden.device.type, enabled=False), exact_bf16_products(hidden):
                tiles = Tiles(hidden, weight, bias, *ctx.options)
                grad = grad.to(tiles.dtype) * tiles.logit_scale
                kept = (gradient, first_peaks, held[: len(held) // 2], held[len(held) // 2 :])
                logit_gradients = LogitGradients(tiles, targets, logsumexp, target_gradient, grad, kept)
                grad_hidden, *others = head_gradients(tiles, logit_gradients, ctx.needs_input_grad[:3], gradient)
            grads = (None if grad_hidden is None else grad_hidden.to(ctx.dtype), *others)
        return *grads, *(None,) * 7


class LogitGradients:
    """d, tile by tile: out of what is kept of the soft-max, otherwise out of logits computed again."""

    def __init__(
        self,
        tiles: Tiles,
        targets: Tensor,
        logsumexp: Tensor,
        target_gradient: Tensor,
        grad: Tensor,
        kept: tuple[Tensor | None, Tensor, Sequence[Tensor], Sequence[Tensor]] | None = None,
    ) -> None:
        """Args: kept, what `_Held` was given and what it kept; None for nothing."""
        self._tiles, self._targets, self._logsumexp = tiles, targets, logsumexp
        self._grad = grad.unsqueeze(1)
        self._at_target = grad * target_gradient
        self._kept = kept or (None, targets.new_empty((len(tiles.vocabulary_runs), 0)), (), ())
        self._first = self._kept[1].shape[1]

    def __call__(self, index: int, tokens: slice, vocabulary: slice, weight_rows: Tensor) -> Tensor:
        """[tokens, vocabulary] d of the index-th run of the vocabulary, in the dtype of the gradient products."""
        tiles, grad = self._tiles, self._grad[tokens]
        logsumexp = self._logsumexp[tokens].unsqueeze(1)
        found = self._exponentials(index, tokens, vocabulary)
        if found is not None:
            exponentials, peaks = found
            factors = (peaks.unsqueeze(1) - logsumexp).exp_().mul_(-grad)
            d = tiles.scale_rows(exponentials, factors, torch.empty_like(exponentials))
        else:
            tile = tiles.logits(tokens, vocabulary, weight_rows)
            slope = tiles.slope(tile)
            d = tile.sub_(logsumexp).exp_().mul_(-grad)
            d = (d if slope is None else d.mul_(slope)).to(tiles.product_dtype)
        inside, column = in_tile(self._targets[tokens], vocabulary)
        # One column a row, so read and written without the clash that would make an added value's order matter.
        entry = torch.arange(d.shape[0], device=d.device), column.squeeze(1)
        d[entry] = torch.where(inside, self._at_target[tokens].to(d.dtype), d[entry])
        return d

    def _exponentials(self, index: int, tokens: slice, vocabulary: slice) -> tuple[Tensor, Tensor] | None:
        gradient, first_peaks, exponentials, peaks = self._kept
        if tokens.start < self._first:
            assert gradient is not None
            block = block_in(gradient, vocabulary, self._first, self._tiles.product_dtype)
            return block[tokens], first_peaks[index, tokens]
        if index < len(exponentials):
            here = slice(tokens.start - self._first, tokens.stop - self._first)
            return exponentials[index][here], peaks[index][here]
        return None


def head_gradients(
    tiles: Tiles, logit_gradients: LogitGradients, needs: Sequence[bool], grad_weight: Tensor | None = None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of hidden, in fp32 or fp64, and of weight and bias in their own dtypes; None for those not needed.

    grad_weight: memory for that of the weight, if there is any yet.
    """
    hidden, weight, bias = tiles.given, tiles.weight, tiles.bias
    needs_hidden, needs_weight, needs_bias = needs
    grad_hidden = torch.zeros(hidden.shape, dtype=tiles.dtype, device=hidden.device) if needs_hidden else None
    # every row is written below, once; without tokens there is nothing to write
    make = torch.empty_like if hidden.shape[0] else torch.zeros_like
    if needs_weight and grad_weight is None:
        grad_weight = make(weight, memory_format=torch.contiguous_format)
    grad_bias = torch.zeros_like(bias) if needs_bias and bias is not None else None
    for index, vocabulary in enumerate(tiles.vocabulary_runs):
        weight_rows = tiles.weight_rows(vocabulary)
        weight_sum, bias_sum = None, None
        for tokens in tiles.token_runs:
            d = logit_gradients(index, tokens, vocabulary, weight_rows)
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
