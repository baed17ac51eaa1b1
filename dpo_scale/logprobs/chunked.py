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

Cost. A pass over (S, H, V) is 2SHV flop: 1 pass forward, up to 3 backward (logits again, dhidden, dW; only
what requires a gradient is computed), beside naive's 1 + 2. Memory beyond inputs and gradients: one fp32 tile
of logits and on CPU one of the weight, at most `tile_bytes` each; d once more in the operands' dtype; and
fp32 [S, H] for hidden and its gradient. Naive holds [S, V] several times.

Precision. The logits of bf16 and fp16 operands are accumulated and kept in fp32: rounding them to bf16 would
cost 1e-2 a token. Where a GEMM cannot write fp32 from 16-bit operands (CPU), the operands are converted, tile
by tile. The two gradient products take d rounded to the operands' dtype where that is the fast path, as the
gradient that they make is rounded to it too; sums over tiles are fp32.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Bounds one tile of logits. CPU: stays near the last-level cache, and well below what naive holds for some
# hundred tokens; measured, 8, 16 and 32 MiB are equally fast and 64 is slower. On GPUs a launch must be worth
# its while, so tiles are larger; that number is reasoned, not measured.
CPU_TILE_BYTES = 8 * 2**20
DEVICE_TILE_BYTES = 256 * 2**20
# Tokens are split too when a tile of all of them would be narrower than this: thin products are slow.
MIN_TILE_WIDTH = 1024


