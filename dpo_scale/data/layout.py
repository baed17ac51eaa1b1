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

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import torch

from dpo_scale.data.dataset import Pair

Layout = Literal["padded", "packed", "shared_prefix"]

PROMPT, CHOSEN, REJECTED = 0, 1, 2  # branches

# (tokens, shared): consecutive tokens of a row that continue a sequence. With shared 0 they begin a document, with
# shared n they follow the first n tokens of that document's beginning.
Segment = tuple[int, int]


class Runs(NamedTuple):
    """Rows as runs of consecutive tokens, on the host, for sums over sequences: each is a sum of sums over runs.

    lengths: tokens of each run, row by row from left to right, padding too; B * T together.
    sequences: [2P] the runs of each sequence, chosen and rejected of a pair in turn. A shared prompt's run belongs to
        both, padding to none.
    """

    lengths: tuple[int, ...]
    sequences: tuple[tuple[int, ...], ...]

    def lengths_in(self, start: int, stop: int) -> tuple[int, ...]:
        """What of each run is among the tokens from start to stop of the rows; 0 of those elsewhere."""
        ends = list(itertools.accumulate(self.lengths, initial=0))
        return tuple(max(0, min(b, stop) - max(a, start)) for a, b in itertools.pairwise(ends))


@dataclass(frozen=True)
class Share:
    """A rank's share of a batch whose one row is computed by a group of N ranks together.

    Rank r computes tokens r * t to (r + 1) * t of the row, t = T / N; the row is filled up to a multiple of N by a
    document of its own. Scored tokens are dealt one by one, whoever computes their hidden states: token j is scored by
    rank j mod N. So no rank has more logits to compute than another, whatever the row looks like.

    Attributes:
        size: N.
        rank: r.
        sent_index: [n] int64 positions, in this rank's part, of hidden states to send, by the rank that scores them.
        sent, received: [N] how many go to each rank, and come from each.
        order: [own scored tokens] int64, puts what was received into the order of the scored tokens.
    """

    size: int
    rank: int
    sent_index: torch.Tensor
    sent: tuple[int, ...]
    received: tuple[int, ...]
    order: torch.Tensor

    @classmethod
    def of(cls, size: int, rank: int, tokens: int, score_index: np.ndarray) -> Share:
        """Args: tokens, of the row, a multiple of `size`; score_index, [S] positions in it of scored hidden states."""
        part = tokens // size
        owners, scorers = score_index // part, np.arange(len(score_index)) % size
        own = np.flatnonzero(owners == rank)
        to_send = own[np.argsort(scorers[own], kind="stable")]
        senders = owners[rank::size]
        arrival = np.argsort(senders, kind="stable")
        return cls(
            size,
            rank,
            torch.from_numpy(score_index[to_send] - rank * part),
            tuple(np.bincount(scorers[own], minlength=size).tolist()),
            tuple(np.bincount(senders, minlength=size).tolist()),
            torch.from_numpy(np.argsort(arrival)),
        )

    def part_of(self, row: torch.Tensor) -> torch.Tensor:
        """This rank's tokens [1, t] of a row [1, T]."""
        return row.chunk(self.size, dim=1)[self.rank]

    def dealt(self, values: torch.Tensor) -> torch.Tensor:
        """What belongs to the tokens that this rank scores, of values [S]."""
        return values[self.rank :: self.size]


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
        runs: what the rows are made of, on the host.
        reference_logps: [P, 2] fp32 summed reference log-probs, where they are known beforehand.
        position_ids: [1, T] positions in the sequences; None for padded rows, as the next three.
        document_ids: [1, T] 0, 1, 2, ... along the row.
        branch_ids: [1, T] `PROMPT`, `CHOSEN` or `REJECTED`.
        segments: the row from left to right, on the host, so that no kernel launch waits for the device.
        share: this rank's, if a group of ranks computes the row; all of them have the same batch otherwise.
    """

    input_ids: torch.Tensor
    score_index: torch.Tensor
    score_targets: torch.Tensor
    score_segments: torch.Tensor
    lengths: torch.Tensor
    row_ids: torch.Tensor
    weights: torch.Tensor
    scored_tokens: tuple[int, ...]
    runs: Runs
    reference_logps: torch.Tensor | None = None
    position_ids: torch.Tensor | None = None
    document_ids: torch.Tensor | None = None
    branch_ids: torch.Tensor | None = None
    segments: tuple[Segment, ...] | None = None
    share: Share | None = None

    @property
    def num_pairs(self) -> int:
        return len(self.scored_tokens)

    @property
    def scorer_inputs(self) -> dict[str, Any]:
        """What a `PairScorer` is called with, by name."""
        names = ["input_ids", "score_index", "score_targets"]
        if self.segments is not None:
            names += ["position_ids", "document_ids", "branch_ids", "segments", "share"]
        return {name: getattr(self, name) for name in names}

    @property
    def leads(self) -> bool:
        """Whether this rank counts the pairs, which all of a group have: it is alone, or its group's first."""
        return self.share is None or self.share.rank == 0

    @property
    def counted(self) -> torch.Tensor:
        """[P] weights of the pairs in sums over all ranks."""
        return self.weights if self.leads else torch.zeros_like(self.weights)

    def to(self, device: torch.device) -> PairBatch:
        return self.map_tensors(lambda tensor: tensor.to(device, non_blocking=True))

    def map_tensors(self, function: Callable[[torch.Tensor], torch.Tensor]) -> PairBatch:
        """The batch with `function` applied to each of its tensors."""
        share = None if self.share is None else _map_tensors(self.share, function)
        return replace(_map_tensors(self, function), share=share)

    def pinned(self) -> PairBatch:
        """The batch in page-locked memory, from which `to` copies without holding up the host."""
        return self.map_tensors(torch.Tensor.pin_memory)


