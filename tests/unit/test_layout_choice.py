"""Which layout and attention a run takes and why, and what the loaded model must prove."""

import sys
import types

import pytest
import torch
import transformers
import varlen_kernels
from tiny import tiny_config

from dpo_scale.distributed import ranks
from dpo_scale.errors import ConfigError, ModelError
from dpo_scale.models.layout_choice import (
    LayoutOption,
    attention_options,
    choose_layout,
    why_padded,
)
from dpo_scale.settings.tree import Config

PADDED = ("padded", None)


def config_with(layout="auto", attention=None, dtype="float32"):
    config = Config()
    config.data.layout, config.model.attn_implementation, config.model.dtype = layout, attention, dtype
    return config


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "gpt2", "gemma2", "gemma3", "mistral", "gpt_oss"])
def test_known_attention_shares_prompts_by_default(architecture):
    config = config_with()
    option = choose_layout(config, [tiny_config(architecture)]).option
    assert option.layout == config.data.layout == "shared_prefix"
    for word in ("each prompt once", "scaled_dot_product_attention", "cpu"):
        assert word in option.describe()


def foreign_config():
    class OwnConfig(transformers.PreTrainedConfig):
        model_type = "own"

    return OwnConfig()


OTHERS = {
    "mamba": (lambda: transformers.MambaConfig(), "has layers"),
    "qwen3_next": (lambda: transformers.Qwen3NextConfig(), "layers of linear_attention"),
    "llama4": (lambda: transformers.Llama4TextConfig(), "layers of chunked_attention"),
    "bloom": (lambda: transformers.BloomConfig(), "cannot be replaced"),
    "nemotron": (lambda: transformers.NemotronConfig(), "does not hand"),
    "own": (foreign_config, "not transformers' own"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_models_run_padded_with_the_reason_or_are_refused_by_name(kind):
    make, why = OTHERS[kind]
    assert choose_layout(config_with(), [make()]).option == LayoutOption("padded", None, why_padded(make()))
    assert kind in why_padded(make()) and why in why_padded(make())
    for layout in ("packed", "shared_prefix"):
        with pytest.raises(ConfigError, match=rf"data\.layout = '{layout}'.*{why}.*expected 'padded' or 'auto'"):
            choose_layout(config_with(layout), [make()])
    assert choose_layout(config_with("padded"), [make()]).option.layout == "padded"


def test_one_model_that_cannot_decides_for_all():
    configs = [tiny_config("llama"), transformers.MambaConfig()]
    assert choose_layout(config_with(), configs).option.layout == "padded"


@pytest.mark.parametrize("asked", ["eager", "flex_attention", "flash_attention_2", "flash_attention_3"])
def test_attention_that_takes_one_sequence_a_row_on_this_device_means_padded(asked):
    option = choose_layout(config_with(attention=asked), [tiny_config("llama")]).option
    assert option.layout == "padded" and f"model.attn_implementation = {asked!r}" in option.reason
    with pytest.raises(ConfigError, match="attn_implementation"):
        choose_layout(config_with("packed", attention=asked), [tiny_config("llama")])


@pytest.mark.parametrize("layout", ["auto", "padded", "packed"])
def test_attention_that_transformers_does_not_have_is_refused_where_rows_are_padded(layout):
    with pytest.raises(ConfigError, match="'varlen_attention'"):
        choose_layout(config_with(layout, attention="varlen_attention"), [tiny_config("llama")])


# packages: of flash-attn and of torch's kernel, "broken": there, but it cannot be imported
@pytest.mark.parametrize(
    ("attention", "dtype", "flash", "torchs", "expected"),
    [
        (None, "bfloat16", "there", "there", ["fa_varlen", "varlen", "flex"]),
        (None, "bfloat16", "missing", "there", ["varlen", "flex"]),
        (None, "float16", "broken", "there", ["varlen", "flex"]),
        (None, "bfloat16", "there", "old", ["fa_varlen", "flex"]),
        (None, "bfloat16", "missing", "old", ["flex"]),
        (None, "float32", "there", "there", ["flex"]),
        ("sdpa", "bfloat16", "there", "there", ["blocks"]),
        ("flex_attention", "bfloat16", "there", "there", ["flex"]),
        ("flash_attention_2", "bfloat16", "there", "there", ["fa_varlen"]),
        ("flash_attention_2", "bfloat16", "missing", "there", [None]),
        ("flash_attention_2", "bfloat16", "broken", "there", [None]),
        ("varlen_attention", "bfloat16", "there", "there", ["varlen"]),
        ("varlen_attention", "bfloat16", "there", "old", [None]),
        ("eager", "bfloat16", "there", "there", [None]),
    ],
)
def test_on_cuda_the_fastest_that_is_there_comes_first(attention, dtype, flash, torchs, expected, monkeypatch):
    monkeypatch.setattr(ranks, "device", lambda: torch.device("cuda"))
    kernel = varlen_kernels.varlen_attn_2_10 if torchs == "old" else None
    varlen_kernels.install(monkeypatch, "torch 2.12", kernel)
    varlen_kernels.install(monkeypatch, "flash-attn 2.8")
    if flash == "missing":
        monkeypatch.setitem(sys.modules, "flash_attn", None)
    if flash == "broken":

        class Broken(types.ModuleType):
            def __getattr__(self, name):
                raise ImportError("flash_attn_2_cuda.so: undefined symbol: _ZN3c104cuda9SetDeviceEi\n (and more)")

        monkeypatch.setitem(sys.modules, "flash_attn", Broken("flash_attn"))
    options = attention_options(config_with(attention=attention, dtype=dtype))
    assert [backend for backend, _ in options] == expected
    reasons = " ".join(reason for _, reason in options)
    if attention is not None:
        assert f"model.attn_implementation = {attention!r}" in reasons
    elif dtype == "float32":
        assert "float32" in reasons
    else:
        assert {"there": "fastest", "missing": "not installed", "broken": "undefined symbol"}[flash] in reasons
        assert ("takes no scale or no window" in reasons) == (torchs == "old")
    assert "\n" not in reasons


@pytest.mark.parametrize(
    ("layout", "attention", "expected"),
    [
        (
            "auto",
            None,
            [("shared_prefix", "fa_varlen"), ("shared_prefix", "varlen"), ("shared_prefix", "flex"), PADDED],
        ),
        ("packed", None, [("packed", "fa_varlen"), ("packed", "varlen"), ("packed", "flex")]),
        ("auto", "flex_attention", [("shared_prefix", "flex")]),
        ("shared_prefix", "varlen_attention", [("shared_prefix", "varlen")]),
        ("padded", None, [PADDED]),
    ],
)
def test_what_the_config_leaves_open_may_be_exchanged_and_nothing_else(layout, attention, expected, monkeypatch):
    monkeypatch.setattr(ranks, "device", lambda: torch.device("cuda"))
    varlen_kernels.install(monkeypatch, "torch 2.12")
    varlen_kernels.install(monkeypatch, "flash-attn 2.8")
    config = config_with(layout, attention, "bfloat16")
    choice = choose_layout(config, [tiny_config("llama")])
    taken = [(choice.option.layout, choice.option.backend)]
    while len(taken) < len(expected):
        choice.give_up("model", "why")
        taken.append((choice.option.layout, choice.option.backend))
        assert config.data.layout == choice.option.layout
    assert taken == expected
    if expected[-1] != PADDED:
        with pytest.raises(ModelError, match=f"model: data.layout = '{expected[-1][0]}'.*why; set data.layout=padded"):
            choice.give_up("model", "why")
