"""The exported folder: same weights, the model's own settings put back, and a card that says what was measured."""

import json
from types import SimpleNamespace

import pytest
import torch
from tiny import save_model, save_tokenizer, tiny_config
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from dpo_scale.config import load_config
from dpo_scale.data.tokenize import load_tokenizer
from dpo_scale.export import export_model
from dpo_scale.models.load import load_causal_lm
from dpo_scale.models.scorer import PairScorer

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
