"""Forecasts of activations against the memory that torch gives out when the same pass is really made."""

import copy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from dpo_scale.data.dataset import Pair
from dpo_scale.data.layout import make_batch
from dpo_scale.forecast.activations import KEPT, ON_HOST, ActivationModel, Rows, rows_of
from dpo_scale.forecast.head import HeadCall, head_bytes
from dpo_scale.logprobs import token_logps
from dpo_scale.logprobs.pair_loss import PairLoss, fused_pair_loss
from dpo_scale.models import lora
from dpo_scale.models.activations import enable_checkpointing
from dpo_scale.models.attention_backends import use_attention
from dpo_scale.models.scorer import PairScorer, causal_lm
from dpo_scale.settings.tree import Config

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
from memory import peak_bytes  # noqa: E402

LENGTHS = np.array([[300, 260, 200], [150, 120, 90]])
SMALL = {
    "vocab_size": 2000, "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 5,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096,
}  # fmt: skip


def model_config(kind):
    import transformers

    if kind == "llama":
        return transformers.LlamaConfig(**SMALL)
    if kind == "tied":
        return transformers.LlamaConfig(**SMALL, tie_word_embeddings=True)
    if kind == "qwen3":
        return transformers.Qwen3Config(**SMALL, head_dim=32)
    if kind == "gemma2":
        return transformers.Gemma2Config(**SMALL, head_dim=32, sliding_window=128, final_logit_softcapping=30.0)
    if kind == "gemma3":
        kinds = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention", "full_attention"]
        return transformers.Gemma3TextConfig(**SMALL, head_dim=32, sliding_window=128, layer_types=kinds)
    if kind == "gpt2":
        return transformers.GPT2Config(vocab_size=2000, n_embd=128, n_layer=5, n_head=4, n_positions=2048)
    assert kind == "mixture"
    return transformers.Qwen3MoeConfig(
        **SMALL, head_dim=32, moe_intermediate_size=96, num_experts=8, num_experts_per_tok=2, mlp_only_layers=[1]
    )


def run_config(layout="shared_prefix", **changes):
    config = Config()
    config.model.dtype, config.data.layout = "float32", layout
    for name, value in changes.items():
        section, _, field = name.partition("__")
        setattr(getattr(config, section), field, value)
    return config


