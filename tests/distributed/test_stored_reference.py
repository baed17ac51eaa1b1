"""Training on stored reference values: the same run as with a live model, nothing computed twice, nothing stale.

All runs are made in three launches, 5 steps each: on 2 ranks, then on 1, and on 2 again with a store that is gone, one
that is wrong, and weights that were overwritten. Those in bf16 are in `test_stored_reference_bf16.py`.
"""

import shutil

import numpy as np
import pytest
import torch
from plain_dpo import read_pairs, summed_logps
from safetensors.torch import load_file, save_file
from tiny import preference_rows, read_metrics, run_named_jobs, run_overrides, without_timings, write_rows

from dpo_scale.reference.store import ReferenceStore
from dpo_scale.reference.store_shard import parse_name

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


def shards(store):
    return sorted(store.glob("*/*.safetensors"))


def falsify(place):
    """Past every checksum: rows written as this model's that are not, as a defect or a hand would leave them."""
    (book,) = ReferenceStore(place).books()
    rows = [shard.rows(0, len(shard)) for shard in book.shards]
    for path in shards(place):
        path.unlink()
    book.refresh()
    with book.writer() as writer:
        for part in rows:
            writer.add(part.keys, part.sums + np.float32(0.5), part.counts)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """(folder of all runs, {run: what it said, its refusal included})."""
    folder = tmp_path_factory.mktemp("stored")
    common = [
        *run_overrides(folder), "train.max_steps=5", "train.eval_on_start=true", "checkpoint.save_at_end=false",
    ]  # fmt: skip
    model = shutil.copytree(folder / "start", folder / "model")
    grown = write_rows(folder / "grown.jsonl", [*preference_rows(10, seed=9), *preference_rows(22)[::-1]])

    def store(name="store"):
        return ["reference.mode=store", f"reference.store={folder / name}"]

    def resumed(run, *overrides, **more):
        return {"overrides": overrides, "resume": f"{folder / run}/checkpoints/step-3", **more}

    saving = ["checkpoint.save_steps=3", "train.eval_steps=3"]
    ld, lora = ["loss.ld_alpha=0.5"], ["lora.r=4", "lora.alpha=8", "train.learning_rate=1e-2"]
    first = {
        "live": [],
        "stored": store(),
        "stored_again": [*store(), "reference.on_missing=error"],
        "stored_stage3": [*store(), "deepspeed.stage=3", "reference.stage=3"],
        "other_loss": [*store(), "loss.loss_type=ipo", "loss.beta=0.3", "train.learning_rate=1e-4"],
        "ld_live": ld,
        "ld_stored": [*store(), *ld],
        "lora_live": lora,
        "copied_model": [*store(), f"model.path={model}", *saving],
        "saved": [*store("lost_store"), *saving],
        "saved_live": [f"model.path={model}", *saving],
    }
    on_one_rank = {
        "stored_1_rank": store(),
        "lora_stored_1_rank": [*store(), *lora],
        "lora_off_1_rank": ["reference.mode=adapter", *lora],
        "refused": {"overrides": [*store(), f"data.train={grown}", "reference.on_missing=error"], "refused": True},
        "grown": [*store(), f"data.train={grown}"],
        "short": [*store("short_store"), "train.max_steps=1"],
        "filling": store("wrong_store"),
    }
    then = {
        "wrong": {"overrides": store("wrong_store"), "refused": True},
        "overwritten": [*store(), f"model.path={model}"],
        "resumed_without_store": resumed("saved", *store("lost_store"), *saving),
        "resumed_live": resumed("saved", *saving),
        "resumed_overwritten": resumed("copied_model", *store(), f"model.path={model}", *saving, refused=True),
        "resumed_live_overwritten": resumed("saved_live", f"model.path={model}", *saving, refused=True),
    }
    said = run_named_jobs(folder, common, first)
    shutil.copytree(folder / "store", folder / "store_of_2_ranks")
    said |= run_named_jobs(folder, common, on_one_rank, ranks=1)
    shutil.rmtree(folder / "lost_store")
    falsify(folder / "wrong_store")
    weights = load_file(model / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"][0, 0] += 1.0
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    said |= run_named_jobs(folder, common, then)
    return folder, said


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("stored", "live"),
        ("stored_again", "live"),
        ("stored_stage3", "live"),
        ("stored_1_rank", "live"),
        ("ld_stored", "ld_live"),
        ("lora_stored_1_rank", "lora_live"),
        ("lora_off_1_rank", "lora_live"),
    ],
)
def test_losses_and_parameters_are_those_of_the_live_reference(done, ours, theirs):
    folder, _ = done
    for phase in ("train", "eval"):
        for stored, live in zip(read_metrics(folder / ours, phase), read_metrics(folder / theirs, phase), strict=True):
            for name in ("loss", "rewards/margins", "ref_logps/margins", "kl"):
                assert stored[name] == pytest.approx(live[name], abs=1e-6, rel=1e-6), (stored["step"], name)
    ours, theirs = (load_file(folder / name / "model" / "model.safetensors") for name in (ours, theirs))
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], atol=2e-5, rtol=1e-4)