Holder = TypeVar("Holder", PairBatch, Share)


def _map_tensors(holder: Holder, function: Callable[[torch.Tensor], torch.Tensor]) -> Holder:
    values = {field.name: getattr(holder, field.name) for field in fields(holder)}
    changed: dict[str, Any] = {k: function(v) for k, v in values.items() if isinstance(v, torch.Tensor)}
    return replace(holder, **changed)


def make_batch(
    layout: Layout,
    pairs: Sequence[Pair],
    weights: np.ndarray,
    pad_token_id: int,
    *,
    group_size: int = 1,
    group_rank: int = 0,
) -> PairBatch:
    """Lay pairs out for one forward pass.

    Args:
        pairs: P pairs; every prompt has at least one token, since the first completion token needs a predecessor.
        weights: [P].
        pad_token_id: any valid token id; padding is neither attended to nor scored.
        group_size: how many ranks compute the row together; more than one only where it is one row.
        group_rank: of this rank among them.
    """
    for pair in pairs:
        assert len(pair.prompt_ids) > 0 and len(pair.chosen_ids) > 0 and len(pair.rejected_ids) > 0
    completions = [ids for pair in pairs for ids in (pair.chosen_ids, pair.rejected_ids)]
    lengths = np.array([len(ids) for ids in completions], dtype=np.int64)
    if layout == "padded":
        assert group_size == 1
        row = _padded_rows(pairs, pad_token_id)
    else:
        row = _packed_row(pairs, layout == "shared_prefix", group_size, pad_token_id)
    if group_size > 1:
        tokens = row["input_ids"].shape[1]
        row["share"] = Share.of(group_size, group_rank, tokens, row["score_index"].numpy())
    return PairBatch(
        **row,
        score_targets=torch.from_numpy(np.concatenate(completions).astype(np.int64)),
        score_segments=torch.from_numpy(np.repeat(np.arange(len(lengths)), lengths)),
        lengths=torch.from_numpy(lengths.reshape(-1, 2)),
        row_ids=torch.tensor([pair.index for pair in pairs]),
        weights=torch.from_numpy(np.asarray(weights, dtype=np.float32)),
        scored_tokens=tuple(lengths.reshape(-1, 2).sum(axis=1).tolist()),
        runs=_runs_of(layout, pairs, row["input_ids"].numel()),
    )


