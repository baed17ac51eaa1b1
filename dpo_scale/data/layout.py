"""Token ids of pairs into the tensors of one forward pass: three layouts of the same P pairs.

    padded          one sequence a row, chosen and rejected of a pair next to each other, padded on the right to the
                    longest. Under a causal mask no real token sees the padding behind it, and positions are 0, 1, 2,
                    ... in every row: neither position ids nor a mask are needed, so any model can run it
    packed          one row, no padding: prompt and chosen, prompt and rejected, one after another, each a document
    shared_prefix   one row, no padding: prompt, chosen, rejected of a pair are one document, the prompt is computed
                    once, and its last token's hidden state is scored twice, for the first token of either completion

One rule says what a token may attend to, in all layouts: tokens of its own document, at its own position or before, of
the prompt or of its own branch. Positions count along prompt and completion, so the rejected completion's start again
at the prompt's length. `dpo_scale.models.attention` follows the rule.

Costs are plain arithmetic on lengths [N, 3] (prompt, chosen, rejected), for whoever plans batches or counts padding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import numpy as np
import torch

from dpo_scale.data.dataset import Pair

Layout = Literal["padded", "packed", "shared_prefix"]

PROMPT, CHOSEN, REJECTED = 0, 1, 2  # branches

# (tokens, shared): consecutive tokens of a row that continue a sequence. With shared 0 they begin a document, with
# shared n they follow the first n tokens of that document's beginning.
Segment = tuple[int, int]


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
        scored_tokens: [P] tokens of each pair's two completions, on the host, where `lengths` may not be.
        reference_logps: [P, 2] fp32 summed reference log-probs, where they are known beforehand.
        position_ids: [1, T] positions in the sequences; None for padded rows, as the next three.
        document_ids: [1, T] 0, 1, 2, ... along the row.
        branch_ids: [1, T] `PROMPT`, `CHOSEN` or `REJECTED`.
        segments: the row from left to right, on the host, so that no kernel launch waits for the device.
    """

    input_ids: torch.Tensor
    score_index: torch.Tensor
    score_targets: torch.Tensor
    score_segments: torch.Tensor
    lengths: torch.Tensor
    row_ids: torch.Tensor
    weights: torch.Tensor
    scored_tokens: tuple[int, ...]
    reference_logps: torch.Tensor | None = None
    position_ids: torch.Tensor | None = None
    document_ids: torch.Tensor | None = None
    branch_ids: torch.Tensor | None = None
    segments: tuple[Segment, ...] | None = None

    @property
    def num_pairs(self) -> int:
        return len(self.scored_tokens)

    @property
    def scorer_inputs(self) -> dict[str, Any]:
        """What a `PairScorer` is called with, by name."""
        names = ["input_ids", "score_index", "score_targets"]
        if self.segments is not None:
            names += ["position_ids", "document_ids", "branch_ids", "segments"]
        return {name: getattr(self, name) for name in names}

    def to(self, device: torch.device) -> PairBatch:
        return self.map_tensors(lambda tensor: tensor.to(device, non_blocking=True))

    def map_tensors(self, function: Callable[[torch.Tensor], torch.Tensor]) -> PairBatch:
        """The batch with `function` applied to each of its tensors."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        changed: dict[str, Any] = {k: function(v) for k, v in values.items() if isinstance(v, torch.Tensor)}
        return replace(self, **changed)

    def pinned(self) -> PairBatch:
        """The batch in page-locked memory, from which `to` copies without holding up the host."""
        return self.map_tensors(torch.Tensor.pin_memory)


def make_batch(layout: Layout, pairs: Sequence[Pair], weights: np.ndarray, pad_token_id: int) -> PairBatch:
    """Lay pairs out for one forward pass.

    Args:
        pairs: P pairs; every prompt has at least one token, since the first completion token needs a predecessor.
        weights: [P].
        pad_token_id: any valid token id; padding is neither attended to nor scored.
    """
    for pair in pairs:
        assert len(pair.prompt_ids) > 0 and len(pair.chosen_ids) > 0 and len(pair.rejected_ids) > 0
    completions = [ids for pair in pairs for ids in (pair.chosen_ids, pair.rejected_ids)]
    lengths = np.array([len(ids) for ids in completions], dtype=np.int64)
    lay_out = {"padded": _padded_row, "packed": _packed_row, "shared_prefix": _shared_prefix_row}[layout]
    return PairBatch(
        **lay_out(pairs, pad_token_id),
        score_targets=torch.from_numpy(np.concatenate(completions).astype(np.int64)),
        score_segments=torch.from_numpy(np.repeat(np.arange(len(lengths)), lengths)),
        lengths=torch.from_numpy(lengths.reshape(-1, 2)),
        row_ids=torch.tensor([pair.index for pair in pairs]),
        weights=torch.from_numpy(np.asarray(weights, dtype=np.float32)),
        scored_tokens=tuple(lengths.reshape(-1, 2).sum(axis=1).tolist()),
    )


def _padded_row(pairs: Sequence[Pair], pad_token_id: int) -> dict[str, Any]:
    rows = [(pair.prompt_ids, completion) for pair in pairs for completion in (pair.chosen_ids, pair.rejected_ids)]
    width = max(len(prompt) + len(completion) for prompt, completion in rows)
    input_ids = np.full((len(rows), width), pad_token_id, dtype=np.int64)
    score_index = []
    for b, (prompt, completion) in enumerate(rows):
        end = len(prompt) + len(completion)
        input_ids[b, : len(prompt)] = prompt
        input_ids[b, len(prompt) : end] = completion
        score_index.append(b * width + np.arange(len(prompt) - 1, end - 1))
    return {
        "input_ids": torch.from_numpy(input_ids),
        "score_index": torch.from_numpy(np.concatenate(score_index)),
    }


def _packed_row(pairs: Sequence[Pair], _: int) -> dict[str, Any]:
    row = _Row()
    for pair in pairs:
        for branch, completion in ((CHOSEN, pair.chosen_ids), (REJECTED, pair.rejected_ids)):
            row.begin_document(pair.prompt_ids, branch, completion)
    return row.tensors()


def _shared_prefix_row(pairs: Sequence[Pair], _: int) -> dict[str, Any]:
    row = _Row()
    for pair in pairs:
        last_of_prompt = row.tokens + len(pair.prompt_ids) - 1
        row.begin_document(pair.prompt_ids, CHOSEN, pair.chosen_ids)
        row.add_branch(last_of_prompt, len(pair.prompt_ids), REJECTED, pair.rejected_ids)
    return row.tensors()


class _Row:
    """A row without padding, put together from left to right."""

    def __init__(self) -> None:
        self.tokens = 0
        self._documents = 0
        self._segments: list[Segment] = []
        self._columns: list[np.ndarray] = []  # [4, n]: token, position, document, branch
        self._score_index: list[np.ndarray] = []

    def begin_document(self, prompt: np.ndarray, branch: int, completion: np.ndarray) -> None:
        """A prompt and the completion right behind it."""
        start, size = self.tokens, len(prompt) + len(completion)
        self._score_index.append(np.arange(start + len(prompt) - 1, start + size - 1))
        self._add(prompt, 0, self._documents, PROMPT)
        self._add(completion, len(prompt), self._documents, branch)
        self._segments.append((size, 0))
        self._documents += 1

    def add_branch(self, last_of_prompt: int, shared: int, branch: int, completion: np.ndarray) -> None:
        """Another completion of the current document's prompt."""
        own = np.arange(self.tokens, self.tokens + len(completion) - 1)
        self._score_index.append(np.concatenate([[last_of_prompt], own]))
        self._add(completion, shared, self._documents - 1, branch)
        self._segments.append((len(completion), shared))

    def _add(self, ids: np.ndarray, first_position: int, document: int, branch: int) -> None:
        columns = np.empty((4, len(ids)), dtype=np.int64)
        columns[0] = ids
        columns[1] = np.arange(first_position, first_position + len(ids))
        columns[2], columns[3] = document, branch
        self._columns.append(columns)
        self.tokens += len(ids)

    def tensors(self) -> dict[str, Any]:
        columns = torch.from_numpy(np.concatenate(self._columns, axis=1))
        input_ids, position_ids, document_ids, branch_ids = (column.clone()[None] for column in columns)
        return {
            "input_ids": input_ids,
            "position_ids": position_ids,
            "document_ids": document_ids,
            "branch_ids": branch_ids,
            "segments": tuple(self._segments),
            "score_index": torch.from_numpy(np.concatenate(self._score_index).astype(np.int64)),
        }


