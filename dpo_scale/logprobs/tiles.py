"""Tiles of the logits in reused memory, and what is summed while they pass by: shared by `chunked` and `pair_loss`.

Nothing here holds logits of all tokens and all of the vocabulary at once. The outer loop is over the vocabulary, so
that a tile of the weight is converted once for all tokens.

Precision. The logits of bf16 and fp16 operands are accumulated and kept in fp32: rounding them to bf16 would cost 1e-2
a token. CUDA has a product of 16-bit operands with an fp32 result. torch has none on a CPU, so there the operands are
converted, tile by tile. oneDNN may then multiply converted bf16 operands in its bf16 mode: they are bf16 numbers, so
nothing is rounded, and their products are summed in fp32 (`exact_bf16_products`).

Letters: S tokens, H hidden size, V vocabulary, l final logits, z logits before the soft-cap.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Bounds one tile of logits. On a CPU it stays near the last-level cache. A GPU's launch must be worth its while, so
# tiles are larger there.
CPU_TILE_BYTES = 8 * 2**20
DEVICE_TILE_BYTES = 128 * 2**20
# Tokens are split too when a tile of all of them would be narrower than this: thin products are slow.
MIN_TILE_WIDTH = 1024

# keep(exponentials, tokens, vocabulary, weight_rows, peak, shrink): see `statistics`
Keep = Callable[[Tensor, slice, slice, Tensor, Tensor, Tensor], None]


class Head(NamedTuple):
    """An output head, as in `dpo_scale.logprobs.token_logps`."""

    weight: Tensor
    bias: Tensor | None = None
    logit_scale: float = 1.0
    softcap: float | None = None

    def target_gradient(self, logps: Tensor, target_logit: Tensor) -> Tensor:
        """dlogp/dz at the target itself, (1 - p) times the soft-cap's slope; digits are kept where p is near 1."""
        gradient = -torch.expm1(logps)
        return gradient if self.softcap is None else gradient * (1.0 - (target_logit / self.softcap).square())


def requires_gradient(hidden: Tensor, head: Head) -> list[bool]:
    """Whether a call must make a gradient for hidden, weight and bias."""
    tensors = hidden, head.weight, head.bias
    return [torch.is_grad_enabled() and tensor is not None and tensor.requires_grad for tensor in tensors]


def default_tile_bytes(device: torch.device) -> int:
    return CPU_TILE_BYTES if device.type == "cpu" else DEVICE_TILE_BYTES


def held_bytes(tokens: int, vocabulary: int, device: torch.device) -> int:
    """How much of the soft-max may be kept between a forward and a backward pass, so as not to compute it again.

    A byte a logit, where the plainest naive form holds ten: with the tile and the rest this stays below a sixth of
    what naive takes. Small calls may keep what does not matter; large ones have a limit.
    """
    lowest, highest = (16, 256) if device.type == "cpu" else (64, 384)
    return min(max(tokens * vocabulary, lowest * 2**20), highest * 2**20)


def product_dtype(hidden: Tensor) -> torch.dtype:
    """The dtype of the gradient products' operands: 16 bits where the device multiplies those fast."""
    fast_16_bits = hidden.is_cuda or (hidden.dtype == torch.bfloat16 and _has_bf16_products())
    return hidden.dtype if fast_16_bits or hidden.dtype == torch.float64 else torch.float32


