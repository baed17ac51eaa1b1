"""The Triton kernels behind `triton_logps`: logits live in registers, statistics and soft-max weights leave.

Letters: S scored tokens, H hidden size, V vocabulary. For token s with target t the final logits are
l_v = scale * (hidden_s . w_v + bias_v), or c tanh(that / c) under a soft-cap, and the wanted value is
l_t - log sum_v exp(l_v).

Computed. A program takes a block of tokens and walks over a run of vocabulary tiles. Each tile is one product of
[BLOCK_S, H] by [H, BLOCK_V] with an fp32 accumulator in registers; the tile is turned into logits there, folded into
a few fp32 numbers a token (the largest logit a, sum exp(l - a), the target's logit; on demand sums of
(l - a) exp(l - a) and exp(l - a)^2), and dropped. `combine_kernel` folds the runs of one token together, in a fixed
order; nothing is added atomically. Where runs end depends on V alone, so a token's log-prob is the same to the last
bit whatever tokens come with it.

Exact, because changing a to b multiplies a sum of exp(l - a) by exp(a - b), and no logit is rounded
below fp32 on its way. Everything is kept in units of log 2 (l * log2(e), exp2, log2), which is what the hardware
computes; converting costs nothing, since logits are multiplied by a number anyway.

Cost per token of one pass over (H, V): 2HV flop, V exponentials. A block of hidden states is read once per run and
the weight once per group of token blocks, (2H + 2HV / (GROUP * BLOCK_S)) bytes from memory in 16 bits: at H = 4096,
V = 128256 and groups of 2048 tokens 0.5 MB beside 1.05 Gflop, 2000 flop per byte, far on the compute side of any GPU
(an H100 breaks even at about 300). The floor of a pass is therefore 2SHV over the rate of the matrix units. Logits
that were written and read back in fp32 would add 8V bytes a token: 1 MB, three times what is read now.

`gradient_kernel` computes a logit tile again and writes d = g scale ([v = t] - p_v) dl/dz, in the operands' dtype,
for two cuBLAS products: 2HV flop and 2V bytes a token. With STORE_WEIGHTS the forward kernel itself writes
exp(l - a) dl/dz the same way: a product of that with the weight makes the gradient's direction without a second logit
pass, and where it is kept d is a number a token times it; see `triton_logps`. At the target 1 - p_t would lose its
digits where p_t is nearly 1: there d is given by the caller, who has log p_t, and the forward kernel writes 0.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Below every logit, and finite: -inf minus -inf would be NaN.
_LOWEST = tl.constexpr(-3.0e38)

# do_not_specialize: sizes that change from batch to batch are compiled once, not again for 1 and multiples of 16.


@triton.jit
def _place(program, blocks, runs, GROUP: tl.constexpr):
    """Which block of tokens and which run of the vocabulary a program takes.

    Programs that run together share a few token blocks and a few runs, GROUP of the former, so that hidden states
    stay in the L2 cache while the weight streams through it once per group.
    """
    per_group = GROUP * runs
    first = program // per_group * GROUP
    height = tl.minimum(blocks - first, GROUP)
    within = program % per_group
    return first + within % height, within // height


@triton.jit
def _products(
    hidden, weight, rows, columns, width, hidden_row, hidden_column, weight_row, weight_column,
    BLOCK_S: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr, EVEN_H: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """hidden[rows] @ weight[columns].T in fp32; rows and columns must be in range."""
    inner = tl.arange(0, BLOCK_H)
    left = hidden + rows.to(tl.int64)[:, None] * hidden_row + inner[None, :] * hidden_column
    right = weight + columns.to(tl.int64)[None, :] * weight_row + inner[:, None] * weight_column
    sums = tl.zeros((BLOCK_S, BLOCK_V), dtype=tl.float32)
    for start in range(0, width, BLOCK_H):
        if EVEN_H:
            a = tl.load(left)
            b = tl.load(right)
        else:
            a = tl.load(left, mask=inner[None, :] < width - start, other=0.0)
            b = tl.load(right, mask=inner[:, None] < width - start, other=0.0)
        if UPCAST:  # numpy, which the interpreter runs on, has no bf16
            a = a.to(tl.float32)
            b = b.to(tl.float32)
        sums = tl.dot(a, b, sums, input_precision="ieee")
        left += BLOCK_H * hidden_column
        right += BLOCK_H * weight_column
    return sums


@triton.jit
def _logits(sums, inner_factor, outer_factor, SOFTCAP: tl.constexpr):
    """Final logits in units of log 2, and dl/dz, from hidden . w + bias. Uncapped: outer_factor = scale * log2(e).

    With a soft-cap, inner_factor = 2 log2(e) scale / c and outer_factor = c log2(e): with r = 1 / (1 + exp(2u)),
    tanh(u) = 1 - 2r and its slope is 4r (1 - r), which keeps its digits where tanh is nearly 1.
    """
    if SOFTCAP:
        r = 1.0 / (1.0 + tl.exp2(sums * inner_factor))
        return outer_factor * (1.0 - 2.0 * r), 4.0 * r * (1.0 - r)
    else:
        return sums * outer_factor, 1.0


@triton.jit
def _shift(highest, base, LIMIT: tl.constexpr):
    """The least whole number, from 0, that keeps exp2(logit - (base + shift)) below 2^LIMIT up to the highest logit."""
    return tl.maximum(tl.ceil(highest - base) - LIMIT, 0.0)


@triton.jit
def reference_kernel(
    hidden, weight, bias, targets, reference, width,
    hidden_row, hidden_column, weight_row, weight_column, inner_factor, outer_factor,
    HEADROOM: tl.constexpr, HAS_BIAS: tl.constexpr, SOFTCAP: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """reference [S] = the targets' logits in units of log 2, rounded up to whole numbers, less HEADROOM.

    What stored soft-max weights are relative to: a token's then sum to about 2^HEADROOM / 2 at least, so that none that
    counts is lost at the small end of the range. A program takes a token.
    """
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + row)
    inner = tl.arange(0, BLOCK_H)
    sums = tl.zeros((BLOCK_H,), dtype=tl.float32)
    for start in range(0, width, BLOCK_H):
        place = start + inner
        h = tl.load(hidden + row * hidden_row + place * hidden_column, mask=place < width, other=0.0)
        w = tl.load(weight + target * weight_row + place * weight_column, mask=place < width, other=0.0)
        sums += h.to(tl.float32) * w.to(tl.float32)
    product = tl.sum(sums, 0)
    if HAS_BIAS:
        product += tl.load(bias + target).to(tl.float32)
    logit, _ = _logits(product, inner_factor, outer_factor, SOFTCAP)
    tl.store(reference + row, tl.ceil(logit) - HEADROOM)


@triton.jit(do_not_specialize=["tokens", "vocabulary", "runs", "tiles_per_run", "stored_tiles"])
def forward_kernel(
    hidden, weight, bias, targets, reference, partials, tile, shifts,
    tokens, vocabulary, width, runs, tiles_per_run, stored_tiles, tile_row,
    hidden_row, hidden_column, weight_row, weight_column, inner_factor, outer_factor,
    HAS_BIAS: tl.constexpr, SOFTCAP: tl.constexpr, ENTROPY: tl.constexpr, SUM_P2: tl.constexpr,
    STORE_WEIGHTS: tl.constexpr, LIMIT: tl.constexpr, EVEN_H: tl.constexpr, UPCAST: tl.constexpr,
    GROUP: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Statistics of one run of vocabulary tiles: partials [5, runs, S] = peak, total, target, sums for by-products.

    With STORE_WEIGHTS, also tile [S, tile_row] = exp2(l - anchor) dl/dz of the first stored_tiles vocabulary tiles,
    and 0 at the target; all of their columns, because a mask would rule out 16-byte stores. Anchors there are one per
    token and vocabulary tile: reference + shift, with the shift of `_shift` in shifts [stored_tiles, S]. It is 0 unless
    a logit is far above the target's, and being whole, `rescale_kernel` can level shifts without rounding anything.
    Statistics stay relative to the peak, at the price of a second exponential: with and without stored weights they
    are the same to the last bit, so that a policy that is its reference has margins of exactly 0.
    """
    blocks = tl.cdiv(tokens, BLOCK_S)
    block, run = _place(tl.program_id(0), blocks, runs, GROUP)
    rows = block * BLOCK_S + tl.arange(0, BLOCK_S)
    is_token = rows < tokens
    rows = tl.minimum(rows, tokens - 1)  # surplus rows repeat the last one, and are not stored
    target = tl.load(targets + rows).to(tl.int32)

    peak = tl.full((BLOCK_S,), _LOWEST, dtype=tl.float32)
    total = tl.zeros((BLOCK_S,), dtype=tl.float32)
    total_x = tl.zeros((BLOCK_S,), dtype=tl.float32)
    total_squared = tl.zeros((BLOCK_S,), dtype=tl.float32)
    target_logit = tl.zeros((BLOCK_S,), dtype=tl.float32)
    first = run * tiles_per_run
    last = tl.minimum(first + tiles_per_run, tl.cdiv(vocabulary, BLOCK_V))
    for index in range(first, last):
        columns = index * BLOCK_V + tl.arange(0, BLOCK_V)
        is_column = columns < vocabulary
        sums = _products(
            hidden, weight, rows, tl.minimum(columns, vocabulary - 1), width,
            hidden_row, hidden_column, weight_row, weight_column, BLOCK_S, BLOCK_V, BLOCK_H, EVEN_H, UPCAST,
        )  # fmt: skip
        if HAS_BIAS:
            sums += tl.load(bias + columns, mask=is_column, other=0.0).to(tl.float32)[None, :]
        logits, slope = _logits(sums, inner_factor, outer_factor, SOFTCAP)
        logits = tl.where(is_column[None, :], logits, float("-inf"))
        is_target = columns[None, :] == target[:, None]
        target_logit += tl.sum(tl.where(is_target, logits, 0.0), 1)
        highest = tl.max(logits, 1)
        new_peak = tl.maximum(peak, highest)
        rise = peak - new_peak
        shrink = tl.exp2(rise)
        peak = new_peak
        x = logits - peak[:, None]
        e = tl.exp2(x)
        if ENTROPY:  # the limit of x exp(x) is 0, at masked columns and at logits of -inf
            total_x = shrink * (total_x + rise * total) + tl.sum(tl.where(e > 0.0, x * e, 0.0), 1)
        total = shrink * total + tl.sum(e, 1)
        if SUM_P2:
            total_squared = shrink * shrink * total_squared + tl.sum(e * e, 1)
        if STORE_WEIGHTS:  # noqa: SIM102 - known when compiling; the next is not
            if index < stored_tiles:
                base = tl.load(reference + rows)
                shift = _shift(highest, base, LIMIT)
                weights = tl.exp2(logits - (base + shift)[:, None]) * slope
                place = tile + rows.to(tl.int64)[:, None] * tile_row + columns[None, :]
                others = tl.where(is_target, 0.0, weights).to(tile.dtype.element_ty)
                tl.store(place, others, mask=is_token[:, None])
                tl.store(shifts + index * tokens + rows, shift, mask=is_token)

    plane = runs.to(tl.int64) * tokens
    out = partials + run.to(tl.int64) * tokens + rows
    tl.store(out, peak, mask=is_token)
    tl.store(out + plane, total, mask=is_token)
    tl.store(out + 2 * plane, target_logit, mask=is_token)
    if ENTROPY:
        tl.store(out + 3 * plane, total_x, mask=is_token)
    if SUM_P2:
        tl.store(out + 4 * plane, total_squared, mask=is_token)


