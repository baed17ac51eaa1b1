"""The preference loss of whole pairs, and its gradient, while their soft-max is still there: no second logits pass.

Derivation. Let L be a loss per pair that is a function of that pair's two sums alone, S_k = sum of a_s * logp_s over
the tokens s of completion k (a_s = 1, or LD-DPO's weights). Then for a token of completion k

    dL/dlogp_s = c_s = a_s * dL/dS_k
    d_sv = scale * c_s * ([v = t] - p_sv) * dl_v/dz_v,     dhidden = d @ W,   dW = d^T @ hidden,   dbias = sum_s d

(letters as in `chunked`). A token path learns c_s from autograd after the forward pass of all tokens, when the soft-max
of the first is long gone, and computes the logits again. But c_s depends on nothing outside of its pair. So this walks
over chunks of whole pairs. One pass over the vocabulary, in fp32 tiles, gives log-sum-exps and log-probs, and leaves
e_sv = exp(l_v - m) * dl_v/dz_v, m being the largest logit of the token up to this tile. Then the sums, the loss and
dL/dS (autograd on a [P, 2] function) are there, and e becomes d in place: p_sv = e_sv * exp(m - lse_s), one factor a
token and tile. The target's own entry is overwritten by c_s * (1 - p_t), whose digits come from the log-prob. Two
products follow, and the backward pass of autograd only multiplies by its upstream scalar (the share of the global
batch, the loss scale of fp16).

Exact: log-probs are those of `chunked`, from fp32 logits; e is rounded to the operands' dtype, as every path rounds d,
which it becomes: two roundings of 16 bits instead of one, on single terms of sums of V.

Cost. 3 passes of 2SHV flop, as naive, where the token path makes 4. Bytes: e, 2SV in 16-bit training, written once,
scaled once, read by two products, in pieces of at most `most_held`; one fp32 tile of logits. A pair whose e is larger
than that is split: the first tokens are treated as above, the logits of the rest are computed again once the loss is
known, so it costs between 3 and 4 passes. A head that is not trained needs no e: the gradient's direction is summed in
the one pass over the vocabulary (`tiles.HiddenDirection`): 2 passes.

The weight's gradient is a sum over chunks. Each adds its product, summed in fp32, to the gradient in the weight's own
dtype: one rounding a chunk, as gradient accumulation has one a micro-step, and no fp32 copy of [V, H], which is 2.1 GB
for a head of 4096 x 128256. Beyond `MOST_ROUNDINGS` chunks the error of that would show (it grows with the root of
their number), and so many tokens dwarf the copy: then the sum is fp32. In fp16, whose range gradients do not fit before
the loss scale has come, both gradients are kept in fp32, and fp16 operands of the products are scaled to that range.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dpo_scale.logprobs import check_arguments
from dpo_scale.logprobs.tiles import (
    HiddenDirection,
    Statistics,
    Tiles,
    default_tile_bytes,
    exact_bf16_products,
    held_bytes,
    runs,
    statistics,
)
from dpo_scale.losses import segment_sums

MOST_ROUNDINGS = 16
# What 1 becomes in fp16 operands: the smallest number is then 4e-12, and sums of two are still in range.
FP16_ONE = 2.0**14


@dataclass(frozen=True)
class PairLoss:
    """What a batch adds to hidden states and targets for its loss to be taken pair by pair.

    Attributes:
        segments: [S] int64, ascending: 2i for tokens of pair i's chosen completion, 2i + 1 for its rejected.
        num_pairs: P.
        loss_of_sums: from sums [P, 2], fp32 or fp64, to losses [P], each weighted as it is to be added up. Loss i must
            depend on row i alone; rows whose sums are not known yet come as 0.
        token_weights: [S] factors of the log-probs in the sums; None for 1.
    """

    segments: Tensor
    num_pairs: int
    loss_of_sums: Callable[[Tensor], Tensor]
    token_weights: Tensor | None = None


def fused_pair_loss(
    hidden: Tensor,
    head_weight: Tensor,
    targets: Tensor,
    pair_loss: PairLoss,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    tile_bytes: int | None = None,
    most_held: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The sum of the pairs' losses, differentiable once in hidden, head_weight and bias, and their sums of log-probs.

    hidden, head_weight, targets, bias, logit_scale, softcap: as in `dpo_scale.logprobs.token_logps`.
    tile_bytes, most_held: bounds of the fp32 tile of logits and of the kept soft-max; defaults by device and size.

    Returns a scalar and [P, 2] without gradient, both fp32 (fp64 for fp64 inputs). The gradients are made here, for an
    upstream of 1, and multiplied in place by the real one: a second backward pass through the same graph is refused by
    autograd. On CUDA the host waits for the device once, for the pairs' numbers of tokens.

    Raises ValueError as `token_logps` does.
    """
    check_arguments(hidden, head_weight, targets, bias, softcap, ())
    assert pair_loss.segments.shape == targets.shape, (pair_loss.segments.shape, targets.shape)
    if tile_bytes is None:
        tile_bytes = default_tile_bytes(hidden.device)
    if most_held is None:
        most_held = held_bytes(hidden.shape[0], head_weight.shape[0], hidden.device)
    trained = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in (hidden, head_weight, bias)]
    job = _Job(pair_loss, targets, bias, logit_scale, softcap, tile_bytes, most_held, trained)
    return _FusedPairLoss.apply(hidden, head_weight, bias, job)


