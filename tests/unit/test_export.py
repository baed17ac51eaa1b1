"""The exported folder: same weights, the model's own settings put back, and a card that says what was measured."""

import errno
import json
import re
from types import SimpleNamespace

import pytest
import torch
from tiny import save_model, save_tokenizer, tiny_config
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import dpo_scale.models.export
from dpo_scale.data.tokenize import load_tokenizer
from dpo_scale.disk.sealed_folder import write_manifest
from dpo_scale.errors import ModelError, TrainingError
from dpo_scale.models.export import export_model
from dpo_scale.models.files import check_model_folder
from dpo_scale.models.load import load_causal_lm, load_tokenizers
from dpo_scale.models.scorer import PairScorer
from dpo_scale.progress import progress
from dpo_scale.settings.tree import load_config

RESULTS = {"before": {"loss": 0.69, "rewards/margins": 0.0}, "after": {"loss": 0.5, "rewards/margins": 0.25}}


def export(start, run_dir, results=RESULTS):
    model = load_causal_lm(str(start), dtype="float32")
    policy = SimpleNamespace(zero_optimization_stage=lambda: 0, module=PairScorer(model))
    config = load_config(None, [f"model.path={start}", "data.train=some/pairs.jsonl", "loss.beta=0.07"])
    run_dir.mkdir(exist_ok=True)
    return export_model(policy, load_tokenizer(start), config, run_dir, {"steps": 4, "pairs": 32, **results})


@pytest.mark.parametrize("tied", [False, True])
def test_weights_tokenizer_and_template_come_back(tmp_path, tied):
    start = save_model(tmp_path / "start", tied=tied)
    folder = export(start, tmp_path / "run")
    ours, theirs = (AutoModelForCausalLM.from_pretrained(path) for path in (folder, start))
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert all(torch.equal(ours.state_dict()[name], value) for name, value in theirs.state_dict().items())
    assert ours.config.use_cache and ours.config.tie_word_embeddings == tied
    tokenizer, before = AutoTokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(start)
    assert tokenizer.chat_template == before.chat_template and tokenizer.get_vocab() == before.get_vocab()


def test_dropout_and_sampling_settings_are_those_of_the_start(tmp_path):
    start = tmp_path / "start"
    config = tiny_config("gpt2")
    config.resid_pdrop = 0.25
    AutoModelForCausalLM.from_config(config).save_pretrained(start)
    save_tokenizer(start)
    # as found in the wild: a temperature without do_sample, which transformers warns of and will not save
    generation = GenerationConfig(eos_token_id=[2, 1]).to_dict() | {"temperature": 0.6, "do_sample": False}
    (start / "generation_config.json").write_text(json.dumps(generation))
    folder = export(start, tmp_path / "run")
    assert AutoConfig.from_pretrained(folder).resid_pdrop == 0.25
    saved = GenerationConfig.from_pretrained(folder)
    assert (saved.temperature, saved.do_sample, saved.eos_token_id) == (0.6, True, [2, 1])


def test_each_shard_that_is_written_synced_and_read_back_is_activity(tmp_path, monkeypatch):
    start = save_model(tmp_path / "start")
    counts = [progress().activity]
    for name, size in (("whole", "5GB"), ("sharded", "20KB")):
        monkeypatch.setattr(dpo_scale.models.export, "MAX_SHARD_SIZE", size)
        export(start, tmp_path / name)
        counts.append(progress().activity)
    shards = len(list((tmp_path / "sharded/model").glob("*.safetensors")))
    whole, sharded = (after - before for before, after in zip(counts, counts[1:], strict=False))
    assert shards > 2 and sharded - whole >= 3 * (shards - 1)


def test_an_earlier_model_is_replaced_whole(tmp_path):
    start = save_model(tmp_path / "start")
    old = tmp_path / "run" / "model"
    old.mkdir(parents=True)
    (old / "model-00001-of-00002.safetensors").write_text("old")
    (tmp_path / "run" / "model.incomplete").mkdir()
    folder = export(start, tmp_path / "run")
    assert not (folder / "model-00001-of-00002.safetensors").exists()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["model"]


