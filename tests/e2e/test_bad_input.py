"""What a user gets wrong, through the real launchers: one short error that names it, exit code 2, no traceback."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import launch, preference_rows, run_jobs, run_overrides, save_model, save_tokenizer, write_rows
from transformers import AutoTokenizer

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


def the_error(done, *parts):
    """The one error in a launch's output, after checking that it is alone, short and says `parts`."""
    output = done.stdout + done.stderr
    assert done.returncode == 2, output[-3000:]
    assert "Traceback" not in output, output[-3000:]
    errors = re.findall(r"^error: .*$", output, re.MULTILINE)
    assert len(errors) == 1, output[-3000:]
    assert len(errors[0]) < 600, errors[0]
    for part in parts:
        assert part in errors[0], errors[0]
    return errors[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("bad")


@pytest.fixture(scope="module")
def common(folder):
    return [*run_overrides(folder), "train.max_steps=2"]


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("train.lerning_rate=1e-6", ["train.lerning_rate", "did you mean train.learning_rate?"]),
        ("train.max_steps=many", ["train.max_steps", "'many'", "whole number"]),
        ("loss.loss_type=sigmoyd", ["loss.loss_type", "'sigmoyd'", "did you mean 'sigmoid'?"]),
        ("checkpoint.metric_for_best_model=accuracy", ["checkpoint.metric_for_best_model", "rewards/accuracies"]),
        ("logging.console_metrics=[loss, margin]", ["logging.console_metrics", "'margin'", "rewards/margins"]),
        ("train.optim=OneBitAdam", ["train.optim", "'OneBitAdam'", "adamw_torch"]),
        ("--resume=nowhere", ["--resume nowhere", "no such folder"]),
    ],
)
def test_what_the_config_alone_tells_is_refused_before_torch_is_imported(folder, override, parts):
    modules = folder / "modules"
    modules.mkdir(exist_ok=True)
    for name in ("torch", "transformers", "deepspeed", "datasets"):
        (modules / f"{name}.py").write_text("raise ImportError('too early')")
    minimal = ["model.path=m", "data.train=t.jsonl", "data.eval=e.jsonl"]
    done = launch("launch/train.py", *minimal, override, launcher="python", first_on_path=modules)
    the_error(done, *parts)


@pytest.fixture(scope="module")
def refusals(folder, common):
    """{name: message}, from one process: how they end a launch is tested once, by the launches below."""
    start = folder / "start"

    def model(name, **changes):
        shutil.copytree(start, folder / name)
        weights = load_file(start / "model.safetensors")
        save_file(weights | changes, folder / name / "model.safetensors", metadata={"format": "pt"})
        return folder / name

    (folder / "empty.jsonl").write_text("")
    (model("no-config") / "config.json").unlink()
    (model("no-weights") / "model.safetensors").unlink()
    weights = load_file(start / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, model("missing-weights") / "model.safetensors", metadata={"format": "pt"})
    model("infinite", **{"model.norm.weight": torch.full((32,), float("inf"))})
    tokenizer = AutoTokenizer.from_pretrained(start)
    tokenizer.add_tokens([f"<extra{i}>" for i in range(384 - len(tokenizer) + 1)])
    tokenizer.save_pretrained(model("large-vocabulary"))
    shutil.copytree(start, folder / "other-tokenizer")
    save_tokenizer(folder / "other-tokenizer", seed=1)
    run = [f"output_dir={folder / 'a-run'}"]
    jobs = {
        "missing file": [f"data.train={folder / 'tran.jsonl'}"],
        "empty file": [f"data.train={folder / 'empty.jsonl'}"],
        "missing model": [f"model.path={folder / 'nothing'}"],
        "no config": [f"model.path={folder / 'no-config'}"],
        "no weights": [f"model.path={folder / 'no-weights'}"],
        "missing weights": [f"model.path={folder / 'missing-weights'}"],
        "infinite weights": [f"model.path={folder / 'infinite'}"],
        "large vocabulary": [f"model.path={folder / 'large-vocabulary'}"],
        "unknown tracker": ["logging.report_to=tensorbored"],
        "tracker not installed": ["logging.report_to=clearml"],
        "optimizer argument": ["train.optim=SGD", "train.optim_args={momentun: 0.9}"],
        "learning rate": ["train.learning_rate=1e30"],
        "too few pairs": ["train.drop_last=true", "train.global_batch_size=64"],
        "other tokenizer": [f"reference.model={folder / 'other-tokenizer'}"],
    }
    listed = [
        {"overrides": [*common, f"output_dir={folder / 'refused' / name}", *overrides], "refused": True}
        for name, overrides in jobs.items()
    ]
    listed += [{"overrides": [*common, *run]}, {"overrides": [*common, *run], "refused": True}]
    gpt2 = [f"model.path={save_model(folder / 'gpt2', 'gpt2')}", f"output_dir={folder / 'refused' / 'gpt2'}"]
    listed += [{"overrides": [*common, *gpt2], "resume": str(folder / "a-run"), "refused": True}]
    names = [*jobs, "a run", "existing run", "checkpoint of another model"]
    return dict(zip(names, run_jobs(folder, listed, ranks=1), strict=True))


