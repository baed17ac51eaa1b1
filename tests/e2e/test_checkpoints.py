"""Runs that are interrupted and resumed, on 2 ranks through the real launcher: the same numbers and files as if not.

Two launches: the first makes whole runs, whose folders are then cut back to what a crash leaves behind; the second, in
fresh processes, resumes those.
"""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from tiny import read_metrics, run_jobs, run_overrides, save_model, without_timings

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

VARIANTS = {
    "stage0": ["deepspeed.stage=0"],
    "stage2": ["deepspeed.stage=2"],
    "stage3": ["deepspeed.config={zero_optimization: {stage: 3, stage3_param_persistence_threshold: 0}}"],
    "bf16": ["deepspeed.stage=2", "model.dtype=bfloat16"],
    "dropout": ["deepspeed.stage=1", "model.path={folder}/gpt2-start", "model.disable_dropout=false"],
}
# margins grow in training, so with the smallest as the best the first measured step is that
BEST = [
    "deepspeed.stage=3", "train.eval_steps=2", "checkpoint.save_steps=1", "checkpoint.save_total_limit=2",
    "checkpoint.metric_for_best_model=rewards/margins", "checkpoint.greater_is_better=false",
    "checkpoint.load_best_model_at_end=true",
]  # fmt: skip


def crash_after_step_5(whole, copy):
    """A copy of a run's folder as it was when step 5 was done, with the rubbish that a crash may leave."""
    shutil.copytree(whole, copy)
    shutil.rmtree(copy / "checkpoints" / "step-6")
    shutil.rmtree(copy / "model")
    (copy / "checkpoints" / "step-6.incomplete").mkdir()
    (copy / "checkpoints" / "step-6.incomplete" / "state.json").write_text("{}")
    (copy / "checkpoints" / "step-5").mkdir()  # complete but for its state
    lines = (copy / "metrics.jsonl").read_text().splitlines()
    kept = [line for line in lines if json.loads(line)["step"] < 6]
    (copy / "metrics.jsonl").write_text("\n".join(kept) + '\n{"phase": "train", "st')
    return copy


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """(folder of all runs, {name: message} of those that were refused)."""
    folder = tmp_path_factory.mktemp("checkpoints")
    save_model(folder / "gpt2-start", "gpt2")
    variants = {name: [text.replace("{folder}", str(folder)) for text in extra] for name, extra in VARIANTS.items()}
    common = run_overrides(folder)
    six = [*common, "train.max_steps=6", "train.eval_steps=3", "checkpoint.save_steps=2"]
    six.append("checkpoint.save_total_limit=null")

    def job(name, *overrides, **more):
        return {"overrides": [*overrides, f"output_dir={folder / name}"], **more}

    run_jobs(
        folder,
        [
            *(job(f"{name}-whole", *six, *extra) for name, extra in variants.items()),
            job("best-whole", *common, "train.max_steps=6", *BEST),
            job("best-two-steps", *common, "train.max_steps=2", "deepspeed.stage=3"),
        ],
    )
    for name in VARIANTS:
        crash_after_step_5(folder / f"{name}-whole", folder / f"{name}-resumed")
    crash_after_step_5(folder / "stage2-whole", folder / "named")
    shutil.copytree(folder / "stage2-whole", folder / "finished")
    shutil.copytree(folder / "stage2-whole", folder / "earlier")
    shutil.copytree(folder / "best-whole", folder / "best-resumed")
    shutil.rmtree(folder / "best-resumed" / "checkpoints" / "step-6")
    shutil.rmtree(folder / "best-resumed" / "model")
    shutil.copytree(folder / "stage2-whole", folder / "damaged")
    for file in (folder / "damaged" / "checkpoints" / "step-6").glob("*optim_states.pt"):
        file.write_bytes(file.read_bytes()[:5000])

    stage2 = [*six, "deepspeed.stage=2"]
    of_stage2 = str(folder / "stage2-whole")
    rows = (folder / "train.jsonl").read_text().splitlines()
    (folder / "other.jsonl").write_text("\n".join(rows[:-1]) + "\n")
    refused = {
        "another model": [*stage2, f"model.path={folder / 'gpt2-start'}"],
        "other data": [*stage2, f"data.train={folder / 'other.jsonl'}"],
        "another setting": [*stage2, "loss.beta=0.5"],
        "another stage": [*six, "deepspeed.stage=1"],
        "beyond the end": [*stage2, "train.max_steps=5"],
    }
    jobs = {
        **{f"{name}-resumed": job(f"{name}-resumed", *six, *e, resume="latest") for name, e in variants.items()},
        "named": {"overrides": stage2, "resume": str(folder / "named")},  # no output_dir
        "finished": job("finished", *stage2, resume="latest"),
        "earlier": job(
            "earlier", *stage2, "train.max_steps=5", resume=str(folder / "earlier" / "checkpoints" / "step-2")
        ),
        "auto": job("auto", *stage2, resume="auto"),
        "best-resumed": job("best-resumed", *common, "train.max_steps=6", *BEST, resume="latest"),
        "best-elsewhere": job(
            "best-elsewhere", *common, "train.max_steps=6", *BEST, resume=str(folder / "best-whole/checkpoints/step-5")
        ),
        **{
            name: job(name.replace(" ", "-"), *overrides, resume=of_stage2, refused=True)
            for name, overrides in refused.items()
        },
        "nothing there": job("nothing", *stage2, resume="latest", refused=True),
        "damaged": job("damaged", *stage2, resume="latest", refused=True),
    }
    return folder, dict(zip(jobs, run_jobs(folder, list(jobs.values())), strict=True))


