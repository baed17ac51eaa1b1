"""The key table under ZeRO-3 on 2 ranks, where weights look empty: counted in rows that are computed.

Every run precomputes the same 27 pairs, unless its change says otherwise, all in one launch and into one store. The
whole table, at the level of keys, is in `tests/unit/test_store_keys.py`.
"""

import json
import shutil

import numpy as np
import pytest
from plain_dpo import read_pairs, summed_logps
from safetensors.torch import load_file, save_file
from tiny import launch, preference_rows, run_overrides, save_adapter, save_sharded, write_rows

from dpo_scale.data.dataset import load_pairs
from dpo_scale.models.load import load_tokenizers
from dpo_scale.reference.compute import missing_rows
from dpo_scale.reference.modes import open_book
from dpo_scale.settings.tree import load_config

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

PAIRS = 27
SHARDED = ["deepspeed.stage=3", "reference.stage=3"]
# {run: (overrides, rows to compute)}, in this order
RUNS = {
    "first": (SHARDED, PAIRS),
    "again": (SHARDED, 0),
    "learning rate, beta and loss": ([*SHARDED, "train.learning_rate=1e-5", "loss.beta=1", "loss.loss_type=ipo"], 0),
    "batches": ([*SHARDED, "train.global_batch_size=4", "train.micro_batch_size=1"], 0),
    "output folder and order": ([*SHARDED, "output_dir=elsewhere", "train.seed=7"], 0),
    "files shuffled, split and renamed": ([*SHARDED, "data.train=[{folder}/b.jsonl, {folder}/a.jsonl]"], 0),
    "reference not sharded": (["deepspeed.stage=2", "reference.stage=0"], 0),
    "weights offloaded": ([*SHARDED, "reference.offload_param=cpu", "deepspeed.offload_param=cpu"], 0),
    "weights in many files": ([*SHARDED, "model.path={folder}/sharded"], 0),
    "copied model": ([*SHARDED, "model.path={folder}/model"], 0),
    "its weights overwritten": ([*SHARDED, "model.path={folder}/model"], PAIRS),
    "the same again": ([*SHARDED, "model.path={folder}/model"], 0),
    "dtype": ([*SHARDED, "model.dtype=bfloat16"], PAIRS),
    "attention": ([*SHARDED, "model.attn_implementation=eager"], PAIRS),
    "adapter": ([*SHARDED, "reference.adapter={folder}/adapter"], PAIRS),
    "no chat template": ([*SHARDED, "data.chat_template=none"], PAIRS),
    "ten new rows": ([*SHARDED, "data.train={folder}/grown.jsonl"], 10),
    "after all of that": (SHARDED, 0),
}


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """(folder, the common overrides, {run: rows that it computed})."""
    folder = tmp_path_factory.mktemp("keys")
    common = [*run_overrides(folder), "reference.mode=store", f"reference.store={folder / 'store'}"]
    rows = preference_rows(22)
    write_rows(folder / "a.jsonl", rows[:9])
    write_rows(folder / "b.jsonl", rows[:8:-1])
    write_rows(folder / "grown.jsonl", [*preference_rows(10, seed=9), *rows])
    save_sharded(folder / "start", folder / "sharded")
    save_adapter(folder / "start", folder / "adapter")
    shutil.copytree(folder / "start", folder / "model")
    tensors = load_file(folder / "start" / "model.safetensors")
    tensors["model.layers.0.self_attn.q_proj.weight"][0, 0] += 0.01
    save_file(tensors, folder / "overwritten.safetensors", {"format": "pt"})
    jobs = [
        {
            "overrides": [*common, *(text.replace("{folder}", str(folder)) for text in changes)],
            "copy": [str(folder / "overwritten.safetensors"), str(folder / "model" / "model.safetensors")]
            if run == "its weights overwritten"
            else None,
        }
        for run, (changes, _) in RUNS.items()
    ]
    (folder / "jobs.json").write_text(json.dumps(jobs))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DPO_SCALE_CACHE", str(folder / "cache"))
        printed = launch("tests/distributed/precompute_many.py", folder / "jobs.json")
        assert printed.returncode == 0, printed.stdout[-3000:] + printed.stderr[-3000:]
        computed = json.loads((folder / "jobs.json.computed").read_text())
        yield folder, common, dict(zip(RUNS, computed, strict=True))


@pytest.mark.parametrize("run", RUNS)
def test_a_run_computes_what_its_change_makes_new_and_nothing_else(done, run):
    assert done[2][run] == RUNS[run][1]


def test_one_rank_finds_what_two_stored_and_it_is_what_the_whole_model_says(done):
    """The values are the weights', not those of empty shards; and the number of ranks is not in the key."""
    folder, common, _ = done
    config = load_config(None, common)
    data = load_pairs(config.data, load_tokenizers(config)[0], seed=0, log=lambda line: None)
    book = open_book(config)
    assert [len(rows) for rows in missing_rows(book, [data.train, data.eval], tokens=False)] == [0, 0]

    for name, split in (("train", data.train), ("heldout", data.eval)):
        expected = summed_logps(folder / "start", read_pairs(folder / f"{name}.jsonl", folder / "start"))
        np.testing.assert_allclose(book.lookup(split.pair_keys).sums, expected, atol=1e-3)
