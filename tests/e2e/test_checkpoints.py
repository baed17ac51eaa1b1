"""Runs that are interrupted and resumed through the real launcher: the same numbers and files as if they were not.

Three launches: the first makes whole runs on 2 ranks, whose folders are then cut back to what a crash leaves behind;
the others, in fresh processes, resume those, on 1 rank and on 2, at the same stage and at others. Steps have two
micro-steps, epochs three steps, the last of them incomplete; what is resumed is in the middle of the second epoch.
"""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file
from tiny import read_metrics, run_jobs, run_overrides, save_model, without_timings

from dpo_scale.checkpoint.load import open_checkpoint, verify
from dpo_scale.errors import CheckpointError

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

SHARDED = "deepspeed.config={zero_optimization: {stage: 3, stage3_param_persistence_threshold: 0}}"
BF16 = "model.dtype=bfloat16"
LORA = ["lora.r=2", "lora.dropout=0.1", "reference.mode=adapter"]
OFFLOADED = ["deepspeed.offload_optimizer=cpu"]
MOVING = ["reference.sync_steps=3", "reference.sync_mixup=0.5", "reference.stage=3"]
BACKGROUND = "checkpoint.async_save=true"
VARIANTS = {
    "stage0": ["deepspeed.stage=0"],
    "stage1": ["deepspeed.stage=1"],
    "stage2": ["deepspeed.stage=2"],
    "stage3": [SHARDED],
    "stage1-bf16": ["deepspeed.stage=1", BF16],
    "stage2-bf16": ["deepspeed.stage=2", BF16],
    "stage3-bf16": [SHARDED, BF16],
    "dropout": ["deepspeed.stage=1", "model.path={folder}/gpt2-start", "model.disable_dropout=false"],
    "moving": ["deepspeed.stage=2", *MOVING],
    "lora": [SHARDED, *LORA],
    "sgd": ["deepspeed.stage=2", "train.optim=SGD", "train.optim_args={momentum: 0.9}"],
    "tied": [SHARDED, "model.path={folder}/tied-start"],
    "lora-plain": [SHARDED, *LORA, "lora.dropout=0"],
    "background-stage3": [SHARDED, BACKGROUND],
    "background-moving": ["deepspeed.stage=2", *MOVING, BACKGROUND],
}
# resumed from (a run, on 2 ranks) at another layout
ON_2_RANKS = {
    "stage0-to-3": ("stage0", [SHARDED]),
    "stage1-to-2": ("stage1", ["deepspeed.stage=2"]),
    "stage2-to-0": ("stage2", ["deepspeed.stage=0"]),
    "stage2-to-3": ("stage2", [SHARDED]),
    "stage2-to-3-offloaded": ("stage2", [SHARDED, *OFFLOADED, "deepspeed.offload_param=cpu"]),
    "stage3-to-2-offloaded": ("stage3", ["deepspeed.stage=2", *OFFLOADED]),
    "stage3-to-1": ("stage3", ["deepspeed.stage=1"]),
    "stage3-to-1-bf16": ("stage3-bf16", ["deepspeed.stage=1", BF16]),
    "stage1-to-3-bf16": ("stage1-bf16", [SHARDED, BF16]),
    "one-rank-to-2": ("one-rank", ["deepspeed.stage=2"]),
    "one-rank-to-2-stage3": ("one-rank", [SHARDED]),
}
ON_1_RANK = {
    "stage0-on-1": ("stage0", ["deepspeed.stage=0"]),
    "stage1-on-1": ("stage1", ["deepspeed.stage=1"]),
    "stage2-on-1": ("stage2", ["deepspeed.stage=2"]),
    "stage3-on-1": ("stage3", [SHARDED]),
    "stage3-to-0-on-1": ("stage3", ["deepspeed.stage=0"]),
    "moving-on-1": ("moving", ["deepspeed.stage=2", *MOVING]),
    "sgd-on-1": ("sgd", VARIANTS["sgd"]),
    "tied-to-0-on-1": ("tied", ["deepspeed.stage=0", "model.path={folder}/tied-start"]),
    "lora-plain-on-1": ("lora-plain", ["deepspeed.stage=2", *LORA, "lora.dropout=0"]),
}
# margins grow in training, so with the smallest as the best the first measured step is that
BEST = [
    "deepspeed.stage=3", "train.eval_steps=2", "checkpoint.save_steps=1", "checkpoint.save_total_limit=2",
    "checkpoint.metric_for_best_model=rewards/margins", "checkpoint.greater_is_better=false",
    "checkpoint.load_best_model_at_end=true",
]  # fmt: skip
SECRETS = {"HF_TOKEN": "hf_NotForAnyFile", "WANDB_API_KEY": "wandb-not-for-any-file"}


