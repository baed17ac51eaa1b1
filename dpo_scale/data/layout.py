"""Token ids of pairs into the tensors of one forward pass.

`padded`: one sequence a row, chosen and rejected of each pair next to each other, padded on the right to the
longest. Positions are 0, 1, 2, ... in every row, and under a causal mask no real token sees the padding behind it,
so neither position ids nor an attention mask are needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch

from dpo_scale.data.dataset import Pair


@dataclass(frozen=True)
class PairBatch:
    """P pairs as B rows of T tokens, of which S are scored. All index tensors are int64.

    Attributes:
        input_ids: [B, T].
        score_index: [S] flat positions (b * T + t) whose hidden state predicts a completion token.
        score_targets: [S] those completion tokens.
        score_segments: [S] ascending; 2i for pair i's chosen, 2i + 1 for its rejected.
        lengths: [P, 2] completion tokens of chosen and rejected.
        row_ids: [P] indices into the dataset.
        weights: [P] fp32 weight of each pair in the global batch's sum; 0 for a filler.
        reference_logps: [P, 2] fp32 summed reference log-probs, where they are known beforehand.
    """

    input_ids: torch.Tensor
    score_index: torch.Tensor
    score_targets: torch.Tensor
    score_segments: torch.Tensor
    lengths: torch.Tensor
    row_ids: torch.Tensor
    weights: torch.Tensor
    reference_logps: torch.Tensor | None = None

    @property
    def num_pairs(self) -> int:
        return self.lengths.shape[0]

    def to(self, device: torch.device) -> PairBatch:
        tensors = {field.name: getattr(self, field.name) for field in fields(self)}
        moved = {name: value.to(device, non_blocking=True) for name, value in tensors.items() if value is not None}
        return replace(self, **moved)

    def pinned(self) -> PairBatch:
        """The batch in page-locked memory, from which `to` copies without holding up the host."""
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        return replace(self, **{name: value.pin_memory() for name, value in tensors.items()})


def padded_batch(pairs: Sequence[Pair], weights: np.ndarray, pad_token_id: int) -> PairBatch:
    """Lay pairs out one sequence a row.

    Args:
        pairs: P pairs; every prompt has at least one token, since the first completion token needs a predecessor.
        weights: [P].
        pad_token_id: any valid token id; padding is neither attended to nor scored.
    """
    rows = [(pair.prompt_ids, completion) for pair in pairs for completion in (pair.chosen_ids, pair.rejected_ids)]
    width = max(len(prompt) + len(completion) for prompt, completion in rows)
    input_ids = np.full((len(rows), width), pad_token_id, dtype=np.int64)
    score_index = []
    for b, (prompt, completion) in enumerate(rows):
        assert len(prompt) > 0 and len(completion) > 0
        end = len(prompt) + len(completion)
        input_ids[b, : len(prompt)] = prompt
        input_ids[b, len(prompt) : end] = completion
        score_index.append(b * width + np.arange(len(prompt) - 1, end - 1))
    lengths = np.array([len(completion) for _, completion in rows], dtype=np.int64)
    return PairBatch(
        input_ids=torch.from_numpy(input_ids),
        score_index=torch.from_numpy(np.concatenate(score_index)),
        score_targets=torch.from_numpy(np.concatenate([completion for _, completion in rows]).astype(np.int64)),
        score_segments=torch.from_numpy(np.repeat(np.arange(len(rows)), lengths)),
        lengths=torch.from_numpy(lengths.reshape(-1, 2)),
        row_ids=torch.tensor([pair.index for pair in pairs]),
        weights=torch.from_numpy(np.asarray(weights, dtype=np.float32)),
    )


def pair_tokens(lengths: np.ndarray, layout: str) -> np.ndarray:
    """Tokens that a model computes for each pair: the prompt twice, or once where it is shared, and both completions.

    Args:
        lengths: [n, 3] tokens of prompt, chosen and rejected.

    Returns:
        int64 [n].
    """
    prompts = 1 if layout == "shared_prefix" else 2
    return prompts * lengths[:, 0].astype(np.int64) + lengths[:, 1] + lengths[:, 2]


def filled_slots(layout: str, pairs: np.ndarray, lengths: np.ndarray) -> int:
    """Token slots of a batch of these pairs that hold a token of theirs.

    Args:
        pairs: [n] indices into the dataset.
        lengths: [N, 3] tokens of prompt, chosen and rejected of the whole dataset.
    """
    return int(pair_tokens(lengths[pairs], layout).sum())


def slots(layout: str, pairs: np.ndarray, lengths: np.ndarray) -> int:
    """Token slots of a batch of these pairs, padding included (B * T); arguments as in `filled_slots`."""
    if layout != "padded":
        return filled_slots(layout, pairs, lengths)
    of_pairs = lengths[pairs]
    return 2 * len(pairs) * int((of_pairs[:, 0] + of_pairs[:, 1:].max(axis=1)).max())