def pair_tokens(lengths: np.ndarray, layout: Layout) -> np.ndarray:
    """Tokens that a model computes for each pair: the prompt twice, or once where it is shared, and both completions.

    int64 [n], for lengths [n, 3] of prompt, chosen and rejected.
    """
    prompts = 1 if layout == "shared_prefix" else 2
    return prompts * lengths[:, 0].astype(np.int64) + lengths[:, 1] + lengths[:, 2]


def row_widths(lengths: np.ndarray) -> np.ndarray:
    """Tokens of the longer of each pair's two sequences, int [n], for lengths [n, 3]."""
    return lengths[:, 0] + lengths[:, 1:].max(axis=1)


def filled_slots(layout: Layout, pairs: np.ndarray, lengths: np.ndarray) -> int:
    """Token slots of a batch of these pairs that hold a token of theirs.

    Args:
        pairs: [n] indices into the dataset.
        lengths: [N, 3] tokens of prompt, chosen and rejected of the whole dataset.
    """
    return int(pair_tokens(lengths[pairs], layout).sum())


def slots(layout: Layout, pairs: np.ndarray, lengths: np.ndarray) -> int:
    """Token slots of a batch of these pairs, padding included (B * T); arguments as in `filled_slots`."""
    if layout != "padded":
        return filled_slots(layout, pairs, lengths)
    return 2 * len(pairs) * int(row_widths(lengths[pairs]).max())