def real_scorer(config, architecture, *, policy=True):
    """The model as a run has it, its gradients dropped as they come, for they are counted apart."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(copy.deepcopy(architecture), dtype=getattr(torch, config.model.dtype))
    model.config.use_cache = False
    if config.data.layout != "padded":
        use_attention(model, "blocks")
    if config.lora.enabled and policy:
        model = lora.add_adapter(model, config.lora, seed=0)
    if config.model.gradient_checkpointing:
        enable_checkpointing(causal_lm(model), offload=False)
    scorer = PairScorer(model, config.logprobs.implementation).train(policy)
    for parameter in scorer.parameters():
        if not policy:
            parameter.requires_grad_(False)
        elif parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    return scorer


def real_batch(config, lengths=LENGTHS):
    rng = np.random.default_rng(0)
    pairs = [Pair(*(rng.integers(3, 2000, n) for n in row), bytes(16), i) for i, row in enumerate(lengths)]
    return make_batch(config.data.layout, pairs, np.ones(len(pairs)), 0)


def real_peak(config, architecture, *, by_pair):
    scorer, batch = real_scorer(config, architecture), real_batch(config)

    def step():
        inputs = dict(batch.scorer_inputs)
        if scorer.router is not None:
            inputs |= {"router_runs": batch.runs, "router_gradient": bool(config.loss.router_aux_loss_coef)}
        loss = PairLoss(batch.score_segments, batch.scored_tokens, lambda sums: -(sums[:, 0] - sums[:, 1]))
        found = scorer(**inputs, pair_loss=loss if by_pair else None)
        found = found[0] if scorer.router is not None else found
        (found[0] if by_pair else found).sum().backward()

    step()
    return peak_bytes(step, "cpu")


CASES = [
    ("llama", "shared_prefix", {}),
    ("llama", "packed", {"model__gradient_checkpointing": True}),
    ("llama", "padded", {}),
    ("llama", "padded", {"model__gradient_checkpointing": True}),
    ("llama", "shared_prefix", {"lora__r": 4}),
    ("llama", "shared_prefix", {"lora__r": 4, "model__gradient_checkpointing": True}),
    ("llama", "shared_prefix", {"logprobs__implementation": "chunked"}),
    ("llama", "shared_prefix", {"logprobs__implementation": "naive"}),
    ("llama", "shared_prefix", {"model__dtype": "bfloat16"}),
    ("tied", "shared_prefix", {"model__gradient_checkpointing": True}),
    ("qwen3", "shared_prefix", {}),
    ("gemma2", "shared_prefix", {}),
    ("gemma3", "shared_prefix", {}),
    ("gpt2", "packed", {}),
    ("mixture", "shared_prefix", {}),
    ("mixture", "shared_prefix", {"model__gradient_checkpointing": True, "loss__router_aux_loss_coef": 0.01}),
]


@pytest.mark.parametrize("kind, layout, changes", CASES)
def test_a_micro_step_takes_what_was_forecast(kind, layout, changes):
    config, architecture = run_config(layout, **changes), model_config(kind)
    forecast = ActivationModel(config, architecture, "cpu").micro_step(rows_of(layout, LENGTHS))
    by_pair = config.logprobs.implementation == "auto" and not config.lora.enabled
    measured = real_peak(config, architecture, by_pair=by_pair)
    assert sum(forecast.values()) == pytest.approx(measured, rel=0.02)


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_a_pass_of_the_reference_takes_what_was_forecast(kind):
    config, architecture = run_config(), model_config(kind)
    forecast = ActivationModel(config, architecture, "cpu").reference_pass(rows_of("shared_prefix", LENGTHS))
    scorer, batch = real_scorer(config, architecture, policy=False), real_batch(config)
    with torch.no_grad():
        scorer(**batch.scorer_inputs)
        measured = peak_bytes(lambda: scorer(**batch.scorer_inputs), "cpu")
    assert sum(forecast.values()) == pytest.approx(measured, rel=0.05)


@pytest.mark.parametrize("trained", [(True, True), (True, False), (False, False)])
@pytest.mark.parametrize("how", ["pairs", "chunked", "naive"])
def test_the_head_takes_what_was_forecast(how, trained):
    if how == "pairs" and not trained[0]:
        return pytest.skip("the loss of pairs is for training")
    scored, hidden, vocabulary = [600, 300, 500], 64, 6000
    count = sum(scored)
    states, weight = torch.randn(count, hidden), torch.randn(vocabulary, hidden)
    targets, segments = torch.randint(0, vocabulary, (count,)), 2 * torch.repeat_interleave(torch.tensor(scored))
    weight.requires_grad_(trained[1])
    if trained[1]:
        weight.register_post_accumulate_grad_hook(lambda w: setattr(w, "grad", None))

    def work():
        leaf = states.clone().requires_grad_(trained[0])
        with torch.set_grad_enabled(any(trained)):
            if how == "pairs":
                pair_loss = PairLoss(segments, scored, lambda sums: -(sums[:, 0] - sums[:, 1]))
                loss, _ = fused_pair_loss(leaf, weight, targets, pair_loss)
            else:
                loss = token_logps(leaf, weight, targets, implementation=how).sum()
        if any(trained):
            loss.backward()

    work()
    measured = peak_bytes(work, "cpu")
    call = HeadCall(scored, hidden, vocabulary, torch.float32, "cpu", trained)
    forecast = head_bytes(call, "chunked" if how == "pairs" else how, by_pair=how == "pairs")
    assert max(forecast.forward, forecast.backward) == pytest.approx(measured, rel=0.05)


@pytest.mark.parametrize("changes", [{}, {"model__gradient_checkpointing": True}, {"lora__r": 4}])
def test_between_two_numbers_of_tokens_a_gpus_bytes_are_what_that_number_itself_gives(changes):
    model = ActivationModel(run_config(model__dtype="bfloat16", **changes), model_config("llama"), "cuda")
    passed, itself = model._pass(Rows(3000, (1000,)), policy=True), model._run(True, 3000, 1, None, 0, 1)
    for found, expected in zip(passed.layers, itself.layers, strict=True):
        assert found.kept == pytest.approx(expected.kept)
        assert found.backward == pytest.approx(expected.backward, rel=0.01)


def test_a_gpu_keeps_of_each_token_what_flash_attention_and_the_layer_keep():
    config = run_config(model__dtype="bfloat16", model__gradient_checkpointing=True)
    rows = rows_of("shared_prefix", LENGTHS)
    kept = ActivationModel(config, model_config("llama"), "cuda").micro_step(rows)[KEPT]
    assert kept == rows.tokens * SMALL["hidden_size"] * 2 * SMALL["num_hidden_layers"]
    config.model.gradient_checkpointing_offload = True
    model = ActivationModel(config, model_config("llama"), "cuda")
    assert model.micro_step(rows)[KEPT] == 0
    assert model.host(rows) == {ON_HOST: kept}


def test_ranks_that_share_a_row_hold_as_much_for_equal_tokens():
    config, architecture = run_config(model__dtype="bfloat16"), model_config("llama")
    model = ActivationModel(config, architecture, "cuda")
    alone, shared = (model.micro_step(rows_of("shared_prefix", LENGTHS * n, n))[KEPT] for n in (1, 2))
    assert shared == pytest.approx(alone, rel=0.05)


def test_what_is_not_modelled_is_said():
    config = run_config(model__compile=True)
    assert "model.compile" in ActivationModel(config, model_config("llama"), "cuda").left_out[0]
