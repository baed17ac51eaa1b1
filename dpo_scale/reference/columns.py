"""Reference log-probs out of the data's own columns, as TRL's `precompute_ref_log_probs` leaves them in a data set.

Nobody here knows how these were computed, so they never enter the store's books of this package's numerics. They are
read at the start of a run, kept by pair key (24 bytes a pair), and checked on use as stored ones are.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dpo_scale.data.dataset import PairDataset
from dpo_scale.data.tokenize import PairTokenizer
from dpo_scale.errors import DataError
from dpo_scale.reference.protocol import KnownReference
from dpo_scale.reference.store_exchange import COLUMNS, column_rows
from dpo_scale.reference.store_rows import as_keys, contains, first_not_below, merge
from dpo_scale.settings.data import DataSettings


class ColumnReference(KnownReference):
    """The reference of a run as the columns `ref_chosen_logps` and `ref_rejected_logps` of its data files.

    Args:
        settings: the `data:` section; every source of `train` and `eval` has both columns.
        tokenizer: of transformers, as the data was tokenized with.
        log: takes lines for the user.

    Raises:
        DataError: naming file and row where a value is missing or not a finite number.
    """

    origin = f"columns {' and '.join(COLUMNS)}"

    def __init__(self, settings: DataSettings, tokenizer: Any, log: Callable[[str], None]):
        encoder = PairTokenizer(tokenizer, settings)
        # tokenized already, and all said of it: this opens the caches
        parts = list(column_rows([*settings.train, *settings.eval], settings, encoder, lambda line: None))
        self._rows, _, differing, largest = merge(parts, tokens=False)
        log(f"reference log-probs: columns of the data, {len(self._rows)} different pairs")
        if differing:
            log(
                f"WARNING: {differing} pairs appear again with other reference log-probs, by {largest:.3g} at most; "
                "one value of each is used"
            )

    def fingerprint(self, dataset: PairDataset) -> str:
        """Hash of the values of a dataset's pairs, in order."""
        values = self._values(dataset, np.arange(len(dataset)))
        return hashlib.blake2b(values.tobytes(), digest_size=16).hexdigest()

    def look_up(self, dataset: PairDataset, indices: np.ndarray) -> Tensor:
        return self.logps(dataset, indices)

    def logps(self, dataset: PairDataset, indices: np.ndarray, ld_alpha: float | None = None) -> Tensor:
        assert ld_alpha is None, "the config refuses it: columns hold sums, not tokens"
        return torch.from_numpy(self._values(dataset, indices))

    def _values(self, dataset: PairDataset, indices: np.ndarray) -> np.ndarray:
        """fp32 [P, 2]."""
        keys = as_keys(dataset.pair_keys[indices])
        found = contains(self._rows.keys, keys)
        if not found.all():
            row = int(np.asarray(indices)[~found][0])
            raise DataError(f"{dataset.describe(row)}: its file changed since the run began")
        return self._rows.sums[first_not_below(self._rows.keys, keys, 0, len(self._rows))]
