"""In bf16 a log-prob depends on the batch that it was computed in; the runs must agree all the same, within bounds.

bf16 has 8 bits: in another composition of the batch activations are rounded otherwise. Here nothing is composed alike:
the runs have other micro-batch sizes, the stores were filled with other budgets of token slots, on 1 and on 2 ranks.
Every run trains 5 steps of 8 pairs (6 in the third). The bounds, t being `TOLERANCE_PER_ROOT_TOKEN`:

- A row: |stored - exact| <= t sqrt(n) for n tokens; exact is plain fp32 on the weights as bf16 has them.
- A step's loss is a mean over its pairs, whose tokens all drift on their own. If t is the limit for a token, then
  t sqrt(n_c + n_r) is that for a pair's margin, and t sqrt(mean(n_c + n_r) / pairs) that for their mean. Around a
  margin of 0 the sigmoid loss has the slope beta / 2.
- Weights: rounding to 8 bits leaves gradients, and so the first steps of Adam, right to a few hundredths. A tenth of
  the way that the weights went in the 5 steps is allowed.

A run against another model's values is outside of each of them.
"""

import math

import numpy as np
import pytest
import torch
from plain_dpo import read_pairs, summed_logps
from safetensors.torch import load_file
from tiny import read_metrics, run_named_jobs, run_overrides, save_model

from dpo_scale.data.dataset import load_pairs
from dpo_scale.models.load import load_tokenizers
from dpo_scale.reference.compute import TOLERANCE_PER_ROOT_TOKEN
from dpo_scale.reference.store import ReferenceStore
from dpo_scale.settings.tree import load_config

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

TOLERANCE = TOLERANCE_PER_ROOT_TOKEN["bfloat16"]
BETA = 0.1
LN_2 = 0.6931471805599453
SHARE_OF_THE_WAY = 0.1
LORA = ["lora.r=4", "lora.alpha=8", "train.learning_rate=1e-2", "lora.merge=false"]
STORES = ("store_of_2_ranks", "store_of_1_rank")


def store(name, max_tokens):
    return [
        "reference.mode=store",
        f"reference.store={{folder}}/{name}",
        f"reference.max_tokens_per_micro_batch={max_tokens}",
    ]


