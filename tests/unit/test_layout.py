"""The tensors of the three layouts, by hand: ids, positions, documents, branches, what is scored, what it costs."""

import numpy as np
import pytest
import torch

from dpo_scale.data.dataset import Pair
from dpo_scale.data.layout import make_batch, pair_tokens, slots

PAIRS = [
    Pair(np.array([10, 11, 12]), np.array([20, 21]), np.array([30]), b"", 7),
    Pair(np.array([40]), np.array([50]), np.array([60, 61, 62]), b"", 3),
]
LENGTHS = np.array([[9, 9, 9], [3, 2, 1], [1, 1, 3]], dtype=np.int32)  # of a dataset that has them as rows 1 and 2


def batch_of(layout, weights=(1.0, 0.0)):
    return make_batch(layout, PAIRS, np.array(weights), pad_token_id=0)


def test_padded_rows():
    batch = batch_of("padded")
    assert batch.input_ids.tolist() == [
        [10, 11, 12, 20, 21], [10, 11, 12, 30, 0], [40, 50, 0, 0, 0], [40, 60, 61, 62, 0],
    ]  # fmt: skip
    assert batch.score_index.tolist() == [2, 3, 7, 10, 15, 16, 17]
    assert batch.position_ids is batch.document_ids is batch.branch_ids is batch.segments is None


def test_packed_rows():
    batch = batch_of("packed")
    assert batch.input_ids.tolist() == [[10, 11, 12, 20, 21, 10, 11, 12, 30, 40, 50, 40, 60, 61, 62]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 1, 0, 1, 2, 3]]
    assert batch.document_ids.tolist() == [[0, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 3, 3, 3, 3]]
    assert batch.branch_ids.tolist() == [[0, 0, 0, 1, 1, 0, 0, 0, 2, 0, 1, 0, 2, 2, 2]]
    assert batch.segments == ((5, 0), (4, 0), (2, 0), (4, 0))
    assert batch.score_index.tolist() == [2, 3, 7, 9, 11, 12, 13]


def test_shared_prefix_rows():
    batch = batch_of("shared_prefix")
    assert batch.input_ids.tolist() == [[10, 11, 12, 20, 21, 30, 40, 50, 60, 61, 62]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 3, 0, 1, 1, 2, 3]]
    assert batch.document_ids.tolist() == [[0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1]]
    assert batch.branch_ids.tolist() == [[0, 0, 0, 1, 1, 2, 0, 1, 2, 2, 2]]
    assert batch.segments == ((5, 0), (1, 3), (2, 0), (3, 1))
    # the last prompt token twice: for the first chosen and for the first rejected token
    assert batch.score_index.tolist() == [2, 3, 2, 6, 6, 8, 9]


@pytest.mark.parametrize("layout", ["padded", "packed", "shared_prefix"])
def test_what_is_scored_does_not_depend_on_the_layout(layout):
    batch = batch_of(layout)
    assert batch.score_targets.tolist() == [20, 21, 30, 50, 60, 61, 62]
    assert batch.score_segments.tolist() == [0, 0, 1, 2, 3, 3, 3]
    assert batch.lengths.tolist() == [[2, 1], [1, 3]]
    assert batch.row_ids.tolist() == [7, 3]
    assert batch.weights.tolist() == [1, 0] and batch.weights.dtype == torch.float32
    assert all(batch.scorer_inputs[name] is getattr(batch, name) for name in batch.scorer_inputs)


@pytest.mark.parametrize(("layout", "tokens"), [("padded", [9, 6]), ("packed", [9, 6]), ("shared_prefix", [6, 5])])
def test_costs_are_those_of_the_batch(layout, tokens):
    assert pair_tokens(LENGTHS[1:], layout).tolist() == tokens
    assert pair_tokens(LENGTHS, layout).dtype == np.int64
    rows = np.array([1, 2])
    assert slots(layout, rows, LENGTHS) == batch_of(layout).input_ids.numel()


def test_moving_a_batch_moves_its_tensors_and_leaves_the_rest():
    batch = batch_of("shared_prefix").to(torch.device("meta"))
    assert batch.input_ids.is_meta and batch.branch_ids.is_meta and batch.weights.is_meta
    assert batch.segments == ((5, 0), (1, 3), (2, 0), (3, 1)) and batch.reference_logps is None
