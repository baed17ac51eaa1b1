"""A model folder that brings its own code: none of it runs unless it was asked for."""

import json

import pytest
from tiny import save_model

from dpo_scale.errors import ModelError
from dpo_scale.models.load import load_causal_lm, load_model_config, load_tokenizers
from dpo_scale.settings.tree import load_config

CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
Path({marker!r}).touch()
class OwnConfig(LlamaConfig):
    model_type = "own"
class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = save_model(tmp_path / "start")
    (folder / "own.py").write_text(CODE.format(marker=str(tmp_path / "ran")))
    for name, mapped in (
        ("config.json", {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}),
        ("tokenizer_config.json", {"AutoTokenizer": ["own.OwnTokenizer", "own.OwnTokenizer"]}),
    ):
        record = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**record, "auto_map": mapped}))
    return folder


def test_code_in_a_model_folder_does_not_run_unasked(folder, tmp_path):
    load_tokenizers(load_config(None, [f"model.path={folder}", "data.train=some/pairs.jsonl"]))
    load_causal_lm(str(folder), dtype="float32")
    assert not (tmp_path / "ran").exists()


def test_a_model_that_cannot_do_without_its_code_is_refused(folder, tmp_path):
    record = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**record, "model_type": "own"}))
    with pytest.raises(ModelError, match="trust_remote_code"):
        load_model_config(str(folder))
    assert not (tmp_path / "ran").exists()
    assert load_model_config(str(folder), trust_remote_code=True).model_type == "own"
    assert (tmp_path / "ran").exists()
