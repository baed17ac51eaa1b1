"""ZeRO-3 by whole layers: which layers, what is refused, and how far the host may run ahead of the device."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import transformers
from deepspeed.utils import get_z3_leaf_modules
from tiny import tiny_config
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM

from dpo_scale.distributed import engine
from dpo_scale.distributed.join import ALLOCATOR_VARIABLES, use_expandable_segments
from dpo_scale.errors import ModelError
from dpo_scale.models.load import prepare_layers
from dpo_scale.models.zero3 import decoder_layers, limit_gathers, make_leaves
from dpo_scale.settings.tree import Config


def make(architecture):
    return AutoModelForCausalLM.from_config(tiny_config(architecture))


@pytest.mark.parametrize(
    ("architecture", "layer"),
    [
        ("llama", "LlamaDecoderLayer"),
        ("gemma2", "Gemma2DecoderLayer"),
        ("gemma3", "Gemma3DecoderLayer"),
        ("gpt2", "GPT2Block"),
        ("gpt_oss", "GptOssDecoderLayer"),  # its experts are two parameters of the layer
    ],
)
def test_the_leaves_are_the_layers_that_the_model_names(architecture, layer):
    model = make(architecture)
    done, what = make_leaves(model, 10**9)
    leaves = get_z3_leaf_modules(model)
    assert done and what.startswith(f"2 x {layer}")
    assert [type(leaf).__name__ for leaf in leaves] == [layer, layer]
    outside = set(model.parameters()) - {p for leaf in leaves for p in leaf.parameters()}
    inputs, head = (part.weight for part in (model.get_input_embeddings(), model.get_output_embeddings()))
    assert {id(inputs), id(head)} <= {id(p) for p in outside}
    largest = max(p.numel() for p in outside - {inputs, head} if p.ndim < 2)  # norms, beside GPT-2's positions
    assert largest == 32


def test_of_a_model_that_also_sees_only_the_text_decoder_is_gathered_by_layers():
    text = tiny_config("gemma3").to_dict() | {"layer_types": None}
    vision = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 28,
        "patch_size": 14,
    }  # fmt: skip
    model = AutoModelForCausalLM.from_config(transformers.Gemma3Config(text_config=text, vision_config=vision))
    assert "SiglipEncoderLayer" in model._no_split_modules
    assert {type(layer).__name__ for layer in decoder_layers(model)} == {"Gemma3DecoderLayer"}


def test_behind_frozen_embeddings_the_first_layer_has_an_input_that_requires_a_gradient():
    from peft import LoraConfig, get_peft_model

    wrapped = get_peft_model(make("llama"), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    model, seen = wrapped.get_base_model(), []
    assert make_leaves(model, 10**9)[0]
    assert len(get_z3_leaf_modules(model)) == 2
    decoder_layers(model)[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].requires_grad))
    wrapped(torch.arange(5)[None])
    assert seen == [True]


def test_a_model_that_names_no_layers_and_one_of_too_large_layers_stay_divided():
    for model, limit, reason in (
        (make("llama"), 9_000, "9,280 weights, more than stage3_max_live_parameters = 9,000"),
        (nn.Sequential(nn.Linear(2, 2)), 10**9, "Sequential does not name its layers"),
    ):
        done, why = make_leaves(model, limit)
        assert not done and reason in why
        assert get_z3_leaf_modules(model) == []


def test_compiled_layers_at_stage_3_are_refused_where_layers_stay_divided(capsys):
    config = Config()
    config.model.compile = True
    zero = {"zero_optimization": {"stage": 3, "stage3_max_live_parameters": 10}}
    with pytest.raises(ModelError, match="model.compile.*stage3_max_live_parameters = 10"):
        prepare_layers(make("llama"), config, zero, "policy")
    assert "gathers the policy by submodules" in capsys.readouterr().out


class ByKeyword(nn.Module):
    """A model that hands its layers hidden states by keyword."""

    _no_split_modules = ["Linear"]

    def __init__(self):
        super().__init__()
        self.embeddings, self.layers = nn.Embedding(4, 3), nn.ModuleList([nn.Linear(3, 3)])

    def get_input_embeddings(self):
        return self.embeddings

    def forward(self, ids):
        return self.layers[0](input=self.embeddings(ids))


def test_hidden_states_by_keyword_are_refused_in_training():
    model = ByKeyword()
    assert make_leaves(model, 10**9)[0]
    with torch.no_grad():
        model(torch.arange(4))
    with pytest.raises(ModelError, match="Linear: none of its positional inputs"):
        model(torch.arange(4))


class Device:
    """A device that does nothing before the host waits for it, and then no more than what it waits for."""

    def __init__(self):
        self.asked, self.finished, self.max_held = 0, 0, 0

    def compute(self):
        self.asked += 1

    def gather(self, *_):
        """Weights are taken now; those of layers that the device is not through with are still held."""
        self.max_held = max(self.max_held, 1 + self.asked - self.finished)

    def event(self):
        event = SimpleNamespace(at=None)
        event.record = lambda: setattr(event, "at", self.asked)
        event.synchronize = lambda: setattr(self, "finished", max(self.finished, event.at))
        return event


class Computes(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, device):
        ctx.device = device
        device.compute()
        return hidden * 2

    @staticmethod
    def backward(ctx, gradient):
        ctx.device.compute()
        return gradient * 2, None


class Layer(nn.Module):
    def __init__(self, device):
        super().__init__()
        self.device = device

    def forward(self, hidden):
        return Computes.apply(hidden, self.device)


class CheckpointedInside(Layer):
    """As in transformers 5.23: hooks are outside of what is computed again."""

    def forward(self, hidden):
        return checkpoint(super().forward, hidden, use_reentrant=False)


class CheckpointedOutside(Layer):
    """As in transformers 5.17: hooks run again with it."""

    def __call__(self, hidden):
        return checkpoint(super().__call__, hidden, use_reentrant=False)


class Stack(nn.Module):
    _no_split_modules = ["Layer", "CheckpointedInside", "CheckpointedOutside"]

    def __init__(self, kind, device):
        super().__init__()
        self.layers = nn.ModuleList(kind(device) for _ in range(9))

    def forward(self, hidden):
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden


@pytest.mark.parametrize("kind", [Layer, CheckpointedInside, CheckpointedOutside])
@pytest.mark.parametrize("ahead", [None, 1, 2, 4])
def test_the_weights_of_no_more_layers_are_held_than_the_host_may_be_ahead(kind, ahead):
    device = Device()
    model = Stack(kind, device)
    if ahead is not None:
        limit_gathers(model, device.event, ahead)
    for layer in model.layers:  # registered after ours, as DeepSpeed's are
        layer.register_forward_pre_hook(device.gather)
        layer.register_full_backward_pre_hook(device.gather)
    hidden = torch.ones(2, requires_grad=True)
    with torch.no_grad():
        model(hidden)  # a reference's pass
    result = model(hidden)
    result.sum().backward()
    assert torch.equal(hidden.grad, torch.full((2,), 2.0**9))
    if ahead is None:
        assert device.max_held > 18  # all layers of both passes
    elif kind is Layer:
        assert device.max_held == ahead  # and the device is not left without work
    else:  # what is computed again counts as work too, of a layer whose weights are there
        assert ahead <= device.max_held <= 2 * ahead


@pytest.mark.parametrize(
    ("device", "hip", "already", "expected"),
    [
        ("cuda", None, {}, "expandable_segments:True"),
        ("cuda", None, {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}, None),
        ("cuda", None, {"PYTORCH_ALLOC_CONF": ""}, ""),
        ("cuda", "7.0", {}, None),
        ("cpu", None, {}, None),
    ],
)
def test_cudas_allocator_grows_its_segments_unless_the_user_set_it(monkeypatch, device, hip, already, expected):
    for name in ALLOCATOR_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in already.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.version, "hip", hip)
    use_expandable_segments(device)
    assert engine.os.environ.get("PYTORCH_ALLOC_CONF") == expected
    assert {name: engine.os.environ[name] for name in already} == already
