"""Layers that keep their activations elsewhere, or run compiled, give the same log-probs and gradients."""

import functools
import weakref

import pytest
import torch
from tiny import tiny_config
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM

from dpo_scale.errors import ModelError
from dpo_scale.models import activations
from dpo_scale.models.load import switch_off_dropout
from dpo_scale.models.scorer import PairScorer

SHAPES = [(2, 17), (3, 40), (1, 64)]


def make(architecture):
    torch.manual_seed(0)
    config = tiny_config(architecture)
    switch_off_dropout(config)
    model = AutoModelForCausalLM.from_config(config)
    model.config.use_cache = False
    return model


def scored(scorer, shape):
    """Log-probs and gradients of a batch of random ids."""
    ids = torch.randint(3, 384, shape, generator=torch.Generator().manual_seed(shape[1]))
    index = torch.arange(3, ids.numel() - 1)
    values = scorer(ids, index, ids.flatten()[index + 1])
    scorer.zero_grad()
    (values * torch.linspace(-1, 1, len(values))).sum().backward()
    return values.detach(), {name: parameter.grad.clone() for name, parameter in scorer.named_parameters()}


def assert_same(plain, other, shapes, **tolerance):
    plain.train(), other.train()
    for shape in shapes:
        (expected, gradients), (values, others) = scored(plain, shape), scored(other, shape)
        torch.testing.assert_close(values, expected, **tolerance)
        for name, gradient in gradients.items():
            torch.testing.assert_close(others[name], gradient, msg=name, **tolerance)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2"])
def test_offloaded_checkpoints_change_no_bit(architecture):
    model = make(architecture)
    activations.enable_checkpointing(model, offload=True)
    assert_same(PairScorer(make(architecture)), PairScorer(model), SHAPES, atol=0, rtol=0)


def test_what_comes_into_a_layer_is_let_go_of_and_its_mask_is_not_copied():
    def layer(hidden, mask):
        return (hidden * mask).sin().exp()

    def kept_on_device(run):
        """Whether hidden states and mask are still the tensors that went in, before the backward pass."""
        leaf, mask = torch.ones(4, 8, requires_grad=True), torch.ones(4, 8)
        hidden = leaf * 2.0
        alive = [weakref.ref(hidden), weakref.ref(mask)]
        out = run(layer, hidden, mask)
        del hidden, mask
        kept = [reference() is not None for reference in alive]
        out.sum().backward()
        torch.testing.assert_close(leaf.grad, 2 * torch.full((4, 8), 2.0).sin().exp() * torch.full((4, 8), 2.0).cos())
        return kept

    assert kept_on_device(functools.partial(checkpoint, use_reentrant=False)) == [True, True]
    assert kept_on_device(activations.offloaded_checkpoint) == [False, True]


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_compiled_layers_agree_for_all_shapes_with_one_compilation(architecture, checkpointing):
    model = make(architecture)
    if checkpointing:
        activations.enable_checkpointing(model, offload=False)
    # what inductor adds, faster code, costs half a minute here
    activations.compile_layers(model, backend="aot_eager")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    assert_same(PairScorer(make(architecture)), PairScorer(model), SHAPES, atol=1e-5, rtol=1e-4)
    counters = torch._dynamo.utils.counters
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] <= 2  # for one row and for several, not one a layer and shape


def test_a_model_without_layers_of_the_common_kind_is_refused():
    with pytest.raises(ModelError, match="model.compile: Linear"):
        activations.compile_layers(torch.nn.Linear(2, 2))
