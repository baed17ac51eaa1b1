"""DPO written down plainly, to compare with: nothing of dpo_scale, one unpadded sequence a forward, full logits.

Two models, plain torch, fp32, one process. It reads the same rows and tokenizes them by the definition: the chat
template's text of the prompt, then the completion and the end of turn.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer


@dataclass(frozen=True)
class PlainPair:
    prompt: list[int]
    chosen: list[int]
    rejected: list[int]


def read_pairs(path: Path, model: Path) -> list[PlainPair]:
    """Rows of prompt, chosen and rejected texts, under the tests' ChatML tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    pairs = []
    for row in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
        start = f"<|im_start|>user\n{row['prompt']}<|im_end|>\n<|im_start|>assistant\n"
        prompt = tokenizer.encode(start, add_special_tokens=False)
        completions = []
        for name in ("chosen", "rejected"):
            whole = tokenizer.encode(f"{start}{row[name]}<|im_end|>", add_special_tokens=False)
            assert whole[: len(prompt)] == prompt and whole[-1] == tokenizer.eos_token_id
            completions.append(whole[len(prompt) :])
        pairs.append(PlainPair(prompt, *completions))
    return pairs


@dataclass(frozen=True)
class Batch:
    """A global batch of G pairs: per pair and completion (chosen, rejected), a tensor over its tokens.

    policy, reference: log-probs of the tokens; log_sum_p2: log of the policy's sum of squared probabilities.
    indices: the pairs' numbers; longest: tokens of each pair's longer sequence.
    """

    indices: Sequence[int]
    longest: list[int]
    policy: list[tuple[Tensor, Tensor]]
    reference: list[tuple[Tensor, Tensor]]
    log_sum_p2: list[tuple[Tensor, Tensor]]

    def sums(self, weigh: Callable[[Tensor, int], Tensor] = lambda logps, shared: logps) -> tuple[Tensor, ...]:
        """s_c, s_r, r_c, r_r, each [G]; `weigh` is given token log-probs and the shorter completion's length."""
        columns = []
        for model in (self.policy, self.reference):
            for side in (0, 1):
                sums = [weigh(pair[side], min(map(len, pair))).sum() for pair in model]
                columns.append(torch.stack(sums))
        return tuple(columns)

    @property
    def lengths(self) -> tuple[Tensor, Tensor]:
        """n_c, n_r, each [G]."""
        n_c, n_r = (torch.tensor([float(len(pair[side])) for pair in self.policy]) for side in (0, 1))
        return n_c, n_r


def score(model: torch.nn.Module, prompt: list[int], completion: list[int]) -> tuple[Tensor, Tensor]:
    """(log-probs of the completion's tokens, log sum of squared probabilities there), each [tokens]."""
    logits = model(input_ids=torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
    logps = torch.log_softmax(logits.float(), dim=-1)
    of_tokens = logps.gather(1, torch.tensor(completion)[:, None])[:, 0]
    return of_tokens, torch.logsumexp(2 * logps.detach(), dim=-1)


@torch.no_grad()
def summed_logps(model: Path, pairs: list[PlainPair], weights_in: torch.dtype = torch.float32) -> Tensor:
    """Log-probs of the completions, fp32 [pairs, 2] with chosen in column 0; the weights rounded, the rest in fp32."""
    whole = AutoModelForCausalLM.from_pretrained(model, dtype=weights_in).float().eval()
    sums = [[score(whole, pair.prompt, side)[0].sum() for side in (pair.chosen, pair.rejected)] for pair in pairs]
    return torch.tensor(sums)


def score_batch(policy: torch.nn.Module, reference: torch.nn.Module, pairs: list[PlainPair], indices: range) -> Batch:
    batch = Batch(indices, [], [], [], [])
    for pair in (pairs[i] for i in indices):
        (chosen, chosen_p2), (rejected, rejected_p2) = (
            score(policy, pair.prompt, completion) for completion in (pair.chosen, pair.rejected)
        )
        with torch.no_grad():
            frozen = [score(reference, pair.prompt, completion)[0] for completion in (pair.chosen, pair.rejected)]
        batch.longest.append(len(pair.prompt) + max(len(pair.chosen), len(pair.rejected)))
        batch.policy.append((chosen, rejected))
        batch.reference.append((frozen[0], frozen[1]))
        batch.log_sum_p2.append((chosen_p2, rejected_p2))
    return batch


@dataclass(frozen=True)
class PlainRun:
    losses: list[float]
    grad_norms: list[float]
    policy: torch.nn.Module


def train(
    model: Path,
    reference: Path,
    pairs: list[PlainPair],
    loss: Callable[[Batch], Tensor],
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    weight_decay: float = 0.0,
    epsilon: float = 1e-8,
    max_grad_norm: float = 1.0,
) -> PlainRun:
    """AdamW with a linear schedule to 0; batches in the rows' order, an epoch's last one as short as it comes.

    loss: the mean loss over a global batch. No dropout: both models are in evaluation mode.
    """
    policy, frozen = (AutoModelForCausalLM.from_pretrained(p, dtype=torch.float32).eval() for p in (model, reference))
    groups = [
        {"params": [p for p in policy.parameters() if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in policy.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, eps=epsilon)
    batches = [range(i, min(i + batch_size, len(pairs))) for i in range(0, len(pairs), batch_size)]
    run = PlainRun([], [], policy)
    for step in range(steps):
        value = loss(score_batch(policy, frozen, pairs, batches[step % len(batches)]))
        value.backward()
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * (1 - step / steps)
        optimizer.step()
        optimizer.zero_grad()
        run.losses.append(value.item())
        run.grad_norms.append(norm.item())
    return run
