"""What a loaded model must prove of its layout and attention, and what a run does where it cannot."""

from dataclasses import replace

import pytest
import torch
import varlen_kernels
from tiny import tiny_config
from transformers import AutoModelForCausalLM

from dpo_scale.distributed import ranks
from dpo_scale.errors import ModelError
from dpo_scale.models import layout_check, varlen_attention
from dpo_scale.models.attention import Limits, blockwise_attention
from dpo_scale.models.attention_backends import BACKENDS
from dpo_scale.models.layout_choice import LayoutChoice, LayoutOption, choose_layout, install_attention, prove_layout
from dpo_scale.models.scorer import PairScorer
from dpo_scale.settings.tree import Config

PADDED = LayoutOption("padded", None, "the last")


def config_with(layout="auto"):
    config = Config()
    config.data.layout, config.model.dtype = layout, "float32"
    return config


class Engine:
    """Stands where DeepSpeed's engine would."""

    def __init__(self, module):
        self.module, self.eval, self.train = module, module.eval, module.train

    def __call__(self, **inputs):
        return self.module(**inputs)


def loaded(architecture, layout="shared_prefix", **settings):
    """A model, an engine around it, and the choice that it was loaded for, on a CPU."""
    torch.manual_seed(0)
    config = tiny_config(architecture)
    config.update(settings)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(4)
    choice = choose_layout(config_with(layout), [model.config])
    install_attention(model, choice.option)
    return model, Engine(PairScorer(model, layout=choice.option.layout).train()), choice


@pytest.mark.parametrize("layout", ["packed", "shared_prefix"])
@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2"])
def test_a_right_model_passes_and_is_left_as_it_was(architecture, layout):
    model, scorer, choice = loaded(architecture, layout)
    prove_layout(choice, scorer, "float32")
    assert model.training and model.config._attn_implementation == "dpo_scale_blocks"


@pytest.mark.parametrize("layout", ["packed", "shared_prefix"])
def test_a_model_that_mixes_neighbours_outside_its_attention_is_refused(layout):
    model, scorer, choice = loaded("llama", layout)
    # a convolution over the row, as in hybrids of attention and state
    model.model.layers[0].mlp.register_forward_hook(lambda module, inputs, output: output + output.roll(1, dims=1))
    with pytest.raises(ModelError, match=r"log-probs of separate sequences.*data\.layout=padded"):
        prove_layout(choice, scorer, "float32")


def test_padded_runs_keep_the_models_own_attention():
    model, scorer, choice = loaded("llama", "padded")
    prove_layout(choice, scorer, "float32")
    assert model.config._attn_implementation == "sdpa"


def test_what_padding_alone_changes_is_allowed_to_a_layout_too():
    model, scorer, choice = loaded("llama")

    class Rounding(Engine):
        """Values that depend on the shape of the batch, as those of a deep model in bf16 do."""

        def __call__(self, **inputs):
            values = self.module(**inputs)
            draw = torch.Generator().manual_seed(sum(inputs["input_ids"].shape))
            return values + self.size * torch.randn(len(values), generator=draw)

    coarse = Rounding(scorer.module)
    coarse.size = 0.1
    prove_layout(choice, coarse, "float32")
    coarse.size = 1.0
    with pytest.raises(ModelError, match="log-probs of separate sequences"):
        prove_layout(choice, coarse, "float32")


def test_a_model_of_few_positions_is_checked_with_rows_that_fit():
    model, scorer, choice = loaded("gpt2", n_positions=48)
    prove_layout(choice, scorer, "float32")
    assert choice.option.layout == "shared_prefix"


def raising(*_, **__):
    raise RuntimeError("LoweringException: NoValidChoicesError: no choices to select\n  target: flex_attention")


def raising_on_long_rows(module, query, *arguments, **settings):
    return (raising if query.shape[2] > 128 else blockwise_attention)(module, query, *arguments, **settings)


def half_of_it(*arguments, **settings):
    return blockwise_attention(*arguments, **settings)[0] / 2, None


def wrong_backward(module, query, *arguments, **settings):
    output, _ = blockwise_attention(module, query, *arguments, **settings)
    return output + (query - query.detach()).transpose(1, 2), None


BROKEN = {
    raising: "RuntimeError: LoweringException: NoValidChoicesError: no choices to select",
    raising_on_long_rows: "RuntimeError: LoweringException: NoValidChoicesError: no choices to select",
    half_of_it: "does not give the log-probs of separate sequences",
    wrong_backward: "its gradient of queries is wrong",
}


@pytest.fixture
def lines(monkeypatch):
    """What is logged."""
    logged = []
    monkeypatch.setattr(ranks, "log", logged.append)
    return logged


def broken_backend(monkeypatch, function):
    """Make `varlen` a back end that does something else."""
    monkeypatch.setitem(BACKENDS, "varlen", replace(BACKENDS["varlen"], attend=function, limits=Limits))


def choice_of(*options):
    config = config_with()
    return config, LayoutChoice(config, options)


def with_choice(scorer, choice):
    scorer.module.layout = choice.option.layout
    install_attention(scorer.module.model, choice.option)
    return scorer


