"""Training on stored reference values: the same run as with a live model, nothing computed twice, nothing stale."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import launch, preference_rows, read_metrics, run_overrides, without_timings, write_rows

from dpo_scale.reference.shard import rows_in_name
from dpo_scale.reference.store import ReferenceStore

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


def shards(store):
    return sorted(store.glob("*/*.safetensors"))


def train(folder, jobs, *, ranks=2):
    """Run jobs [(name, overrides, expected refusal or False)] in one launch; returns all that was said."""
    common = [*run_overrides(folder), "train.max_steps=5", "train.eval_on_start=true", "checkpoint.save_at_end=false"]
    written = [
        {"overrides": [*common, *extra, f"output_dir={folder / name}"], "refused": refused}
        for name, extra, refused in jobs
    ]
    (folder / "jobs.json").write_text(json.dumps(written))
    done = launch("tests/distributed/run_many.py", folder / "jobs.json", ranks=ranks)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + (folder / "jobs.json.messages").read_text()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Live and stored runs on 2 ranks, stages and losses that read the store differently, then on 1 rank."""
    folder = tmp_path_factory.mktemp("stored")
    store = ["reference.mode=store", f"reference.store={folder / 'store'}"]
    ld = ["loss.ld_alpha=0.5"]
    printed = train(
        folder,
        [
            ("live", [], False),
            ("stored", store, False),
            ("stored_again", [*store, "reference.on_missing=error"], False),
            ("stored_stage3", [*store, "deepspeed.stage=3", "reference.stage=3"], False),
            ("other_loss", [*store, "loss.loss_type=ipo", "loss.beta=0.3", "train.learning_rate=1e-4"], False),
            ("ld_live", ld, False),
            ("ld_stored", [*store, *ld], False),
        ],
    )
    (folder / "printed.txt").write_text(printed)
    (folder / "printed_1.txt").write_text(train(folder, [("stored_1_rank", store, False)], ranks=1))
    return folder


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("stored", "live"),
        ("stored_again", "live"),
        ("stored_stage3", "live"),
        ("stored_1_rank", "live"),
        ("ld_stored", "ld_live"),
    ],
)
def test_losses_and_parameters_are_those_of_the_live_reference(folder, ours, theirs):
    for phase in ("train", "eval"):
        for stored, live in zip(read_metrics(folder / ours, phase), read_metrics(folder / theirs, phase), strict=True):
            for name in ("loss", "rewards/margins", "ref_logps/margins", "kl"):
                assert stored[name] == pytest.approx(live[name], abs=1e-6, rel=1e-6), (stored["step"], name)
    ours, theirs = (load_file(folder / name / "model" / "model.safetensors") for name in (ours, theirs))
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], atol=2e-5, rtol=1e-4)


def test_what_does_not_change_the_numbers_computes_nothing_again(folder):
    printed = (folder / "printed.txt").read_text()
    # the first stored run and, for want of per-token values, the first LD-DPO run
    assert printed.count("computed 27 pairs") == 2, printed
    assert printed.count("all 27 pairs are there") == 3
    assert "all 27 pairs are there" in (folder / "printed_1.txt").read_text()


def test_stored_rows_are_computed_again_at_the_start(folder):
    assert (folder / "printed.txt").read_text().count("8 rows computed again") == 5


def test_each_pair_is_stored_once_by_its_rank(folder):
    counts = [rows_in_name(path.name) for path in shards(folder / "store")]
    assert len(list((folder / "store").iterdir())) == 1, "one model and numerics, one book"
    assert sum(counts) == 2 * 27 and len(counts) == 4  # once plain and once with tokens, by 2 ranks each


def test_only_new_rows_are_computed_and_missing_ones_can_be_refused(folder):
    grown = write_rows(folder / "grown.jsonl", [*preference_rows(10, seed=9), *preference_rows(22)[::-1]])
    store = ["reference.mode=store", f"reference.store={folder / 'store'}", f"data.train={grown}"]
    said = train(folder, [("refused", [*store, "reference.on_missing=error"], True), ("grown", store, False)], ranks=1)
    assert "10 of 37 pairs have no stored reference log-probs" in said and "grown.jsonl row 1;" in said
    assert "computed 10 pairs" in said


def test_a_short_run_computes_only_the_pairs_that_it_sees(folder):
    store = ["reference.mode=store", f"reference.store={folder / 'short_store'}", "train.max_steps=1"]
    assert "computed 13 pairs" in train(folder, [("short", store, False)], ranks=1), "8 to train on, 5 held out"


def test_weights_overwritten_in_place_are_another_model(folder):
    model = shutil.copytree(folder / "start", folder / "model")
    store = ["reference.mode=store", f"reference.store={folder / 'store'}", f"model.path={model}"]
    assert "all 27 pairs are there" in train(folder, [("copied", store, False)], ranks=1), "another path, same weights"
    weights = load_file(model / "model.safetensors")
    name = next(name for name in weights if "mlp.down_proj" in name)
    weights[name][0, 0] += 1.0
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    assert "computed 27 pairs" in train(folder, [("overwritten", store, False)], ranks=1)


def test_values_that_are_not_the_models_stop_the_run(folder):
    """Past every checksum: rows written as this model's that are not, as a defect or a hand would leave them."""
    place = folder / "wrong_store"
    store = ["reference.mode=store", f"reference.store={place}"]
    train(folder, [("fill", store, False)], ranks=1)
    (book,) = ReferenceStore(place).books()
    rows = [shard.rows(0, len(shard), tokens=False) for shard in book.shards]
    for path in shards(place):
        path.unlink()
    book.refresh()
    with book.writer() as writer:
        for part in rows:
            writer.add(part.keys, part.sums + np.float32(0.5), part.counts)
    said = train(folder, [("wrong", store, True)], ranks=1)
    assert "not those of the model that training starts from" in said and "stored chosen" in said


def test_two_stored_runs_are_bit_identical(folder):
    first, second = (without_timings(read_metrics(folder / name)) for name in ("stored", "stored_again"))
    assert first == second
