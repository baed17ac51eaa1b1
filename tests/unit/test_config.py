"""Configs: strict reading, overrides, helpful refusals, and a saved file that reproduces the run."""

import datetime
import subprocess
import sys
import time
from dataclasses import fields, is_dataclass

import pytest
import yaml

from dpo_scale.errors import ConfigError
from dpo_scale.settings.fields import described, setting
from dpo_scale.settings.reader import build, list_sections, to_mapping
from dpo_scale.settings.tree import Config, load_config

MINIMAL = ["model.path=some/model", "data.train=pairs.jsonl"]


def refusal(*overrides, file=None):
    with pytest.raises(ConfigError) as caught:
        load_config(file, [*MINIMAL, *overrides])
    return str(caught.value)


def test_file_then_overrides_then_defaults(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("model: {path: a/b}\ndata: {train: x.jsonl}\ntrain: {learning_rate: 5e-7, seed: 7}\n")
    config = load_config(path, ["train.seed=8", "loss.loss_type=[sigmoid, sft]", "loss.loss_weights=[1, 0.2]"])
    assert config.train.learning_rate == 5e-7  # YAML 1.1 reads 5e-7 as text
    assert config.train.seed == 8
    assert config.loss.loss_types == ["sigmoid", "sft"]
    assert config.train.max_grad_norm == 1.0
    assert [source.path for source in config.data.train] == ["x.jsonl"]


def test_sources_may_be_text_lists_or_mappings():
    config = load_config(None, ["model.path=m", "data.train=[a.jsonl, {path: b.csv, weight: 0.5}]"])
    assert [(source.path, source.weight) for source in config.data.train] == [("a.jsonl", 1.0), ("b.csv", 0.5)]


def test_resolved_file_reproduces_the_config(tmp_path):
    json_file = tmp_path / "ds.json"
    json_file.write_text(
        '{"zero_optimization": {"stage": 3, "reduce_bucket_size": "auto"}, "train_batch_size": "auto"}'
    )
    config = load_config(None, [*MINIMAL, f"deepspeed.config={json_file}", "loss.loss_type=[sigmoid, sft]"])
    config.save(tmp_path / "config.yaml")
    json_file.unlink()  # the saved file must not depend on it
    again = load_config(tmp_path / "config.yaml")
    assert to_mapping(again) == to_mapping(config)
    assert again.deepspeed.stage == 3


def test_default_output_folder_is_named_after_the_config_and_the_time(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({"model": {"path": "m"}, "data": {"train": "x"}}))
    config = load_config(path, now=datetime.datetime(2024, 5, 6, 7, 8, 9))
    assert config.output_dir == "runs/mine-20240506-070809"


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("train.lerning_rate=1", ["train.lerning_rate", "train.learning_rate"]),
        ("beta=0.1", ["beta", "loss.beta"]),
        ("train.beta=0.1", ["train.beta", "loss.beta"]),
        ("modle.path=x", ["modle", "model"]),
        ("model.model_name_or_path=x", ["model.path"]),
        ("train.use_liger_kernel=true", ["model.liger"]),
        ("model.liger=maybe", ["model.liger", "maybe", "'auto'", "true or false"]),
        ("train.max_steps=many", ["train.max_steps", "'many'", "whole number"]),
        ("train.max_steps=0", ["train.max_steps", "0", "at least 1"]),
        ("train.seed=true", ["train.seed", "True", "whole number"]),
        ("deepspeed.stage=4", ["deepspeed.stage", "4", "0, 1, 2, 3"]),
        ("deepspeed.stage=true", ["deepspeed.stage", "True"]),
        ("model.dtype=bfloat61", ["model.dtype", "bfloat61", "did you mean 'bfloat16'"]),
        (
            "train.learning_rate=.nan",
            ["train.learning_rate = nan: expected a number, at least 0, found a number that is"],
        ),
        ("train.optim=adamw_torhc", ["train.optim", "adamw_torch"]),
        ("loss.loss_type=sigmoyd", ["loss.loss_type", "sigmoyd", "sigmoid"]),
        ("train=5", ["train = 5", "section"]),
        ("train.eval_steps=5", ["train.eval_steps", "data.eval"]),
        ("deepspeed.offload_param=cpu", ["deepspeed.offload_param", "stage 3"]),
        ("reference.offload_param=cpu", ["reference.offload_param", "reference.stage is 3"]),
        ("reference.seconds_per_shard=-1", ["reference.seconds_per_shard", "-1", "at least 0 (how often"]),
        ("reference.seconds_per_shard=.inf", ["reference.seconds_per_shard", "inf", "number"]),
        ("reference.seconds_per_shard=.nan", ["reference.seconds_per_shard", "nan", "number"]),
        (
            "reference.seconds_per_shard=soon",
            ["reference.seconds_per_shard", "'soon'", "number of seconds, at least 0"],
        ),
        ("reference.seconds_per_shard=null", ["reference.seconds_per_shard", "None", "number"]),
        ("deepspeed.stage=0", ["deepspeed.stage", "bfloat16"]),
        ("train.max_tokens_per_micro_batch=0", ["train.max_tokens_per_micro_batch", "0", "at least 1"]),
        (
            "model.gradient_checkpointing_offload=true",
            ["gradient_checkpointing_offload", "gradient_checkpointing=true"],
        ),
        ("train.reduce_dtype=float16", ["train.reduce_dtype", "float16", "'float32', 'bfloat16'"]),
        ("deepspeed.bf16_optimizer_states=1", ["deepspeed.bf16_optimizer_states", "1", "true or false"]),
        ("lora.dropout=1", ["lora.dropout = 1: expected a number, at least 0 and below 1 ("]),
        ("reference.sync_mixup=0", ["reference.sync_mixup = 0: expected a number, above 0 and at most 1 ("]),
        ("train.seed=9223372036854775808", ["train.seed", "below 9223372036854775808"]),
        ("logging.console_metrics=[loss, lss]", ["logging.console_metrics[1] = 'lss': expected one of loss, "]),
        ("checkpoint.allow_changes=train.seed", ["checkpoint.allow_changes[0] = 'train.seed'", "a setting of loss"]),
        (
            "logging.peak_tflops=0",
            ["logging.peak_tflops = 0: expected null or a number of TFLOP/s, above 0 (peak of a rank's device"],
        ),
        ("noequals", ["noequals", "section.key=value"]),
    ],
)
def test_refusals_name_key_value_and_what_is_allowed(override, parts):
    message = refusal(override)
    for part in parts:
        assert part in message, message


