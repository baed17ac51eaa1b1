"""Which folders are checkpoints, which one is meant, what is kept, and what a checkpoint is refused for."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from tiny import save_model
from transformers import LlamaConfig

from dpo_scale.checkpoint import (
    FORMAT_VERSION,
    Identity,
    TrainState,
    complete_checkpoints,
    find_checkpoint,
    model_fingerprint,
    read_state,
    save_checkpoint,
)
from dpo_scale.config import load_config
from dpo_scale.errors import CheckpointError
from dpo_scale.models.load import load_model_config
from dpo_scale.trainer import identity_of

IDENTITY = Identity("model", "data", {"loss.beta": 0.1, "train.seed": 42}, world_size=2, stage=3)


class FakeEngine:
    """Stands for DeepSpeed's engine: saves one file."""

    def save_checkpoint(self, folder, tag, save_latest, exclude_frozen_parameters):
        (Path(folder) / tag).mkdir(parents=True)
        (Path(folder) / tag / "shard.pt").write_text(tag)


def save(run_dir, step, keep=None, **state):
    return save_checkpoint(FakeEngine(), TrainState(step=step, **state), IDENTITY, run_dir, keep=keep)


def steps(run_dir):
    return [path.name for path in complete_checkpoints(run_dir)]


def test_a_saved_state_is_read_back_and_nothing_unfinished_is_left(tmp_path):
    path = save(tmp_path, 3, pairs=24, tokens=1000, best_metric=0.5, best_step=2)
    assert read_state(path, IDENTITY) == TrainState(3, 24, 1000, 0.5, 2)
    assert [item.name for item in (tmp_path / "checkpoints").iterdir()] == ["step-3"]


def test_only_folders_with_their_final_name_and_a_state_are_checkpoints(tmp_path):
    save(tmp_path, 9)
    save(tmp_path, 10)
    for name in ("step-11.incomplete", "step-x", "step-12"):
        (tmp_path / "checkpoints" / name).mkdir()
    (tmp_path / "checkpoints" / "step-11.incomplete" / "state.json").write_text("{}")
    (tmp_path / "checkpoints" / "step-x" / "state.json").write_text("{}")
    assert steps(tmp_path) == ["step-9", "step-10"]  # by number, not by name
    assert find_checkpoint("latest", tmp_path).name == "step-10"


def test_the_newest_are_kept_and_the_best_beside_them(tmp_path):
    for step in range(1, 6):
        save(tmp_path, step, keep=2, best_step=2 if step >= 2 else None)
    assert steps(tmp_path) == ["step-2", "step-4", "step-5"]
    save(tmp_path, 6, keep=1, best_step=6)
    assert steps(tmp_path) == ["step-6"]


def test_saving_drops_later_checkpoints_never_itself(tmp_path):
    for step in (2, 4, 6):
        save(tmp_path, step)
    save(tmp_path, 3, keep=1)  # resumed from step 2
    assert steps(tmp_path) == ["step-3"]


def test_latest_auto_run_folder_and_checkpoint_folder(tmp_path):
    assert find_checkpoint("auto", tmp_path) is None
    with pytest.raises(CheckpointError, match="no complete checkpoint to resume from"):
        find_checkpoint("latest", tmp_path)
    with pytest.raises(CheckpointError, match="neither a checkpoint"):
        find_checkpoint(str(tmp_path), Path("elsewhere"))
    save(tmp_path, 2)
    save(tmp_path, 4)
    assert find_checkpoint("auto", tmp_path).name == "step-4"
    assert find_checkpoint(str(tmp_path), Path("elsewhere")).name == "step-4"
    assert find_checkpoint(str(tmp_path / "checkpoints" / "step-2"), Path("elsewhere")).name == "step-2"


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"model": "other"}, ["another model"]),
        ({"data": "other"}, ["data.train"]),
        ({"settings": {"loss.beta": 0.5, "train.seed": 42}}, ["loss.beta was 0.1, is 0.5"]),
        ({"world_size": 4}, ["ranks = 2", "4"]),
        ({"stage": 2}, ["deepspeed.stage = 3", "2"]),
    ],
)
def test_a_checkpoint_of_something_else_is_refused_with_what_differs(tmp_path, change, parts):
    path = save(tmp_path, 1)
    with pytest.raises(CheckpointError) as caught:
        read_state(path, dataclasses.replace(IDENTITY, **change))
    for part in [str(path), *parts]:
        assert part in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"identity": {}, "state": {"step": 1}, "format_version": 99}'])
def test_a_damaged_or_foreign_state_file_is_named(tmp_path, text):
    path = save(tmp_path, 1)
    (path / "state.json").write_text(text)
    with pytest.raises(CheckpointError, match="step-1"):
        read_state(path, IDENTITY)


