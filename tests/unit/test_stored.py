"""Stored rows that are computed again: how far apart they may be."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny import preference_rows, save_tokenizer, write_rows

from dpo_scale.data.dataset import load_pairs
from dpo_scale.data.groups import Groups
from dpo_scale.data.tokenize import load_tokenizer
from dpo_scale.errors import StoreError
from dpo_scale.reference.compute import verify
from dpo_scale.settings.data import DataSettings, SourceSettings


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    save_tokenizer(folder)
    source = SourceSettings(str(write_rows(folder / "rows.jsonl", preference_rows(6))))
    settings = DataSettings(train=[source], cache_dir=str(folder / "cache"))
    return load_pairs(settings, load_tokenizer(folder), seed=0, log=lambda line: None).train


def verified(pairs, apart, dtype, token_logp=-2.0):
    """Verify values that lie `apart(n)` above those of a model that gives each token `token_logp`."""

    class Model:
        module = SimpleNamespace(layout="padded", groups=Groups(1))

        def __call__(self, score_index, **inputs):
            return torch.full((len(score_index),), token_logp)

    def logps(dataset, indices):
        tokens = torch.from_numpy(dataset.lengths[indices, 1:].astype(np.float32))
        return tokens * -2.0 + torch.tensor([[apart(n) for n in row] for row in tokens.tolist()])

    stored = SimpleNamespace(logps=logps, origin="the store")
    verify(stored, Model(), pairs, len(pairs), dtype=dtype, seed=0, pad_token_id=0)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(("dtype", "of_one_token"), [("float32", 1e-3), ("float16", 0.03), ("bfloat16", 0.25)])
def test_what_may_differ_grows_with_the_root_of_the_tokens(pairs, dtype, of_one_token, sign):
    """By hand: in bf16 a completion of 9 tokens may be 0.75 off, one of 16 tokens 1."""
    verified(pairs, lambda n: sign * 0.98 * of_one_token * n**0.5, dtype)
    with pytest.raises(StoreError, match=f"allowed in {dtype}.*stored chosen .*computed "):
        verified(pairs, lambda n: sign * 1.02 * of_one_token * n**0.5, dtype)


def test_one_sequence_that_is_off_is_enough_and_is_shown(pairs):
    longest = int(pairs.lengths[:, 1:].max())
    (row,) = np.flatnonzero((pairs.lengths[:, 1:] == longest).any(axis=1))[:1]
    with pytest.raises(StoreError) as caught:
        verified(pairs, lambda n: 5.0 if n == longest else 0.0, "bfloat16")
    assert f"{pairs.describe(int(row))}: stored" in str(caught.value) and "(5 apart" in str(caught.value)


def test_a_model_that_gives_no_number_does_not_pass(pairs):
    with pytest.raises(StoreError, match="nan apart"):
        verified(pairs, lambda n: 0.0, "bfloat16", token_logp=float("nan"))
