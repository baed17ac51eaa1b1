"""Adapters on one process: what they do to a model, what is merged, saved and refused; settings that go together."""

import pytest
import torch
from tiny import save_model, tiny_config
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from dpo_scale.errors import ConfigError, ModelError
from dpo_scale.models import lora
from dpo_scale.models.load import load_causal_lm, policy_source, reference_source
from dpo_scale.models.scorer import PairScorer
from dpo_scale.settings.tree import LoraSettings, load_config

IDS = torch.arange(24).view(2, 12)
MINIMAL = ["model.path=some/model", "data.train=pairs.jsonl"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    save_model(folder / "llama", "llama")
    save_model(folder / "llama-tied", "llama", tied=True)
    save_model(folder / "gpt2", "gpt2", tied=True)
    return folder


def base(folders, name="llama", dtype="float32"):
    return load_causal_lm(str(folders / name), dtype=dtype)


def adapted(folders, name="llama", dtype="float32", **settings):
    """A model with a new adapter that does something."""
    model = lora.add_adapter(base(folders, name, dtype), LoraSettings(r=4, alpha=8.0, **settings), seed=1)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "lora_B" in parameter_name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def adapter_weights(model):
    return {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}


def score(scorer):
    index = torch.arange(24).view(2, 12)[:, :-1].flatten()
    return scorer(IDS, index, IDS[:, 1:].flatten())


def test_a_new_adapter_changes_nothing_and_draws_the_same_weights_whatever_was_drawn_before(folders):
    plain = base(folders)
    first = lora.add_adapter(base(folders), LoraSettings(r=4), seed=3)
    torch.rand(7)
    model, before = base(folders), torch.get_rng_state()
    second = lora.add_adapter(model, LoraSettings(r=4), seed=3)
    assert torch.equal(before, torch.get_rng_state())
    other = lora.add_adapter(base(folders), LoraSettings(r=4), seed=4)
    ours, theirs, others = (adapter_weights(model) for model in (first, second, other))
    assert ours and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert any(not torch.equal(ours[name], others[name]) for name in ours)
    assert torch.equal(first(IDS).logits, plain(IDS).logits)


def test_scores_are_those_of_the_adapted_models_logits(folders):
    def from_logits(model):
        return model(IDS).logits[:, :-1].log_softmax(-1).gather(-1, IDS[:, 1:, None]).flatten()

    model = adapted(folders)
    expected = from_logits(model)
    assert (expected - from_logits(base(folders))).abs().max() > 0.01
    torch.testing.assert_close(score(PairScorer(model)), expected, atol=1e-5, rtol=1e-5)


class ProductsSeen(TorchDispatchMode):
    """Remembers the shapes of all matrix products."""

    def __init__(self):
        super().__init__()
        self.shapes = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if "mm" in str(func):
            self.shapes.add(tuple(made.shape))
        return made


@pytest.mark.parametrize("implementation", ["naive", "chunked"])
def test_no_weight_gradient_is_computed_for_the_frozen_head(folders, implementation):
    def products(model):
        total = score(PairScorer(model, implementation)).sum()
        with ProductsSeen() as seen:
            total.backward()
        return seen.shapes

    model, gradients = adapted(folders).train(), {(384, 32), (32, 384)}
    assert not products(model) & gradients
    assert products(base(folders)) & gradients  # that of the whole model's head, so the test would see one
    assert all((parameter.grad is not None) == ("lora_" in name) for name, parameter in model.named_parameters())


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2"])
def test_merged_weights_are_the_adapted_model(folders, name, tmp_path):
    model = adapted(folders, name)
    weights = lora.merged_weights(model, model.state_dict())
    model.get_base_model().save_pretrained(tmp_path, state_dict=weights)
    merged = load_causal_lm(str(tmp_path), dtype="float32")
    torch.testing.assert_close(merged(IDS).logits, model(IDS).logits, atol=1e-4, rtol=1e-5)
    assert (merged(IDS).logits - base(folders, name)(IDS).logits).abs().max() > 0.01


def test_merging_rounds_once(folders):
    model = adapted(folders, dtype="bfloat16")
    state = model.state_dict()
    merged = lora.merged_weights(model, state)
    layer = "base_model.model.model.layers.0.self_attn.q_proj"
    a, b = (state[f"{layer}.lora_{side}.default.weight"].double() for side in "AB")
    expected = state[f"{layer}.base_layer.weight"].double() + 2.0 * b @ a
    ours = merged["model.layers.0.self_attn.q_proj.weight"]
    assert ours.dtype == torch.bfloat16
    assert torch.equal(ours, expected.bfloat16())


def test_a_saved_adapter_comes_back_in_peft_and_here(folders, tmp_path):
    from peft import PeftModel

    model = adapted(folders)
    lora.save_adapter(model, adapter_weights(model), str(folders / "llama"), tmp_path / "a")
    expected = model(IDS).logits
    assert torch.equal(PeftModel.from_pretrained(base(folders), tmp_path / "a")(IDS).logits, expected)
    worn = lora.wear_adapter(base(folders), str(tmp_path / "a"))
    assert torch.equal(worn.eval()(IDS).logits, expected)
    assert not any(parameter.requires_grad for parameter in worn.parameters())
    further = lora.add_adapter(base(folders), LoraSettings(adapter=str(tmp_path / "a"), dropout=0.25), seed=0)
    assert torch.equal(further.eval()(IDS).logits, expected)
    assert adapter_weights(further).keys() == adapter_weights(model).keys()
    assert {m.p for m in further.modules() if isinstance(m, torch.nn.Dropout)} == {0.25}


def test_the_reference_state_is_the_base_or_the_frozen_adapter(folders, tmp_path):
    plain, model = base(folders)(IDS).logits, adapted(folders)
    lora.save_adapter(model, adapter_weights(model), str(folders / "llama"), tmp_path / "a")
    start = model(IDS).logits
    both = lora.add_adapter(base(folders), LoraSettings(adapter=str(tmp_path / "a")), seed=0)
    lora.add_reference_adapter(both, str(tmp_path / "a"))
    for trained in (model, both.eval()):
        weights = adapter_weights(trained)
        with torch.no_grad():
            for tensor in weights.values():
                tensor.mul_(1.5)
        moved = trained(IDS).logits
        assert not torch.equal(moved, start)
        with lora.in_reference_state(trained):
            assert torch.equal(trained(IDS).logits, plain if trained is model else start)
        assert torch.equal(trained(IDS).logits, moved)
        assert adapter_weights(trained).keys() == weights.keys()
        with pytest.raises(KeyError), lora.in_reference_state(trained):
            raise KeyError
        assert torch.equal(trained(IDS).logits, moved)


def saved_by_peft(folders, folder, **settings):
    from peft import LoraConfig, get_peft_model

    get_peft_model(base(folders), LoraConfig(task_type="CAUSAL_LM", **settings)).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"target_modules": ["q_proj"], "use_dora": True}, "q_proj"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, "lm_head"),
        ({"target_modules": ["q_proj", "lm_head"]}, "lm_head"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "embed_tokens"),
        ({"target_modules": ["q_proj"], "lora_bias": True}, "q_proj"),
    ],
)
def test_other_kinds_of_adapters_are_refused(folders, tmp_path, settings, part):
    path = saved_by_peft(folders, tmp_path / "a", **settings)
    for use in (
        lambda: lora.wear_adapter(base(folders), path),
        lambda: lora.add_reference_adapter(adapted(folders), path),
    ):
        with pytest.raises(ModelError) as caught:
            use()
        assert path in str(caught.value) and part in str(caught.value)


