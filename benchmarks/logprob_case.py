"""One case of the log-prob benchmark: inputs, the loss on top, and what fp64 says about both.

Letters: N scored tokens, H hidden size, V vocabulary, P pairs.

Inputs are random but shaped like a language model's. Rows of the head have length about 1, so that a token's hidden
state, Gaussian of size 2 plus a random multiple of its target's row, gives most tokens small logits (spread 2) and
its target one between 0 and 20: log-probs run from nearly 0 down to some -14, as real ones do. That matters to peers
that skip what is nearly 0. All completions have the same length, so that nobody pays for padding.

The loss on top of every implementation is sigmoid DPO, the mean over pairs, given reference log-probs. Those are 0
here, since one peer (Liger's fused DPO) takes no stored values. `BETA` keeps the loss from saturating.

What is exact: hidden states and weights are in their dtype, and all that follows from these very numbers is computed
in fp64, by the definitions, tile by tile.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

BETA = 0.02
COMPLETION_TOKENS = 512
LOGIT_SPREAD, TARGET_LOGIT = 2.0, 20.0
TILE_BYTES = 256 * 2**20
SAMPLED_ROWS = 64
SEED = 0


@dataclass(frozen=True)
class Head:
    """An output head: [vocabulary, hidden], and its soft-cap if it has one."""

    name: str
    hidden: int
    vocabulary: int
    softcap: float | None = None


HEADS = {
    head.name: head
    for head in (
        Head("SmolLM2-135M", 576, 49152),
        Head("Qwen2.5-0.5B", 896, 151936),
        Head("Llama-3-8B", 4096, 128256),
        Head("Qwen2.5-7B", 3584, 152064),
        Head("Gemma-2-2B", 2304, 256000, softcap=30.0),
    )
}


@dataclass(frozen=True)
class Case:
    """hidden [N, H] and weight [V, H] of one dtype, targets and segments [N]; segment 2i is pair i's chosen."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    segments: Tensor
    pairs: int
    softcap: float | None

    @property
    def tokens(self) -> int:
        return self.hidden.shape[0]


def make_case(head: Head, tokens: int, dtype: torch.dtype, device: str) -> Case:
    """Raises ValueError unless tokens make whole pairs of equally long completions."""
    length = min(COMPLETION_TOKENS, tokens // 2)
    if length == 0 or tokens % (2 * length):
        raise ValueError(f"tokens must be even, and a multiple of {2 * COMPLETION_TOKENS} above that, got {tokens}")
    generator = torch.Generator(device).manual_seed(SEED)
    weight = torch.empty(head.vocabulary, head.hidden, dtype=dtype, device=device)
    for rows in weight.split(8192):  # a whole copy in fp32 would be the largest tensor of the benchmark
        rows.copy_(torch.randn(rows.shape, generator=generator, device=device) / head.hidden**0.5)
    targets = torch.randint(head.vocabulary, (tokens,), generator=generator, device=device)
    size = TARGET_LOGIT * torch.rand(tokens, 1, generator=generator, device=device)
    noise = torch.randn(tokens, head.hidden, generator=generator, device=device)
    hidden = (LOGIT_SPREAD * noise + size * weight[targets]).to(dtype)
    segments = torch.arange(tokens, device=device) // length
    return Case(hidden, weight, targets, segments, tokens // (2 * length), head.softcap)


def loss_of_sums(sums: Tensor) -> Tensor:
    """Sigmoid DPO against reference log-probs of 0, per pair [P] from sums [P, 2]; its mean is the loss."""
    return -F.logsigmoid(BETA * (sums[:, 0] - sums[:, 1]))


@dataclass(frozen=True)
class Exact:
    """In fp64: logps [N], the largest |logit|, and the gradient's rows [n, H] at sampled tokens and words."""

    logps: Tensor
    logit_size: float
    tokens: Tensor
    hidden_grad: Tensor
    words: Tensor
    weight_grad: Tensor


def compute_exact(case: Case) -> Exact:
    hidden, (tokens, _), vocabulary = case.hidden.double(), case.hidden.shape, case.weight.shape[0]
    device = hidden.device

    def logits(rows: Tensor, words: Tensor) -> tuple[Tensor, Tensor | float]:
        """Of some hidden states and words, and their slope under the soft-cap."""
        z = rows @ words.double().t()
        if case.softcap is None:
            return z, 1.0
        capped = case.softcap * torch.tanh(z / case.softcap)
        return capped, 1 - (capped / case.softcap) ** 2

    logps, logsumexp = (torch.empty(tokens, dtype=torch.float64, device=device) for _ in range(2))
    largest = torch.zeros((), dtype=torch.float64, device=device)
    step = max(1, TILE_BYTES // (8 * vocabulary))
    for first in range(0, tokens, step):
        run = slice(first, first + step)
        tile, _ = logits(hidden[run], case.weight)
        logsumexp[run] = tile.logsumexp(1)
        logps[run] = tile.gather(1, case.targets[run, None]).squeeze(1) - logsumexp[run]
        largest = torch.maximum(largest, tile.abs().max())

    # dL/dlogp of a token is that of its completion's sum.
    sums = torch.zeros(2 * case.pairs, dtype=torch.float64, device=device).index_add_(0, case.segments, logps)
    sums.requires_grad_()
    with torch.enable_grad():
        (upstream,) = torch.autograd.grad(loss_of_sums(sums.view(-1, 2)).mean(), sums)
    upstream = upstream[case.segments]

    def logit_gradient(token_rows: Tensor, word_rows: Tensor) -> Tensor:
        """dL/dz of these tokens and words, before the soft-cap."""
        tile, slope = logits(hidden[token_rows], case.weight[word_rows])
        chosen = case.targets[token_rows, None] == word_rows
        return upstream[token_rows, None] * (chosen.double() - (tile - logsumexp[token_rows, None]).exp()) * slope

    sampled = torch.linspace(0, tokens - 1, min(SAMPLED_ROWS, tokens), device=device).long()
    hidden_grad = torch.zeros(len(sampled), hidden.shape[1], dtype=torch.float64, device=device)
    for words in torch.arange(vocabulary, device=device).split(max(1, TILE_BYTES // (8 * hidden.shape[1]))):
        hidden_grad += logit_gradient(sampled, words) @ case.weight[words].double()
    # Half of the words are targets, whose rows are the largest, half are any.
    words = torch.cat(
        [case.targets[sampled[::2]], torch.linspace(0, vocabulary - 1, SAMPLED_ROWS // 2, device=device).long()]
    ).unique()
    weight_grad = logit_gradient(torch.arange(tokens, device=device), words).t() @ hidden
    return Exact(logps, largest.item(), sampled, hidden_grad, words, weight_grad)


def relative_error(actual: Tensor, exact: Tensor) -> float:
    return ((actual.double() - exact).norm() / exact.norm()).item()
