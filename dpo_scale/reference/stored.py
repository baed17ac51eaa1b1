"""Reference log-probs out of the store: served to batches, filled where rows are missing, checked on use.

Filling is the forward half of training with the reference's weights: pairs are sorted by length, laid out by a token
budget, spread over the ranks, and each rank adds its own rows to the store as it goes. Nothing here depends on which
run asks: a row's key is what the model saw, a book's key is the model and the numerics.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from dpo_scale.data.batching import MicroBatch, forward_batches
from dpo_scale.data.dataset import PairDataset
from dpo_scale.data.layout import Layout, PairBatch, make_batch
from dpo_scale.data.prefetch import BATCHES_AHEAD, Prefetcher
from dpo_scale.distributed import ranks
from dpo_scale.errors import StoreError
from dpo_scale.losses import sum_token_logps
from dpo_scale.models.scorer import Scorer
from dpo_scale.progress import heartbeat
from dpo_scale.reference.protocol import KnownReference
from dpo_scale.reference.store import Book
from dpo_scale.reference.upkeep import TARGET_SHARD_BYTES, compact_book

# What the composition of a batch alone may change in a log-prob summed over n tokens, divided by sqrt(n): rounding of
# activations moves each token to either side, so sums drift apart as a random walk does. In bf16 the steps have a
# standard deviation of 0.024 on SmolLM2-135M, and of 60 sequences the furthest drifted 0.086 sqrt(n); a limit on the
# mean per token would refuse short completions or pass anything of long ones. fp16 has 3 bits more. Other weights
# differ in proportion to n.
TOLERANCE_PER_ROOT_TOKEN = {"float32": 1e-3, "float16": 3e-2, "bfloat16": 0.25}
MAX_SMALL_SHARDS = 32  # more are compacted after a fill
GRACE_HOURS = 24.0


class StoredReference(KnownReference):
    """The reference of a run as values of a book; several threads may ask at once (training and evaluation).

    Args:
        ld_alpha: LD-DPO's weight of the tokens beyond the shorter completion, which `look_up` applies.
    """

    def __init__(self, book: Book, ld_alpha: float | None = None) -> None:
        self.book, self.origin = book, str(book.folder)
        self._ld_alpha, self._lock = ld_alpha, threading.Lock()

    def look_up(self, dataset: PairDataset, indices: np.ndarray) -> Tensor:
        return self.logps(dataset, indices, self._ld_alpha)

    def logps(self, dataset: PairDataset, indices: np.ndarray, ld_alpha: float | None = None) -> Tensor:
        """As of `KnownReference`.

        Raises:
            StoreError: if a row is not in the store; the run filled it, so someone has taken it away since.
        """
        keys = dataset.pair_keys[indices]
        if ld_alpha is None:
            with self._lock:
                found, sums, counts = self.book.lookup(keys)
            # a row with other token counts is another row, whatever its key says
            found &= (counts == dataset.lengths[indices, 1:]).all(axis=1)
            self._all_found(found, dataset, indices)
            return torch.from_numpy(sums)
        with self._lock:
            found, values, offsets = self.book.lookup_tokens(keys)
        self._all_found(found, dataset, indices)
        lengths = np.diff(offsets)
        segments = torch.from_numpy(np.repeat(np.arange(len(lengths)), lengths))
        counts = torch.from_numpy(lengths.reshape(-1, 2))
        return sum_token_logps(torch.from_numpy(values), segments, len(indices), counts, ld_alpha=ld_alpha)

    def _all_found(self, found: np.ndarray, dataset: PairDataset, indices: np.ndarray) -> None:
        if not found.all():
            row = int(np.asarray(indices)[~found][0])
            raise StoreError(f"{self.book.folder}: {dataset.describe(row)} is not in the reference store (any more)")


def missing_rows(book: Book, datasets: Sequence[PairDataset], *, tokens: bool) -> list[np.ndarray]:
    """Per data set the indices of pairs that the book lacks, each key once, the same on every rank.

    Rank 0 looks; another job may be filling the same book, and ranks that look a moment apart would not agree.
    """
    missing: list[np.ndarray] = []
    if ranks.is_main():
        seen: set[bytes] = set()
        for dataset in datasets:
            keys = dataset.pair_keys
            found = (book.lookup_tokens(keys) if tokens else book.lookup(keys)).found
            wanted = []
            for index in np.flatnonzero(~found).tolist():
                key = keys[index].tobytes()
                if key not in seen:
                    seen.add(key)
                    wanted.append(index)
            missing.append(np.array(wanted, dtype=np.int64))
    return ranks.from_main(missing)


def fill(
    book: Book,
    datasets: Sequence[PairDataset],
    load_reference: Callable[[], Scorer],
    *,
    pad_token_id: int,
    max_tokens: int,
    tokens: bool,
    seconds_per_shard: float = 60.0,
    missing: Sequence[np.ndarray] | None = None,
) -> int:
    """Compute and store what the book lacks of some data sets. Every rank must call it.

    Args:
        load_reference: gives the reference's engine; called only if something is missing.
        max_tokens: most token slots of a forward pass.
        tokens: store per-token values too.
        seconds_per_shard: how often a rank puts its rows on the disk; 0: after every micro-batch.
        missing: as `missing_rows` says; looked up if not given.

    Returns:
        The number of rows computed, over all ranks.
    """
    if missing is None:
        missing = missing_rows(book, datasets, tokens=tokens)
    total = sum(map(len, missing))
    if total == 0:
        return 0
    reference = load_reference()
    layout = reference.module.layout
    started, done, last_said = time.monotonic(), 0, time.monotonic()
    with book.writer(tokens=tokens, seconds_per_shard=seconds_per_shard) as writer:
        for dataset, rows in zip(datasets, missing, strict=True):
            if len(rows) == 0:
                continue
            plan = forward_batches(
                rows, dataset.lengths, max_tokens=max_tokens, world_size=ranks.world_size(), layout=layout
            )
            own = [of_ranks[ranks.rank()] for of_ranks in plan]
            with Prefetcher(_batches(dataset, own, pad_token_id, layout), BATCHES_AHEAD) as batches:
                for k, (of_ranks, micro_batch, batch) in enumerate(zip(plan, own, batches, strict=True)):
                    heartbeat(f"reference log-probs, micro-batch {k + 1} of {len(plan)}")
                    values = _score(reference, batch)
                    if micro_batch.weights.any():
                        keys, counts = dataset.pair_keys[micro_batch.indices], dataset.lengths[micro_batch.indices, 1:]
                        writer.add(keys, _sums(values, counts).numpy(), counts, values.numpy() if tokens else None)
                    done += sum(int(micro.weights.sum()) for micro in of_ranks)
                    if time.monotonic() - last_said > 10:
                        last_said = time.monotonic()
                        left = (last_said - started) / done * (total - done)
                        ranks.log(f"reference log-probs: {done} of {total} pairs, {left:.0f} s left")
    ranks.barrier()  # every rank's shards are on the disk
    if ranks.is_main():
        book.refresh()
        book.write_manifest()
        _compact_if_scattered(book)
    ranks.barrier()
    book.refresh()
    seconds = time.monotonic() - started
    data_tokens = sum(int(dataset.lengths[rows].sum()) for dataset, rows in zip(datasets, missing, strict=True))
    ranks.log(f"reference log-probs: computed {total} pairs in {seconds:.1f} s, {data_tokens / seconds:.0f} tokens/s")
    return total


def _compact_if_scattered(book: Book) -> None:
    """Make few shards of many small ones: a reader opens each. Old ones stay a while, for readers on other machines."""
    small = sum(shard.nbytes < TARGET_SHARD_BYTES // 4 for shard in book.shards)
    if small <= MAX_SMALL_SHARDS:
        return
    try:
        done = compact_book(book.folder, grace_hours=GRACE_HOURS)
    except StoreError as error:  # what was computed is safe all the same, and whoever reads a damaged row is told
        ranks.log(f"WARNING: small shards of the reference store were not compacted: {error}")
        return
    ranks.log(f"reference store: {done.shards_before} shards compacted into {done.shards}")


def _batches(
    dataset: PairDataset, micro_batches: Iterable[MicroBatch], pad_token_id: int, layout: Layout
) -> Iterator[PairBatch]:
    """Micro-batches on the host, ready to be copied."""
    for micro_batch in micro_batches:
        pairs = [dataset[int(i)] for i in micro_batch.indices]
        batch = make_batch(layout, pairs, micro_batch.weights, pad_token_id)
        yield batch.pinned() if ranks.device().type == "cuda" else batch


@torch.no_grad()
def _score(model: Scorer, batch: PairBatch) -> Tensor:
    """Per-token log-probs of a batch's completions on the host, fp32, row by row, chosen before rejected."""
    return model(**batch.to(ranks.device()).scorer_inputs).cpu()