def rows_in(gradient: Tensor | None, dtype: torch.dtype) -> int:
    """Of how many tokens the soft-max fits into the memory of the weight's gradient [V, H], while that has no value."""
    if gradient is None or gradient.itemsize % dtype.itemsize:
        return 0
    return gradient.shape[1] * (gradient.itemsize // dtype.itemsize)


def block_in(gradient: Tensor, vocabulary: slice, rows: int, dtype: torch.dtype) -> Tensor:
    """[rows, vocabulary] of `dtype` in the memory of those rows of the weight's gradient."""
    width = vocabulary.stop - vocabulary.start
    return gradient[vocabulary].view(-1).view(dtype)[: rows * width].view(rows, width)


class Tiles:
    """The tiles of one call: logits of a run of tokens and a run of the vocabulary, in reused memory."""

    def __init__(self, hidden: Tensor, head: Head, tile_bytes: int, token_ends: Sequence[int] = ()) -> None:
        """Args: token_ends, numbers of tokens that no tile of logits may reach across."""
        self.head = head
        self.dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        # Only CUDA has a GEMM of 16-bit operands with an fp32 result; elsewhere the operands are converted.
        self.mixed_gemm = hidden.is_cuda and hidden.dtype in (torch.bfloat16, torch.float16)
        self.given = hidden
        self.hidden = hidden if self.mixed_gemm else hidden.to(self.dtype)
        self.product_dtype = product_dtype(hidden)
        (tokens, width), vocabulary = hidden.shape, head.weight.shape[0]
        numbers = tile_bytes // self.dtype.itemsize
        rows = min(tokens, max(1, numbers // MIN_TILE_WIDTH))
        # The second bound is for the converted tile of the weight.
        cols = min(vocabulary, max(MIN_TILE_WIDTH, numbers // max(1, rows, width) // 64 * 64))
        ends = sorted({0, tokens, *(min(end, tokens) for end in token_ends)})
        parts = zip(ends, ends[1:], strict=False)
        self.token_runs = [slice(a + r.start, a + r.stop) for a, b in parts for r in runs(b - a, rows)]
        self.vocabulary_runs = list(runs(vocabulary, cols))
        self._logits = hidden.new_empty(0 if self.mixed_gemm else rows * cols, dtype=self.dtype)
        convert = not self.mixed_gemm and head.weight.dtype != self.dtype
        self._weight = hidden.new_empty((cols, width), dtype=self.dtype) if convert else None

    def weight_rows(self, vocabulary: slice) -> Tensor:
        """These rows of the weight in the dtype that the logits' product takes; valid until the next call."""
        rows = self.head.weight[vocabulary]
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
        if self.head.bias is not None:
            logits += self.head.bias[vocabulary].to(self.dtype)
        if self.head.logit_scale != 1.0:
            logits *= self.head.logit_scale
        if self.head.softcap is not None:
            logits.div_(self.head.softcap).tanh_().mul_(self.head.softcap)
        return logits

    def slope(self, logits: Tensor) -> Tensor | None:
        """dl/dz, or None where it is 1."""
        return None if self.head.softcap is None else (logits / self.head.softcap).square_().neg_().add_(1.0)

    def index_of(self, vocabulary: slice) -> int:
        """Which of `vocabulary_runs` this is."""
        return vocabulary.start // self.vocabulary_runs[0].stop

    def scale_kept(self, block: Tensor, peaks: Tensor, logsumexp: Tensor, gradient: Tensor, out: Tensor) -> Tensor:
        """d out of what a tile's `keep` was given: block [s, v] times -gradient * exp(peak - logsumexp) of its rows.

        All but the targets' entries. The block is of `product_dtype` and no wider than a tile; out may be the block.
        """
        factors = (peaks - logsumexp).exp_().mul_(-gradient).unsqueeze(1)
        if block.is_cuda or block.dtype == factors.dtype:
            return torch.mul(block, factors, out=out)
        # on a CPU mixed dtypes cost torch two copies and ten times the time of this
        for tokens in runs(block.shape[0], max(1, self._logits.numel() // block.shape[1])):
            part = block[tokens]
            out[tokens] = self._logits[: part.numel()].view(part.shape).copy_(part).mul_(factors[tokens])
        return out

    def product(self, left: Tensor, right: Tensor) -> Tensor:
        """A gradient product, of operands of `product_dtype`, summed in fp32; in fp32 where that costs nothing."""
        return torch.mm(left, right, out_dtype=torch.float32) if self.mixed_gemm else torch.mm(left, right)

    def product_weight(self, vocabulary: slice) -> Tensor:
        """These rows of the weight in `product_dtype`; valid until the next call of `weight_rows` or of this."""
        return (
            self.head.weight[vocabulary]
            if self.product_dtype == self.head.weight.dtype
            else self.weight_rows(vocabulary)
        )

    @property
    def product_hidden(self) -> Tensor:
        """[S, H] hidden states in `product_dtype`."""
        return self.given if self.product_dtype == self.given.dtype else self.hidden


def runs(total: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, total)) for start in range(0, total, max(1, size)))


def _has_bf16_products() -> bool:
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def exact_bf16_products(hidden: Tensor) -> AbstractContextManager[None]:
    """Within it, fp32 products on a CPU go through oneDNN's bf16 mode, if the operands were bf16 before.

    Operands that are bf16 numbers are not changed by it, and the sums are fp32. Where the CPU has matrix units (AMX) it
    uses them; elsewhere it is oneDNN's fp32 product.
    """
    if hidden.device.type == "cpu" and hidden.dtype == torch.bfloat16 and _has_bf16_products():
        return _onednn_bf16_mode()
    return nullcontext()


@contextmanager
def _onednn_bf16_mode() -> Iterator[None]:
    settings: Any = getattr(torch.backends.mkldnn, "matmul")  # noqa: B009 - unknown to torch's stubs
    before = settings.fp32_precision
    settings.fp32_precision = "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before


def in_tile(targets: Tensor, vocabulary: slice) -> tuple[Tensor, Tensor]:
    """Whether each target is in the tile, and its column there (any column if it is not): [s] and [s, 1]."""
    column = targets - vocabulary.start
    width = vocabulary.stop - vocabulary.start
    return (column >= 0) & (column < width), column.clamp(0, width - 1).unsqueeze(1)


def put_at_targets(block: Tensor, targets: Tensor, vocabulary: slice, values: Tensor) -> None:
    """Overwrite a tile's entries at those targets [s] that are in it, with values [s] or [1]."""
    inside, column = in_tile(targets, vocabulary)
    # One column a row, so read and written without the clash that would make an added value's order matter.
    value = torch.where(inside.unsqueeze(1), values.to(block.dtype).unsqueeze(1), block.gather(1, column))
    block.scatter_(1, column, value)


@dataclass(frozen=True)
class Statistics:
    """What a pass over the vocabulary leaves of each token: [S] each, fp32 or fp64."""

    logps: Tensor
    logsumexp: Tensor
    total: Tensor  # sum of exp(l - the largest l)
    target_logit: Tensor
    by_products: list[Tensor]


def statistics(tiles: Tiles, targets: Tensor, by_products: Sequence[str] = (), keep: Keep | None = None) -> Statistics:
    """Walk over all tiles once.

    Args:
        keep: called with each tile as exp(l - peak) * dl/dz, to be read only, where peak [s] is the largest logit of
            each token so far, and with shrink [s], exp(old peak - peak), the factor of what was summed before.
    """
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
            inside, column = in_tile(targets[tokens], vocabulary)
            target_logit[tokens] = torch.where(inside, tile.gather(1, column).squeeze(1), target_logit[tokens])
            new_peak = torch.maximum(peak[tokens], tile.amax(1))
            rise = peak[tokens] - new_peak
            shrink = rise.exp()
            slope = None if keep is None else tiles.slope(tile)
            tile.sub_(new_peak.unsqueeze(1))
            x = tile.clone() if "entropy" in by_products else None
            tile.exp_()
            if keep is not None:
                kept = tile if slope is None else slope.mul_(tile)
                keep(kept, tokens, vocabulary, weight_rows, new_peak, shrink)
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
    return Statistics(logps, peak + log_total, total, target_logit, [values[name]() for name in by_products])


class HiddenDirection:
    """dlogp/dhidden of every token, summed while the tiles pass by; for a head that is not trained.

        dlogp/dhidden = scale * (target_gradient * w_t - sum over v != t of p_v * dl_v/dz_v * w_v)

    The sum is kept relative to the largest logit so far, as the sum of exponentials is. The target is left out of it
    and added at the end: 1 - p_t would lose its digits where p_t is near 1.
    """

    def __init__(self, tiles: Tiles, targets: Tensor) -> None:
        self._tiles, self._targets = tiles, targets
        self._sum = torch.zeros(tiles.given.shape, dtype=tiles.dtype, device=targets.device)

    def __call__(
        self, tile: Tensor, tokens: slice, vocabulary: slice, weight_rows: Tensor, peak: Tensor, shrink: Tensor
    ) -> None:
        others = tile.to(self._tiles.product_dtype, copy=True)
        put_at_targets(others, self._targets[tokens], vocabulary, others.new_zeros(1))
        product = self._tiles.product(others, self._tiles.product_weight(vocabulary))
        self._sum[tokens] = self._sum[tokens].mul_(shrink.unsqueeze(1)).add_(product)

    def result(self, found: Statistics) -> Tensor:
        """[S, H], fp32 or fp64. The object is spent after it."""
        tiles, head = self._tiles, self._tiles.head
        of_target = head.target_gradient(found.logps, found.target_logit).unsqueeze(1)
        direction = self._sum.div_(-found.total.unsqueeze(1))
        direction.addcmul_(head.weight[self._targets].to(tiles.dtype), of_target)
        return direction if head.logit_scale == 1.0 else direction.mul_(head.logit_scale)