def test_an_unknown_field_of_the_state_is_refused(tmp_path):
    path = save(tmp_path, 1)
    record = json.loads((path / "state.json").read_text())
    assert record["format_version"] == FORMAT_VERSION
    record["state"]["steps"] = 1
    (path / "state.json").write_text(json.dumps(record))
    with pytest.raises(CheckpointError, match="damaged"):
        read_state(path, IDENTITY)


def test_the_fingerprint_is_of_the_architecture_not_of_where_it_lies():
    config = LlamaConfig(hidden_size=32, num_hidden_layers=2)
    moved = LlamaConfig(hidden_size=32, num_hidden_layers=2, attention_dropout=0.1)
    moved._name_or_path = "elsewhere"
    moved.dtype = "bfloat16"
    assert model_fingerprint(moved) == model_fingerprint(config)
    assert model_fingerprint(LlamaConfig(hidden_size=64, num_hidden_layers=2)) != model_fingerprint(config)


class TestWhichRunContinues:
    """`--resume` without `output_dir`, from the folder that holds `runs/`."""

    MINIMAL = ("model.path=some/model", "data.train=pairs.jsonl")

    @pytest.fixture(autouse=True)
    def here(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)

    def run(self, name, *, checkpoint=True):
        folder = Path("runs") / name
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text("")
        if checkpoint:
            save(folder, 5)
        return folder

    def output_dir(self, resume, *overrides):
        return load_config(None, [*self.MINIMAL, *overrides], resume=resume).output_dir

    def test_the_newest_of_this_config_that_has_a_checkpoint(self):
        self.run("run-20240101-000000")
        newest = self.run("run-20240102-000000")
        self.run("run-20240103-000000", checkpoint=False)
        self.run("run-other-20240104-000000")
        assert self.output_dir("latest") == self.output_dir("auto") == str(newest)

    def test_without_any_auto_is_a_new_run_and_latest_an_error(self):
        assert self.output_dir("auto").startswith("runs/run-")
        with pytest.raises(CheckpointError, match="no runs/run-<time> has a checkpoint"):
            self.output_dir("latest")

    def test_a_named_run_or_its_checkpoint(self):
        folder = self.run("mine")
        assert self.output_dir("runs/mine") == str(folder)
        assert Path(self.output_dir("runs/mine/checkpoints/step-5")).resolve() == folder.resolve()

    def test_an_explicit_output_dir_wins(self):
        self.run("mine")
        assert self.output_dir("runs/mine", "output_dir=new") == "new"

    def test_a_checkpoint_copied_out_of_its_run_starts_a_new_folder(self):
        self.run("mine").joinpath("checkpoints", "step-5").rename("copied")
        assert self.output_dir("copied").startswith("runs/run-")

    def test_a_missing_folder_is_named(self):
        with pytest.raises(CheckpointError, match="runs/none: no such folder"):
            self.output_dir("runs/none")


@pytest.mark.parametrize(
    ("overrides", "overwritten", "refused_for"),
    [
        ([], "start", "model.path"),
        (["reference.mode=store"], "start", "model.path"),
        (["reference.model={folder}/other"], "other", "reference.model"),
        # the checkpoint has the policy's weights, and the reference is another model
        (["reference.model={folder}/other"], "start", None),
        (["loss.loss_type=simpo"], "start", None),
        # a reference that moves is in the checkpoint
        (["reference.sync_steps=2"], "start", None),
    ],
)
def test_a_run_is_not_resumed_with_other_weights_behind_the_references_path(
    tmp_path, monkeypatch, overrides, overwritten, refused_for
):
    monkeypatch.setenv("DPO_SCALE_CACHE", str(tmp_path / "cache"))
    for name in ("start", "other"):
        save_model(tmp_path / name)
    overrides = [text.replace("{folder}", str(tmp_path)) for text in overrides]
    config = load_config(None, [f"model.path={tmp_path / 'start'}", "data.train=x.jsonl", *overrides])

    def identity():
        return identity_of(config, load_model_config(config.model.path), SimpleNamespace(fingerprint="data"))

    path = save_checkpoint(FakeEngine(), TrainState(step=1), identity(), tmp_path, keep=None)
    assert read_state(path, identity()).step == 1
    save_model(tmp_path / overwritten, seed=1)
    if refused_for is None:
        assert read_state(path, identity()).step == 1
    else:
        message = rf"step-1: saved with other settings: the reference's weights \({refused_for}\) was '\w+', is '\w+'$"
        with pytest.raises(CheckpointError, match=message):
            read_state(path, identity())