OFF = ["reference.mode=adapter"]
OTHER = ["reference.model={folder}/other"]
ON_2_RANKS = {
    "live": ["train.micro_batch_size=2"],
    "stored": [*store(STORES[0], 400), "train.micro_batch_size=4"],
    "other": [*OTHER, "train.micro_batch_size=2"],
    "lora_live": [*LORA, "train.micro_batch_size=2"],
    "lora_stored": [*LORA, *store(STORES[0], 400), "train.micro_batch_size=4"],
    "lora_off": [*LORA, *OFF, "train.micro_batch_size=1"],
    "lora_other": [*LORA, *OTHER, "train.micro_batch_size=2"],
}
ON_1_RANK = {
    "live_1": ["train.micro_batch_size=3"],
    "stored_1": [*store(STORES[1], 1), "train.micro_batch_size=8"],
    "lora_live_1": [*LORA, "train.micro_batch_size=3"],
    "lora_stored_1": [*LORA, *store(STORES[1], 1), "train.micro_batch_size=8"],
    "lora_off_1": [*LORA, *OFF, "train.micro_batch_size=5"],
}
SAME = [
    *((run, "live") for run in ("stored", "live_1", "stored_1")),
    *((run, "lora_live") for run in ("lora_stored", "lora_off", "lora_live_1", "lora_stored_1", "lora_off_1")),
]
OTHERS = [("other", "live"), ("lora_other", "lora_live")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bf16")
    common = [
        *run_overrides(folder), "model.dtype=bfloat16", "train.max_steps=5", "train.shuffle=false",
        "checkpoint.save_at_end=false", f"loss.beta={BETA}",
    ]  # fmt: skip
    save_model(folder / "other", seed=5)
    for runs, ranks in ((ON_2_RANKS, 2), (ON_1_RANK, 1)):
        jobs = {name: [text.replace("{folder}", str(folder)) for text in extra] for name, extra in runs.items()}
        said = run_named_jobs(folder, common, jobs, ranks=ranks)
        assert all("computed 27 pairs" in said[name] for name in said if name in ("stored", "stored_1"))
    return folder


@pytest.fixture(scope="module")
def rows(folder):
    """(keys, exact sums fp32 [N, 2], tokens [N, 2]) of the training pairs."""
    config = load_config(None, [f"model.path={folder / 'start'}", f"data.train={folder / 'train.jsonl'}"])
    config.data.cache_dir = str(folder / "cache")
    data = load_pairs(config.data, load_tokenizers(config)[0], seed=0, log=lambda line: None).train
    exact = summed_logps(folder / "start", read_pairs(folder / "train.jsonl", folder / "start"), torch.bfloat16)
    return data.pair_keys, exact.numpy(), data.lengths[:, 1:]


def stored_rows(folder, name, keys):
    (book,) = ReferenceStore(folder / name).books()
    found, sums, _ = book.lookup(keys)
    assert found.all()
    return sums


@pytest.mark.parametrize("name", STORES)
def test_stored_rows_are_within_the_tolerance_of_exact_ones_however_they_were_batched(folder, rows, name):
    keys, exact, tokens = rows
    allowed = TOLERANCE * np.sqrt(tokens)
    apart = np.abs(stored_rows(folder, name, keys) - exact)
    assert (apart <= allowed).all() and apart.max() > 1e-3, "bf16 it is"
    other = summed_logps(folder / "other", read_pairs(folder / "train.jsonl", folder / "start"), torch.bfloat16)
    assert (np.abs(other.numpy() - exact) > allowed).mean() > 0.5, "verifying 8 rows, 16 sequences, would tell"


def losses(folder, run):
    return np.array([record["loss"] for record in read_metrics(folder / run)])


def loss_bounds(tokens):
    """[5], one a step; see the top of the file."""
    steps = [tokens[start : start + 8].sum(axis=1) for start in (0, 8, 16, 0, 8)]
    return BETA / 2 * TOLERANCE * np.array([math.sqrt(step.mean() / len(step)) for step in steps])


def way(folder, run):
    """Where the 5 steps took the weights: what they are less what they were, as one vector."""
    if "lora" in run:
        weights = load_file(folder / run / "model" / "adapter_model.safetensors")
        return torch.cat([weights[name].float().flatten() for name in sorted(weights) if "lora_B" in name])  # from 0
    weights, start = (load_file(folder / name / "model.safetensors") for name in (f"{run}/model", "start"))
    return torch.cat([(weights[name].float() - start[name].bfloat16().float()).flatten() for name in sorted(weights)])


def share(folder, run, other):
    """Distance of two runs' weights as a share of how far the second one went."""
    ours, theirs = way(folder, run), way(folder, other)
    return ((ours - theirs).norm() / theirs.norm()).item()


@pytest.mark.parametrize(("ours", "theirs"), SAME)
def test_losses_and_parameters_are_those_of_the_live_reference(folder, rows, ours, theirs):
    bounds = loss_bounds(rows[2])
    assert (np.abs(losses(folder, ours) - losses(folder, theirs)) <= bounds).all()
    assert abs(losses(folder, ours)[0] - LN_2) <= bounds[0]
    assert share(folder, ours, theirs) <= SHARE_OF_THE_WAY


@pytest.mark.parametrize(("ours", "theirs"), OTHERS)
def test_another_reference_is_outside_of_these_bounds(folder, rows, ours, theirs):
    assert (np.abs(losses(folder, ours) - losses(folder, theirs)) > loss_bounds(rows[2])).all()
    assert share(folder, ours, theirs) > SHARE_OF_THE_WAY


@pytest.mark.parametrize("run", ["live", "lora_live"])
def test_the_runs_learn(folder, rows, run):
    """Five times as much as the bounds leave open: agreement is not that of runs which stand still."""
    of_run = losses(folder, run)
    assert of_run[0] - of_run[-1] > 5 * loss_bounds(rows[2]).max()
