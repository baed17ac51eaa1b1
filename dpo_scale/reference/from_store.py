"""Reference log-probs out of the store, served to batches."""

from __future__ import annotations

import threading

import numpy as np
import torch
from torch import Tensor

from dpo_scale.data.dataset import PairDataset
from dpo_scale.errors import StoreError
from dpo_scale.losses import sum_token_logps
from dpo_scale.reference.protocol import KnownReference
from dpo_scale.reference.store import Book


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
        of_pairs = torch.from_numpy(lengths.reshape(-1, 2))
        return sum_token_logps(torch.from_numpy(values), segments, len(indices), of_pairs, ld_alpha=ld_alpha)

    def _all_found(self, found: np.ndarray, dataset: PairDataset, indices: np.ndarray) -> None:
        if not found.all():
            row = int(np.asarray(indices)[~found][0])
            raise StoreError(f"{self.book.folder}: {dataset.describe(row)} is not in the reference store (any more)")