def test_the_card_says_what_was_done_and_measured(tmp_path):
    start = save_model(tmp_path / "start")
    card = (export(start, tmp_path / "run") / "README.md").read_text()
    for line in (
        "base_model: start", "- `pairs.jsonl`",
        "| beta | 0.07 |", "| optimizer steps | 4 |", "32 preference pairs seen",
        "| loss | 0.6900 | 0.5000 |", "| rewards/margins | 0.0000 | 0.2500 |",
    ):  # fmt: skip
        assert line in card, card
    assert str(tmp_path) not in card
    card = (export(start, tmp_path / "run", {"before": None, "after": RESULTS["after"]}) / "README.md").read_text()
    assert "| loss | not measured | 0.5000 |" in card
    card = (export(start, tmp_path / "run", {"before": None, "after": None}) / "README.md").read_text()
    assert "No held-out data was given." in card


DAMAGES = {
    "first byte": lambda data: bytes([data[0] ^ 1]) + data[1:],
    "middle bit": lambda data: data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 64]) + data[len(data) // 2 + 1 :],
    "last byte": lambda data: data[:-1] + bytes([data[-1] ^ 128]),
    "cut": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
}


def test_every_damage_of_every_file_is_found_and_named_before_anything_is_loaded(tmp_path, capsys):
    folder = export(save_model(tmp_path / "start"), tmp_path / "run")
    config = load_config(None, [f"model.path={folder}", "data.train=some/pairs.jsonl"])
    load_tokenizers(config)
    files = sorted(folder.iterdir())
    assert {"config.json", "model.safetensors", "tokenizer.json", "dpo_scale_manifest.json"} <= {f.name for f in files}
    for file in files:
        whole = file.read_bytes()
        for damaged in DAMAGES.values():
            file.write_bytes(damaged(whole))
            if file.name == "README.md":  # people edit it
                check_model_folder(folder)
                assert "README.md" in capsys.readouterr().out
            else:
                with pytest.raises(ModelError, match=file.name):
                    load_tokenizers(config)
        file.write_bytes(whole)
        if file.name not in ("README.md", "dpo_scale_manifest.json"):
            file.unlink()
            with pytest.raises(ModelError, match=f"{file.name} is missing"):
                check_model_folder(folder)
            file.write_bytes(whole)
    check_model_folder(folder)


def test_a_model_changed_on_purpose_is_loaded_without_its_manifest(tmp_path):
    folder = export(save_model(tmp_path / "start"), tmp_path / "run")
    (folder / "generation_config.json").write_text("{}")
    with pytest.raises(ModelError, match="if you changed it on purpose, remove dpo_scale_manifest.json"):
        check_model_folder(folder)
    (folder / "dpo_scale_manifest.json").unlink()
    check_model_folder(folder)


def test_a_manifest_that_names_files_elsewhere_is_refused(tmp_path):
    folder = export(save_model(tmp_path / "start"), tmp_path / "run")
    manifest = folder / "dpo_scale_manifest.json"
    for name in ("../secret", "/etc/passwd", "a/../../b", "c:\\d", ""):
        manifest.unlink()
        write_manifest(manifest, {}, {name: {"bytes": 1, "xxh3_128": "0"}})
        with pytest.raises(ModelError, match="names a file outside its folder"):
            check_model_folder(folder)


def test_pickled_weights_are_refused_with_the_way_to_convert_them(tmp_path):
    folder = save_model(tmp_path / "start")
    state = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="pytorch_model.bin: a pickled file.*python -c") as caught:
        check_model_folder(folder)
    command = re.search(r'python -c "(.*?)", and copy', str(caught.value)).group(1)
    exec(command.replace("NEW_FOLDER", str(tmp_path / "converted")))  # what the message says works
    check_model_folder(tmp_path / "converted")
    again = load_causal_lm(str(tmp_path / "converted"), dtype="float32").state_dict()
    assert all(torch.equal(again[name], value) for name, value in state.items())


def test_a_model_that_cannot_be_written_leaves_the_older_one(tmp_path, monkeypatch):
    start = save_model(tmp_path / "start")
    folder = export(start, tmp_path / "run")
    before = (folder / "README.md").read_bytes()

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("dpo_scale.disk.sealed_folder.os.fsync", full)
    with pytest.raises(TrainingError, match="could not be written.*No space left"):
        export(start, tmp_path / "run", {**RESULTS, "after": {"loss": 0.1}})
    assert (folder / "README.md").read_bytes() == before
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["model"]