@triton.jit(do_not_specialize=["tokens", "runs"])
def combine_kernel(
    partials, reference, out, tokens, runs, ln2,
    STORE_WEIGHTS: tl.constexpr, LIMIT: tl.constexpr, ENTROPY: tl.constexpr, SUM_P2: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_RUNS: tl.constexpr,
):  # fmt: skip
    """Fold the runs of each token: out [8, S], see `triton_logps.KernelStatistics`; BLOCK_RUNS >= runs."""
    rows = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    run = tl.arange(0, BLOCK_RUNS)
    is_token = rows < tokens
    inside = (run < runs)[:, None] & is_token[None, :]
    plane = runs.to(tl.int64) * tokens
    here = partials + run.to(tl.int64)[:, None] * tokens + rows[None, :]
    peaks = tl.load(here, mask=inside, other=_LOWEST)
    totals = tl.load(here + plane, mask=inside, other=0.0)
    peak = tl.max(peaks, 0)
    drop = peaks - peak[None, :]
    shrink = tl.exp2(drop)
    total = tl.sum(totals * shrink, 0)
    target = tl.sum(tl.load(here + 2 * plane, mask=inside, other=0.0), 0)
    log_total = tl.log2(total)
    anchor = peak
    anchored_total = total
    if STORE_WEIGHTS:
        base = tl.load(reference + rows, mask=is_token, other=0.0)
        anchor = base + _shift(peak, base, LIMIT)
        anchored_total = total * tl.exp2(peak - anchor)
    plane_out = tokens.to(tl.int64)
    place = out + rows
    # The peak and the sum are subtracted one by one: their sum would round away digits of a log-prob near 0.
    tl.store(place, ((target - peak) - log_total) * ln2, mask=is_token)
    tl.store(place + plane_out, (peak + log_total) * ln2, mask=is_token)
    tl.store(place + 2 * plane_out, target * ln2, mask=is_token)
    tl.store(place + 3 * plane_out, peak * ln2, mask=is_token)
    tl.store(place + 4 * plane_out, anchor, mask=is_token)
    tl.store(place + 5 * plane_out, anchored_total, mask=is_token)
    if ENTROPY:
        total_x = tl.load(here + 3 * plane, mask=inside, other=0.0)
        total_x = tl.sum(shrink * (total_x + drop * totals), 0)
        tl.store(place + 6 * plane_out, (log_total - total_x / total) * ln2, mask=is_token)
    if SUM_P2:
        squared = tl.load(here + 4 * plane, mask=inside, other=0.0)
        squared = tl.sum(shrink * shrink * squared, 0)
        tl.store(place + 7 * plane_out, (tl.log2(squared) - 2.0 * log_total) * ln2, mask=is_token)


