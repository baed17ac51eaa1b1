"""Runs that differ only in how pairs are laid out, kept or timed train alike, on 2 ranks and on 1; what they report."""

import json

import pytest
import torch
from safetensors.torch import load_file
from tiny import preference_rows, read_metrics, run_jobs, run_overrides, write_rows

from dpo_scale.settings.metric_names import PHASES

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

BUDGETS = {
    "pairs": ["train.micro_batch_size=2", "data.layout=padded"],
    "small": ["train.max_tokens_per_micro_batch=90", "data.layout=padded"],  # less than the longest pair
    "middle": [
        *("train.max_tokens_per_micro_batch=200", "data.layout=packed"),
        *("deepspeed.stage=3", "logging.peak_tflops=0.01"),
    ],
    "large": [
        *("train.max_tokens_per_micro_batch=100000", "data.layout=shared_prefix"),
        *("deepspeed.stage=1", "reference.mode=store"),
    ],
    "checkpoints": [
        *("train.max_tokens_per_micro_batch=200", "data.layout=shared_prefix"),
        *("model.gradient_checkpointing=true", "model.gradient_checkpointing_offload=true"),
    ],
}
ONE_RANK = {
    "one": [
        *("train.max_tokens_per_micro_batch=200", "data.layout=shared_prefix"),
        *("deepspeed.stage=0", "logging.peak_tflops=0.01"),
    ],
    "one again": ["train.max_tokens_per_micro_batch=200", "data.layout=shared_prefix", "deepspeed.stage=0"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("budgets")
    common = [one for one in run_overrides(folder) if "micro_batch_size" not in one]
    write_rows(folder / "train.jsonl", preference_rows(22, seed=5))
    common += ["train.max_steps=3", "checkpoint.save_at_end=false", f"reference.store={folder / 'store'}"]
    for ranks, runs in ((2, BUDGETS), (1, ONE_RANK)):
        jobs = [{"overrides": [*common, *extra, f"output_dir={folder / name}"]} for name, extra in runs.items()]
        jobs[0]["profile"] = [2, 3]
        if ranks == 1:
            shown = ["logging.console_metrics=[mfu]", f"output_dir={folder / 'refused'}"]
            jobs.append({"overrides": [*common, *shown], "refused": True})
        messages = run_jobs(folder, jobs, ranks=ranks)
    (folder / "message").write_text(messages[-1])
    return folder


@pytest.mark.parametrize("name", [*BUDGETS, *ONE_RANK])
def test_losses_norms_and_weights_do_not_depend_on_the_budget(folder, name):
    base = read_metrics(folder / "pairs")
    assert len({round(step["loss"], 3) for step in base}) == 3
    for ours, theirs in zip(read_metrics(folder / name), base, strict=True):
        for metric in ("loss", "grad_norm", "rewards/margins"):
            assert ours[metric] == pytest.approx(theirs[metric], abs=1e-5, rel=1e-5), metric
        assert (ours["tokens"], ours["pairs"]) == (theirs["tokens"], theirs["pairs"])
    (ours,), (theirs,) = read_metrics(folder / name, "eval"), read_metrics(folder / "pairs", "eval")
    assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5)
    weights = load_file(folder / name / "model" / "model.safetensors")
    for key, expected in load_file(folder / "pairs" / "model" / "model.safetensors").items():
        torch.testing.assert_close(weights[key], expected, atol=2e-5, rtol=1e-4, msg=key)


def test_the_same_budget_gives_the_same_bits(folder):
    ours, theirs = (load_file(folder / name / "model" / "model.safetensors") for name in ("one", "one again"))
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_times_of_a_step_are_shares_of_it(folder):
    for name in [*BUDGETS, *ONE_RANK]:
        for record in read_metrics(folder / name):
            shares = {phase: record[f"time/{phase}"] for phase in PHASES}
            assert all(share >= 0 for share in shares.values())
            assert 0.5 < sum(shares.values()) <= 1 + 1e-6, (name, shares)
            assert shares["forward"] > 0 and shares["backward"] > 0 and shares["optimizer"] > 0
            # a stored reference runs nothing
            assert (shares["reference"] > 0.01) == (name != "large"), (name, shares)
            assert 0 <= record["rank_idle"] < 0.5
            assert record["rank_idle"] == 0 or name in BUDGETS


def test_rows_that_are_packed_have_no_padding(folder):
    for name in ("large", "checkpoints", "one"):
        assert all(record["padding_fraction"] == 0 for record in read_metrics(folder / name)), name
    assert all(record["padding_fraction"] > 0 for record in read_metrics(folder / "pairs"))


def test_utilisation_is_there_where_the_peak_is_known(folder):
    for name in [*BUDGETS, *ONE_RANK]:
        known = name in ("middle", "one")
        assert all(("mfu" in record) == known for record in read_metrics(folder / name))
    one, two = read_metrics(folder / "one"), read_metrics(folder / "middle")
    for ours, theirs in zip(one, two, strict=True):  # as many FLOPs, over twice the peak
        useful = [r["mfu"] * r["step_seconds"] for r in (ours, theirs)]
        assert useful[0] == pytest.approx(2 * useful[1])
    # 4 passes over 2 layers of 32 x (32 + 16 + 16 + 32 + 3 x 64) weights, more for attention and head
    tokens = one[0]["tokens"]
    layers = 4 * 2 * 2 * 32 * (32 + 16 + 16 + 32 + 3 * 64) * tokens
    assert layers < one[0]["mfu"] * one[0]["step_seconds"] * 0.01e12 < 3 * layers


def test_a_utilisation_that_nobody_can_compute_is_refused_by_name(folder):
    message = (folder / "message").read_text()
    assert "logging.console_metrics" in message and "'cpu'" in message and "logging.peak_tflops" in message


def test_each_rank_leaves_a_trace_of_the_chosen_steps(folder):
    names = sorted(path.name for path in (folder / "pairs" / "profile").iterdir())
    assert names == ["steps-2-3-rank-0.json", "steps-2-3-rank-1.json"]
    events = json.loads((folder / "pairs" / "profile" / names[1]).read_text())["traceEvents"]
    assert {f"dpo_scale: {phase}" for phase in PHASES} <= {event.get("name") for event in events}
