"""Which layout and attention a run takes and why, and what the loaded model must prove."""

import pytest
import torch
import transformers
from tiny import tiny_config
from transformers import AutoModelForCausalLM

from dpo_scale import engine
from dpo_scale.config import Config
from dpo_scale.errors import ConfigError, ModelError
from dpo_scale.models import layouts
from dpo_scale.models.layouts import check_layout, choose_attention, choose_layout, install_attention, why_padded
from dpo_scale.models.scorer import PairScorer


def config_with(layout="auto", attention=None, dtype="float32"):
    config = Config()
    config.data.layout, config.model.attn_implementation, config.model.dtype = layout, attention, dtype
    return config


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "gpt2", "gemma2", "gemma3", "mistral", "gpt_oss"])
def test_known_attention_shares_prompts_by_default(architecture):
    layout, reason = choose_layout(config_with(), [tiny_config(architecture)])
    assert layout == "shared_prefix"
    assert "each prompt once" in reason and "scaled_dot_product_attention" in reason and "cpu" in reason


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
    assert choose_layout(config_with(), [make()]) == ("padded", why_padded(make()))
    assert kind in why_padded(make()) and why in why_padded(make())
    for layout in ("packed", "shared_prefix"):
        with pytest.raises(ConfigError, match=rf"data\.layout = '{layout}'.*{why}.*expected 'padded' or 'auto'"):
            choose_layout(config_with(layout), [make()])
    assert choose_layout(config_with("padded"), [make()])[0] == "padded"


def test_one_model_that_cannot_decides_for_all():
    configs = [tiny_config("llama"), transformers.MambaConfig()]
    assert choose_layout(config_with(), configs)[0] == "padded"


@pytest.mark.parametrize("asked", ["eager", "flex_attention", "flash_attention_2", "flash_attention_3"])
def test_attention_that_takes_one_sequence_a_row_on_this_device_means_padded(asked):
    layout, reason = choose_layout(config_with(attention=asked), [tiny_config("llama")])
    assert layout == "padded" and f"model.attn_implementation = {asked!r}" in reason
    with pytest.raises(ConfigError, match="attn_implementation"):
        choose_layout(config_with("packed", attention=asked), [tiny_config("llama")])


@pytest.mark.parametrize(
    ("attention", "dtype", "flash", "expected"),
    [
        (None, "bfloat16", True, "varlen"),
        (None, "float32", True, "flex"),
        (None, "bfloat16", False, "flex"),
        ("sdpa", "bfloat16", True, "blocks"),
        ("flex_attention", "bfloat16", True, "flex"),
        ("flash_attention_2", "bfloat16", True, "varlen"),
        ("flash_attention_2", "bfloat16", False, None),
        ("eager", "bfloat16", True, None),
    ],
)
def test_on_cuda_the_fastest_that_is_installed(attention, dtype, flash, expected, monkeypatch):
    monkeypatch.setattr(engine, "device", lambda: torch.device("cuda"))
    monkeypatch.setattr(layouts, "find_spec", lambda name: object() if flash and name == "flash_attn" else None)
    assert choose_attention(config_with(attention=attention, dtype=dtype))[0] == expected


class Engine:
    """Stands where DeepSpeed's engine would."""

    def __init__(self, module):
        self.module, self.eval, self.train = module, module.eval, module.train

    def __call__(self, **inputs):
        return self.module(**inputs)


def loaded(architecture, layout="shared_prefix"):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(architecture))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(4)
    config = config_with(layout)
    install_attention(model, config)
    return model, Engine(PairScorer(model, layout=layout).train()), config


@pytest.mark.parametrize("layout", ["packed", "shared_prefix"])
@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2"])
def test_a_right_model_passes_and_is_left_as_it_was(architecture, layout):
    model, scorer, config = loaded(architecture, layout)
    check_layout(scorer, model, config)
    assert model.training and model.config._attn_implementation == "dpo_scale_blocks"


@pytest.mark.parametrize("layout", ["packed", "shared_prefix"])
def test_a_model_that_mixes_neighbours_outside_its_attention_is_refused(layout):
    model, scorer, config = loaded("llama", layout)
    # a convolution over the row, as in hybrids of attention and state
    model.model.layers[0].mlp.register_forward_hook(lambda module, inputs, output: output + output.roll(1, dims=1))
    with pytest.raises(ModelError, match=r"log-probs of separate sequences.*data\.layout=padded"):
        check_layout(scorer, model, config)


def test_padded_runs_keep_the_models_own_attention():
    model, scorer, config = loaded("llama", "padded")
    check_layout(scorer, model, config)
    assert model.config._attn_implementation == "sdpa"


def test_what_padding_alone_changes_is_allowed_to_a_layout_too():
    model, scorer, config = loaded("llama")

    class Rounding(Engine):
        """Values that depend on the shape of the batch, as those of a deep model in bf16 do."""

        def __call__(self, **inputs):
            values = self.module(**inputs)
            draw = torch.Generator().manual_seed(sum(inputs["input_ids"].shape))
            return values + self.size * torch.randn(len(values), generator=draw)

    coarse = Rounding(scorer.module)
    coarse.size = 0.1
    check_layout(coarse, model, config)
    coarse.size = 1.0
    with pytest.raises(ModelError, match="log-probs of separate sequences"):
        check_layout(coarse, model, config)