def weights(run):
    return load_file(run / "model" / "model.safetensors")


def assert_same_run(ours, theirs):
    for phase in ("train", "eval"):
        assert without_timings(read_metrics(ours, phase)) == without_timings(read_metrics(theirs, phase))
    a, b = weights(ours), weights(theirs)
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def steps_of(run):
    return sorted(int(path.name.split("-")[1]) for path in (run / "checkpoints").glob("step-*") if path.suffix == "")


@pytest.mark.parametrize("name", VARIANTS)
def test_a_resumed_run_is_bit_identical_to_an_uninterrupted_one(done, name):
    folder, _ = done
    resumed = folder / f"{name}-resumed"
    assert [record["step"] for record in read_metrics(resumed)] == [1, 2, 3, 4, 5, 6]
    assert len({record["loss"] for record in read_metrics(resumed)}) == 6
    assert_same_run(resumed, folder / f"{name}-whole")


def test_a_run_folder_named_without_output_dir_is_continued(done):
    folder, _ = done
    assert_same_run(folder / "named", folder / "stage2-whole")
    assert (folder / "named" / "checkpoints" / "step-6" / "state.json").exists()


def test_resuming_a_finished_run_changes_nothing(done):
    folder, _ = done
    assert_same_run(folder / "finished", folder / "stage2-whole")
    cards = [(folder / name / "model" / "README.md").read_text() for name in ("finished", "stage2-whole")]
    assert cards[0] == cards[1] and "rewards/margins" in cards[0]


def test_auto_without_a_checkpoint_starts_afresh(done):
    folder, _ = done
    assert_same_run(folder / "auto", folder / "stage2-whole")


def test_checkpoints_of_the_course_that_was_left_are_dropped(done):
    folder, _ = done
    assert steps_of(folder / "stage2-whole") == [2, 4, 6]
    assert steps_of(folder / "earlier") == [2, 4, 5]
    assert [record["step"] for record in read_metrics(folder / "earlier")] == [1, 2, 3, 4, 5]


def test_the_last_ones_and_the_best_one_are_kept(done):
    folder, _ = done
    margins = {record["step"]: record["rewards/margins"] for record in read_metrics(folder / "best-whole", "eval")}
    assert min(margins, key=margins.get) == 2 and set(margins) == {2, 4, 6}
    assert steps_of(folder / "best-whole") == [2, 5, 6]


def test_the_exported_model_is_that_of_the_best_step(done):
    folder, _ = done
    two_steps, best, resumed = (weights(folder / name) for name in ("best-two-steps", "best-whole", "best-resumed"))
    for name in two_steps:
        assert torch.equal(best[name], two_steps[name]), name
        assert torch.equal(resumed[name], two_steps[name]), name
    for run in ("best-whole", "best-resumed"):
        assert "| optimizer steps | 2 |" in (folder / run / "model" / "README.md").read_text()


def test_a_best_checkpoint_left_in_another_folder_is_looked_for_anew(done):
    folder, _ = done
    assert steps_of(folder / "best-elsewhere") == [6]
    assert "| optimizer steps | 6 |" in (folder / "best-elsewhere" / "model" / "README.md").read_text()


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("another model", ["another model", "model.path"]),
        ("other data", ["data.train"]),
        ("another setting", ["loss.beta was 0.1, is 0.5"]),
        ("another stage", ["deepspeed.stage = 2", "1"]),
        ("beyond the end", ["step 6", "ends at step 5"]),
        ("nothing there", ["nothing: no complete checkpoint"]),
        ("damaged", ["step-6: cannot be loaded"]),
    ],
)
def test_what_does_not_belong_is_refused_by_name(done, name, parts):
    folder, messages = done
    assert messages[name] is not None
    for part in parts:
        assert part in messages[name], messages[name]
    assert len(messages[name]) < 400
