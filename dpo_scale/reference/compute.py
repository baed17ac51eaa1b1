"""Reference values computed: a store filled where rows are missing, and known values checked on use.

Filling is the forward half of training with the reference's weights: pairs are sorted by length, laid out by a token
budget, spread over the ranks, and each rank adds its own rows to the store as it goes; where ranks share pairs, the
first of them does. Nothing here depends on which run asks: a row's key is what the model saw, a book's key is the model
and the numerics.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from dpo_scale.data.batching import MicroBatch, counted_pairs, forward_batches
from dpo_scale.data.dataset import PairDataset
from dpo_scale.data.prefetch import BATCHES_AHEAD, Prefetcher
from dpo_scale.distributed import ranks
from dpo_scale.errors import StoreError
from dpo_scale.losses import sum_token_logps
from dpo_scale.models.scorer import Scorer, host_batch
from dpo_scale.progress import heartbeat
from dpo_scale.reference.protocol import KnownReference
from dpo_scale.reference.store import Book
from dpo_scale.reference.store_upkeep import TARGET_SHARD_BYTES, compact_book

# What the composition of a batch alone may change in a log-prob summed over n tokens, divided by sqrt(n): rounding of
# activations moves each token to either side, so sums drift apart as a random walk does. In bf16 the steps have a
# standard deviation of 0.024 on SmolLM2-135M, and of 60 sequences the furthest drifted 0.086 sqrt(n); a limit on the
# mean per token would refuse short completions or pass anything of long ones. fp16 has 3 bits more. Other weights
# differ in proportion to n.
TOLERANCE_PER_ROOT_TOKEN = {"float32": 1e-3, "float16": 3e-2, "bfloat16": 0.25}
MAX_SMALL_SHARDS = 32  # more are compacted after a fill
GRACE_HOURS = 24.0


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
) -> int:
    """Compute and store what the book lacks of some data sets. Every rank must call it.

    Args:
        load_reference: gives the reference's engine; called only if something is missing.
        max_tokens: most token slots of a forward pass that one rank holds.
        tokens: store per-token values too.
        seconds_per_shard: how often a rank puts its rows on the disk; 0: after every micro-batch.

    Returns:
        The number of rows computed, over all ranks.
    """
    missing = missing_rows(book, datasets, tokens=tokens)
    total = sum(map(len, missing))
    if total == 0:
        return 0
    reference, started = load_reference(), time.monotonic()
    done, last_said = 0, started
    with book.writer(tokens=tokens, seconds_per_shard=seconds_per_shard) as writer:
        for dataset, rows in zip(datasets, missing, strict=True):
            if len(rows) == 0:
                continue
            layout, groups = reference.module.layout, reference.module.groups
            plan = forward_batches(rows, dataset.lengths, max_tokens=max_tokens, groups=groups, layout=layout)
            for pairs_of_ranks, micro_batch, values in _scored(reference, dataset, plan, pad_token_id):
                if pairs_of_ranks[ranks.rank()]:
                    keys, counts = dataset.pair_keys[micro_batch.indices], dataset.lengths[micro_batch.indices, 1:]
                    writer.add(keys, _sums(values, counts).numpy(), counts, values.numpy() if tokens else None)
                done += sum(pairs_of_ranks)
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


def _scored(
    scorer: Scorer, dataset: PairDataset, plan: Sequence[list[MicroBatch]], pad_token_id: int
) -> Iterator[tuple[tuple[int, ...], MicroBatch, Tensor]]:
    """Of each entry of a plan: how many pairs count for each rank, this rank's micro-batch, what the model gives it.

    The last are the log-probs of the completions' tokens on the host, fp32, row by row, chosen before rejected.
    """
    own = [of_ranks[ranks.rank()] for of_ranks in plan]
    made = (host_batch(dataset, micro_batch, pad_token_id, scorer.module.layout) for micro_batch in own)
    with Prefetcher(made, BATCHES_AHEAD) as batches, torch.no_grad():
        for k, (of_ranks, micro_batch, batch) in enumerate(zip(plan, own, batches, strict=True)):
            heartbeat(f"reference log-probs, micro-batch {k + 1} of {len(plan)}")
            yield counted_pairs(of_ranks), micro_batch, scorer(**batch.to(ranks.device()).scorer_inputs).cpu()


def _sums(values: Tensor, counts: np.ndarray) -> Tensor:
    lengths = torch.from_numpy(counts.astype(np.int64))
    segments = torch.from_numpy(np.repeat(np.arange(counts.size), counts.ravel()))
    return sum_token_logps(values, segments, len(counts), lengths)


def verify(
    stored: KnownReference,
    model: Scorer,
    dataset: PairDataset,
    rows: int,
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
    plan = forward_batches(drawn, dataset.lengths, max_tokens=0, groups=model.module.groups)  # one pair at a time
    for pairs_of_ranks, own, values in _scored(model, dataset, plan, pad_token_id):
        if not pairs_of_ranks[ranks.rank()]:
            continue
        index = int(own.indices[0])
        counts = dataset.lengths[own.indices, 1:]
        computed = _sums(values, counts)[0]
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
