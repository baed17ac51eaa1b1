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

Cost. 3 passes of 2SHV flop, as naive, where a token path that keeps nothing makes 4. Bytes: e, 2SV in 16-bit training,
written once, scaled once, read by two products. It needs no memory of its own for the first H tokens: their e lies in
the memory of the weight's gradient, [V, H] as well, which has no value yet; each tile is copied out before its rows of
dW are written. Further tokens come in chunks whose e takes at most `max_held`. Beside it there is one fp32 tile of
logits and, on a CPU, one of the weight. A pair whose e fits neither is split: the logits of the tokens beyond are
computed again once the loss is known, so it costs between 3 and 4 passes. A head that is not trained needs no e: the
gradient's direction is summed in the one pass over the vocabulary (`tiles.HiddenDirection`): 2 passes.

The weight's gradient is a sum over chunks. Each adds its product, summed in fp32, to the gradient in the weight's own
dtype: one rounding a chunk, as gradient accumulation has one a micro-step, and no fp32 copy of [V, H], which is 2.1 GB
for a head of 4096 x 128256. Beyond `MAX_ROUNDINGS` chunks the error of that would show (it grows with the root of
their number), and so many tokens dwarf the copy: then the sum is fp32. In fp16, whose range gradients do not fit before
the loss scale has come, both gradients are kept in fp32, and fp16 operands of the products are scaled to that range.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dpo_scale.logprobs import check_arguments, choose_implementation
from dpo_scale.logprobs.tiles import (
    Head,
    HiddenDirection,
    Keep,
    Tiles,
    block_in,
    default_tile_bytes,
    exact_bf16_products,
    held_bytes,
    put_at_targets,
    requires_gradient,
    rows_in,
    statistics,
)
from dpo_scale.losses import segment_sums

# Sums of so many chunks in bf16 are still within a few times the error of one.
MAX_ROUNDINGS = 24
# What 1 becomes in fp16 operands: the smallest number is then 4e-12, and sums of two are still in range.
FP16_ONE = 2.0**14