def crash_after_step_5(whole, copy):
    """A copy of a run's folder as it was when step 5 was done, with the rubbish that a crash may leave."""
    shutil.copytree(whole, copy)
    shutil.rmtree(copy / "checkpoints" / "step-6")
    shutil.rmtree(copy / "model")
    (copy / "finished.json").unlink()
    (copy / "checkpoints" / "step-6.incomplete").mkdir()
    (copy / "checkpoints" / "step-6.incomplete" / "manifest.json").write_text("{}")
    (copy / "checkpoints" / "step-5").mkdir()  # a copy of which the manifest is missing
    lines = (copy / "metrics.jsonl").read_text().splitlines()
    kept = [line for line in lines if json.loads(line)["step"] < 6]
    (copy / "metrics.jsonl").write_text("\n".join(kept) + '\n{"phase": "train", "st')
    return copy


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """(folder of all runs, {name: message} of those that were refused)."""
    os.environ.update(SECRETS)
    try:
        return run_all(tmp_path_factory.mktemp("checkpoints"))
    finally:
        for name in SECRETS:
            del os.environ[name]


def run_all(folder):
    save_model(folder / "gpt2-start", "gpt2")
    save_model(folder / "tied-start", tied=True)

    def here(overrides):
        return [text.replace("{folder}", str(folder)) for text in overrides]

    variants = {name: here(overrides) for name, overrides in VARIANTS.items()}
    common = run_overrides(folder)
    six = [*common, "train.max_steps=6", "train.eval_steps=3", "checkpoint.save_steps=2"]
    six.append("checkpoint.save_total_limit=null")

    def job(name, *overrides, **more):
        return {"overrides": [*overrides, f"output_dir={folder / name}"], **more}

    def resumed_elsewhere(runs):
        for name, (origin, _) in runs.items():
            crash_after_step_5(folder / f"{origin}-whole", folder / name)
        return [job(name, *six, *here(extra), resume="latest") for name, (_, extra) in runs.items()]

    run_jobs(
        folder,
        [
            *(job(f"{name}-whole", *six, *extra) for name, extra in variants.items()),
            job("best-whole", *common, "train.max_steps=6", *BEST),
            job("best-background", *common, "train.max_steps=6", *BEST, BACKGROUND),
            job("best-two-steps", *common, "train.max_steps=2", "deepspeed.stage=3"),
        ],
    )
    run_jobs(folder, [job("one-rank-whole", *six, SHARDED), *resumed_elsewhere(ON_1_RANK)], ranks=1)
    for name in VARIANTS:
        crash_after_step_5(folder / f"{name}-whole", folder / f"{name}-resumed")
    crash_after_step_5(folder / "stage2-whole", folder / "named")
    crash_after_step_5(folder / "stage2-whole", folder / "faster")
    for name in ("finished", "finished-and-cleared", "earlier", "damaged", "longer"):
        shutil.copytree(folder / "stage2-whole", folder / name)
    shutil.rmtree(folder / "finished-and-cleared" / "checkpoints")
    shutil.copytree(folder / "best-whole", folder / "best-resumed")
    shutil.rmtree(folder / "best-resumed" / "checkpoints" / "step-6")
    shutil.rmtree(folder / "best-resumed" / "model")
    (folder / "damaged" / "finished.json").unlink()
    (folder / "best-resumed" / "finished.json").unlink()
    for file in (folder / "damaged" / "checkpoints" / "step-6").glob("*rank_1*optim_states.pt"):
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 16
        file.write_bytes(data)

    stage2 = [*six, "deepspeed.stage=2"]
    of_stage2 = str(folder / "stage2-whole")
    rows = (folder / "train.jsonl").read_text().splitlines()
    (folder / "other.jsonl").write_text("\n".join(rows[:-1]) + "\n")
    refused = {
        "another model": [*stage2, f"model.path={folder / 'gpt2-start'}"],
        "other data": [*stage2, f"data.train={folder / 'other.jsonl'}"],
        "another setting": [*stage2, "loss.beta=0.5"],
        "another rate": [*stage2, "train.learning_rate=2e-3"],
        "beyond the end": [*stage2, "train.max_steps=5"],
    }
    faster = [*stage2, "train.learning_rate=2e-3", "checkpoint.allow_changes=[train.learning_rate]"]
    jobs = {
        **{f"{name}-resumed": job(f"{name}-resumed", *six, *e, resume="latest") for name, e in variants.items()},
        "named": {"overrides": stage2, "resume": str(folder / "named")},  # no output_dir
        "faster": job("faster", *faster, resume="latest"),
        "finished": job("finished", *stage2, resume="auto"),
        "finished-and-cleared": job("finished-and-cleared", *stage2, resume="auto"),
        "longer": job("longer", *stage2, "train.max_steps=7", resume="auto"),
        "earlier": job(
            "earlier", *stage2, "train.max_steps=5", resume=str(folder / "earlier" / "checkpoints" / "step-2")
        ),
        "auto": job("auto", *stage2, resume="auto"),
        "damaged": job("damaged", *stage2, resume="auto"),
        "best-resumed": job("best-resumed", *common, "train.max_steps=6", *BEST, resume="latest"),
        "best-elsewhere": job(
            "best-elsewhere", *common, "train.max_steps=6", *BEST, resume=str(folder / "best-whole/checkpoints/step-5")
        ),
        "full disk, rank 0": job("full-disk-0", *stage2, full_disk=[0, 2]),
        "full disk, rank 1": job("full-disk-1", *stage2, "checkpoint.save_total_limit=1", full_disk=[1, 4]),
        "full disk at the end": job("full-disk-end", *stage2, full_disk=[1, 6], refused=True),
        **{
            name: job(name.replace(" ", "-"), *overrides, resume=of_stage2, refused=True)
            for name, overrides in refused.items()
        },
        "nothing there": job("nothing", *stage2, resume="latest", refused=True),
    }
    elsewhere = resumed_elsewhere(ON_2_RANKS)
    messages = run_jobs(folder, [*jobs.values(), *elsewhere])
    return folder, dict(zip(jobs, messages[: len(jobs)], strict=True))


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


