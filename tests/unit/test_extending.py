"""The examples of docs/extending.md, run as they stand there: each adds what it says, and that works."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
from tiny import tiny_config
from tokenizers_for_tests import byte_level
from transformers import AutoModelForCausalLM

from dpo_scale import losses
from dpo_scale.data.dataset import load_pairs
from dpo_scale.data.schemas import SCHEMAS
from dpo_scale.distributed import ranks
from dpo_scale.errors import DataError, ModelError
from dpo_scale.models.attention_backends import BACKENDS, log_once, use_attention
from dpo_scale.models.layout_choice import choose_layout, install_attention, prove_layout
from dpo_scale.models.scorer import PairScorer
from dpo_scale.settings.data import DataSettings, SourceSettings
from dpo_scale.settings.loss import LOSSES, LossSettings
from dpo_scale.settings.tree import Config
from dpo_scale.training.evaluate import evaluate

PAGE = Path(__file__).resolve().parents[2] / "docs" / "extending.md"


@pytest.fixture(autouse=True)
def tables():
    """The tables that the examples add to, which are as they were afterwards."""
    tables = [LOSSES, losses.FORMULAS, SCHEMAS, BACKENDS]
    kept = [dict(table) for table in tables]
    yield
    for table, before in zip(tables, kept, strict=True):
        table.clear()
        table.update(before)


def run_example(heading):
    """The names that the Python of one section of the page defines."""
    section = re.search(rf"^## {heading}\n(.*?)(?=^## |\Z)", PAGE.read_text(), re.MULTILINE | re.DOTALL)[1]
    [code] = re.findall(r"^```python\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
    names = {}
    exec(compile(code, f"{PAGE.name}, {heading}", "exec"), names)
    return names


def test_the_loss_has_its_value_its_gradient_and_its_metrics():
    run_example("A loss")
    settings = LossSettings(loss_type=["simper", "sigmoid"], loss_weights=[1.0, 0.0], beta=0.5)
    settings.validate()
    assert not LossSettings(loss_type="simper").needs_reference
    policy = torch.tensor([[-12.0, -15.0], [-30.5, -28.0]], dtype=torch.float64, requires_grad=True)
    lengths = torch.tensor([[4, 6], [10, 7]])
    loss, metrics = losses.preference_loss(policy, None, lengths, LossSettings(loss_type="simper", beta=0.5))
    by_hand = [math.exp(-15 / 6) - math.exp(-12 / 4), math.exp(-28 / 7) - math.exp(-30.5 / 10)]
    assert loss.tolist() == pytest.approx(by_hand, rel=1e-12)
    (gradient,) = torch.autograd.grad(loss.sum(), policy)
    assert gradient[0].tolist() == pytest.approx([-math.exp(-3) / 4, math.exp(-2.5) / 6], rel=1e-12)
    assert metrics["rewards/chosen"].tolist() == pytest.approx([0.5 * -3, 0.5 * -3.05])
    _, both = losses.preference_loss(policy, torch.zeros_like(policy), lengths, settings)
    assert both["loss/simper"].tolist() == pytest.approx(by_hand, rel=1e-12)
    assert sorted(both) == sorted(settings.metric_names)


def numbered(prompt, *responses, better):
    return {"prompt": prompt, "response_0": responses[0], "response_1": responses[1], "better_response_id": better}


def test_a_file_is_read_with_the_schema(tmp_path):
    run_example("A data schema")
    rows = [numbered("Hi? ", "No.", "Yes.", better=1), numbered("So? ", "Fine.", "Bad.", better=0)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = DataSettings(train=[SourceSettings(str(tmp_path / "train.jsonl"))], cache_dir=str(tmp_path / "cache"))
    tokenizer, lines = byte_level(), []
    data = load_pairs(settings, tokenizer, seed=0, log=lines.append, report_dir=tmp_path).train
    end = tokenizer.eos_token
    texts = [[tokenizer.decode(ids) for ids in (p.prompt_ids, p.chosen_ids, p.rejected_ids)] for p in data]
    assert texts == [["Hi? ", f"Yes.{end}", f"No.{end}"], ["So? ", f"Fine.{end}", f"Bad.{end}"]]
    assert "schema numbered (prompt, response_0, response_1, better_response_id)" in lines[0]

    (tmp_path / "train.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in [*rows, {**rows[0], "better_response_id": 2}])
    )
    with pytest.raises(DataError, match="train.jsonl row 3: field 'better_response_id' is 2, expected 0 or 1"):
        load_pairs(settings, tokenizer, seed=0, log=lines.append, report_dir=tmp_path)


class Engine:
    """Stands where DeepSpeed's engine would."""

    def __init__(self, module):
        self.module, self.eval, self.train = module, module.eval, module.train

    def __call__(self, **inputs):
        return self.module(**inputs)