@triton.jit(do_not_specialize=["tokens"])
def rescale_kernel(tile, shifts, reference, anchor, tokens, tile_row, BLOCK_S: tl.constexpr, BLOCK_V: tl.constexpr):
    """Bring each vocabulary tile's weights from their anchor to the token's: times a power of two, nearly always 1."""
    rows = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    index = tl.program_id(1)
    is_token = rows < tokens
    own = tl.load(shifts + index * tokens + rows, mask=is_token, other=0.0)
    base = tl.load(reference + rows, mask=is_token, other=0.0)
    power = own - (tl.load(anchor + rows, mask=is_token, other=0.0) - base)  # of whole numbers: exact
    if tl.min(power, 0) < 0.0:
        columns = index * BLOCK_V + tl.arange(0, BLOCK_V)
        mask = is_token[:, None]
        place = tile + rows.to(tl.int64)[:, None] * tile_row + columns[None, :]
        weights = tl.load(place, mask=mask, other=0.0).to(tl.float32) * tl.exp2(power)[:, None]
        tl.store(place, weights.to(tile.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["tokens", "first_column", "last_column"])
def gradient_kernel(
    hidden, weight, bias, targets, logsumexp, upstream, at_target, tile, bias_partials,
    tokens, first_column, last_column, width, tile_row,
    hidden_row, hidden_column, weight_row, weight_column, inner_factor, outer_factor, log2e,
    HAS_BIAS: tl.constexpr, BIAS_GRADIENT: tl.constexpr, SOFTCAP: tl.constexpr, EVEN_H: tl.constexpr,
    UPCAST: tl.constexpr,
    GROUP: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """tile [S, tile_row] = d for vocabulary columns first_column to last_column: -upstream p_v dl/dz, or at_target.

    Rows of the tile are whole blocks long, as in `forward_kernel`; what is beyond the columns has no meaning.

    With BIAS_GRADIENT, also bias_partials [token blocks, columns] = its sums over each block's tokens, in fp32.
    """
    blocks = tl.cdiv(tokens, BLOCK_S)
    columns_here = last_column - first_column
    block, index = _place(tl.program_id(0), blocks, tl.cdiv(columns_here, BLOCK_V), GROUP)
    rows = block * BLOCK_S + tl.arange(0, BLOCK_S)
    is_token = rows < tokens
    rows = tl.minimum(rows, tokens - 1)
    places = index * BLOCK_V + tl.arange(0, BLOCK_V)
    is_column = places < columns_here
    columns = first_column + tl.minimum(places, columns_here - 1)
    sums = _products(
        hidden, weight, rows, columns, width,
        hidden_row, hidden_column, weight_row, weight_column, BLOCK_S, BLOCK_V, BLOCK_H, EVEN_H, UPCAST,
    )  # fmt: skip
    if HAS_BIAS:
        sums += tl.load(bias + columns).to(tl.float32)[None, :]
    logits, slope = _logits(sums, inner_factor, outer_factor, SOFTCAP)
    target = tl.load(targets + rows).to(tl.int32)
    scale = tl.load(upstream + rows)
    p = tl.exp2(logits - (tl.load(logsumexp + rows) * log2e)[:, None])
    is_target = columns[None, :] == target[:, None]
    d = tl.where(is_target, tl.load(at_target + rows)[:, None], -scale[:, None] * p * slope)
    place = tile + rows.to(tl.int64)[:, None] * tile_row + places[None, :]
    tl.store(place, d.to(tile.dtype.element_ty), mask=is_token[:, None])
    if BIAS_GRADIENT:
        out = bias_partials + block.to(tl.int64) * columns_here + places
        tl.store(out, tl.sum(tl.where(is_token[:, None], d, 0.0), 0), mask=is_column)