@dataclass(frozen=True)
class PairLoss:
    """What a batch adds to hidden states and targets for its loss to be taken pair by pair.

    Attributes:
        segments: [S] int64, ascending: 2i for tokens of pair i's chosen completion, 2i + 1 for its rejected.
        scored_tokens: [P] tokens of each pair's two completions, on the host: which tokens come together is decided by
            it, and the host need not wait for the device to know.
        loss_of_sums: from sums [P, 2], fp32 or fp64, to losses [P], each weighted as it is to be added up. Loss i must
            depend on row i alone; rows whose sums are not known yet come as 0.
        token_weights: [S] factors of the log-probs in the sums; None for 1.
        planned_tokens: [P] at least `scored_tokens`; which pairs come together is decided by these. None: by those.
        sum_over_ranks: where pairs' tokens are spread over several ranks: sums a tensor over them. They must have the
            same pairs and the same `planned_tokens`, so that they sum the same pairs at a time.
    """

    segments: Tensor
    scored_tokens: Sequence[int]
    loss_of_sums: Callable[[Tensor], Tensor]
    token_weights: Tensor | None = None
    planned_tokens: Sequence[int] | None = None
    sum_over_ranks: Callable[[Tensor], Tensor] | None = None

    @property
    def num_pairs(self) -> int:
        """P."""
        return len(self.scored_tokens)

    @property
    def planned(self) -> Sequence[int]:
        """[P] what decides which pairs come together."""
        return self.scored_tokens if self.planned_tokens is None else self.planned_tokens

    def dealt(self, size: int, rank: int, sum_over_ranks: Callable[[Tensor], Tensor]) -> PairLoss:
        """What is left for one of several ranks to which all tokens are dealt one by one: tokens rank, rank + size, ...

        Args:
            sum_over_ranks: sums a tensor over these ranks.
        """
        ends = list(itertools.accumulate(self.scored_tokens, initial=0))
        before = [(end - rank + size - 1) // size for end in ends]  # of the rank's tokens, those before each end
        return replace(
            self,
            segments=self.segments[rank::size],
            scored_tokens=tuple(stop - start for start, stop in itertools.pairwise(before)),
            token_weights=None if self.token_weights is None else self.token_weights[rank::size],
            planned_tokens=tuple(-(-count // size) for count in self.scored_tokens),
            sum_over_ranks=sum_over_ranks,
        )

    def chunks(self, max_in_first: int, max_tokens: int) -> Iterator[tuple[slice, slice]]:
        """Pairs and their tokens, as many whole pairs at a time as fit; a pair that does not fit comes alone."""
        first, held, most = 0, 0, max_in_first
        ends = list(itertools.accumulate(self.scored_tokens, initial=0))
        for pair, count in enumerate(self.planned):
            if pair > first and held + count > most:
                yield slice(first, pair), slice(ends[first], ends[pair])
                first, held, most = pair, 0, max_tokens
            held += count
        if self.num_pairs:
            yield slice(first, self.num_pairs), slice(ends[first], ends[-1])


def fused_pair_loss(
    hidden: Tensor,
    head_weight: Tensor,
    targets: Tensor,
    pair_loss: PairLoss,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    implementation: str = "auto",
    tile_bytes: int | None = None,
    max_held: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The sum of the pairs' losses, differentiable once in hidden, head_weight and bias, and their sums of log-probs.

    hidden, head_weight, targets, bias, logit_scale, softcap: as in `dpo_scale.logprobs.token_logps`.
    implementation: "chunked", or "triton" for bf16 and a head that is trained, see `triton_pair_loss`; "auto" takes the
        latter where it is for CUDA.
    tile_bytes, max_held: bounds of the fp32 tile of logits and of the kept soft-max; defaults by device and size.

    Returns a scalar and [P, 2] without gradient, both fp32 (fp64 for fp64 inputs). The gradients are made here, for an
    upstream of 1, and multiplied in place by the real one: a second backward pass through the same graph is refused by
    autograd. On CUDA the host never waits for the device.

    Raises ValueError as `token_logps` does.
    """
    head = Head(head_weight, bias, logit_scale, softcap)
    check_arguments(hidden, head, targets)
    assert pair_loss.segments.shape == targets.shape, (pair_loss.segments.shape, targets.shape)
    assert sum(pair_loss.scored_tokens) == len(targets), (sum(pair_loss.scored_tokens), len(targets))
    if tile_bytes is None:
        tile_bytes = default_tile_bytes(hidden.device)
    if max_held is None:
        max_held = held_bytes(sum(pair_loss.planned), head_weight.shape[0], hidden.device)
    trained = requires_gradient(hidden, head)
    settings = (pair_loss, targets, head, tile_bytes, max_held, trained)
    job = Job(*settings)
    for_triton = hidden.dtype == torch.bfloat16 and (trained[1] or trained[2])
    if for_triton and choose_implementation(implementation, hidden.device, hidden.dtype)[0] == "triton":
        from dpo_scale.logprobs.triton_pair_loss import TritonJob

        job = TritonJob(*settings)
    return _FusedPairLoss.apply(hidden, head_weight, bias, job)


class _FusedPairLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, job: Job) -> tuple[Tensor, Tensor]:
        with torch.autocast(hidden.device.type, enabled=False), exact_bf16_products(hidden):
            sums, gradients = job.run(hidden)
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
class Job:
    """One call: its arguments, and the walk over chunks of pairs."""

    pair_loss: PairLoss
    targets: Tensor
    head: Head
    tile_bytes: int
    max_held: int
    trained: Sequence[bool]  # hidden, weight, bias

    def run(self, hidden: Tensor) -> tuple[Tensor, list[Tensor | None]]:
        """Sums [P, 2], and the gradients of hidden, weight and bias for an upstream of 1, None where not trained."""
        head, weight = self.head, self.head.weight
        probe = Tiles(hidden[:0], head, self.tile_bytes)
        sums = hidden.new_zeros((self.pair_loss.num_pairs, 2), dtype=probe.dtype)
        own_rows = max(1, self.max_held // (weight.shape[0] * probe.product_dtype.itemsize))
        total = sum(self.pair_loss.planned)
        gradients = Gradients(hidden, head, self.trained, 1 + total // own_rows)
        free_rows = rows_in(gradients.weight, probe.product_dtype)
        to_head = self.trained[1] or self.trained[2]
        needed_rows = min(own_rows, max(0, total - free_rows)) if to_head else 0
        memory = hidden.new_empty(needed_rows * weight.shape[0], dtype=probe.product_dtype)
        for pairs, tokens in self.pair_loss.chunks(free_rows + own_rows, own_rows):
            count = tokens.stop - tokens.start
            free = min(free_rows if gradients.is_empty else 0, count)
            held = min(free + own_rows, count)
            tiles = Tiles(hidden[tokens], head, self.tile_bytes, (free, held))
            targets = self.targets[tokens]
            parts = []
            if to_head:
                parts = [_Rows(tiles, 0, free, gradients.weight), _Rows(tiles, free, held, memory)]
            direction = HiddenDirection(tiles, targets) if self.trained[0] and not to_head else None
            found = statistics(tiles, targets, keep=_keep_in(parts) if parts else direction)
            gradient = self.token_gradient(found.logps, sums, pairs, tokens)
            if direction is not None:
                assert gradients.hidden is not None
                gradients.hidden[tokens] = direction.result(found).mul_(gradient.unsqueeze(1))
            if not to_head:
                continue
            of_target = head.target_gradient(found.logps, found.target_logit)
            per_token = torch.stack([gradient * head.logit_scale, of_target, found.logsumexp])
            for part in parts:
                _add(gradients, part, per_token[:, part.run], targets[part.run], tokens.start + part.run.start)
            for start in range(held, count, own_rows):
                rest = slice(start, min(start + own_rows, count))
                part = _Rows(Tiles(hidden[tokens][rest], head, self.tile_bytes), 0, rest.stop - rest.start, memory)
                part.compute(found.logsumexp[rest])
                _add(gradients, part, per_token[:, rest], targets[rest], tokens.start + start)
        return sums, gradients.all()

    def token_gradient(self, logps: Tensor, sums: Tensor, pairs: slice, tokens: slice) -> Tensor:
        """Write these pairs' rows of `sums`; returns dL/dlogp of their tokens, in the dtype of logps."""
        segments = self.pair_loss.segments[tokens] - 2 * pairs.start
        weights = self.pair_loss.token_weights
        values = logps.double()
        if weights is not None:
            values = values * weights[tokens]
        of_pairs = segment_sums(values, segments, pairs.stop - pairs.start)
        if self.pair_loss.sum_over_ranks is not None:
            of_pairs = self.pair_loss.sum_over_ranks(of_pairs)
        sums[pairs] = of_pairs.to(sums.dtype)
        with torch.enable_grad():
            leaf = sums.clone().requires_grad_()
            loss = self.pair_loss.loss_of_sums(leaf)[pairs].sum()
            (of_sums,) = torch.autograd.grad(loss, leaf)
        gradient = of_sums[pairs].flatten()[segments]
        return gradient if weights is None else gradient * weights[tokens].to(gradient.dtype)


class _Rows:
    """The soft-max of a run of tokens over the whole vocabulary, in the products' dtype, tile by tile.

    Each tile is exp(l - peak) * dl/dz, with a peak for each of its tokens; `logit_gradient` turns it into d.
    """

    def __init__(self, tiles: Tiles, start: int, stop: int, memory: Tensor | None) -> None:
        """One run.

        Args:
            start, stop: the run, in the tokens of `tiles`.
            memory: flat, or the weight's gradient [V, H], whose rows of a tile are then written after the tile is used.
        """
        assert memory is not None or start == stop
        self.tiles, self.run = tiles, slice(start, stop)
        self._count, self._memory = stop - start, memory
        self._peaks = tiles.given.new_empty((len(tiles.vocabulary_runs), self._count), dtype=tiles.dtype)
        self._one = FP16_ONE if tiles.product_dtype == torch.float16 else 1.0

    @property
    def in_gradient(self) -> bool:
        return self._memory is not None and self._memory.ndim == 2

    def _block(self, vocabulary: slice) -> Tensor:
        """[tokens, vocabulary]."""
        assert self._memory is not None
        if self.in_gradient:
            return block_in(self._memory, vocabulary, self._count, self.tiles.product_dtype)
        flat = self._memory[self._count * vocabulary.start : self._count * vocabulary.stop]
        return flat.view(self._count, vocabulary.stop - vocabulary.start)

    def keep(self, tile: Tensor, tokens: slice, vocabulary: slice, peak: Tensor) -> None:
        """Keep what is in a tile of logits; tokens in those of `tiles`."""
        here = slice(tokens.start - self.run.start, tokens.stop - self.run.start)
        self._block(vocabulary)[here] = tile if self._one == 1.0 else tile * self._one
        self._peaks[self.tiles.index_of(vocabulary), here] = peak

    def compute(self, logsumexp: Tensor) -> None:
        """Fill all rows from logits that are computed again; log-sum-exps [rows] take the place of peaks."""
        for vocabulary in self.tiles.vocabulary_runs:
            weight_rows = self.tiles.weight_rows(vocabulary)
            for tokens in self.tiles.token_runs:
                tile = self.tiles.logits(tokens, vocabulary, weight_rows)
                slope = self.tiles.slope(tile)
                tile.sub_(logsumexp[tokens].unsqueeze(1)).exp_()
                self.keep(tile if slope is None else tile.mul_(slope), tokens, vocabulary, logsumexp[tokens])

    def unit(self, gradient: Tensor) -> Tensor | None:
        """What 1 in d stands for, given dL/dlogp * scale [rows]: None for 1, and in fp16 what uses its range."""
        if self._one == 1.0:
            return None
        return gradient.abs().max().clamp(min=torch.finfo(gradient.dtype).tiny) / self._one

    def logit_gradient(self, index: int, per_token: Tensor, targets: Tensor, unit: Tensor | None) -> Tensor:
        """d of the index-th tile, in `unit`, once: it is made in place.

        Args:
            per_token: [3, rows] dL/dlogp * scale, dlogp/dz at the target, log-sum-exp.
            targets: [rows].
        """
        gradient, of_target, logsumexp = per_token
        vocabulary = self.tiles.vocabulary_runs[index]
        kept = self._block(vocabulary)
        if unit is not None:
            gradient = gradient / (unit * self._one)
        out = torch.empty_like(kept) if self.in_gradient else kept
        self.tiles.scale_kept(kept, self._peaks[index], logsumexp, gradient, out)
        put_at_targets(out, targets, vocabulary, gradient * of_target * self._one)
        return out


def _keep_in(parts: Sequence[_Rows]) -> Keep:
    """The `keep` of `statistics`: each tile, which reaches across no end of a part, goes to its part, if it has one."""

    def keep(tile: Tensor, tokens: slice, vocabulary: slice, weight_rows: Tensor, peak: Tensor, _: Tensor) -> None:
        for part in parts:
            if part.run.start <= tokens.start < part.run.stop:
                part.keep(tile, tokens, vocabulary, peak)

    return keep


class Gradients:
    """Memory for the gradients of one call, for an upstream of 1; None where not trained.

    Each row of `hidden` is written once. The first tokens write `weight`, the others add to it.
    """

    def __init__(
        self,
        hidden: Tensor,
        head: Head,
        trained: Sequence[bool],
        roundings: int,
        bias_dtype: torch.dtype | None = None,
    ) -> None:
        """Args: roundings, of the weight's gradient, one a chunk; bias_dtype, of the bias's, if not the weight's."""
        kept = torch.float32 if hidden.dtype == torch.float16 else hidden.dtype
        summed = torch.float32 if roundings > MAX_ROUNDINGS and kept == torch.bfloat16 else kept
        self.hidden = torch.empty_like(hidden, dtype=kept) if trained[0] else None
        # zeroed only where there are no tokens to write it
        make = torch.empty_like if hidden.shape[0] else torch.zeros_like
        self.weight = make(head.weight, dtype=summed, memory_format=torch.contiguous_format) if trained[1] else None
        self.bias = (
            torch.zeros_like(head.bias, dtype=bias_dtype or summed) if trained[2] and head.bias is not None else None
        )
        self.is_empty = True

    def all(self) -> list[Tensor | None]:
        return [self.hidden, self.weight, self.bias]


def _add(to: Gradients, rows: _Rows, per_token: Tensor, targets: Tensor, first: int) -> None:
    """Add what these rows give, which are those of tokens first, first + 1, ...; see `_Rows.logit_gradient`."""
    if not targets.numel():
        return
    tiles, unit = rows.tiles, rows.unit(per_token[0])
    hidden = tiles.product_hidden[rows.run]
    hidden_sum = hidden.new_zeros(hidden.shape, dtype=tiles.dtype) if to.hidden is not None else None
    for index, vocabulary in enumerate(tiles.vocabulary_runs):
        d = rows.logit_gradient(index, per_token, targets, unit)
        if hidden_sum is not None:
            hidden_sum += tiles.product(d, tiles.product_weight(vocabulary))
        if to.weight is not None:
            weight = to.weight[vocabulary]
            if weight.dtype != d.dtype or unit is not None:
                product = _in_unit(tiles.product(d.t(), hidden), unit)
                weight.copy_(product if to.is_empty else weight + product)
            elif to.is_empty:
                torch.mm(d.t(), hidden, out=weight)
            else:
                weight.addmm_(d.t(), hidden)
        if to.bias is not None:
            to.bias[vocabulary] += _in_unit(d.sum(0, dtype=tiles.dtype), unit)
    if to.hidden is not None and hidden_sum is not None:
        to.hidden[first : first + len(targets)] = _in_unit(hidden_sum, unit)
    to.is_empty = False


def _in_unit(product: Tensor, unit: Tensor | None) -> Tensor:
    return product if unit is None else product * unit
