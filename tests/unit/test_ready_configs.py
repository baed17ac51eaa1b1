"""The ready configs load, and the memory that their comments compute is what their formulas and settings give."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from dpo_scale.settings.deepspeed import MAX_BUCKET_ELEMENTS, policy_deepspeed_config
from dpo_scale.settings.tree import load_config

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
WITH_MEMORY = [path for path in CONFIGS if path.name.startswith(("llama", "qwen3"))]
LONG_ROWS = "llama-3.1-8b-128k"
PARAMETERS = {"8B": 8_030_261_248, "70B": 70_553_706_496, "30B": 30_532_122_624}  # Llama-3.1's and Qwen3-30B-A3B's
SHAPES = {
    "8B": {"L": 32, "H": 4096, "V": 128256, "F": 14336},
    "70B": {"L": 80, "H": 8192, "V": 128256},
    "30B": {"L": 48, "H": 2048, "V": 151936, "E": 0.623e9},  # E: 128 experts of 3 x 768 x 2048, attention, router
}


@pytest.fixture(autouse=True)
def from_the_checkout(monkeypatch):
    monkeypatch.chdir(ROOT)  # they name files from there


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_ready_config_loads_and_leaves_the_attention_to_the_machine(path):
    config = load_config(path)
    assert config.model.attn_implementation is None
    assert f"configs/{path.name}" in (ROOT / "docs" / "getting-started.md").read_text()
    for file in re.findall(r"--config (configs/\S+)", path.read_text()):
        assert file == f"configs/{path.name}"


@pytest.mark.parametrize("path", WITH_MEMORY, ids=lambda path: path.stem)
def test_configs_for_gpus_count_their_micro_batches_in_tokens_and_offload_to_pinned_memory(path):
    config = load_config(path)
    assert config.train.max_tokens_per_micro_batch == 16384
    assert config.data.max_length <= (131072 if path.stem == LONG_ROWS else 2048)
    zero = policy_deepspeed_config(config, 4, "cuda")["zero_optimization"]
    offloaded = [zero[name] for name in ("offload_optimizer", "offload_param") if name in zero]
    assert offloaded == ([{"device": "cpu", "pin_memory": True}] if "70b" in path.stem else [])


@pytest.mark.parametrize("path", WITH_MEMORY, ids=lambda path: path.stem)
def test_the_memory_in_a_comment_is_what_its_formulas_give(path):
    text, config = path.read_text(), load_config(path)
    size = re.search(r"(\d+B)(?:-A\dB)?-Instruct", config.model.path).group(1)
    (symbols,) = re.findall(r"^# (N=.*)$", text, re.MULTILINE)
    values = {name: float(value) for name, value in (item.split("=") for item in symbols.split())}
    assert values["N"] == pytest.approx(PARAMETERS[size], rel=1e-3)
    assert values["T"] == config.train.max_tokens_per_micro_batch
    assert all(values[name] == number for name, number in SHAPES[size].items() if name in values)
    if "A" in values:  # r rows in and r columns out of seven matrices of each layer
        hidden, width, key_value = values["H"], values["F"], 1024
        ends = 2 * (hidden + hidden) + 2 * (hidden + key_value) + 3 * (hidden + width)
        assert values["A"] == pytest.approx(config.lora.r * ends * values["L"], rel=1e-3)
    zero = policy_deepspeed_config(config, 4, "cuda")["zero_optimization"]
    if "B" in values:
        assert values["B"] == zero.get("reduce_bucket_size", MAX_BUCKET_ELEMENTS)
        assert values["B"] == zero.get("stage3_prefetch_bucket_size", values["B"])
    assert zero.get("stage3_max_live_parameters", 1e9) == 1e9  # as the formula has it

    values["sum"] = 0.0
    rows = re.findall(r"^# +([\d.]+)  (\S.*?)  +(\S.*)$", text, re.MULTILINE)
    assert len(rows) >= 7
    for said, formula, about in rows:
        number = eval(formula, {"__builtins__": {}}, values)
        assert number / 1e9 == pytest.approx(float(said), abs=0.06), (formula, about)
        values["sum"] += number
        if "sum" in formula:
            assert number / 1e9 < float(re.match(r"of (\d+) GB", about).group(1))
            values["sum"] = 0.0  # of the hosts, from here on


def test_the_zero_3_variant_fits_four_gpus_as_its_comment_says():
    text = (ROOT / "configs" / "llama-3.1-8b-zero3.yaml").read_text()
    said, total = (
        float(re.search(pattern, text).group(1)) for pattern in (r"on 4 GPUs ([\d.]+)", r"([\d.]+)  1\.05 \*")
    )
    assert said == pytest.approx(total + 1.05 * 18 * PARAMETERS["8B"] / 8 / 1e9, abs=0.1)


def test_a_group_of_all_8_gpus_holds_the_longest_row_of_the_config_for_long_rows():
    config = load_config(ROOT / "configs" / f"{LONG_ROWS}.yaml")
    assert config.train.sequence_parallel_size == "auto"
    second_answer = 4096  # as the comment beside data.max_length has it
    assert config.data.max_length + second_answer == 8 * config.train.max_tokens_per_micro_batch == 128 * 1024
    assert config.data.max_prompt_length + second_answer == config.data.max_length


def test_the_experts_config_needs_more_than_one_node_as_its_comment_says():
    text = (ROOT / "configs" / "qwen3-30b-a3b.yaml").read_text()
    said, total = (float(re.search(p, text).group(1)) for p in (r"on 8 GPUs ([\d.]+)", r"([\d.]+)  1\.05 \*"))
    assert said == pytest.approx(total + 1.05 * 18 * PARAMETERS["30B"] / 16 / 1e9, abs=0.1) and said > 80


def test_the_table_of_mixtures_of_experts_is_what_its_formulas_give():
    page = (ROOT / "docs" / "scale.md").read_text()
    shapes = {
        "Qwen3-30B-A3B": {**SHAPES["30B"], "P": PARAMETERS["30B"], "layer": 95},
        # layer: 128 experts of 3 x 2880 x 2880 with biases, attention with 64 + 2 x 8 heads of 64, router
        "gpt-oss-120b's shape, in bf16": {"L": 36, "H": 2880, "V": 201088, "E": 3.213e9, "P": 116.8e9, "layer": 101},
    }
    rows = re.findall(r"^\| (.*?) \|.*\| (\d+) GB \| (\d+) GB \| (\d+) GB \|$", page, re.MULTILINE)
    assert [name for name, *_ in rows][::2] == list(shapes) and len(rows) == 4
    for (name, *said), (model, offloaded) in zip(rows, [(m, o) for m in shapes.values() for o in (0, 12)], strict=True):
        for ranks, number in zip((16, 32, 64), said, strict=True):
            states = (18 - offloaded) * model["P"] / ranks
            weights = 2 * (max(model["E"], 1e9) + 2e8) + 2 * model["E"] + 4 * 2e8 + 4 * model["V"] * model["H"]
            activations = (2 * model["L"] + model["layer"]) * model["H"] * 16384 + 0.6e9
            assert 1.05 * (states + weights + activations) / 1e9 + 3 == pytest.approx(float(number), abs=0.6), name
