"""A reference that runs scores a step's pairs in passes of its own budget: same numbers, weights gathered once a pass.

Every run trains 3 steps on 15 pairs in fp32, 7 at a time, so on 2 ranks one has 4 pairs and the other 3, and of the
last step's only pair one has a filler. With a budget of 1 every pair is a pass of its own, which is what a micro-batch
holds: the reference is scored micro-step by micro-step.
"""

import json

import pytest
from tiny import launch, preference_rows, read_metrics, run_overrides, write_rows

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

ALL_SHARDS = "deepspeed.config={zero_optimization: {stage: 3, stage3_param_persistence_threshold: 0}}"
APART = ["reference.max_tokens_per_micro_batch=1"]
PADDED = ["data.layout=padded"]
MOVING = [ALL_SHARDS, "reference.stage=3", "reference.sync_steps=1", "reference.sync_mixup=0.5"]
ADAPTER = [ALL_SHARDS, "lora.r=4", "reference.mode=adapter"]
AOT, WPO, LD = ["loss.loss_type=aot"], ["loss.use_weighting=true"], ["loss.ld_alpha=0.5"]

# run -> (overrides, the run that it must equal)
ON_2_RANKS = {
    "apart": (APART, None),
    "live": ([], "apart"),
    "stored": (["reference.mode=store"], "apart"),
    "some_together": (["reference.max_tokens_per_micro_batch=100"], "apart"),
    "sharded": (["reference.stage=3"], "apart"),
    "both_sharded": ([ALL_SHARDS, "reference.stage=3", "reference.max_tokens_per_micro_batch=100"], "apart"),
    "by_tokens": (["train.max_tokens_per_micro_batch=60"], "apart"),
    "padded_apart": ([*PADDED, *APART], "apart"),
    "padded": ([*PADDED, "reference.stage=3"], "apart"),
    "padded_over_budget": ([*PADDED, "train.micro_batch_size=4", *APART], "apart"),
    "moving_apart": ([*MOVING, *APART], None),
    "moving": (MOVING, "moving_apart"),
    "adapter_apart": ([*ADAPTER, *APART], None),
    "adapter": (ADAPTER, "adapter_apart"),
    "aot_apart": ([*AOT, *APART], None),
    "aot": (AOT, "aot_apart"),
    "wpo_apart": ([*WPO, *APART], None),
    "wpo": (WPO, "wpo_apart"),
    "ld_stored": ([*LD, "reference.mode=store"], None),
    "ld": (LD, "ld_stored"),
}
ON_1_RANK = {
    "one_rank": ([], "apart"),
    "one_rank_padded": ([*PADDED, "deepspeed.stage=3"], "apart"),
}
COMPARED = {run: to for run, (_, to) in (ON_2_RANKS | ON_1_RANK).items() if to is not None}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(folder of the runs, {run: what `count_passes.py` counted in each step})."""
    folder = tmp_path_factory.mktemp("passes")
    common = [one for one in run_overrides(folder) if "batch_size" not in one]
    common += [
        "train.global_batch_size=7", "train.max_steps=3", "deepspeed.stage=1", "checkpoint.save_at_end=false",
        f"reference.store={folder / 'store'}",
    ]  # fmt: skip
    write_rows(folder / "train.jsonl", preference_rows(15))
    counts = {}
    for ranks, runs in ((2, ON_2_RANKS), (1, ON_1_RANK)):
        jobs = {
            name: [*(one for one in common if one != "deepspeed.stage=1" or ALL_SHARDS not in extra), *extra]
            + [f"output_dir={folder / name}"]
            for name, (extra, _) in runs.items()
        }
        (folder / "jobs.json").write_text(json.dumps(jobs))
        done = launch("tests/distributed/count_passes.py", folder / "jobs.json", ranks=ranks)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        counts |= json.loads((folder / "jobs.json.counts").read_text())
    return folder, counts


@pytest.mark.parametrize("run", COMPARED)
def test_losses_are_those_of_a_reference_scored_micro_step_by_micro_step(made, run):
    folder, _ = made
    base = read_metrics(folder / COMPARED[run])
    assert [record["pairs"] for record in base] == [7, 14, 15]
    assert len({round(record["loss"], 3) for record in base}) == 3  # the loss moves, so agreement says something
    for ours, theirs in zip(read_metrics(folder / run), base, strict=True):
        for metric in ("loss", "grad_norm", "rewards/chosen", "rewards/margins", "kl"):
            assert ours[metric] == pytest.approx(theirs[metric], abs=1e-5, rel=1e-5), (ours["step"], metric)
    (ours,), (theirs,) = (read_metrics(folder / name, "eval") for name in (run, COMPARED[run]))
    assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5)


def test_pairs_are_scored_together_as_the_budget_allows(made):
    _, counts = made

    def passes(run):
        return [step["passes"] for step in counts[run]]

    assert passes("apart") == [4, 4, 1], "rank 0 has 4 pairs of 7, and 1 of 1"
    for run in ("live", "sharded", "by_tokens", "moving", "adapter", "aot", "wpo", "ld", "one_rank"):
        assert passes(run) == [1, 1, 1], run
    assert passes("stored") == [0, 0, 0]
    assert 1 < passes("some_together")[0] < 4
    assert passes("padded_over_budget") == passes("padded_apart") == [4, 4, 1]
    assert sum(passes("padded")) < sum(passes("padded_apart"))


def test_weights_are_gathered_once_a_pass(made):
    _, counts = made
    for run in ("sharded", "padded", "both_sharded", "moving", "moving_apart"):
        for step in counts[run]:
            assert step["gathered"]["reference"] == pytest.approx(step["passes"]), (run, step)
    for together, apart in zip(counts["moving"], counts["moving_apart"], strict=True):
        # what the policy gathers is as it was
        assert together["gathered"]["forward"] == apart["gathered"]["forward"]
        assert together["gathered"]["backward"] == apart["gathered"]["backward"]
    # the policy's own weights; what had been gathered ahead for a pass with the adapter is thrown away, once a step
    for together, apart in zip(counts["adapter"][:-1], counts["adapter_apart"], strict=False):
        assert together["gathered"]["reference"] < 2 < apart["gathered"]["reference"]


def test_ranks_beat_alike(made):
    _, counts = made
    for run in ON_2_RANKS:
        for step in counts[run]:
            assert len(set(step["beats"])) == 1, (run, step)
    first, second, _ = (step["beats"][0] for step in counts["apart"])
    assert second - first == 4 + 4 + 1, "one a pass, one a micro-step, one before the optimizer"