def test_what_does_not_change_the_numbers_computes_nothing_again(done):
    _, said = done
    # the first stored run and, for want of per-token values, the first LD-DPO run
    for run in ("stored", "ld_stored"):
        assert "computed 27 pairs" in said[run]
    for run in ("stored_again", "stored_stage3", "other_loss", "copied_model", "stored_1_rank", "lora_stored_1_rank"):
        assert "all 27 pairs are there" in said[run] and "computed" not in said[run].replace("computed again", ""), run


def test_stored_rows_are_computed_again_at_the_start(done):
    _, said = done
    for run in ("stored", "stored_again", "stored_stage3", "other_loss", "ld_stored", "stored_1_rank"):
        assert "8 rows computed again" in said[run], run


def test_each_pair_is_stored_once_by_its_rank(done):
    store = done[0] / "store_of_2_ranks"
    counts = [parse_name(path)[0] for path in shards(store)]
    assert len(list(store.iterdir())) == 1, "one model and numerics, one book"
    assert sum(counts) == 2 * 27 and len(counts) == 4  # once plain and once with tokens, by 2 ranks each


def test_only_new_rows_are_computed_and_missing_ones_can_be_refused(done):
    _, said = done
    assert "10 of 37 pairs have no stored reference log-probs" in said["refused"]
    assert "grown.jsonl row 1;" in said["refused"]
    assert "computed 10 pairs" in said["grown"]


def test_a_short_run_computes_only_the_pairs_that_it_sees(done):
    assert "computed 13 pairs" in done[1]["short"], "8 to train on, 5 held out"


def test_weights_overwritten_in_place_are_another_model(done):
    assert "computed 27 pairs" in done[1]["overwritten"]


@pytest.mark.parametrize("run", ["resumed_without_store", "resumed_live"])
def test_a_resumed_run_takes_the_reference_from_the_start_not_from_the_checkpoint(done, run):
    folder, said = done
    if run == "resumed_without_store":
        assert "computed 27 pairs" in said[run]
    logps = summed_logps(folder / "start", read_pairs(folder / "heldout.jsonl", folder / "start"))
    of_start = (logps[:, 0] - logps[:, 1]).mean().item()
    at_step_3, _ = (record for record in read_metrics(folder / "saved", "eval") if record["step"] > 0)
    (resumed,) = read_metrics(folder / run, "eval")
    assert (at_step_3["step"], resumed["step"]) == (3, 5)
    # what the reference would say if it were the checkpoint
    assert abs(at_step_3["logps/margins"] - of_start) > 0.1
    assert resumed["ref_logps/margins"] == pytest.approx(of_start, abs=1e-4)
    for phase in ("train", "eval"):
        straight = [record for record in read_metrics(folder / "saved", phase) if record["step"] > 3]
        again = read_metrics(folder / run, phase)
        for name in ("loss", "rewards/margins", "ref_logps/margins", "kl"):
            assert [r[name] for r in again] == pytest.approx([r[name] for r in straight], abs=1e-6, rel=1e-6), name


@pytest.mark.parametrize("run", ["resumed_overwritten", "resumed_live_overwritten"])
def test_a_run_is_not_resumed_with_an_overwritten_reference(done, run):
    assert "step-3: saved with other settings: the reference's weights (model.path) was" in done[1][run]


def test_values_that_are_not_the_models_stop_the_run(done):
    assert "not those of the model that training starts from" in done[1]["wrong"]
    assert "stored chosen" in done[1]["wrong"]


def test_two_stored_runs_are_bit_identical(done):
    first, second = (without_timings(read_metrics(done[0] / name)) for name in ("stored", "stored_again"))
    assert first == second