@pytest.mark.parametrize("loss", ("loss.loss_type=aot", "loss.use_weighting=true"))
def test_the_fused_pair_loss_is_refused_for_a_loss_that_is_no_function_of_a_pairs_sums(loss):
    assert "logprobs.pair_loss" in refusal("logprobs.pair_loss=fused", loss)


def test_a_budget_of_tokens_and_a_number_of_pairs_exclude_each_other():
    budget = "train.max_tokens_per_micro_batch=4096"
    assert "train.micro_batch_size = 4" in refusal(budget, "train.micro_batch_size=4")


@pytest.mark.parametrize(
    "overrides",
    [
        ["model.gradient_checkpointing=true", "model.gradient_checkpointing_offload=true"],
        ["model.liger=true"],
    ],
)
def test_compiled_layers_are_refused_with_what_they_do_not_go_with(overrides):
    message = refusal("model.compile=true", *overrides)
    assert message.startswith(overrides[-1].partition("=")[0]) and "model.compile" in message


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["model.dtype=float32"], ["model.dtype = 'float32'", "bfloat16 with"]),
        (["deepspeed.stage=1"], ["deepspeed.stage = 1", "2 or 3 with", "fp32 copies"]),
        (["train.optim=Lion"], ["train.optim = 'Lion'", "adamw_torch or Adam or AdamW"]),
        (
            ["deepspeed.offload_optimizer=cpu"],
            ["train.optim = 'adamw_torch'", "Adam or AdamW with", "offload_optimizer"],
        ),
    ],
)
def test_bf16_optimizer_states_are_refused_with_what_deepspeed_has_none_for(overrides, parts):
    message = refusal("deepspeed.bf16_optimizer_states=true", *overrides)
    for part in [*parts, "deepspeed.bf16_optimizer_states"]:
        assert part in message, message


def test_reference_model_is_refused_for_a_loss_that_needs_none():
    assert "reference.model" in refusal("loss.loss_type=simpo", "reference.model=other")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("train: {seed: 1, seed: 2}", ["'seed'", "twice"]),
        ("train: [", ["not valid YAML"]),
        ("- a\n- b", ["expected sections"]),
        ("train: {seed: !!python/object/apply:os.system ['true']}", ["not valid YAML"]),
    ],
)
def test_a_malformed_file_is_named(tmp_path, text, parts):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    message = refusal(file=path)
    for part in [str(path), *parts]:
        assert part in message, message


def test_missing_and_binary_files_are_named(tmp_path):
    assert "no such config file" in refusal(file=tmp_path / "none.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    assert "UTF-8" in refusal(file=tmp_path / "binary.yaml")


def test_every_option_survives_a_round_trip_through_its_type():
    mapping = to_mapping(Config())
    assert to_mapping(build(Config, mapping)) == mapping


def test_every_option_is_described_and_its_default_lies_in_its_range():
    options = [option for _, _, section in list_sections(Config) for option in section]
    assert len(options) > 90
    assert [option.key for option in options if not option.meaning] == []
    for section in fields(Config):
        holder = getattr(Config(), section.name)
        for field in fields(holder) if is_dataclass(holder) else ():
            assert described(field).allows(getattr(holder, field.name)), field.name


def test_a_range_holds_at_its_ends_and_not_beyond_them():
    closed = described(setting(0, "", at_least=0, at_most=1))
    assert [closed.allows(value) for value in (-1e-9, 0, 1, 1 + 1e-9)] == [False, True, True, False]
    opened = described(setting(0.5, "", above=0, below=1))
    assert [opened.allows(value) for value in (0, 1e-9, 1 - 1e-9, 1)] == [False, True, True, False]
    assert opened.allows(None)


def test_help_is_quick_and_loads_no_torch():
    code = (
        "import sys, runpy; sys.argv = ['train.py', '--help']\n"
        "try: runpy.run_path('launch/train.py', run_name='__main__')\n"
        "except SystemExit: pass\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert time.monotonic() - started < 2  # 0.1 s on a machine that does nothing else
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    for line in (
        "  train.learning_rate=1e-06  # the highest rate, reached after the warm-up (a number, at least 0)",
        "  train.max_steps=null  # length of training; overrides num_train_epochs "
        "(null or a whole number of steps, at least 1)",
        "  data.train=[]  # sources of training pairs (a list of sources)",
    ):
        assert line in lines
    assert len([line for line in lines if "=" in line and "  # " in line]) > 90