def prove(architecture, layout):
    """Check a model, as a run does that asks for the example's back end by name; the choice that it was checked for."""
    torch.manual_seed(0)
    config = Config()
    config.data.layout, config.model.attn_implementation, config.model.dtype = layout, "dense_attention", "float32"
    model = AutoModelForCausalLM.from_config(tiny_config(architecture))
    choice = choose_layout(config, [model.config])
    install_attention(model, choice.option)
    prove_layout(choice, Engine(PairScorer(model, layout=layout).train()), "float32")
    return choice


@pytest.mark.parametrize("layout", ["packed", "shared_prefix"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2", "gpt_oss"])
def test_the_attention_back_end_keeps_sequences_apart(architecture, layout, monkeypatch):
    names, lines, calls = run_example("An attention back end"), [], []
    monkeypatch.setattr(ranks, "log", lines.append)
    log_once.cache_clear()
    checked = names["checked_plan"]
    names["checked_plan"] = lambda *arguments: calls.append(1) or checked(*arguments)
    choice = prove(architecture, layout)
    assert choice.option.backend == "dense" and "one mask for the whole row" in choice.option.describe()
    beyond = {"gemma2": "soft-capped scores", "gpt_oss": "attention sinks"}.get(architecture)
    assert bool(calls) == (beyond is None)
    assert all("one mask for the whole row does not support" in line for line in lines)
    assert (beyond is None) == (not lines) and (beyond is None or any(beyond in line for line in lines))


def test_an_attention_back_end_that_mixes_branches_is_refused():
    names = run_example("An attention back end")
    checked = names["checked_plan"]

    def without_branches(*arguments):
        plan = checked(*arguments)
        plan.branch_ids = torch.zeros_like(plan.branch_ids)
        return plan

    names["checked_plan"] = without_branches
    with pytest.raises(ModelError, match=r"one mask for the whole row fails its check.*data\.layout=padded"):
        prove("llama", "shared_prefix")


def test_the_reference_gives_an_evaluation_its_values(tmp_path):
    reference = run_example("A reference mode")["UniformReference"](384)
    rows = [
        {"prompt": "Hi? ", "chosen": "Yes.", "rejected": "Not at all."},
        {"prompt": "So", "chosen": "a", "rejected": "b"},
    ]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = DataSettings(train=[SourceSettings(str(tmp_path / "train.jsonl"))], cache_dir=str(tmp_path / "cache"))
    data = load_pairs(settings, byte_level(), seed=0, log=lambda line: None).train
    config = Config()
    config.data.layout = "shared_prefix"
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config("llama"))
    use_attention(model, "blocks")
    metrics = evaluate(Engine(PairScorer(model, layout="shared_prefix")), reference, data, config, pad_token_id=0)
    tokens = data.lengths[:, 1:].sum() / (2 * len(data))
    policy = (metrics["logps/chosen"] + metrics["logps/rejected"]) / 2
    rewards = (metrics["rewards/chosen"] + metrics["rewards/rejected"]) / 2
    assert rewards == pytest.approx(config.loss.beta * (policy + math.log(384) * tokens), rel=1e-5)
