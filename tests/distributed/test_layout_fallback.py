"""Attention that fails on one of two ranks: both pad, before anything is laid out, and the numbers stay the same."""

import pytest
from tiny import read_metrics, run_jobs, run_overrides

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

STAGE_3 = "deepspeed.config={zero_optimization: {stage: 3, stage3_param_persistence_threshold: 0}}"
RUNS = {
    "padded": ({}, ["data.layout=padded", "deepspeed.stage=2"]),
    # an error on one rank alone, in the middle of a pass that gathers weights layer by layer
    "raises": ({"attention": "raises"}, [STAGE_3, "reference.stage=3"]),
    "wrong": ({"attention": "wrong"}, ["deepspeed.stage=2", "reference.mode=store"]),
    "by name": ({"attention": "raises", "refused": True}, ["data.layout=packed", "deepspeed.stage=2"]),
    "short": ({"attention": "wrong"}, ["deepspeed.stage=2", "train.max_steps=2"]),
    # goes on with attention that is right, in the layout that the other run could not take
    "short again": ({"resume": "auto"}, ["deepspeed.stage=2"]),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """(folder, what was printed, {run: message of its refusal or None})."""
    folder = tmp_path_factory.mktemp("fallback")
    # padded, a micro-batch of so many tokens holds fewer pairs
    common = [setting for setting in run_overrides(folder) if not setting.startswith("train.micro_batch_size")]
    common += ["train.max_steps=4", "train.max_tokens_per_micro_batch=150"]
    jobs = [
        {**job, "overrides": [*common, f"reference.store={folder / name}.store",
                              f"output_dir={folder / name.split()[0]}", *overrides]}
        for name, (job, overrides) in RUNS.items()
    ]  # fmt: skip
    messages = run_jobs(folder, jobs)
    return folder, (folder / "log.txt").read_text(), dict(zip(RUNS, messages, strict=True))


@pytest.mark.parametrize("name", ["raises", "wrong", "short"])
def test_the_run_is_that_of_padded_rows(runs, name):
    folder, _, _ = runs
    ours, theirs = (read_metrics(folder / run) for run in (name, "padded"))
    assert len(ours) == len(theirs) == 4
    for step, expected in zip(ours, theirs, strict=True):
        for metric in ("loss", "rewards/margins", "logps/chosen", "grad_norm"):
            assert step[metric] == pytest.approx(expected[metric], abs=1e-5, rel=1e-5), (step["step"], metric)
    padding = [[step["padding_fraction"] for step in steps] for steps in (ours, theirs)]
    fallen = 2 if name == "short" else 4
    assert padding[0][:fallen] == padding[1][:fallen] and min(padding[1]) > 0
    assert max(padding[0][fallen:], default=0.0) == 0.0
    evaluated = [read_metrics(folder / run, "eval")[-1]["loss"] for run in (name, "padded")]
    assert evaluated[0] == pytest.approx(evaluated[1], abs=1e-5)
    assert f"layout: {'shared_prefix' if name == 'short' else 'padded'}" in (folder / name / "config.yaml").read_text()


def test_the_log_says_why_and_what_was_planned_again(runs):
    _, printed, _ = runs
    because = "with attention by scaled_dot_product_attention, sequence by sequence fails its check: "
    assert printed.count(f"{because}RuntimeError: no kernel image is available") == 1
    assert printed.count(f"{because}it does not give the log-probs of separate sequences") == 2
    assert printed.count("planned again for layout padded: ") == 2 + 1


def test_a_layout_asked_for_by_name_is_refused_on_all_ranks(runs):
    _, _, refusals = runs
    assert {name for name, message in refusals.items() if message} == {"by name"}
    assert "no kernel image is available" in refusals["by name"] and "set data.layout=padded" in refusals["by name"]