def test_an_adapter_of_another_model_or_type_is_refused(folders, tmp_path):
    from peft import IA3Config, get_peft_model

    path = saved_by_peft(folders, tmp_path / "a", target_modules=["q_proj"])
    with pytest.raises(ModelError, match="lora_A|target"):
        lora.wear_adapter(base(folders, "gpt2"), path)
    (tmp_path / "a" / "adapter_model.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(ModelError, match="cannot be loaded"):
        lora.wear_adapter(base(folders), path)
    get_peft_model(base(folders), IA3Config(task_type="CAUSAL_LM")).save_pretrained(tmp_path / "ia3")
    pissa = saved_by_peft(folders, tmp_path / "pissa", target_modules=["q_proj"], init_lora_weights="pissa")
    with pytest.raises(ModelError, match="init_lora_weights = 'pissa'"):
        lora.read_adapter_config(pissa)
    with pytest.raises(ModelError, match="IA3"):
        lora.read_adapter_config(str(tmp_path / "ia3"))
    with pytest.raises(ModelError, match="lora.adapter"):
        load_causal_lm(str(tmp_path / "ia3"), dtype="float32")


def test_an_adapter_that_lacks_layers_is_refused(folders, tmp_path):
    from safetensors.torch import load_file, save_file

    path = saved_by_peft(folders, tmp_path / "a", target_modules=["q_proj"])
    weights = load_file(tmp_path / "a" / "adapter_model.safetensors")
    dropped = next(name for name in weights if "layers.1" in name)
    save_file({k: v for k, v in weights.items() if k != dropped}, tmp_path / "a" / "adapter_model.safetensors")
    with pytest.raises(ModelError, match="lacks weights for .*layers.1"):
        lora.wear_adapter(base(folders), path)


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["lora.alpha=32"], ["lora.alpha", "lora.r"]),
        (["lora.r=0"], ["lora.r", "at least 1"]),
        (["lora.r=8", "lora.adapter=a"], ["lora.r", "lora.adapter"]),
        (["lora.adapter=a", "lora.target_modules=[q_proj]"], ["lora.target_modules", "lora.adapter"]),
        (["lora.r=8", "lora.dropout=1"], ["lora.dropout", "below 1"]),
        (["reference.mode=adapter"], ["reference.mode", "lora.r"]),
        (["lora.r=8", "reference.mode=adapter", "reference.model=m"], ["reference.mode", "reference.model"]),
        (["lora.r=8", "reference.sync_steps=5"], ["reference.sync_steps", "LoRA"]),
        (["reference.mode=store", "reference.sync_steps=5"], ["reference.sync_steps", "live"]),
        (["reference.sync_steps=5", "reference.sync_mixup=0"], ["reference.sync_mixup", "above 0"]),
        (["reference.sync_steps=5", "loss.loss_type=simpo"], ["reference.sync_steps", "simpo"]),
        (
            ["reference.sync_steps=5", "deepspeed.config={zero_optimization: {stage: 3, mics_shard_size: 2}}"],
            ["reference.sync_steps", "mics_shard_size"],
        ),
    ],
)
def test_settings_that_do_not_go_together_are_refused(overrides, parts):
    with pytest.raises(ConfigError) as caught:
        load_config(None, [*MINIMAL, *overrides])
    assert all(part in str(caught.value) for part in parts), caught.value


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], ("some/model", None)),
        (["lora.r=8"], ("some/model", None)),
        (["lora.adapter=a"], ("some/model", "a")),
        (["lora.adapter=a", "reference.adapter=none"], ("some/model", None)),
        (["lora.adapter=a", "reference.adapter=b"], ("some/model", "b")),
        (["lora.adapter=a", "reference.model=m"], ("m", None)),
        (["reference.model=m", "reference.adapter=b"], ("m", "b")),
    ],
)
def test_the_reference_is_what_the_policy_starts_from_unless_named(overrides, expected):
    config = load_config(None, [*MINIMAL, *overrides])
    source = reference_source(config)
    assert (source.path, source.adapter) == expected
    assert (source == policy_source(config)) == (not any("reference." in override for override in overrides))