def chunked_token_logps(
    hidden: Tensor,
    head_weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    by_products: Sequence[str],
    tile_bytes: int | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Arguments, checked, and results as in `dpo_scale.logprobs.token_logps`; tile_bytes bounds a tile."""
    if tile_bytes is None:
        tile_bytes = CPU_TILE_BYTES if hidden.device.type == "cpu" else DEVICE_TILE_BYTES
    logps, *extras = _ChunkedTokenLogps.apply(
        hidden, head_weight, bias, targets, logit_scale, softcap, tuple(by_products), tile_bytes
    )
    return logps, dict(zip(by_products, extras, strict=True))


class _Tiles:
    """The tiles of one call: logits of a run of tokens and a run of the vocabulary, in reused memory."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        logit_scale: float,
        softcap: float | None,
        tile_bytes: int,
    ) -> None:
        self.weight, self.bias, self.logit_scale, self.softcap = weight, bias, logit_scale, softcap
        self.dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        # Only CUDA has a GEMM of 16-bit operands with an fp32 result; elsewhere the operands are converted.
        self.mixed_gemm = hidden.is_cuda and hidden.dtype in (torch.bfloat16, torch.float16)
        self.hidden = hidden if self.mixed_gemm else hidden.to(self.dtype)
        (tokens, width), vocabulary = hidden.shape, weight.shape[0]
        numbers = tile_bytes // self.dtype.itemsize
        rows = min(tokens, max(1, numbers // MIN_TILE_WIDTH))
        # The second bound is for the converted tile of the weight.
        cols = min(vocabulary, max(MIN_TILE_WIDTH, numbers // max(1, rows, width) // 64 * 64))
        self.token_runs = list(_runs(tokens, rows))
        self.vocabulary_runs = list(_runs(vocabulary, cols))
        self._logits = hidden.new_empty(0 if self.mixed_gemm else rows * cols, dtype=self.dtype)
        convert = not self.mixed_gemm and weight.dtype != self.dtype
        self._weight = hidden.new_empty((cols, width), dtype=self.dtype) if convert else None

    def weight_rows(self, vocabulary: slice) -> Tensor:
        """These rows of the weight in the dtype that the logits' product takes; valid until the next call."""
        rows = self.weight[vocabulary]
        return rows if self._weight is None else self._weight[: rows.shape[0]].copy_(rows)

    def logits(self, tokens: slice, vocabulary: slice, weight_rows: Tensor) -> Tensor:
        """[tokens, vocabulary] final logits, fp32 or fp64, to be overwritten; valid until the next call."""
        hidden = self.hidden[tokens]
        if self.mixed_gemm:
            logits = torch.mm(hidden, weight_rows.t(), out_dtype=torch.float32)
        else:
            shape = (hidden.shape[0], weight_rows.shape[0])
            logits = self._logits[: shape[0] * shape[1]].view(shape)
            torch.mm(hidden, weight_rows.t(), out=logits)
        if self.bias is not None:
            logits += self.bias[vocabulary].to(self.dtype)
        if self.logit_scale != 1.0:
            logits *= self.logit_scale
        if self.softcap is not None:
            logits.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits


def _runs(total: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, total)) for start in range(0, total, max(1, size)))


def _in_tile(targets: Tensor, vocabulary: slice) -> tuple[Tensor, Tensor]:
    """Whether each target is in the tile, and its column there (any column if it is not): [s] and [s, 1]."""
    column = targets - vocabulary.start
    width = vocabulary.stop - vocabulary.start
    return (column >= 0) & (column < width), column.clamp(0, width - 1).unsqueeze(1)


def _forward(tiles: _Tiles, targets: Tensor, by_products: Sequence[str]) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Log-probs, log-sum-exps and by-products, each [S]."""
    zeros = torch.zeros(targets.shape, dtype=tiles.dtype, device=targets.device)
    # Running values over the vocabulary, with x = l - peak: sums of exp(x), of x exp(x) and of exp(x)^2. The
    # peak starts at the lowest finite number, not at -inf, whose product with an empty sum would be NaN.
    peak = torch.full_like(zeros, torch.finfo(tiles.dtype).min)
    total, total_x, total_squared = zeros, zeros.clone(), zeros.clone()
    target_logit = zeros.clone()
    for vocabulary in tiles.vocabulary_runs:
        weight_rows = tiles.weight_rows(vocabulary)
        for tokens in tiles.token_runs:
            tile = tiles.logits(tokens, vocabulary, weight_rows)
            inside, column = _in_tile(targets[tokens], vocabulary)
            target_logit[tokens] = torch.where(inside, tile.gather(1, column).squeeze(1), target_logit[tokens])
            new_peak = torch.maximum(peak[tokens], tile.amax(1))
            rise = peak[tokens] - new_peak
            shrink = rise.exp()
            tile.sub_(new_peak.unsqueeze(1))
            x = tile.clone() if "entropy" in by_products else None
            tile.exp_()
            if x is not None:
                total_x[tokens] = shrink * (total_x[tokens] + rise * total[tokens]) + x.mul_(tile).sum(1)
            total[tokens] = shrink * total[tokens] + tile.sum(1)
            if "log_sum_p2" in by_products:
                total_squared[tokens] = shrink.square() * total_squared[tokens] + tile.square_().sum(1)
            peak[tokens] = new_peak
    log_total = total.log()
    values = {
        "logsumexp": lambda: peak + log_total,
        "entropy": lambda: log_total - total_x / total,
        "log_sum_p2": lambda: total_squared.log() - 2 * log_total,
        "argmax_is_target": lambda: target_logit >= peak,
    }
    # Peak and sum are subtracted one by one: their sum would round away digits of a log-prob near 0.
    logps = (target_logit - peak) - log_total
    return logps, peak + log_total, [values[name]() for name in by_products]


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
    ) -> tuple[Tensor, ...]:
        tiles = _Tiles(hidden, weight, bias, logit_scale, softcap, tile_bytes)
        logps, logsumexp, extras = _forward(tiles, targets, by_products)
        # The parameter itself, no view or copy of it: under ZeRO-3 its storage is released after the head's
        # forward and filled again before its backward, which only the parameter follows.
        ctx.save_for_backward(hidden, weight, bias, targets, logsumexp)
        ctx.options = (logit_scale, softcap, tile_bytes)
        ctx.mark_non_differentiable(*extras)
        return logps, *extras

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, logsumexp = ctx.saved_tensors
        with torch.autocast(hidden.device.type, enabled=False):
            tiles = _Tiles(hidden, weight, bias, *ctx.options)
            grads = _backward(tiles, hidden, targets, logsumexp, grad, ctx.needs_input_grad[:3])
        return *grads, None, None, None, None, None


def _backward(
    tiles: _Tiles,
    hidden: Tensor,
    targets: Tensor,
    logsumexp: Tensor,
    grad: Tensor,
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of hidden, weight and bias in their own dtypes; None for those not needed."""
    weight, bias = tiles.weight, tiles.bias
    needs_hidden, needs_weight, needs_bias = needs
    grad = grad.to(tiles.dtype) * tiles.logit_scale
    grad_hidden = torch.zeros(hidden.shape, dtype=tiles.dtype, device=hidden.device) if needs_hidden else None
    grad_weight = torch.zeros_like(weight) if needs_weight else None
    grad_bias = torch.zeros_like(bias) if needs_bias and bias is not None else None
    product_dtype = _product_dtype(tiles, hidden)
    right = hidden if product_dtype == hidden.dtype else tiles.hidden
    for vocabulary in tiles.vocabulary_runs:
        weight_rows = tiles.weight_rows(vocabulary)
        left = weight[vocabulary] if product_dtype == weight.dtype else weight_rows
        weight_sum, bias_sum = None, None
        for tokens in tiles.token_runs:
            d32 = _logit_gradient(tiles, tokens, vocabulary, weight_rows, targets, logsumexp, grad)
            d = d32.to(product_dtype)
            if grad_hidden is not None:
                grad_hidden[tokens] += _product(d, left, tiles)
            if grad_weight is not None:
                weight_sum = _sum(weight_sum, _product(d.t(), right[tokens], tiles), tiles.dtype)
            if grad_bias is not None:
                bias_sum = _sum(bias_sum, d32.sum(0), tiles.dtype)
        if grad_weight is not None and weight_sum is not None:
            grad_weight[vocabulary] = weight_sum
        if grad_bias is not None and bias_sum is not None:
            grad_bias[vocabulary] = bias_sum
    return None if grad_hidden is None else grad_hidden.to(hidden.dtype), grad_weight, grad_bias


def _logit_gradient(
    tiles: _Tiles,
    tokens: slice,
    vocabulary: slice,
    weight_rows: Tensor,
    targets: Tensor,
    logsumexp: Tensor,
    grad: Tensor,
) -> Tensor:
    """d of one tile, before the weight and hidden products: [tokens, vocabulary], in the tile's memory."""
    tile = tiles.logits(tokens, vocabulary, weight_rows)
    slope = None if tiles.softcap is None else (tile / tiles.softcap).square_().neg_().add_(1.0)
    grad = grad[tokens].unsqueeze(1)
    tile.sub_(logsumexp[tokens].unsqueeze(1)).exp_().mul_(-grad)
    inside, column = _in_tile(targets[tokens], vocabulary)
    # One column a row, so read and written without the clash that would make a scattered add's order matter.
    at_target = tile.gather(1, column)
    tile.scatter_(1, column, torch.where(inside.unsqueeze(1), at_target + grad, at_target))
    return tile if slope is None else tile.mul_(slope)


def _product_dtype(tiles: _Tiles, hidden: Tensor) -> torch.dtype:
    """The dtype that the gradient products' operands have: 16 bits where the device multiplies those fast."""
    if tiles.mixed_gemm:
        return hidden.dtype
    if hidden.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return torch.bfloat16
    return tiles.dtype


def _product(left: Tensor, right: Tensor, tiles: _Tiles) -> Tensor:
    return torch.mm(left, right, out_dtype=torch.float32) if tiles.mixed_gemm else torch.mm(left, right)


def _sum(total: Tensor | None, term: Tensor, dtype: torch.dtype) -> Tensor:
    """total + term in dtype; a first term is kept as it is, so that a lone one is not converted."""
    return term if total is None else total.to(dtype) + term
