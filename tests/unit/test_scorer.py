"""Log-probs through backbone and head against the model's own logits, for every family of head."""

import pytest
import torch
from tiny import tiny_config
from transformers import AutoModelForCausalLM

from dpo_scale.errors import ModelError
from dpo_scale.models.load import switch_off_dropout
from dpo_scale.models.scorer import PairScorer, check_head, head_transform

ARCHITECTURES = ["llama", "qwen2", "qwen3", "gpt2", "gemma2", "cohere"]


def make(architecture, tied=False):
    torch.manual_seed(0)
    config = tiny_config(architecture, tied=tied)
    switch_off_dropout(config)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(4)
    return model


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_log_probs_and_gradients_are_those_of_the_models_own_logits(architecture, tied):
    plain, wrapped = make(architecture, tied), make(architecture, tied)
    check_head(wrapped)
    scorer = PairScorer(wrapped)
    ids = torch.randint(0, 384, (3, 20), generator=torch.Generator().manual_seed(1))
    index = torch.tensor([3, 4, 18, 20, 38, 45, 46])
    targets = ids.flatten()[index + 1]

    expected = plain(input_ids=ids, use_cache=False).logits.float().log_softmax(-1).flatten(0, 1)
    expected = expected[index].gather(1, targets[:, None])[:, 0]
    got = scorer(ids, index, targets)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)

    weights = torch.linspace(-1, 1, 7)
    (expected * weights).sum().backward()
    (got * weights).sum().backward()
    theirs = dict(plain.named_parameters())
    for name, parameter in wrapped.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs[name].grad, atol=2e-5, rtol=2e-4, msg=name)


def test_right_padding_changes_nothing():
    scorer = PairScorer(make("gemma2"))
    ids = torch.randint(0, 384, (1, 24), generator=torch.Generator().manual_seed(2))
    index, targets = torch.arange(5, 23), ids[0, 6:24]
    alone = scorer(ids, index, targets)
    padded = torch.nn.functional.pad(ids, (0, 9), value=7)
    torch.testing.assert_close(scorer(padded, index, targets), alone, atol=1e-6, rtol=1e-6)


def test_logit_scale_and_softcap_are_read_off_the_config():
    import transformers

    assert head_transform(tiny_config("gemma2")).softcap == 3.0
    assert head_transform(tiny_config("cohere")).logit_scale == 0.25
    granite = transformers.GraniteConfig(vocab_size=16, hidden_size=8, logits_scaling=8.0)
    assert head_transform(granite).logit_scale == 0.125
    assert head_transform(tiny_config("llama")).softcap is None


def test_an_architecture_that_does_more_to_its_logits_is_refused():
    model = make("gemma2")
    model.config.final_logit_softcapping = 30.0
    check_head(model)  # consistent: the model itself reads the config
    # a model that does something behind its head's back
    original = model.forward

    def shifted(*args, **kwargs):
        out = original(*args, **kwargs)
        out.logits = out.logits * 1.5
        return out

    model.forward = shifted
    with pytest.raises(ModelError, match="not supported"):
        check_head(model)


def test_a_model_without_a_language_model_head_is_refused():
    from transformers import AutoModel

    with pytest.raises(ModelError, match="linear head"):
        PairScorer(AutoModel.from_config(tiny_config("llama")))


def test_dropout_is_switched_off_and_remembered():
    config = tiny_config("gpt2")
    found = switch_off_dropout(config)
    assert found == {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1, "summary_first_dropout": 0.1}
    assert config.attn_pdrop == 0.0