@pytest.mark.parametrize(
    ("background", "at_once"),
    [
        ("background-stage3-whole", "stage3-whole"),
        ("background-moving-whole", "moving-whole"),
        ("best-background", "best-whole"),
    ],
)
def test_saves_in_the_background_change_no_number_and_keep_the_same_checkpoints(done, background, at_once):
    folder, _ = done
    assert_same_run(folder / background, folder / at_once)
    assert steps_of(folder / background) == steps_of(folder / at_once)


def test_a_run_folder_named_without_output_dir_is_continued(done):
    folder, _ = done
    assert_same_run(folder / "named", folder / "stage2-whole")
    assert (folder / "named" / "checkpoints" / "step-6" / "manifest.json").exists()


@pytest.mark.parametrize(("name", "origin"), [(n, o) for n, (o, _) in (ON_2_RANKS | ON_1_RANK).items()])
def test_another_number_of_ranks_or_stage_changes_rounding_only(done, name, origin):
    folder, _ = done
    whole, tolerance = folder / f"{origin}-whole", 3e-3 if "bf16" in name else 1e-5
    for phase, steps in (("train", [1, 2, 3, 4, 5, 6]), ("eval", [3, 6])):
        ours, theirs = read_metrics(folder / name, phase), read_metrics(whole, phase)
        assert [record["step"] for record in ours] == steps
        for a, b in zip(ours, theirs, strict=True):
            assert a["loss"] == pytest.approx(b["loss"], abs=tolerance), (phase, a["step"])
    if "bf16" not in name:
        for key, value in weights(folder / name).items():
            torch.testing.assert_close(value, weights(whole)[key], atol=2e-5, rtol=1e-4)


