"""Token log-probs through Triton kernels and cuBLAS: the fast path on CUDA.

What needs a gradient decides what is done; a pass is one product over (S, H, V), 2SHV flop.

    nothing          1 pass   `forward_kernel`; logits never leave registers, nothing is saved
    hidden alone     2 passes (frozen head, LoRA) `forward_kernel` also writes exp(l - a) dl/dz of a run of tokens into
                              a reused tile, and one product of that tile with the weight makes the direction
                                  dlogp/dhidden = scale ((1 - p_t) dl_t/dz w_t - sum over v != t of p_v dl_v/dz w_v)
                              which is saved; backward is direction times upstream gradient
    weight or bias   3 to 4   `forward_kernel`, which also keeps the weights exp(l - a) dl/dz of as many vocabulary
                              columns as `MEMORY_BYTES` holds. Backward walks over runs of the vocabulary: for the first
                              run kept weights are turned into d in place, for the others `gradient_kernel` computes
                              logits again and writes d to the same place. From d come
                                  dhidden += d @ W (summed over runs in fp32),   dW = d^T @ hidden
                              each run's rows of dW once, summed over tokens in fp32 inside the product

d and the soft-max weights are rounded to the operands' dtype for their products, as the gradients made of them are;
log-probs see no rounding below fp32. Memory beyond inputs and gradients: the tile, which a trained head keeps from its
forward to its backward pass, and fp32 [S, H] for dhidden; `MEMORY_BYTES` together, where S and H allow it.

Every sum has a fixed order: two calls give the same bits. Under TRITON_INTERPRET=1 the kernels run on CPU tensors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from dpo_scale.logprobs import triton_kernels as kernels
from dpo_scale.logprobs.tiles import Head, put_at_targets, requires_gradient, runs
from dpo_scale.logprobs.triton_blocks import LEAST_TILE_BYTES, MEMORY_BYTES, Blocks, default_blocks

# Whether Triton was told, before it was imported, to run kernels in its interpreter: on CPU tensors, slowly.
INTERPRETED = not isinstance(kernels.forward_kernel, triton.runtime.JITFunction)
LOG2E, LN2 = math.log2(math.e), math.log(2.0)
# The vocabulary is cut into at most so many runs: enough programs to fill a GPU with the tokens of one pair, and few
# statistics to store and combine, 1.5 KB a token. A function of V alone: a token's numbers do not depend on how many
# others there are.
MAX_RUNS = 128
# Hidden states of the token blocks that run together: a third of the smallest L2 of the GPUs below.
GROUP_BYTES = 12 * 2**20


def triton_token_logps(
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    by_products: Sequence[str],
    blocks: Blocks | None = None,
    memory_bytes: int = MEMORY_BYTES,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Arguments, checked, and results as in `dpo_scale.logprobs.token_logps`; bf16, fp16 or fp32.

    blocks: instead of the ones chosen for the device. memory_bytes: see `MEMORY_BYTES`.
    """
    trained = requires_gradient(hidden, head)
    logps, *extras = _TritonTokenLogps.apply(
        hidden, *head, targets.contiguous(), tuple(by_products), trained, blocks, memory_bytes
    )
    return logps, dict(zip(by_products, extras, strict=True))


@dataclass(frozen=True)
class KernelStatistics:
    """The rows of `combine_kernel`'s result, fp32 [S] each.

    total is the sum of exp2(l - anchor) over logits and an anchor in units of log 2: that of stored weights if there
    are any, otherwise the peak.
    """

    logps: Tensor
    logsumexp: Tensor
    target_logit: Tensor
    peak: Tensor
    anchor: Tensor
    total: Tensor
    entropy: Tensor
    log_sum_p2: Tensor

    def by_product(self, name: str) -> Tensor:
        return self.target_logit >= self.peak if name == "argmax_is_target" else getattr(self, name)