def test_a_checkpoint_belongs_to_the_weights_under_its_adapter(folders, tmp_path, monkeypatch):
    from types import SimpleNamespace

    from dpo_scale.training.identity import identity_of

    def identity():
        overrides = [f"model.path={tmp_path / 'm'}", "data.train=x.jsonl", "lora.r=4"]
        model_config = load_causal_lm(str(tmp_path / "m"), dtype="float32").config
        return identity_of(load_config(None, overrides), model_config, SimpleNamespace(fingerprint="data"))

    monkeypatch.setenv("DPO_SCALE_CACHE", str(tmp_path / "cache"))
    save_model(tmp_path / "m", "llama")
    first, again = identity(), identity()
    save_model(tmp_path / "m", "llama", seed=1)  # other weights in the same place
    assert first == again != identity()


@pytest.mark.parametrize("architecture", ["mixtral", "qwen3_moe", "qwen3_moe_with_a_dense_layer", "olmoe", "gpt_oss"])
def test_on_a_mixture_of_experts_all_linear_is_its_attention_and_the_log_says_what_is_not_reached(architecture):
    model = AutoModelForCausalLM.from_config(tiny_config(architecture))
    whole = sum(parameter.numel() for parameter in model.parameters())
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name and "bias" not in name)
    said = lora.describe(lora.add_adapter(model, LoraSettings(r=2), seed=0))
    adapted = {name.split(".")[-4] for name, p in model.named_parameters() if p.requires_grad}
    assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert f"does not reach the experts, {experts:,} weights" in said
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert said.startswith(f"LoRA: {trained:,} weights") and f"of {whole + trained:,};" in said


def test_nothing_is_said_of_experts_where_there_are_none():
    model = lora.add_adapter(AutoModelForCausalLM.from_config(tiny_config("llama")), LoraSettings(r=2), seed=0)
    assert "experts" not in lora.describe(model)
