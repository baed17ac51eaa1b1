"""One rank's micro-batch on the host, with the reference values that are known beforehand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from dpo_scale.data.batching import MicroBatch
from dpo_scale.data.dataset import PairDataset
from dpo_scale.data.layout import Layout, PairBatch, make_batch
from dpo_scale.distributed import ranks
from dpo_scale.reference.columns import ColumnReference
from dpo_scale.reference.stored import StoredReference
from dpo_scale.settings.loss import LossSettings


def mean_chosen_tokens(pairs: np.ndarray, lengths: np.ndarray) -> float:
    """Mean chosen tokens of a global batch [G]; `lengths` is [N, 3] (prompt, chosen, rejected)."""
    return float(lengths[pairs, 1].mean())


def load_batch(
    dataset: PairDataset,
    micro_batch: MicroBatch,
    pad_token_id: int,
    reference: Any,
    settings: LossSettings,
    layout: Layout,
) -> PairBatch:
    """One rank's micro-batch on the host, ready to be copied; a stored reference's values come with it."""
    pairs = [dataset[int(i)] for i in micro_batch.indices]
    batch = make_batch(layout, pairs, micro_batch.weights, pad_token_id)
    if isinstance(reference, (StoredReference, ColumnReference)):
        batch = replace(batch, reference_logps=reference.logps(dataset, micro_batch.indices, settings))
    return batch.pinned() if ranks.device().type == "cuda" else batch
