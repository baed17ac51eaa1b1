"""Which folders are checkpoints, which one is meant, what is kept, and what a checkpoint is refused for."""

import dataclasses
import errno
import io
import json
import os
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny import save_model
from transformers import LlamaConfig

from dpo_scale.checkpoint import save as saving
from dpo_scale.checkpoint.compatibility import Identity, architecture_fingerprint, check_identity
from dpo_scale.checkpoint.deepspeed_files import load_file
from dpo_scale.checkpoint.load import (
    FORMAT_VERSION,
    TrainState,
    checkpoint_folders,
    checkpoint_path,
    choose_checkpoint,
    find_checkpoints,
    open_checkpoint,
)
from dpo_scale.checkpoint.save import Saver, write
from dpo_scale.distributed import ranks
from dpo_scale.errors import CheckpointError, ConfigError
from dpo_scale.models.load import load_model_config
from dpo_scale.models.router import resolve_router_loss
from dpo_scale.reference.protocol import NoReference
from dpo_scale.settings.tree import load_config
from dpo_scale.training.identity import identity_of

IDENTITY = Identity(
    "model",
    "data",
    {"loss.beta": 0.1, "train.seed": 42, "train.learning_rate": 1e-6},
    {"train.max_steps": 4},
    world_size=1,
    stage=3,
    versions={"torch": "2.13.0"},
)


class FakeEngine:
    """Stands for DeepSpeed's engine: saves one file, through the checkpoint engine that it is given."""

    def __init__(self):
        self.weight = torch.arange(1000.0)

    def save_checkpoint(self, folder, tag, save_latest, exclude_frozen_parameters):
        self.checkpoint_engine.save({"weight": self.weight}, str(Path(folder) / tag / "shard.pt"))


@pytest.fixture(params=[False, True], ids=["waited for", "in the background"])
def in_background(request):
    return request.param


def save(run_dir, step, keep=None, *, identity=IDENTITY, in_background=False, **state):
    """Save a checkpoint and wait for it; its folder, or None if it could not be written."""
    saver = Saver(run_dir, identity, keep=keep, in_background=in_background)
    saver.start(FakeEngine(), TrainState(step=step, **state), NoReference())
    return checkpoint_path(run_dir, step) if saver.wait() else None


def steps(run_dir):
    return [path.name for path in checkpoint_folders(run_dir)]


def found(resume, output_dir):
    return [checkpoint.path.name for checkpoint in find_checkpoints(resume, output_dir)]


def flip(path, place=0.5):
    data = bytearray(path.read_bytes())
    data[int(len(data) * place)] ^= 1
    path.write_bytes(data)


def test_a_saved_state_is_read_back_and_nothing_unfinished_is_left(tmp_path, in_background):
    path = save(tmp_path, 3, pairs=24, tokens=1000, best_metric=0.5, best_step=2, in_background=in_background)
    checkpoint = open_checkpoint(path)
    assert checkpoint.state == TrainState(3, 24, 1000, 0.5, 2) and checkpoint.identity == IDENTITY
    assert [item.name for item in (tmp_path / "checkpoints").iterdir()] == ["step-3"]
    assert {item.name for item in path.iterdir()} == {"manifest.json", "shard.pt", "random-rank-0.pt"}
    assert set(checkpoint.files) == {"shard.pt", "random-rank-0.pt"}
    assert checkpoint.files["shard.pt"]["bytes"] == (path / "shard.pt").stat().st_size


def test_training_goes_on_beside_a_save_which_is_of_the_step_that_it_began_after(tmp_path, monkeypatch):
    may_write, engine, state = threading.Event(), FakeEngine(), TrainState(step=3)
    monkeypatch.setattr(saving, "write", lambda *arguments: may_write.wait(60) and write(*arguments))
    saver = Saver(tmp_path, IDENTITY, keep=None, in_background=True)
    saver.start(engine, state, NoReference())
    engine.weight.add_(1)  # the next step
    state.step = 4
    assert steps(tmp_path) == []
    may_write.set()
    assert saver.wait() and steps(tmp_path) == ["step-3"]
    assert load_file(tmp_path / "checkpoints/step-3/shard.pt")["weight"].tolist() == list(range(1000))
    assert open_checkpoint(tmp_path / "checkpoints/step-3").state.step == 3