def _sums(values: Tensor, counts: np.ndarray) -> Tensor:
    lengths = torch.from_numpy(counts.astype(np.int64))
    segments = torch.from_numpy(np.repeat(np.arange(counts.size), counts.ravel()))
    return sum_token_logps(values, segments, len(counts), lengths)


def verify(
    stored: KnownReference,
    model: Scorer,
    dataset: PairDataset,
    rows: int,
    *,
    dtype: str,
    seed: int,
    pad_token_id: int,
) -> None:
    """Compute some stored rows again with a model that should be the reference. Every rank must call it.

    Args:
        model: an engine around a `PairScorer` in evaluation mode.
        rows: how many, drawn by `seed`.
        dtype: the precision of the models, which decides the tolerance (`TOLERANCE_PER_ROOT_TOKEN`).

    Raises:
        StoreError: showing the stored and the computed values of the worst row.
    """
    if rows == 0:
        return
    drawn = np.random.default_rng(seed).choice(len(dataset), size=min(rows, len(dataset)), replace=False)
    worst = (-1.0, 0.0, 0.0, "")
    plan = forward_batches(drawn, dataset.lengths, max_tokens=1, world_size=ranks.world_size())
    micro_batches = [of_ranks[ranks.rank()] for of_ranks in plan]
    batches = _batches(dataset, micro_batches, pad_token_id, model.module.layout)
    for k, (own, batch) in enumerate(zip(micro_batches, batches, strict=True)):
        heartbeat(f"the check of stored log-probs, row {k + 1} of {len(plan)} of each rank")
        index = int(own.indices[0])
        counts = dataset.lengths[own.indices, 1:]
        computed = _sums(_score(model, batch), counts)[0]
        kept = stored.logps(dataset, own.indices)[0]
        shown = (
            f"{dataset.describe(index)}: stored chosen {kept[0]:.4f}, rejected {kept[1]:.4f}; "
            f"computed {computed[0]:.4f}, {computed[1]:.4f}"
        )
        for apart, tokens in zip((computed - kept).abs().tolist(), counts[0].tolist(), strict=True):
            allowed = TOLERANCE_PER_ROOT_TOKEN[dtype] * math.sqrt(tokens)
            share = math.inf if math.isnan(apart) else apart / allowed
            worst = max(worst, (share, apart, allowed, shown))
    share, apart, allowed, shown = max(ranks.gather_objects(worst))
    measured = f"{apart:.2g} apart, {allowed:.2g} allowed in {dtype}"
    if not share <= 1:
        raise StoreError(
            f"{stored.origin}: stored reference log-probs are not those of the model that training starts from "
            f"({measured}). {shown}"
        )
    ranks.log(f"stored reference log-probs: {len(drawn)} rows computed again, at most {measured}")