def _runs_of(layout: Layout, pairs: Sequence[Pair], tokens: int) -> Runs:
    """Args: tokens, of all rows."""
    sizes = [(len(pair.prompt_ids), len(pair.chosen_ids), len(pair.rejected_ids)) for pair in pairs]
    if layout == "shared_prefix":
        lengths = [n for size in sizes for n in size]
        branches = [(3 * i, 3 * i + branch) for i in range(len(pairs)) for branch in (CHOSEN, REJECTED)]
        return Runs(_filled_up(lengths, tokens), tuple(branches))
    lengths = [size[PROMPT] + size[branch] for size in sizes for branch in (CHOSEN, REJECTED)]
    if layout == "packed":
        return Runs(_filled_up(lengths, tokens), tuple((i,) for i in range(len(lengths))))
    width = tokens // len(lengths)
    return Runs(
        tuple(n for real in lengths for n in (real, width - real)), tuple((2 * i,) for i in range(len(lengths)))
    )


def _filled_up(lengths: list[int], tokens: int) -> tuple[int, ...]:
    """With a last run of what fills a row up, if anything does."""
    missing = tokens - sum(lengths)
    return (*lengths, missing) if missing else tuple(lengths)


def _padded_rows(pairs: Sequence[Pair], pad_token_id: int) -> dict[str, Any]:
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


def _packed_row(pairs: Sequence[Pair], shared: bool, multiple: int, pad_token_id: int) -> dict[str, Any]:
    """Pairs in one row from left to right, each prompt twice or, `shared`, once; filled up to a multiple of tokens."""
    columns: list[np.ndarray] = []  # [4, n]: token, position, document, branch
    score_index: list[np.ndarray] = []
    segments: list[Segment] = []
    size = document = 0  # of the row so far, and the number of the document that is being written

    def add(ids: np.ndarray, first_position: int, branch: int) -> None:
        nonlocal size
        positions = np.arange(first_position, first_position + len(ids))
        columns.append(np.stack([ids, positions, np.full_like(positions, document), np.full_like(positions, branch)]))
        size += len(ids)

    for pair in pairs:
        length = len(pair.prompt_ids)
        for branch, completion in ((CHOSEN, pair.chosen_ids), (REJECTED, pair.rejected_ids)):
            is_branch = shared and branch == REJECTED  # behind the prompt that is there already
            if not is_branch:
                add(pair.prompt_ids, 0, PROMPT)
                last_of_prompt = size - 1
            score_index.append(np.concatenate([[last_of_prompt], np.arange(size, size + len(completion) - 1)]))
            add(completion, length, branch)
            segments.append((len(completion), length) if is_branch else (length + len(completion), 0))
            document += not shared or is_branch
    if missing := -size % multiple:
        add(np.full(missing, pad_token_id), 0, PROMPT)
        segments.append((missing, 0))
    names = ("input_ids", "position_ids", "document_ids", "branch_ids")
    tensors = torch.from_numpy(np.concatenate(columns, axis=1))
    return {
        **{name: column.clone()[None] for name, column in zip(names, tensors, strict=True)},
        "segments": tuple(segments),
        "score_index": torch.from_numpy(np.concatenate(score_index)),
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


def slots(layout: Layout, pairs: np.ndarray, lengths: np.ndarray) -> int:
    """Token slots of a batch of these pairs, padding included (B * T).

    Args:
        pairs: [n] indices into the dataset.
        lengths: [N, 3] tokens of prompt, chosen and rejected of the whole dataset.
    """
    if layout != "padded":
        return int(pair_tokens(lengths[pairs], layout).sum())
    return 2 * len(pairs) * int(row_widths(lengths[pairs]).max())