def test_a_checkpoint_is_not_committed_before_rank_0_sees_every_ranks_files(tmp_path, monkeypatch, capsys):
    """Two ranks, of which the other writes into a folder of its own, or late."""
    other = {"shard-rank-1.pt": {"bytes": 8, "xxh3_128": "0"}}

    def gather(value, group=None):
        return [value, other] if isinstance(value, dict) else [value, None]

    monkeypatch.setattr(ranks, "gather_objects", gather)
    monkeypatch.setattr(saving, "LAG_SECONDS", 0.3)
    assert save(tmp_path, 2) is None and steps(tmp_path) == []
    assert "files of other ranks are not in" in capsys.readouterr().out

    def arrives(*arguments):
        (tmp_path / "checkpoints" / "step-4.incomplete" / "shard-rank-1.pt").write_bytes(bytes(8))

    monkeypatch.setattr(saving.time, "sleep", arrives)
    assert save(tmp_path, 4) is not None and steps(tmp_path) == ["step-4"]


def test_one_save_at_a_time(tmp_path, monkeypatch):
    order = []
    monkeypatch.setattr(saving, "write", lambda save, *more: [order.append(save.state.step), time.sleep(0.05), True][2])
    saver = Saver(tmp_path, IDENTITY, keep=None, in_background=True)
    for step in (1, 2, 3):
        saver.start(FakeEngine(), TrainState(step=step), NoReference())
        assert order[: step - 1] == list(range(1, step)), "the save before is done when the next begins"
    assert saver.wait() and order == [1, 2, 3]


def test_what_breaks_in_the_background_is_raised_where_the_run_waits_for_it(tmp_path, monkeypatch):
    monkeypatch.setattr(saving, "write", lambda *arguments: {}["no such key"])
    saver = Saver(tmp_path, IDENTITY, keep=None, in_background=True)
    saver.start(FakeEngine(), TrainState(step=1), NoReference())
    with pytest.raises(KeyError, match="no such key"):
        saver.wait()


def test_what_is_not_whole_is_passed_over_with_the_reason(tmp_path, capsys):
    for step in (1, 9, 10, 11, 12):
        save(tmp_path, step)
    folder = tmp_path / "checkpoints"
    (folder / "step-13.incomplete").mkdir()
    (folder / "step-13.incomplete" / "manifest.json").write_text("{}")
    (folder / "step-x").mkdir()
    (folder / "step-10" / "manifest.json").unlink()
    flip(folder / "step-11" / "manifest.json")
    with (folder / "step-12" / "shard.pt").open("r+b") as file:
        file.truncate(100)
    assert found("latest", tmp_path) == ["step-9", "step-1"]  # by number, not by name
    said = capsys.readouterr().out
    for text in ("step-10: incomplete", "step-11/manifest.json: damaged", "step-12: damaged: shard.pt has 100 bytes"):
        assert f"not resuming from {folder}/{text}" in said


def test_damaged_bytes_are_found_before_loading_and_the_one_before_is_taken(tmp_path, capsys):
    for step in (2, 4):
        save(tmp_path, step)
    flip(tmp_path / "checkpoints" / "step-4" / "shard.pt")
    candidates = find_checkpoints("latest", tmp_path)
    assert choose_checkpoint(candidates, IDENTITY, []).path.name == "step-2"
    assert "step-4: damaged: shard.pt is damaged: its checksum differs" in capsys.readouterr().out
    flip(tmp_path / "checkpoints" / "step-2" / "random-rank-0.pt")
    with pytest.raises(CheckpointError, match="step-2: damaged: random-rank-0.pt .* no older one"):
        choose_checkpoint(candidates, IDENTITY, [])


def test_auto_does_not_start_afresh_over_damaged_checkpoints(tmp_path):
    save(tmp_path, 2)
    (tmp_path / "checkpoints" / "step-2" / "shard.pt").unlink()
    with pytest.raises(CheckpointError, match="none of its 1 checkpoints can be used.*shard.pt is missing"):
        find_checkpoints("auto", tmp_path)


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


def test_saving_replaces_a_damaged_one_of_the_same_step_and_clears_what_kills_left(tmp_path, in_background):
    save(tmp_path, 2, in_background=in_background)
    flip(save(tmp_path, 4, in_background=in_background) / "shard.pt")
    for name in ("step-4.incomplete", "step-6.incomplete", "step-1.removed", "step-4.replaced"):
        (tmp_path / "checkpoints" / name).mkdir()
        (tmp_path / "checkpoints" / name / "file").write_text("rubbish")
    (tmp_path / "checkpoints" / "step-2.mine").mkdir()
    save(tmp_path, 4, in_background=in_background)
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"step-2", "step-2.mine", "step-4"}
    assert choose_checkpoint(find_checkpoints("latest", tmp_path), IDENTITY, []).path.name == "step-4"