@pytest.mark.parametrize("function", BROKEN)
def test_attention_that_fails_is_replaced_by_the_next_and_the_log_says_why(function, monkeypatch, lines):
    broken_backend(monkeypatch, function)
    model, scorer, _ = loaded("llama")
    config, choice = choice_of(
        LayoutOption("shared_prefix", "varlen", "a"), LayoutOption("shared_prefix", "blocks", "the next"), PADDED
    )
    prove_layout(choice, with_choice(scorer, choice), "float32")
    assert config.data.layout == scorer.module.layout == "shared_prefix"
    assert model.config._attn_implementation == "dpo_scale_blocks" and model.training
    failed, taken = lines
    assert "LlamaForCausalLM: data.layout = 'shared_prefix' with attention by torch's variable-length" in failed
    assert BROKEN[function] in failed and "\n" not in failed
    assert "sequence by sequence (the next)" in taken
    prove_layout(choice, scorer, "float32")
    assert len(lines) == 2


@pytest.mark.parametrize("function", BROKEN)
def test_where_no_attention_is_right_rows_are_padded_and_the_models_own_is_back(function, monkeypatch, lines):
    broken_backend(monkeypatch, function)
    model, scorer, _ = loaded("llama")
    config, choice = choice_of(LayoutOption("shared_prefix", "varlen", "a"), PADDED)
    prove_layout(choice, with_choice(scorer, choice), "float32")
    assert config.data.layout == scorer.module.layout == "padded"
    assert model.config._attn_implementation == "sdpa" and lines[-1] == "layout padded: the last"


@pytest.mark.parametrize("function", BROKEN)
def test_attention_asked_for_by_name_that_fails_ends_the_run(function, monkeypatch, lines):
    broken_backend(monkeypatch, function)
    _, scorer, _ = loaded("llama")
    _, choice = choice_of(LayoutOption("shared_prefix", "varlen", "a"))
    with pytest.raises(ModelError, match=rf"LlamaForCausalLM.*{BROKEN[function]}.*data\.layout=padded"):
        prove_layout(choice, with_choice(scorer, choice), "float32")


def test_a_model_that_is_only_scored_is_not_asked_for_gradients(monkeypatch, lines):
    broken_backend(monkeypatch, wrong_backward)
    _, scorer, _ = loaded("llama")
    scorer.eval()
    _, choice = choice_of(LayoutOption("shared_prefix", "varlen", "a"), PADDED)
    prove_layout(choice, with_choice(scorer, choice), "float32")
    assert choice.option.backend == "varlen" and not lines


def test_a_failure_on_another_rank_is_a_failure_here(monkeypatch, lines):
    _, scorer, choice = loaded("llama", "auto")
    monkeypatch.setattr(ranks, "gather_objects", lambda mine: [mine, "no kernel image for this device"])
    prove_layout(choice, scorer, "float32")
    assert choice.option.layout == "padded" and "no kernel image for this device (on rank 1)" in lines[0]


def test_the_policy_follows_a_reference_that_fails(monkeypatch, lines):
    broken_backend(monkeypatch, lambda module, query, key, *rest, **settings: (  # not with 4 heads to 4
        raising() if query.shape[1] == key.shape[1] else blockwise_attention(module, query, key, *rest, **settings)
    ))  # fmt: skip
    policy, reference = loaded("llama")[1], loaded("llama", num_key_value_heads=4)[1]
    _, choice = choice_of(
        LayoutOption("shared_prefix", "varlen", "a"), LayoutOption("shared_prefix", "blocks", "b"), PADDED
    )
    prove_layout(choice, with_choice(policy, choice), "float32")
    assert choice.option.backend == "varlen"
    prove_layout(choice, with_choice(reference, choice), "float32", beside=[policy])
    for scorer in (policy, reference):
        assert scorer.module.model.config._attn_implementation == "dpo_scale_blocks"
    assert len(lines) == 2


@pytest.mark.parametrize("sharpness", [1, 100])
@pytest.mark.parametrize("architecture", ["llama", "gemma2", "mistral", "gpt_oss"])
def test_rounding_to_16_bits_is_no_wrong_gradient(architecture, sharpness, monkeypatch, lines):
    def rounding(module, query, key, value, *arguments, **settings):
        rounded = (tensor.bfloat16() for tensor in (query, key, value))
        if settings.get("s_aux") is not None:
            settings["s_aux"] = settings["s_aux"].bfloat16()
        output, _ = blockwise_attention(module, *rounded, *arguments, **settings)
        return output.to(query.dtype), None

    broken_backend(monkeypatch, rounding)
    monkeypatch.setitem(layout_check._ALLOWED_IN_GRADIENT, torch.float32, 5e-2)
    model, scorer, _ = loaded(architecture)
    with torch.no_grad():
        for layer in model.model.layers:  # attention that is nearly all on one key
            layer.self_attn.q_proj.weight.mul_(sharpness)
    _, choice = choice_of(LayoutOption("shared_prefix", "varlen", "a"), PADDED)
    prove_layout(choice, with_choice(scorer, choice), "bfloat16")
    assert choice.option.backend == "varlen", lines


@pytest.mark.parametrize("at_end", [True, False])
@pytest.mark.parametrize("layout", ["packed", "shared_prefix"])
def test_a_kernel_that_aligns_masks_elsewhere_fails_where_there_are_branches(at_end, layout, monkeypatch, lines):
    def aligned(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa):
        return varlen_kernels.kernel(
            query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale, window_size, width_step=8, at_end=at_end
        )

    monkeypatch.setattr(varlen_attention, "DTYPES", (torch.float32,))
    varlen_kernels.install(monkeypatch, "torch 2.12", aligned)
    _, scorer, _ = loaded("llama")
    _, choice = choice_of(LayoutOption(layout, "varlen", "a"), PADDED)
    prove_layout(choice, with_choice(scorer, choice), "float32")
    assert (choice.option.layout == layout) == (at_end or layout == "packed")
