"""One rank's micro-batch on the host, with the reference values that are known beforehand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from dpo_scale.data.batching import MicroBatch
from dpo_scale.data.dataset import PairDataset
from dpo_scale.data.layout import Layout, PairBatch, make_batch
from dpo_scale.distributed import ranks
from dpo_scale.reference.protocol import Reference


def mean_chosen_tokens(pairs: np.ndarray, lengths: np.ndarray) -> float:
    """Mean chosen tokens of a global batch [G]; `lengths` is [N, 3] (prompt, chosen, rejected)."""
    return float(lengths[pairs, 1].mean())


def load_batch(
    dataset: PairDataset, micro_batch: MicroBatch, pad_token_id: int, reference: Reference, layout: Layout
) -> PairBatch:
    """One rank's micro-batch on the host, ready to be copied."""
    pairs = [dataset[int(i)] for i in micro_batch.indices]
    batch = make_batch(layout, pairs, micro_batch.weights, pad_token_id)
    known = reference.look_up(dataset, micro_batch.indices)
    if known is not None:
        batch = replace(batch, reference_logps=known)
    return batch.pinned() if ranks.device().type == "cuda" else batch