@pytest.mark.parametrize("failing", ["open", "write", "fsync", "replace"])
def test_a_save_that_fails_leaves_the_run_alive_with_its_older_checkpoint(
    tmp_path, monkeypatch, capsys, failing, in_background
):
    save(tmp_path, 2, in_background=in_background)

    def full(*arguments, **more):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        if failing == "open":
            patched.setattr("dpo_scale.disk.sealed_folder.open", full, raising=False)
        elif failing == "write":
            patched.setattr("dpo_scale.disk.sealed_folder.open", lambda *_: io.FileIO("/dev/full", "w"), raising=False)
        else:
            patched.setattr(os, failing, full)
        assert save(tmp_path, 4, keep=1, in_background=in_background) is None
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-2"]
    assert "WARNING: the checkpoint of step 4 could not be saved (rank 0: No space left" in capsys.readouterr().out
    assert save(tmp_path, 6, keep=1, in_background=in_background).name == "step-6"
    assert steps(tmp_path) == ["step-6"]


class Killed(BaseException):
    """Stands for SIGKILL: nothing of ours catches it."""


def test_a_kill_at_any_call_of_the_file_system_leaves_a_usable_checkpoint(tmp_path, monkeypatch, in_background):
    calls = ["os.fsync", "os.replace", "os.open", "os.stat", "os.unlink", "os.rmdir", "os.mkdir"]
    names = [*calls, "dpo_scale.disk.sealed_folder.open"]
    outcomes = []
    for last_call in range(1, 1000):
        run_dir = tmp_path / str(last_call)
        for step in (2, 4):
            save(run_dir, step, in_background=in_background)
        flip(checkpoint_folders(run_dir)[-1] / "shard.pt")  # the newest is damaged, so step 4 is saved again over it
        done = []

        def killing(original, done=done, last_call=last_call):
            def call(*arguments, **more):
                done.append(original)
                if len(done) == last_call:
                    raise Killed
                return original(*arguments, **more)

            return call

        with monkeypatch.context() as patched:
            for name in names:
                module, _, attribute = name.rpartition(".")
                original = open if attribute == "open" and module != "os" else getattr(os, attribute)
                patched.setattr(name, killing(original), raising=False)
            try:
                save(run_dir, 4, keep=1, in_background=in_background)
                killed = False
            except Killed:
                killed = True
        outcomes.append(choose_checkpoint(find_checkpoints("auto", run_dir), IDENTITY, []).path.name)
        save(run_dir, 6, keep=1, in_background=in_background)
        assert [path.name for path in (run_dir / "checkpoints").iterdir()] == ["step-6"]
        if not killed:
            break
    assert len(outcomes) > 20 and set(outcomes) == {"step-2", "step-4"}
    assert outcomes == sorted(outcomes)  # up to the rename the older one, from then on the new one


def test_a_disk_that_wrote_other_bytes_is_noticed_before_the_older_one_is_dropped(
    tmp_path, monkeypatch, capsys, in_background
):
    save(tmp_path, 2, in_background=in_background)
    fsync = os.fsync

    def damaging(descriptor):
        fsync(descriptor)
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        if path.name == "shard.pt":
            flip(path)

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", damaging)
        assert save(tmp_path, 4, keep=1, in_background=in_background) is None
    assert "shard.pt is damaged" in capsys.readouterr().out
    assert steps(tmp_path) == ["step-2"]


def test_latest_auto_run_folder_and_checkpoint_folder(tmp_path):
    assert found("auto", tmp_path) == []
    with pytest.raises(CheckpointError, match="no complete checkpoint to resume from"):
        find_checkpoints("latest", tmp_path)
    with pytest.raises(CheckpointError, match="no complete checkpoint to resume from"):
        find_checkpoints(str(tmp_path), Path("elsewhere"))
    save(tmp_path, 2)
    save(tmp_path, 4)
    assert found("auto", tmp_path) == ["step-4", "step-2"]
    assert found(str(tmp_path), Path("elsewhere")) == ["step-4", "step-2"]
    assert found(str(tmp_path / "checkpoints" / "step-2"), Path("elsewhere")) == ["step-2"]


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"model": "other"}, ["another model"]),
        ({"data": "other"}, ["data.train"]),
        (
            {"settings": {"loss.beta": 0.5, "train.seed": 43, "train.learning_rate": 1e-6}},
            ["loss.beta was 0.1, is 0.5", "train.seed was 42, is 43", "checkpoint.allow_changes=[loss.beta]"],
        ),
    ],
)
def test_a_checkpoint_of_something_else_is_refused_with_what_differs(tmp_path, change, parts):
    save(tmp_path, 1)
    candidates = find_checkpoints("latest", tmp_path)
    with pytest.raises(CheckpointError) as caught:
        choose_checkpoint(candidates, dataclasses.replace(IDENTITY, **change), [])
    for part in [str(candidates[0].path), *parts]:
        assert part in str(caught.value)


