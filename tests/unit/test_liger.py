"""Liger's kernels in one model: what they replace, that nothing else changes, and where they are refused."""

from __future__ import annotations

from importlib.util import find_spec
from types import SimpleNamespace

import liger_stand_in
import pytest
import torch
import transformers
from liger_stand_in import CALLS
from tiny import save_adapter, save_model, tiny_config

from dpo_scale.distributed import engine, ranks
from dpo_scale.errors import ConfigError, ModelError
from dpo_scale.models import lora
from dpo_scale.models.activations import enable_checkpointing
from dpo_scale.models.liger import choose_liger, take_kernels
from dpo_scale.models.scorer import causal_lm
from dpo_scale.reference.numerics import numerics_of
from dpo_scale.settings.tree import LoraSettings, ModelSettings, load_config

IDS = torch.arange(3, 40)[None]
PER_PASS = {"norm": 5, "rope": 2, "swiglu": 2}  # of two layers


@pytest.fixture(params=["stand-in", "installed"])
def liger(request, monkeypatch):
    """Liger with its kernels in plain torch."""
    if request.param == "installed" and find_spec("liger_kernel") is None:
        pytest.skip("liger-kernel is not installed")
    (liger_stand_in.use_stand_in if request.param == "stand-in" else liger_stand_in.use_installed)(monkeypatch)
    CALLS.clear()
    return monkeypatch


def make(architecture="llama", dtype=torch.float32):
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(tiny_config(architecture), dtype=dtype)


def gradients(model):
    """Loss and gradients of what is trained, through hidden states only, as in training."""
    model.zero_grad()
    hidden = causal_lm(model).base_model(input_ids=IDS, use_cache=False).last_hidden_state
    loss = hidden.float().pow(3).mean()
    loss.backward()
    return loss, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(ours, theirs):
    (loss, grads), (expected_loss, expected) = ours, theirs
    torch.testing.assert_close(loss, expected_loss)
    assert grads.keys() == expected.keys() and len(grads) > 10
    for name in grads:
        torch.testing.assert_close(grads[name], expected[name], msg=name)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_model_computes_with_ligers_kernels_what_it_computed_without(liger, checkpointing):
    model, other = make(), make()
    taken = take_kernels(model, check=True)
    assert taken == {"LigerRMSNorm": 5, "LigerSwiGLUMLP": 2, "apply_rotary_pos_emb": 2}
    if checkpointing:
        model.train()
        enable_checkpointing(model, offload=False)
    CALLS.clear()
    ours = gradients(model)
    again = {name: count - (name == "norm") for name, count in PER_PASS.items()}  # the last norm is in no layer
    assert {name: count + checkpointing * again[name] for name, count in PER_PASS.items()} == CALLS
    assert_same(ours, gradients(other))


def test_no_other_model_of_the_process_changes(liger):
    from transformers.models.llama import modeling_llama

    before, names = make(), dict(vars(modeling_llama))
    take_kernels(make(), check=True)
    assert dict(vars(modeling_llama)) == names
    CALLS.clear()
    for model in (before, make()):
        gradients(model)
    assert not CALLS


def test_a_models_own_file_is_restored_when_liger_fails(liger):
    from transformers.models.llama import modeling_llama

    names, model = dict(vars(modeling_llama)), make()
    del model.model.norm
    with pytest.raises(AttributeError):
        take_kernels(model, check=False)
    assert dict(vars(modeling_llama)) == names


def test_adapters_are_inside_ligers_swiglu(liger):
    trained = []
    for with_liger in (False, True):
        model = make()
        if with_liger:
            take_kernels(model, check=True)
        model = lora.add_adapter(model, LoraSettings(r=2), seed=0)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(len(name)))
        CALLS.clear()
        trained.append(gradients(model))
        assert (PER_PASS if with_liger else {}) == CALLS
    assert any("gate_proj.lora_A" in name for name in trained[0][1])
    assert_same(trained[1], trained[0])


