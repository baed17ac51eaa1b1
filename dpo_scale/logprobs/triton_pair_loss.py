"""The fused pair loss through Triton kernels and cuBLAS: `pair_loss` for bf16 on CUDA.

The derivation is that of `pair_loss`; what differs is where logits live. `triton_kernels.forward_kernel` keeps them in
registers and leaves e_sv = exp(l_v - a_s) dl_v/dz_v of a chunk of pairs in bf16, 0 at the target. With the chunk's loss
known, one elementwise pass makes d of it in place, and two products follow.

Cost. 3 passes of 2SHV flop: logits, dhidden, dW. Bytes per token and vocabulary entry: 2 written, 2 read and 2 written
to scale, 2 read by each product: 10, where fp32 logits that are written once and read back cost 8 before any of that.
At H = 4096 on an H100 those 10 take a tenth of the time of the 3 passes, and most of them overlap with products.
Memory: e, at most `MEMORY_BYTES`, and fp32 [rows of e, H].

bf16 only: e and d need its range (fp16 would need a unit for each chunk, as `pair_loss` has), and fp32 products are
not the matrix units'.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dpo_scale.logprobs.pair_loss import Gradients, Job
from dpo_scale.logprobs.triton_blocks import MEMORY_BYTES
from dpo_scale.logprobs.triton_logps import Launcher, product, product_in_place, scale_kept


class TritonJob(Job):
    """`pair_loss.Job` with a trained head; `tile_bytes` and the limit of `max_held` for torch's tiles are not used."""

    memory_bytes = MEMORY_BYTES

    def run(self, hidden: Tensor) -> tuple[Tensor, list[Tensor | None]]:
        """As `Job.run`."""
        assert hidden.dtype == torch.bfloat16 and (self.trained[1] or self.trained[2])
        head, weight = self.head, self.head.weight
        launcher = Launcher(hidden, head)
        tokens, vocabulary = sum(self.pair_loss.planned), weight.shape[0]
        columns = launcher.columns(vocabulary)
        rows = max(1, min(tokens, self.memory_bytes // (columns * hidden.element_size())))
        tile = hidden.new_empty((rows, columns))
        sums = hidden.new_zeros((self.pair_loss.num_pairs, 2), dtype=torch.float32)
        gradients = Gradients(hidden, head, self.trained, 1 + tokens // rows, torch.float32)
        for pairs, chunk in self.pair_loss.chunks(rows, rows):
            part, targets = hidden[chunk], self.targets[chunk].contiguous()
            held = min(rows, len(targets))
            first = launcher.statistics(part[:held], targets[:held], (), tile[:held])
            # of a pair that is longer than the tile; empty otherwise
            rest = launcher.statistics(part[held:], targets[held:])
            gradient = self.token_gradient(torch.cat([first.logps, rest.logps]), sums, pairs, chunk) * head.logit_scale
            target_gradients = [head.target_gradient(found.logps, found.target_logit) for found in (first, rest)]
            of_target = torch.cat(target_gradients) * gradient
            scale_kept(tile[:held], first.total, targets[:held], gradient[:held], of_target[:held])
            _add(gradients, tile[:held, :vocabulary], part[:held], weight, chunk.start)
            for start in range(held, len(targets), rows):
                run = slice(start, min(start + rows, len(targets)))
                logsumexp, d = rest.logsumexp[start - held : run.stop - held], tile[: run.stop - start]
                inputs = part[run], targets[run], logsumexp, gradient[run], of_target[run]
                launcher.logit_gradient(*inputs, d, slice(0, vocabulary), bias_gradient=False)
                _add(gradients, d[:, :vocabulary], part[run], weight, chunk.start + start)
        return sums, gradients.all()


def _add(to: Gradients, d: Tensor, hidden: Tensor, weight: Tensor, start: int) -> None:
    """Add what d [s, V] gives, which is of tokens start, start + 1, ... with these hidden states."""
    if not len(d):
        return
    if to.hidden is not None:
        to.hidden[start : start + len(d)] = product(d, weight)
    if to.weight is not None:
        if to.weight.dtype == torch.float32:
            product(d.t(), hidden, to.weight, add=not to.is_empty)
        elif to.is_empty:
            product_in_place(d.t(), hidden, to.weight)
        else:
            to.weight.addmm_(d.t(), hidden)
    if to.bias is not None:
        to.bias += d.sum(0, dtype=torch.float32)
    to.is_empty = False