def test_a_finished_run_is_left_alone_also_without_checkpoints(done):
    folder, _ = done
    for name in ("finished", "finished-and-cleared"):
        for file in ("metrics.jsonl", "model/model.safetensors", "model/README.md", "finished.json", "config.yaml"):
            assert (folder / name / file).read_bytes() == (folder / "stage2-whole" / file).read_bytes(), (name, file)
    assert not (folder / "finished-and-cleared" / "checkpoints").exists()
    assert (folder / "log.txt").read_text().count("this run is finished, at step 6; nothing to do") == 2


def test_a_finished_run_can_be_made_longer(done):
    folder, _ = done
    assert [record["step"] for record in read_metrics(folder / "longer")] == [1, 2, 3, 4, 5, 6, 7]
    assert json.loads((folder / "longer" / "finished.json").read_text())["step"] == 7
    assert "train.max_steps was 6, is 7" in (folder / "log.txt").read_text()


def test_a_rate_that_was_allowed_by_name_takes_effect(done):
    folder, _ = done
    rates = [record["learning_rate"] for record in read_metrics(folder / "faster")]
    assert rates == [1e-3] * 4 + [2e-3] * 2


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(done):
    folder, _ = done
    assert_same_run(folder / "damaged", folder / "stage2-whole")
    log = (folder / "log.txt").read_text()
    assert "damaged/checkpoints/step-6: damaged: zero_pp_rank_1_mp_rank_00_optim_states.pt is damaged" in log
    assert "damaged/checkpoints/step-4 at step 4" in log


def test_a_save_that_fails_on_one_rank_costs_that_checkpoint_only(done):
    folder, messages = done
    for name, steps in (("full-disk-0", [4, 6]), ("full-disk-1", [6]), ("full-disk-end", [2, 4])):
        assert steps_of(folder / name) == steps
        assert_same_run(folder / name, folder / "stage2-whole")
        assert not [path.name for path in (folder / name / "checkpoints").iterdir() if path.suffix]
    log = (folder / "log.txt").read_text()
    assert "the checkpoint of step 4 could not be saved (rank 1: File too large)" in log
    assert "the checkpoint of step 2 could not be saved (rank 0: File too large)" in log
    assert "not marked as finished" in messages["full disk at the end"]
    assert not (folder / "full-disk-end" / "finished.json").exists()
    assert (folder / "full-disk-1" / "finished.json").exists()


DAMAGES = {
    "first byte": lambda data: bytes([data[0] ^ 1]) + data[1:],
    "middle bit": lambda data: data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 64]) + data[len(data) // 2 + 1 :],
    "last byte": lambda data: data[:-1] + bytes([data[-1] ^ 128]),
    "cut": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "longer": lambda data: data + b"0",
}


@pytest.mark.parametrize("run", ["stage0", "stage2-bf16", "stage3", "moving"])
def test_every_damage_of_every_file_is_found_and_named(done, tmp_path, run):
    folder, _ = done
    copy = tmp_path / "step-6"
    shutil.copytree(folder / f"{run}-whole" / "checkpoints" / "step-6", copy)
    assert verify(open_checkpoint(copy)) == []
    files = sorted(copy.iterdir())
    assert len(files) >= 4 and all(file.suffix in (".pt", ".json") for file in files)
    for file in files:
        whole = file.read_bytes()
        for name, damaged in DAMAGES.items():
            file.write_bytes(damaged(whole))
            try:
                found = verify(open_checkpoint(copy))
            except CheckpointError as error:
                found = [str(error)]
            assert len(found) == 1 and file.name in found[0], (file.name, name, found)
        file.unlink()
        with pytest.raises(CheckpointError, match=file.name):
            open_checkpoint(copy)
        file.write_bytes(whole)


def test_no_secret_of_the_environment_is_in_any_file(done):
    folder, _ = done
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 200
    for path in files:
        data = path.read_bytes()
        assert not any(secret.encode() in data for secret in SECRETS.values()), path


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
        ("another rate", ["train.learning_rate was 0.001, is 0.002", "checkpoint.allow_changes=[train.learning_rate]"]),
        ("beyond the end", ["step 6", "ends at step 5"]),
        ("nothing there", ["nothing: no complete checkpoint"]),
    ],
)
def test_what_does_not_belong_is_refused_by_name(done, name, parts):
    folder, messages = done
    assert messages[name] is not None
    for part in parts:
        assert part in messages[name], messages[name]
    assert len(messages[name]) < 400