class Launcher:
    """The kernels of one head, and how they are launched."""

    def __init__(
        self, hidden: Tensor, head: Head, blocks: Blocks | None = None, memory_bytes: int = MEMORY_BYTES
    ) -> None:
        self.head, self.memory_bytes = head, memory_bytes
        self._bias = head.weight if head.bias is None else head.bias.contiguous()
        self.width = hidden.shape[1]
        device = hidden.device
        if blocks is None:
            capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
            blocks = default_blocks(capability, hidden.dtype, self.width, head.softcap is not None)
        self.blocks = blocks
        group = GROUP_BYTES // (blocks.tokens * max(1, self.width) * hidden.element_size())
        self._meta = {
            "HAS_BIAS": head.bias is not None,
            "SOFTCAP": head.softcap is not None,
            "EVEN_H": self.width % blocks.width == 0,
            "UPCAST": INTERPRETED,
            "GROUP": 2 ** int(math.log2(min(max(group, 1), 32))),
            "BLOCK_S": blocks.tokens,
            "BLOCK_V": blocks.vocabulary,
            "BLOCK_H": blocks.width,
            "num_warps": blocks.warps,
            "num_stages": blocks.stages,
        }
        self._factors = (0.0, head.logit_scale * LOG2E)
        if head.softcap is not None:
            self._factors = (2.0 * LOG2E * head.logit_scale / head.softcap, head.softcap * LOG2E)

    def statistics(
        self, hidden: Tensor, targets: Tensor, by_products: Sequence[str] = (), tile: Tensor | None = None
    ) -> KernelStatistics:
        """One pass over the logits.

        Args:
            tile: [S, columns] in the operands' dtype, columns in whole blocks, or None; filled with soft-max weights of
                these first columns: exp(l - anchor) dl/dz, 0 at the target. p dl/dz = weight / total but for that.
        """
        weight = self.head.weight
        tokens, vocabulary = hidden.shape[0], weight.shape[0]
        options = {"ENTROPY": "entropy" in by_products, "SUM_P2": "log_sum_p2" in by_products}
        flags = {name: self._meta[name] for name in ("HAS_BIAS", "SOFTCAP")}
        blocks, tiles = triton.cdiv(tokens, self.blocks.tokens), triton.cdiv(vocabulary, self.blocks.vocabulary)
        tiles_per_run = triton.cdiv(tiles, MAX_RUNS)
        num_runs = triton.cdiv(tiles, tiles_per_run)
        partials = hidden.new_empty((3 + 2 * bool(by_products), num_runs, tokens), dtype=torch.float32)
        out = hidden.new_empty((8, tokens), dtype=torch.float32)
        found = KernelStatistics(*out)
        if tokens == 0:
            return found
        operands = hidden, weight, self._bias, targets
        layout = *hidden.stride(), *weight.stride(), *self._factors
        stored = 0 if tile is None else tile.shape[1] // self.blocks.vocabulary
        reference = hidden.new_empty(tokens, dtype=torch.float32)
        shifts = hidden.new_empty((max(1, stored), tokens), dtype=torch.float32)
        target_tile = hidden if tile is None else tile
        # bf16 has the range of fp32: weights and their sums stay far inside. fp16 ends at 2^16 and loses digits below
        # 2^-14: there the target is put at 2^14, so that what is 2^-28 as likely keeps its digits.
        headroom, limit = (14, 15) if hidden.dtype == torch.float16 else (0, 48)
        storing = {"STORE_WEIGHTS": tile is not None, "LIMIT": limit}
        with current_device(hidden.device):
            if tile is not None:
                kernels.reference_kernel[(tokens,)](
                    *operands, reference, self.width, *layout, HEADROOM=headroom, BLOCK_H=512, **flags
                )
            kernels.forward_kernel[(blocks * num_runs,)](
                *operands, reference, partials, target_tile, shifts,
                tokens, vocabulary, self.width, num_runs, tiles_per_run, stored, target_tile.stride(0), *layout,
                **storing, **options, **self._meta,
            )  # fmt: skip
            kernels.combine_kernel[(triton.cdiv(tokens, 16),)](
                partials, reference, out, tokens, num_runs, LN2,
                BLOCK_S=16, BLOCK_RUNS=triton.next_power_of_2(num_runs), **storing, **options,
            )  # fmt: skip
            if tile is not None:
                kernels.rescale_kernel[(triton.cdiv(tokens, 32), stored)](
                    tile, shifts, reference, found.anchor, tokens, tile.stride(0),
                    BLOCK_S=32, BLOCK_V=self.blocks.vocabulary,
                )  # fmt: skip
        return found

    def tile_to_keep(self, hidden: Tensor, trained: Sequence[bool]) -> Tensor | None:
        """Memory for the soft-max weights of all tokens and of as many columns as fit; None where that is too few."""
        tokens, vocabulary = hidden.shape[0], self.head.weight.shape[0]
        hidden_sum = 4 * hidden.numel() if trained[0] else 0
        fitting = self._tile_bytes(hidden_sum) // (max(1, tokens) * hidden.element_size())
        columns = min(fitting // self._step * self._step, self.columns(vocabulary))
        return hidden.new_empty((tokens, columns)) if tokens and columns else None

    @property
    def _step(self) -> int:
        """What a tile's columns are a multiple of, unless all of them fit: whole blocks, and no thin products."""
        return self.blocks.vocabulary * triton.cdiv(1024, self.blocks.vocabulary)

    def columns(self, vocabulary: int) -> int:
        """All columns, in whole blocks."""
        return triton.cdiv(vocabulary, self.blocks.vocabulary) * self.blocks.vocabulary

    def direction(
        self, hidden: Tensor, targets: Tensor, by_products: Sequence[str]
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """logps, dlogp/dhidden and by-products, over runs of tokens."""
        weight = self.head.weight
        tokens, vocabulary = hidden.shape[0], weight.shape[0]
        # fp16 has not the range for the direction of a token that is all but certain
        kept = torch.bfloat16 if hidden.dtype == torch.bfloat16 else torch.float32
        direction = torch.empty(hidden.shape, dtype=kept, device=hidden.device)
        columns = self.columns(vocabulary)
        fitting = self._tile_bytes(direction.nbytes) // (columns * hidden.element_size())
        rows = max(self.blocks.tokens, fitting // self.blocks.tokens * self.blocks.tokens)
        tile = hidden.new_empty((min(rows, tokens), columns))
        parts = []
        for run in list(runs(tokens, rows)) or [slice(0, 0)]:
            part, here = hidden[run], tile[: min(rows, tokens - run.start)]
            found = self.statistics(part, targets[run], by_products, here)
            others = product(here[:, :vocabulary], weight).div_(-found.total.unsqueeze(1))
            of_target = self.head.target_gradient(found.logps, found.target_logit).unsqueeze(1)
            others.addcmul_(weight[targets[run]].float(), of_target)
            direction[run] = others.mul_(self.head.logit_scale)
            parts.append((found.logps, *(found.by_product(name) for name in by_products)))
        logps, *extras = (torch.cat(column) for column in zip(*parts, strict=True))
        return logps, direction, extras

    def gradients(
        self,
        hidden: Tensor,
        targets: Tensor,
        logsumexp: Tensor,
        target_gradient: Tensor,
        upstream: Tensor,
        needs: Sequence[bool],
        kept: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of hidden, in fp32, and of weight and bias in their own dtypes; None for those not needed.

        upstream, target_gradient: fp32 [S], of the log-probs, and `KernelStatistics.target_gradient`.
        kept: the tile that `statistics` filled and `KernelStatistics.total`; its columns become d in place.
        """
        needs_hidden, needs_weight, needs_bias = needs
        weight, bias = self.head.weight, self.head.bias
        tokens, vocabulary = hidden.shape[0], weight.shape[0]
        upstream = upstream.float() * self.head.logit_scale
        at_target = upstream * target_gradient
        hidden_sum = torch.empty(hidden.shape, dtype=torch.float32, device=hidden.device) if needs_hidden else None
        make = torch.empty_like if tokens else torch.zeros_like
        grad_weight = make(weight) if needs_weight else None
        grad_bias = make(bias) if needs_bias and bias is not None else None
        if kept is not None:  # d of the columns after these takes their place
            tile, rows, columns = kept[0].view(-1), tokens, kept[0].shape[1]
        else:
            fitting = self._tile_bytes(0 if hidden_sum is None else hidden_sum.nbytes) // hidden.element_size()
            # tokens are split too only where a narrow tile of all of them would not fit
            max_rows = fitting // self._step // self.blocks.tokens * self.blocks.tokens
            rows = min(tokens, max(self.blocks.tokens, max_rows))
            columns = min(self.columns(vocabulary), max(1, fitting // max(1, rows) // self._step) * self._step)
            tile = hidden.new_empty(rows * columns)
        for first in range(0, vocabulary, columns):
            span = slice(first, min(first + columns, vocabulary))
            weight_sum: Tensor | None = None
            bias_sum: Tensor | None = None
            for index, run in enumerate(runs(tokens, rows)):
                part = hidden[run]
                d = tile[: part.shape[0] * columns].view(part.shape[0], columns)
                if kept is not None and first == 0:
                    scale_kept(d, kept[1], targets, upstream, at_target)
                    of_bias = d.sum(0, dtype=torch.float32)[: span.stop] if grad_bias is not None else None
                else:
                    vectors = targets[run], logsumexp[run], upstream[run], at_target[run]
                    of_bias = self.logit_gradient(part, *vectors, d, span, grad_bias is not None)
                d = d[:, : span.stop - span.start]
                if hidden_sum is not None:
                    product(d, weight[span], hidden_sum[run], add=first > 0)
                if grad_weight is not None and rows == tokens:
                    product_in_place(d.t(), part, grad_weight[span])
                elif grad_weight is not None:
                    weight_sum = product(d.t(), part, weight_sum, add=index > 0)
                if of_bias is not None:
                    bias_sum = of_bias if bias_sum is None else bias_sum + of_bias
            if grad_weight is not None and weight_sum is not None:
                grad_weight[span] = weight_sum
            if grad_bias is not None and bias_sum is not None:
                grad_bias[span] = bias_sum
        return hidden_sum, grad_weight, grad_bias

    def logit_gradient(
        self,
        hidden: Tensor,
        targets: Tensor,
        logsumexp: Tensor,
        upstream: Tensor,
        at_target: Tensor,
        tile: Tensor,
        span: slice,
        bias_gradient: bool,
    ) -> Tensor | None:
        """Fill the tile with d of these vocabulary columns; their sums over tokens, fp32, if asked for."""
        weight = self.head.weight
        columns, blocks = span.stop - span.start, triton.cdiv(hidden.shape[0], self.blocks.tokens)
        partials = tile.new_empty((blocks, columns) if bias_gradient else 1, dtype=torch.float32)
        with current_device(hidden.device):
            kernels.gradient_kernel[(blocks * triton.cdiv(columns, self.blocks.vocabulary),)](
                hidden, weight, self._bias, targets, logsumexp, upstream, at_target, tile,
                partials, hidden.shape[0], span.start, span.stop, self.width, tile.stride(0),
                *hidden.stride(), *weight.stride(), *self._factors, LOG2E,
                BIAS_GRADIENT=bias_gradient, **self._meta,
            )  # fmt: skip
        return partials.sum(0) if bias_gradient else None

    def _tile_bytes(self, others: int) -> int:
        """What is left for the tile beside other memory."""
        return max(self.memory_bytes - others, min(LEAST_TILE_BYTES, self.memory_bytes))


class _TritonTokenLogps(torch.autograd.Function):
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
        trained: Sequence[bool],
        blocks: Blocks | None,
        memory_bytes: int,
    ) -> tuple[Tensor, ...]:
        head = Head(weight, bias, logit_scale, softcap)
        launcher = Launcher(hidden, head, blocks, memory_bytes)
        ctx.frozen, ctx.dtype = list(trained) == [True, False, False], hidden.dtype
        ctx.transform, ctx.cut = (logit_scale, softcap), (blocks, memory_bytes)
        if ctx.frozen:
            logps, direction, extras = launcher.direction(hidden, targets, by_products)
            ctx.save_for_backward(direction)
        else:
            tile = launcher.tile_to_keep(hidden, trained) if any(trained) else None
            found = launcher.statistics(hidden, targets, by_products, tile)
            logps, extras = found.logps, [found.by_product(name) for name in by_products]
            ctx.kept = None if tile is None else (tile, found.total)
            # The parameter itself, no view or copy of it: under ZeRO-3 its storage is released after the head's
            # forward and filled again before its backward, which only the parameter follows.
            of_target = head.target_gradient(found.logps, found.target_logit)
            ctx.save_for_backward(hidden, weight, bias, targets, found.logsumexp, of_target)
        ctx.mark_non_differentiable(*extras)
        return logps, *extras

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        grads: tuple[Tensor | None, ...]
        if ctx.frozen:
            (direction,) = ctx.saved_tensors
            grads = ((direction * grad.unsqueeze(1)).to(ctx.dtype), None, None)
        else:
            hidden, weight, bias, targets, logsumexp, target_gradient = ctx.saved_tensors
            kept, ctx.kept = ctx.kept, None  # overwritten, so of no use to a second backward pass
            with torch.autocast(hidden.device.type, enabled=False):
                launcher = Launcher(hidden, Head(weight, bias, *ctx.transform), *ctx.cut)
                grad_hidden, *others = launcher.gradients(
                    hidden, targets, logsumexp, target_gradient, grad, ctx.needs_input_grad[:3], kept
                )
            grads = (None if grad_hidden is None else grad_hidden.to(ctx.dtype), *others)
        return *grads, *(None,) * 7


def scale_kept(tile: Tensor, total: Tensor, targets: Tensor, upstream: Tensor, at_target: Tensor) -> None:
    """Turn soft-max weights of all tokens and the first columns into d, in place."""
    tile.mul_((-upstream / total).unsqueeze(1))
    put_at_targets(tile, targets, slice(0, tile.shape[1]), at_target)


def product(left: Tensor, right: Tensor, out: Tensor | None = None, add: bool = False) -> Tensor:
    """left @ right in fp32, into out if given, on top of what is there with add."""
    options: dict[str, Any] = {"out_dtype": torch.float32} if left.is_cuda and left.dtype != torch.float32 else {}
    if not options:
        left, right = left.float(), right.float()
    if out is None:
        return torch.mm(left, right, **options)
    return torch.addmm(out, left, right, **options, out=out) if add else torch.mm(left, right, **options, out=out)


def product_in_place(left: Tensor, right: Tensor, out: Tensor) -> None:
    """out = left @ right in out's dtype, summed in fp32: by cuBLAS, which splits no product with this many results."""
    if left.is_cuda:
        torch.mm(left, right, out=out)
    else:
        out.copy_(product(left, right))


def current_device(device: torch.device) -> AbstractContextManager[Any]:
    """Kernels are launched on the current device, which need not be the tensors'."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