def test_a_refused_run_leaves_no_folder_and_one_that_began_does(folder, refusals):
    assert len(refusals) > 10
    assert [path.name for path in (folder / "refused").iterdir()] == ["learning rate"]  # it failed in a step
    assert (folder / "a-run" / "model").is_dir(), "refused only as the second run of its folder"


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("missing file", ["tran.jsonl: no such file or folder; did you mean", "train.jsonl?"]),
        ("empty file", ["empty.jsonl: the file is empty"]),
        ("missing model", ["nothing: no config.json there; expected a Hugging Face model folder"]),
        ("no config", ["no-config: no config.json there"]),
        ("no weights", ["no-weights: its weights cannot be read: neither model.safetensors"]),
        ("missing weights", ["missing-weights: no weights for 1 of", "model.layers.1.mlp.up_proj.weight"]),
        ("infinite weights", ["infinite: its logits are not finite"]),
        ("large vocabulary", ["large-vocabulary", "ids up to 384", "384 tokens"]),
        ("unknown tracker", ["logging.report_to = 'tensorbored'", "tensorboard", "wandb"]),
        ("tracker not installed", ["logging.report_to = 'clearml'", "pip install clearml"]),
        ("optimizer argument", ["train.optim_args", "momentun"]),
        ("learning rate", ["step 2", "not finite", "train.jsonl row "]),
        ("too few pairs", ["train.drop_last", "22 training pairs", "64"]),
        ("existing run", ["output_dir", "a-run", "there is a run in it already"]),
        ("other tokenizer", ["reference.model = ", "other-tokenizer", "start", "tokenizer differs"]),
        ("checkpoint of another model", ["a-run/checkpoints/step-2: a checkpoint of another model", "model.path"]),
    ],
)
def test_refusals_name_what_is_wrong(refusals, name, parts):
    assert refusals[name] is not None
    for part in parts:
        assert part in refusals[name], refusals[name]
    assert "\n" not in refusals[name] and len(refusals[name]) < 600, refusals[name]


def test_a_refused_run_leaves_no_model(folder, refusals):
    assert refusals["a run"] is None and (folder / "a-run" / "model").exists()
    assert not list((folder / "refused").glob("*/model")) and not list((folder / "refused").glob("*/checkpoints"))


def test_malformed_row_17_under_deepspeed(folder, common):
    lines = [json.dumps(row) for row in preference_rows(20)]
    lines[16] = lines[16][:-9]
    (folder / "row17.jsonl").write_text("\n".join(lines))
    done = launch("launch/train.py", *common, f"data.train={folder / 'row17.jsonl'}", f"output_dir={folder / 'out1'}")
    the_error(done, f"{folder / 'row17.jsonl'} row 17: malformed JSON")
    assert not (folder / "out1").exists()


def test_a_loss_that_is_not_finite_names_its_row_and_saves_nothing(folder, common):
    start = folder / "start"
    rows = preference_rows(20)
    rows[16]["chosen"] = "the Z sat"  # a token of this row alone
    write_rows(folder / "nan.jsonl", rows)
    shutil.copytree(start, folder / "nan-model")
    weights = load_file(start / "model.safetensors")
    (token,) = AutoTokenizer.from_pretrained(start)("Z").input_ids
    weights["model.embed_tokens.weight"][token] = float("nan")
    save_file(weights, folder / "nan-model" / "model.safetensors", metadata={"format": "pt"})
    done = launch(
        "launch/train.py", *common, f"model.path={folder / 'nan-model'}", f"data.train={folder / 'nan.jsonl'}",
        f"output_dir={folder / 'nan-run'}", "train.global_batch_size=20", "checkpoint.save_steps=1",
    )  # fmt: skip
    error = the_error(done, "step 1: the loss is not finite", f"{folder / 'nan.jsonl'} row 17: loss nan")
    assert error.count("row ") == 1
    assert not (folder / "nan-run" / "model").exists() and not (folder / "nan-run" / "checkpoints").exists()
    assert (folder / "nan-run" / "metrics.jsonl").read_text() == ""


def test_an_error_on_one_rank_alone_is_the_only_one():
    the_error(launch("tests/distributed/fail_on_rank_1.py"), "pairs.jsonl row 3: seen by rank 1 alone")