def test_the_experts_of_a_mixture_stay_the_models_own(liger):
    from transformers import MixtralConfig

    shape = {name: getattr(tiny_config("llama"), name) for name in ("vocab_size", "hidden_size", "intermediate_size")}
    config = MixtralConfig(
        **shape, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, num_local_experts=2
    )
    torch.manual_seed(0)
    taken = take_kernels(transformers.AutoModelForCausalLM.from_config(config), check=True)
    assert taken == {"LigerRMSNorm": 5, "apply_rotary_pos_emb": 2}


def test_kernels_that_compute_something_else_are_found(liger):
    liger.setattr(liger_stand_in, "NORM_SCALE", 1.5)
    with pytest.raises(ModelError, match=r"hidden states differ by [\d.]+ of .* model.liger=false"):
        take_kernels(make(), check=True)


def choose(liger="auto", device="cuda", configs=("llama",), **settings):
    made = [SimpleNamespace(model_type=kind) for kind in configs]
    return choose_liger(ModelSettings(liger=liger, **settings), device, lambda: made)


def test_auto_takes_liger_where_the_device_is_cuda_and_the_models_are_known(liger):
    assert choose()[0] and choose(True)[0]
    assert not choose(False)[0]


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        ({"device": "cpu"}, "CUDA device, this one is a cpu"),
        ({"configs": ["llama", "gpt2"]}, "none of these kernels for a gpt2 model"),
        ({"configs": ["nemotron"]}, "none of these kernels for a nemotron model"),
        ({"compile": True}, "model.compile fuses"),
    ],
)
def test_what_keeps_liger_out_is_said_under_auto_and_refused_under_true(liger, case, reason):
    used, said = choose(**case)
    assert not used and reason in said
    with pytest.raises(ConfigError, match=f"model.liger = True: .*{reason}.*expected auto or false"):
        choose(True, **case)


def test_a_package_that_is_missing_is_named(monkeypatch):
    monkeypatch.setattr("dpo_scale.models.liger.find_spec", lambda name: None)
    assert choose() == (False, "the package liger-kernel is not installed")


def test_a_models_own_code_is_left_alone(liger):
    config = SimpleNamespace(model_type="llama", auto_map={"AutoModelForCausalLM": "x.Y"})
    used, reason = choose_liger(ModelSettings(), "cuda", lambda: [config])
    assert not used and "code is not transformers' own" in reason


def test_stored_values_say_liger_only_where_it_computed_them(liger, tmp_path):
    save_model(tmp_path / "model")
    config = load_config(None, [f"model.path={tmp_path / 'model'}", "data.train=none"])
    without = numerics_of(config)
    assert "elementwise" not in without
    liger.setattr(ranks, "device", lambda: torch.device("cuda"))
    assert numerics_of(config)["elementwise"].startswith("liger 0.")
    config.model.liger = False
    assert numerics_of(config) == without


def test_policy_and_reference_are_loaded_with_liger_alike(liger, tmp_path):
    """Up to the engine: what `take_kernels` is given is the model without its adapter."""
    from dpo_scale.models import load as loading

    save_model(tmp_path / "model")
    save_adapter(tmp_path / "model", tmp_path / "adapter")
    overrides = [f"model.path={tmp_path / 'model'}", f"lora.adapter={tmp_path / 'adapter'}", "data.train=none"]
    config = load_config(None, [*overrides, "model.dtype=float32", "reference.adapter=none"])
    liger.setattr(loading, "uses_liger", lambda config: (True, "as on a GPU"))
    taken = []
    liger.setattr(loading, "take_kernels", lambda model, check: taken.append((type(model).__name__, check)))
    for start in (lambda: loading.load_policy(config, 1), lambda: loading.load_reference(config)):
        liger.setattr(engine, "initialize_policy", lambda scorer, *others: scorer)
        liger.setattr(engine, "initialize_reference", lambda scorer, *others: scorer)
        liger.setattr(loading, "prove_layout", lambda *others: None)
        start()
    assert taken == [("LlamaForCausalLM", True)] * 2