class _FusedPairLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, job: _Job) -> tuple[Tensor, Tensor]:
        with torch.autocast(hidden.device.type, enabled=False), exact_bf16_products(hidden):
            sums, gradients = job.run(hidden, weight)
        total = job.pair_loss.loss_of_sums(sums).sum().to(sums.dtype)
        ctx.save_for_backward(*gradients)
        ctx.dtype = hidden.dtype
        ctx.mark_non_differentiable(sums)
        return total, sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        # As a 0-dimensional tensor it would be rounded to the dtype of what it multiplies. [1] is not, but on a CPU
        # torch then makes an fp32 copy of the product; on CUDA a Python number would have to be waited for.
        factor = upstream.item() if upstream.device.type == "cpu" else upstream.reshape(1)
        return *(None if g is None else g.mul_(factor).to(ctx.dtype) for g in ctx.saved_tensors), None


@dataclass
class _Job:
    """One call: its arguments, and the walk over chunks of pairs."""

    pair_loss: PairLoss
    targets: Tensor
    bias: Tensor | None
    logit_scale: float
    softcap: float | None
    tile_bytes: int
    most_held: int
    trained: Sequence[bool]  # hidden, weight, bias

    def run(self, hidden: Tensor, weight: Tensor) -> tuple[Tensor, list[Tensor | None]]:
        """Sums [P, 2], and the gradients of hidden, weight and bias for an upstream of 1, None where not trained."""
        probe = self._tiles(hidden[:0], weight)
        sums = hidden.new_zeros((self.pair_loss.num_pairs, 2), dtype=probe.dtype)
        most_rows = max(1, self.most_held // (weight.shape[0] * probe.product_dtype.itemsize))
        counts = torch.bincount(self.pair_loss.segments // 2, minlength=self.pair_loss.num_pairs).tolist()
        chunks = list(_chunks(counts, most_rows))
        to_head = self.trained[1] or self.trained[2]
        roundings = sum(len(list(runs(tokens.stop - tokens.start, most_rows))) for _, tokens in chunks)
        gradients = _Gradients(hidden, weight, self.bias, self.trained, roundings)
        most_needed = min(most_rows, max((tokens.stop - tokens.start for _, tokens in chunks), default=0))
        memory = hidden.new_empty(most_needed * weight.shape[0] if to_head else 0, dtype=probe.product_dtype)
        for pairs, tokens in chunks:
            tiles = self._tiles(hidden[tokens], weight)
            targets = self.targets[tokens]
            rows = _Rows(tiles, targets, memory, most_needed) if to_head else None
            direction = HiddenDirection(tiles, targets) if self.trained[0] and not to_head else None
            found = statistics(tiles, targets, keep=rows or direction)
            token_gradient = self._token_gradient(found.logps, sums, pairs, tokens)
            if direction is not None:
                assert gradients.hidden is not None
                gradients.hidden[tokens] = direction.result(found).mul_(token_gradient.unsqueeze(1))
            elif rows is not None:
                for run in runs(tokens.stop - tokens.start, most_needed):
                    if run.start > 0:
                        tiles = self._tiles(hidden[tokens][run], weight)
                        rows = _Rows(tiles, targets[run], memory, most_needed)
                        rows.compute(found.logsumexp[run])
                    unit = rows.to_logit_gradient(found, token_gradient * self.logit_scale, run)
                    gradients.add(rows, unit, slice(tokens.start + run.start, tokens.start + run.stop))
        return sums, [gradients.hidden, gradients.weight, gradients.bias]

    def _tiles(self, hidden: Tensor, weight: Tensor) -> Tiles:
        return Tiles(hidden, weight, self.bias, self.logit_scale, self.softcap, self.tile_bytes)

    def _token_gradient(self, logps: Tensor, sums: Tensor, pairs: slice, tokens: slice) -> Tensor:
        """Write these pairs' rows of `sums`; returns dL/dlogp of their tokens, in the dtype of logps."""
        segments = self.pair_loss.segments[tokens] - 2 * pairs.start
        weights = self.pair_loss.token_weights
        values = logps.double()
        if weights is not None:
            values = values * weights[tokens]
        sums[pairs] = segment_sums(values, segments, pairs.stop - pairs.start).to(sums.dtype)
        with torch.enable_grad():
            leaf = sums.clone().requires_grad_()
            loss = self.pair_loss.loss_of_sums(leaf)[pairs].sum()
            (of_sums,) = torch.autograd.grad(loss, leaf)
        gradient = of_sums[pairs].flatten()[segments]
        return gradient if weights is None else gradient * weights[tokens].to(gradient.dtype)


def _chunks(counts: Sequence[int], most_tokens: int) -> Iterator[tuple[slice, slice]]:
    """Pairs and their tokens, as many whole pairs at a time as fit; a pair that does not fit comes alone."""
    first, start, stop = 0, 0, 0
    for pair, count in enumerate(counts):
        if pair > first and stop + count - start > most_tokens:
            yield slice(first, pair), slice(start, stop)
            first, start = pair, stop
        stop += count
    if counts:
        yield slice(first, len(counts)), slice(start, stop)


class _Rows:
    """The soft-max of a run of tokens over the whole vocabulary, [rows, V] in the products' dtype; then d, in place.

    First exp(l - peak) * dl/dz, with a peak for each token and tile. As the `keep` of `statistics` it takes the first
    tokens that pass by.
    """

    def __init__(self, tiles: Tiles, targets: Tensor, memory: Tensor, most_rows: int) -> None:
        self.tiles = tiles
        vocabulary = tiles.weight.shape[0]
        self.count = min(tiles.given.shape[0], most_rows)
        self._targets = targets[: self.count]
        self.values = memory[: self.count * vocabulary].view(self.count, vocabulary)
        self._peaks = tiles.given.new_empty((len(tiles.vocabulary_runs), self.count), dtype=tiles.dtype)
        self._one = FP16_ONE if tiles.product_dtype == torch.float16 else 1.0

    def __call__(
        self, tile: Tensor, tokens: slice, vocabulary: slice, weight_rows: Tensor, peak: Tensor, shrink: Tensor
    ) -> None:
        stop = min(tokens.stop, self.count)
        if tokens.start < stop:
            here, count = slice(tokens.start, stop), stop - tokens.start
            self.values[here, vocabulary] = tile[:count] if self._one == 1.0 else tile[:count] * self._one
            self._peaks[vocabulary.start // self.tiles.vocabulary_runs[0].stop, here] = peak[:count]

    def compute(self, logsumexp: Tensor) -> None:
        """Fill all rows from logits that are computed again; log-sum-exps [rows] take the place of peaks."""
        for vocabulary in self.tiles.vocabulary_runs:
            weight_rows = self.tiles.weight_rows(vocabulary)
            for tokens in self.tiles.token_runs:
                tile = self.tiles.logits(tokens, vocabulary, weight_rows)
                slope = self.tiles.slope(tile)
                tile.sub_(logsumexp[tokens].unsqueeze(1)).exp_()
                tile = tile if slope is None else tile.mul_(slope)
                self(tile, tokens, vocabulary, weight_rows, logsumexp[tokens], logsumexp[tokens])

    def to_logit_gradient(self, found: Statistics, gradient: Tensor, run: slice) -> Tensor | None:
        """Turn the rows into d, in the unit that is returned; None stands for 1.

        Args:
            found, gradient: statistics and dL/dlogp * scale of the chunk, of which these rows are `run`.
        """
        run = slice(run.start, run.start + self.count)
        gradient, unit = gradient[run], None
        if self._one != 1.0:
            largest = gradient.abs().max().clamp(min=torch.finfo(gradient.dtype).tiny)
            gradient, unit = gradient / largest, largest / self._one
        factors = (self._peaks - found.logsumexp[run]).exp_().mul_(-gradient).unsqueeze(2)
        for vocabulary, factor in zip(self.tiles.vocabulary_runs, factors, strict=True):
            self.tiles.scale_rows(self.values[:, vocabulary], factor)
        at_target = gradient * found.target_gradient(self.tiles.softcap)[run] * self._one
        self.values[torch.arange(self.count, device=at_target.device), self._targets] = at_target.to(self.values.dtype)
        return unit


class _Gradients:
    """The gradients of one call, for an upstream of 1; None where not trained."""

    def __init__(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, trained: Sequence[bool], roundings: int
    ) -> None:
        kept = torch.float32 if hidden.dtype == torch.float16 else hidden.dtype
        summed = torch.float32 if roundings > MOST_ROUNDINGS and kept == torch.bfloat16 else kept
        self.hidden = torch.zeros_like(hidden, dtype=kept) if trained[0] else None
        # written by the first product, so zeroed only where there is none
        make = torch.empty_like if roundings else torch.zeros_like
        self.weight = make(weight, dtype=summed, memory_format=torch.contiguous_format) if trained[1] else None
        self.bias = torch.zeros_like(bias, dtype=summed) if trained[2] and bias is not None else None
        self._is_first = True

    def add(self, rows: _Rows, unit: Tensor | None, tokens: slice) -> None:
        """Add what these rows, d in `unit`, of these tokens give."""
        tiles, d = rows.tiles, rows.values
        if self.hidden is not None:
            self.hidden[tokens] = _in_unit(self._times_weight(tiles, d), unit)
        if self.weight is not None:
            self._add_to_weight(tiles, d, unit)
        if self.bias is not None:
            self.bias += _in_unit(d.sum(0, dtype=tiles.dtype), unit)
        self._is_first = False

    def _times_weight(self, tiles: Tiles, d: Tensor) -> Tensor:
        if tiles.product_dtype == tiles.weight.dtype:
            return tiles.product(d, tiles.weight)
        product = d.new_zeros((d.shape[0], tiles.weight.shape[1]))
        for vocabulary in tiles.vocabulary_runs:
            product.addmm_(d[:, vocabulary], tiles.weight_rows(vocabulary))
        return product

    def _add_to_weight(self, tiles: Tiles, d: Tensor, unit: Tensor | None) -> None:
        assert self.weight is not None
        hidden = tiles.product_hidden[: d.shape[0]]
        if self.weight.dtype == d.dtype and unit is None:
            if self._is_first:
                torch.mm(d.t(), hidden, out=self.weight)
            else:
                self.weight.addmm_(d.t(), hidden)
            return
        for vocabulary in tiles.vocabulary_runs:
            product = _in_unit(tiles.product(d[:, vocabulary].t(), hidden), unit)
            self.weight[vocabulary] = product if self._is_first else self.weight[vocabulary] + product


def _in_unit(product: Tensor, unit: Tensor | None) -> Tensor:
    return product if unit is None else product * unit
