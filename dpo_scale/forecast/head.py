"""Memory of our own head and loss, from the constants of the code in `dpo_scale.logprobs`. Sizes are bytes.

Each function follows one implementation: how it cuts tiles, what it holds between the passes, what it sums in fp32.

Letters as there: S scored tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from dpo_scale.logprobs.pair_loss import MAX_ROUNDINGS, PairLoss
from dpo_scale.logprobs.tiles import MIN_TILE_WIDTH, default_tile_bytes, held_bytes, product_dtype
from dpo_scale.logprobs.triton_blocks import BLOCKS, LEAST_TILE_BYTES, MEMORY_BYTES

FP32 = 4
KERNEL_STATISTICS = 1536  # of a token, by the kernels' runs over the vocabulary, and what follows from them


class HeadBytes(NamedTuple):
    """What the head takes beside the backbone's hidden states and its own weights.

    Attributes:
        forward: the most in its forward pass, the hidden states that are scored among it.
        kept: from its forward to its backward pass.
        backward: the most in its backward pass, what is kept among it.
    """

    forward: int
    kept: int = 0
    backward: int = 0


@dataclass(frozen=True)
class HeadCall:
    """A call of the head on one rank.

    Attributes:
        scored: [P] tokens of each pair that this rank scores.
        trained: whether weight and hidden states get a gradient, as (hidden, weight).
        softcap: whether logits are soft-capped.
    """

    scored: Sequence[int]
    hidden: int
    vocabulary: int
    dtype: torch.dtype
    device_type: str
    trained: tuple[bool, bool]
    softcap: bool = False

    @property
    def tokens(self) -> int:
        """S."""
        return sum(self.scored)

    @property
    def numbers(self) -> int:
        """Of the scored hidden states, S * H."""
        return self.tokens * self.hidden

    @property
    def device(self) -> torch.device:
        return torch.device(self.device_type)

    @property
    def is_cuda(self) -> bool:
        return self.device_type == "cuda"

    @property
    def operand(self) -> int:
        """Bytes of a number of the gradient products' operands."""
        return self.dtype.itemsize if self.is_cuda else product_dtype(torch.empty(0, dtype=self.dtype)).itemsize

    @property
    def max_held(self) -> int:
        return held_bytes(self.tokens, self.vocabulary, self.device)

    @property
    def free_rows(self) -> int:
        """Of how many tokens the soft-max fits into the memory of the weight's gradient, in its own dtype."""
        return self.hidden * (self.dtype.itemsize // self.operand) if self.dtype.itemsize % self.operand == 0 else 0

    def tile(self, tokens: int) -> tuple[int, int, int]:
        """Rows and columns of a tile of so many tokens' logits, and bytes of `Tiles`."""
        numbers = default_tile_bytes(self.device) // FP32
        rows = min(tokens, max(1, numbers // MIN_TILE_WIDTH))
        columns = min(self.vocabulary, max(MIN_TILE_WIDTH, numbers // max(1, rows, self.hidden) // 64 * 64))
        if self.is_cuda and self.dtype.itemsize == 2:  # products make their results, the last one's is still there
            return rows, columns, 2 * FP32 * rows * columns
        converted = 0 if self.dtype == torch.float32 else FP32 * self.hidden * (columns + tokens)
        return rows, columns, FP32 * rows * columns + converted

    def slope(self, rows: int, columns: int) -> int:
        """A soft-cap's slope beside a tile; that of the last tile is still there."""
        return (2 if columns < self.vocabulary else 1) * FP32 * rows * columns if self.softcap else 0

    def put_at_targets(self, rows: int, columns: int) -> int:
        """torch scatters into 16 bits on a CPU by way of a copy in fp32."""
        return FP32 * rows * columns if self.operand == 2 and not self.is_cuda else 0

    def chunks(self, first: int, most: int) -> list[int]:
        """Tokens of the runs of whole pairs that `pair_loss` takes together."""
        pairs = PairLoss(torch.empty(0), self.scored, lambda sums: sums)
        return [sum(self.scored[run]) for run, _ in pairs.chunks(first, most)]

    def statistics(self, tokens: int) -> int:
        """The vectors of `tiles.statistics` and what follows from them."""
        return 12 * FP32 * tokens


def head_bytes(call: HeadCall, implementation: str, *, by_pair: bool) -> HeadBytes:
    """What one call holds.

    Args:
        implementation: "naive", "chunked" or "triton".
        by_pair: loss and gradient pair by pair (`fused_pair_loss`), otherwise token log-probs first.
    """
    if by_pair and call.trained[1]:
        in_kernels = implementation == "triton" and call.dtype == torch.bfloat16
        return _pairs_in_kernels(call) if in_kernels else _pairs_in_tiles(call)
    if by_pair:
        return _pairs_of_frozen(call)
    if implementation == "naive":
        return _naive(call)
    of_tokens = {"chunked": _tokens_in_tiles, "triton": _tokens_in_kernels}[implementation]
    return of_tokens(call)


def _gradients(call: HeadCall, roundings: int) -> tuple[int, int, int]:
    """`pair_loss.Gradients`: bytes of those of hidden states and weight, and of a number of the latter."""
    kept = FP32 if call.dtype == torch.float16 else call.dtype.itemsize
    summed = FP32 if roundings > MAX_ROUNDINGS else kept
    return call.numbers * kept, call.vocabulary * call.hidden * summed, summed


def _of_gradients(call: HeadCall, forward: int, of_hidden: int, of_weight: int) -> HeadBytes:
    """Gradients that are there already wait for the backward pass, which multiplies them and gives them their dtype."""
    size, kept = call.dtype.itemsize, of_hidden + of_weight
    numbers = call.numbers + (call.vocabulary * call.hidden if of_weight else 0)
    return HeadBytes(forward, kept, kept + (numbers * size if kept != numbers * size else 0))


def _pairs_in_tiles(call: HeadCall) -> HeadBytes:
    vocabulary, operand, hidden = call.vocabulary, call.operand, call.hidden
    own_rows = max(1, call.max_held // (vocabulary * operand))
    of_hidden, of_weight, number = _gradients(call, 1 + call.tokens // own_rows)
    free_rows = hidden * (number // operand) if number % operand == 0 else 0
    memory = min(own_rows, max(0, call.tokens - free_rows)) * vocabulary * operand
    most = before = 0  # the tiles of the chunk before live until the next are used
    for index, tokens in enumerate(call.chunks(free_rows + own_rows, own_rows)):
        free = min(0 if index else free_rows, tokens)
        own = min(own_rows, tokens - free)
        rest = min(own_rows, tokens - free - own)  # of a pair that does not fit, in tiles of their own
        rows, columns, tiles = call.tile(tokens)
        part = max(free, own, rest)
        sums = 2 * FP32 * hidden * part  # of the hidden states' gradient, and a term
        block = operand * free * columns  # d of a tile whose memory the weight's gradient is about to take
        of_rows = 2 * FP32 * columns * hidden if number != operand else 0
        peaks = FP32 * -(-vocabulary // columns) * (free + own)
        adding = sums + block + of_rows + call.put_at_targets(part, columns) + (call.tile(rest)[2] if rest else 0)
        working = max(before + call.slope(rows, columns), adding)
        most = max(most, tiles + peaks + working + call.statistics(tokens))
        before = tiles + (call.tile(rest)[2] if rest else 0)
    forward = call.numbers * call.dtype.itemsize + of_hidden + of_weight + memory + most
    return _of_gradients(call, forward, of_hidden, of_weight)


def _pairs_of_frozen(call: HeadCall) -> HeadBytes:
    own_rows = max(1, call.max_held // (call.vocabulary * call.operand))
    of_hidden, _, _ = _gradients(call, 1)
    most = before = 0
    for tokens in call.chunks(own_rows, own_rows):
        tiles, working = _direction(call, tokens)
        most, before = max(most, tiles + max(before, working) + call.statistics(tokens)), tiles
    forward = call.numbers * call.dtype.itemsize + of_hidden + most
    return _of_gradients(call, forward, of_hidden, 0)


def _direction(call: HeadCall, tokens: int) -> tuple[int, int]:
    """Bytes of `Tiles` and of `HiddenDirection`: its sum, and the more of a tile's term and the targets' rows."""
    rows, columns, tiles = call.tile(tokens)
    filling = max(call.put_at_targets(rows, columns), FP32 * rows * call.hidden)
    term = rows * columns * call.operand + call.slope(rows, columns) + filling
    numbers = tokens * call.hidden
    of_targets = numbers * (FP32 + call.dtype.itemsize if call.dtype.itemsize != FP32 else FP32)
    return tiles, FP32 * numbers + max(term, of_targets)


def _tokens_in_tiles(call: HeadCall) -> HeadBytes:
    size, tokens, vocabulary, hidden = call.dtype.itemsize, call.tokens, call.vocabulary, call.hidden
    scored = call.numbers * size
    rows, columns, tiles = call.tile(tokens)
    begun = scored + tiles + call.statistics(tokens)
    if not any(call.trained):
        return HeadBytes(begun)
    if not call.trained[1]:
        kept = call.numbers * (2 if call.dtype == torch.bfloat16 else FP32)
        forward = begun + max(_direction(call, tokens)[1], FP32 * call.numbers + kept)
        return HeadBytes(forward, kept, kept + FP32 * call.numbers + (scored if size != FP32 else 0))
    of_weight = vocabulary * hidden * size
    in_gradient = min(call.free_rows, tokens)
    run = (tokens - in_gradient) * columns * call.operand
    count = -(-vocabulary // columns)
    held = min(count, call.max_held // run) * run if run else 0
    held = min(held, (tokens - in_gradient) * vocabulary * call.operand) + FP32 * count * tokens
    kept = scored + of_weight + held
    several = tokens > rows or in_gradient not in (0, tokens) or call.operand != size
    working = FP32 * call.numbers + FP32 * rows * hidden + rows * columns * call.operand
    working += (2 * FP32 * columns * hidden if several else 0) + call.put_at_targets(min(rows, tokens), columns)
    last = FP32 * call.numbers + (scored if size != FP32 else 0)
    return HeadBytes(
        begun + of_weight + held + call.slope(rows, columns), kept,
        kept + max(tiles + max(working, call.slope(rows, columns)), last),
    )  # fmt: skip


def _naive(call: HeadCall) -> HeadBytes:
    size, logits = call.dtype.itemsize, FP32 * call.tokens * call.vocabulary
    converted = 0 if size == FP32 else FP32 * (call.numbers + call.vocabulary * call.hidden)
    scored = call.numbers * size
    if not any(call.trained):
        return HeadBytes(scored + converted + (3 if call.softcap else 2) * logits)
    saved = logits * (2 if call.softcap else 1)
    kept = scored + converted + saved
    of_weight = call.vocabulary * call.hidden * FP32 if call.trained[1] else 0
    of_products = FP32 * call.numbers + of_weight + (of_weight // 2 if size != FP32 else 0)
    return HeadBytes(kept + logits, kept, kept + max(2 * logits, logits + of_products))


def _columns(call: HeadCall) -> int:
    """The vocabulary in whole blocks of the kernels; the largest are taken."""
    block = max(blocks.vocabulary for blocks in BLOCKS.values())
    return -(-call.vocabulary // block) * block


def _pairs_in_kernels(call: HeadCall) -> HeadBytes:
    size, columns = call.dtype.itemsize, _columns(call)
    rows = max(1, min(call.tokens, MEMORY_BYTES // (columns * size)))
    of_hidden, of_weight, _ = _gradients(call, 1 + call.tokens // rows)
    working = rows * (columns * size + FP32 * call.hidden) + KERNEL_STATISTICS * rows
    return _of_gradients(call, call.numbers * size + of_hidden + of_weight + working, of_hidden, of_weight)


def _tokens_in_kernels(call: HeadCall) -> HeadBytes:
    size, tokens = call.dtype.itemsize, call.tokens
    scored, all_columns = call.numbers * size, tokens * _columns(call) * size
    begun = scored + KERNEL_STATISTICS * tokens
    if not any(call.trained):
        return HeadBytes(begun)
    if not call.trained[1]:
        kept = call.numbers * (2 if call.dtype == torch.bfloat16 else FP32)
        tile = min(all_columns, max(MEMORY_BYTES - kept, LEAST_TILE_BYTES))
        rows = tile // max(1, _columns(call) * size)
        forward = begun + kept + tile + rows * call.hidden * 2 * FP32
        return HeadBytes(forward, kept, kept + FP32 * call.numbers + scored)
    sums = FP32 * call.numbers
    tile = min(all_columns, max(MEMORY_BYTES - sums, LEAST_TILE_BYTES))
    kept = begun + tile
    return HeadBytes(kept, kept, kept + sums + call.vocabulary * call.hidden * size)