def test_what_may_change_is_told_and_the_rest_only_by_name():
    other = dataclasses.replace(
        IDENTITY,
        settings={**IDENTITY.settings, "train.learning_rate": 2e-6},
        length={"train.max_steps": 8},
        versions={"torch": "2.12.0"},
        world_size=2,
        stage=1,
    )
    told = check_identity("here", IDENTITY, other, ["train.learning_rate"])
    assert told == [
        "train.learning_rate was 1e-06, is 2e-06",
        "train.max_steps was 4, is 8",
        "torch was '2.13.0', is '2.12.0'",
    ]
    with pytest.raises(CheckpointError, match=r"allow_changes=\[train.learning_rate\]"):
        check_identity("here", IDENTITY, other, [])


def test_only_what_takes_effect_may_be_named_as_changeable():
    minimal = ["model.path=some/model", "data.train=pairs.jsonl"]
    load_config(None, [*minimal, "checkpoint.allow_changes=[train.learning_rate, loss.beta]"])
    for name in ("train.seed", "train.weight_decay", "model.path"):
        with pytest.raises(ConfigError, match="checkpoint.allow_changes"):
            load_config(None, [*minimal, f"checkpoint.allow_changes=[{name}]"])


def test_a_manifest_of_another_version_is_refused(tmp_path):
    from dpo_scale.disk.sealed_folder import write_manifest

    path = save(tmp_path, 1)
    record = json.loads((path / "manifest.json").read_text())
    files, _ = record.pop("files"), record.pop("checksum")
    assert record["format_version"] == FORMAT_VERSION
    for change, expected in (({"format_version": 99}, "format 99"), ({"state": {"steps": 1}}, "not of this version")):
        (path / "manifest.json").unlink()
        write_manifest(path / "manifest.json", {**record, **change}, files)
        with pytest.raises(CheckpointError, match=expected):
            open_checkpoint(path)


def test_the_fingerprint_is_of_the_architecture_not_of_where_it_lies():
    config = LlamaConfig(hidden_size=32, num_hidden_layers=2)
    moved = LlamaConfig(hidden_size=32, num_hidden_layers=2, attention_dropout=0.1)
    moved._name_or_path = "elsewhere"
    moved.dtype = "bfloat16"
    assert architecture_fingerprint(moved) == architecture_fingerprint(config)
    assert architecture_fingerprint(LlamaConfig(hidden_size=64, num_hidden_layers=2)) != architecture_fingerprint(
        config
    )


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

    def test_a_finished_run_without_checkpoints_counts_too(self):
        self.run("run-20240101-000000")
        finished = self.run("run-20240102-000000", checkpoint=False)
        (finished / "finished.json").write_text('{"step": 6}')
        assert self.output_dir("auto") == str(finished)

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

    save(tmp_path, 1, identity=identity())
    candidates = find_checkpoints("latest", tmp_path)
    assert choose_checkpoint(candidates, identity(), []).state.step == 1
    save_model(tmp_path / overwritten, seed=1)
    if refused_for is None:
        assert choose_checkpoint(candidates, identity(), []).state.step == 1
    else:
        message = rf"step-1: saved with other settings: the reference's weights \({refused_for}\) was '\w+', is '\w+'$"
        with pytest.raises(CheckpointError, match=message):
            choose_checkpoint(candidates, identity(), [])


def test_a_checkpoint_from_before_the_balancing_loss_is_resumed_from_unless_it_now_has_a_weight(tmp_path, monkeypatch):
    monkeypatch.setenv("DPO_SCALE_CACHE", str(tmp_path / "cache"))
    model_config = load_model_config(str(save_model(tmp_path / "start", "mixtral")))

    def identity(*overrides):
        config = load_config(None, [f"model.path={tmp_path / 'start'}", "data.train=x.jsonl", *overrides])
        resolve_router_loss(config, model_config)
        return identity_of(config, model_config, SimpleNamespace(fingerprint="data"))

    plain = identity()
    assert not any("router" in name for name in plain.settings)
    assert identity("loss.router_aux_loss_coef=0") == plain
    save(tmp_path, 1, identity=plain)
    candidates, weighted = find_checkpoints("latest", tmp_path), identity("loss.router_aux_loss_coef=0.02")
    with pytest.raises(CheckpointError, match=r"loss.router_aux_loss_coef was None, is 0.02; to change it on purpose"):
        choose_checkpoint(candidates, weighted, [])
    assert choose_checkpoint(candidates, weighted, ["loss.router_aux_loss_coef"]).state.step == 1
