"""Hugging Face weights into a model ready for an engine: whole, or straight into ZeRO-3 shards.

Nothing is executed from a model folder unless `model.trust_remote_code` says so. Dropout is switched off in the config
before the model is built, because many architectures read it only then; the values the folder came with are put back
when the trained model is saved.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from dpo_scale.data.tokenize import load_tokenizer
from dpo_scale.distributed import engine, ranks
from dpo_scale.distributed.sequence_parallel import make_groups
from dpo_scale.errors import ConfigError, ModelError, first_line
from dpo_scale.logprobs import choose_implementation
from dpo_scale.models import lora
from dpo_scale.models.activations import compile_layers, enable_checkpointing
from dpo_scale.models.builtin import resolve_model_path
from dpo_scale.models.files import check_models, looks_like_folder
from dpo_scale.models.layout_choice import (
    LayoutChoice,
    choose_layout,
    install_attention,
    prove_layout,
    transformers_has,
)
from dpo_scale.models.liger import choose_liger, take_kernels
from dpo_scale.models.scorer import PairScorer, causal_lm, check_head
from dpo_scale.models.zero3 import limit_gathers, make_leaves
from dpo_scale.progress import patience
from dpo_scale.settings.deepspeed import MAX_LIVE, policy_deepspeed_config, reference_deepspeed_config
from dpo_scale.settings.tree import Config

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase


def check_logprobs(config: Config) -> None:
    """Log how log-probs will be computed on this device, and why; every entry point calls it once.

    Raises:
        ConfigError: if the implementation asked for does not run here.
    """
    try:
        name, reason = choose_implementation(
            config.logprobs.implementation, ranks.device(), getattr(torch, config.model.dtype)
        )
    except ValueError as error:
        raise ConfigError(f"logprobs.implementation = {config.logprobs.implementation!r}: {error}") from error
    ranks.log(f"log-probs: {name} ({reason})")


def check_liger(config: Config) -> None:
    """Log whether the models take Liger's kernels, and why; every entry point calls it once.

    Raises:
        ConfigError: if `model.liger: true` cannot be.
    """
    used, reason = uses_liger(config)
    ranks.log(f"liger: {'RMSNorm, rotary embedding and SwiGLU' if used else 'not used'} ({reason})")


def uses_liger(config: Config) -> tuple[bool, str]:
    """Whether policy and reference, which are alike in that, take Liger's kernels, and why."""
    return choose_liger(config.model, ranks.device().type, lambda: _model_configs(config))


def _model_configs(config: Config) -> list[PreTrainedConfig]:
    """The transformers configs of policy and reference; one where they are the same model."""
    code = config.model.trust_remote_code
    sources = dict.fromkeys((policy_source(config), reference_source(config)))
    return [load_model_config(s.path, revision=s.revision, trust_remote_code=code) for s in sources]


@dataclass(frozen=True)
class ModelSource:
    """Which weights a model is made of: a folder, hub id or `builtin:` name, and the adapter it wears."""

    path: str
    revision: str | None = None
    adapter: str | None = None


def policy_source(config: Config) -> ModelSource:
    """What the policy is before the first step."""
    return ModelSource(config.model.path, config.model.revision, config.lora.adapter)


def reference_source(config: Config) -> ModelSource:
    """What the reference is, in every mode: the model that the config names, otherwise what the policy starts from.

    Never a checkpoint: a resumed run has the reference it began with.
    """
    named, settings = config.reference.model, config.reference
    source = policy_source(config) if named is None else ModelSource(named, settings.revision)
    if settings.adapter is not None:
        source = replace(source, adapter=None if settings.adapter == "none" else settings.adapter)
    return source


def load_model_config(path: str, *, revision: str | None = None, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The transformers config of a folder or hub id.

    Raises:
        ModelError: naming the path and what could not be read.
    """
    from transformers import AutoConfig

    path = resolve_model_path(path)
    if looks_like_folder(path) and not (Path(path) / "config.json").is_file():
        if (Path(path) / lora.ADAPTER_CONFIG).is_file():
            raise ModelError(f"{path}: an adapter; name it as lora.adapter, and the model it belongs on as model.path")
        raise ModelError(f"{path}: no config.json there; expected a Hugging Face model folder")
    try:
        return AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if "trust_remote_code" in str(error) and not trust_remote_code:
            raise ModelError(
                f"{path}: needs Python code that comes with it; model.trust_remote_code=true runs it, if you trust it"
            ) from None
        raise ModelError(f"{path}: not a model that transformers can load: {first_line(error)}") from None


def load_causal_lm(
    path: str,
    *,
    dtype: str,
    revision: str | None = None,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    disable_dropout: bool = True,
) -> Any:
    """A transformers causal LM with its weights in `dtype` ("float32", "bfloat16", "float16").

    Raises:
        ModelError: if the folder lacks weights for some of the model, or has none that can be read.
    """
    from transformers import AutoModelForCausalLM

    path = resolve_model_path(path)
    config = load_model_config(path, revision=revision, trust_remote_code=trust_remote_code)
    original_dropout = switch_off_dropout(config) if disable_dropout else {}
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path,
            config=config,
            revision=revision,
            dtype=getattr(torch, dtype),
            attn_implementation=attn_implementation,
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        raise ModelError(f"{path}: its weights cannot be loaded: {first_line(error)}") from None
    model, report = loaded
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise ModelError(
            f"{path}: no weights for {len(missing)} of the model's parameters, e.g. {missing[0]}; "
            f"is this a complete {config.model_type} language model?"
        )
    model.config.use_cache = False
    model.original_dropout = original_dropout
    return model


def switch_off_dropout(config: PreTrainedConfig) -> dict[str, float]:
    """Set every dropout probability of a transformers config to 0; returns those that were not."""
    text = config.get_text_config()
    found = {
        name: value
        for name, value in text.to_dict().items()
        if ("dropout" in name or "pdrop" in name) and isinstance(value, float) and value > 0
    }
    for name in found:
        setattr(text, name, 0.0)
    return found


@patience("the loading of the policy")
def load_policy(config: Config, micro_steps: int, choice: LayoutChoice | None = None) -> Any:
    """The policy's DeepSpeed engine around a `PairScorer`, in training mode; with LoRA its adapter is on it.

    Args:
        choice: of the run's layout; made from the config if not given. Its check may change `config.data.layout`.
    """
    choice = choice or resolve_layout(config)
    deepspeed_config = policy_deepspeed_config(config, micro_steps, ranks.device().type)
    if config.deepspeed.bf16_optimizer_states:
        ranks.log(lost_updates(config.train.learning_rate, config.train.adam_beta2))
    reference_adapter = reference_source(config).adapter if config.reference.mode == "adapter" else None
    if reference_adapter is not None:
        lora.read_adapter_config(reference_adapter)  # before the base's weights are read
    model = _load_for(config, policy_source(config), deepspeed_config, choice)
    if config.lora.enabled:
        model = lora.add_adapter(model, config.lora, config.train.seed)
        if reference_adapter is not None:
            lora.add_reference_adapter(model, reference_adapter)
        ranks.log(lora.describe(model))
    if config.model.gradient_checkpointing:
        offload, on_cpu = config.model.gradient_checkpointing_offload, ranks.device().type == "cpu"
        if offload and on_cpu:
            why = "activations are in host memory already"
            ranks.log(f"model.gradient_checkpointing_offload does nothing on a CPU: {why}")
        enable_checkpointing(causal_lm(model), offload=offload and not on_cpu)
    prepare_layers(model, config, deepspeed_config, "policy")
    scorer = PairScorer(model, config.logprobs.implementation, choice.option.layout, choice.groups)
    policy = engine.initialize_policy(scorer, deepspeed_config, config.train.weight_decay)
    policy.train()
    prove_layout(choice, policy, config.model.dtype)
    return policy


def lost_updates(learning_rate: float, beta2: float) -> str:
    """What bf16 optimizer states cost, in numbers, for the log.

    bf16 has 8 significant bits, so the neighbours of a weight w are |w| / 256 to |w| / 128 away. An update of less than
    half of that is lost. Adam's is at most about the learning rate.
    """
    stuck = f"; Adam's second moments can grow but not decay, as 1 - beta2 is below 1/512 (adam_beta2 = {beta2:g})"
    return (
        "WARNING: deepspeed.bf16_optimizer_states: there are no fp32 weights, so an update below 1/512 of a weight is "
        f"lost to rounding; at train.learning_rate = {learning_rate:g} weights above {512 * learning_rate:.1e} in "
        f"absolute value do not move{stuck if 1 - beta2 < 2**-9 else ''}"
    )


def load_reference(config: Config, choice: LayoutChoice | None = None, beside: Sequence[Any] = ()) -> Any:
    """The reference's DeepSpeed engine around a `PairScorer`, forward only; arguments as of `load_scoring_model`."""
    return load_scoring_model(config, reference_source(config), choice, beside)


@patience("the loading of a model that only scores")
def load_scoring_model(
    config: Config, source: ModelSource, choice: LayoutChoice | None = None, beside: Sequence[Any] = ()
) -> Any:
    """A forward-only DeepSpeed engine around a `PairScorer`, sharded as `reference.*` says.

    Args:
        choice: of the run's layout; made from the config if not given. Its check may change `config.data.layout`.
        beside: engines of the run that are loaded already, and follow if it does.
    """
    choice = choice or resolve_layout(config)
    deepspeed_config = reference_deepspeed_config(config, ranks.device().type)
    model = _load_for(config, source, deepspeed_config, choice)
    if source.adapter is not None:
        model = lora.wear_adapter(model, source.adapter)
    prepare_layers(model, config, deepspeed_config, "reference")
    scorer = PairScorer(model, config.logprobs.implementation, choice.option.layout, choice.groups)
    reference = engine.initialize_reference(scorer, deepspeed_config)
    prove_layout(choice, reference, config.model.dtype, beside)
    return reference


def _load_for(config: Config, source: ModelSource, deepspeed_config: dict[str, Any], choice: LayoutChoice) -> nn.Module:
    """The causal LM of a source, on the device or in ZeRO-3 shards, with Liger's kernels and the choice's attention."""
    if source.adapter is not None:
        lora.read_adapter_config(source.adapter)  # before the base's weights are read
    sharded = deepspeed_config["zero_optimization"]["stage"] == 3
    asked = config.model.attn_implementation
    with engine.partitioned_loading(deepspeed_config):
        model = load_causal_lm(
            source.path,
            dtype=config.model.dtype,
            revision=source.revision,
            attn_implementation=asked if transformers_has(asked) else None,
            trust_remote_code=config.model.trust_remote_code,
            disable_dropout=config.model.disable_dropout,
        )
    if not sharded:
        model.to(ranks.device())
        check_head(model)
    if uses_liger(config)[0]:
        take_kernels(model, check=not sharded)
    install_attention(model, choice.option)
    return model


def prepare_layers(model: nn.Module, config: Config, deepspeed_config: dict[str, Any], role: str) -> None:
    """Make a model ready for its engine: its layers gathered one by one at ZeRO stage 3, and compiled if asked for.

    Raises:
        ModelError: if they are to be compiled but cannot be gathered so.
    """
    whole, zero = causal_lm(model), deepspeed_config["zero_optimization"]
    sharded = zero["stage"] == 3
    if sharded:
        leaves, reason = make_leaves(whole, int(zero.get(MAX_LIVE, 1e9)))
        ranks.log(f"ZeRO-3 gathers the {role} by {'layers' if leaves else 'submodules'}: {reason}")
        if config.model.compile and not leaves:
            raise ModelError(f"model.compile with ZeRO stage 3 needs weights gathered by layers: {reason}")
        if ranks.device().type != "cpu":
            limit_gathers(whole, torch.get_device_module(ranks.device()).Event)
    if config.model.compile:
        compile_layers(whole, in_hooks=sharded)


def load_tokenizers(config: Config) -> tuple[PreTrainedTokenizerBase, PreTrainedConfig]:
    """The policy's tokenizer, checked against the reference's, and the policy's transformers config."""
    model, adapters = config.model, (config.lora.adapter, config.reference.adapter)
    check_models([model.path, model.tokenizer, config.reference.model, *(a for a in adapters if a != "none")])
    model_config = load_model_config(model.path, revision=model.revision, trust_remote_code=model.trust_remote_code)
    path, revision, code = model.tokenizer or model.path, model.revision, model.trust_remote_code
    path, revision = resolve_model_path(path), None if model.tokenizer else revision
    template = config.data.chat_template
    tokenizer = load_tokenizer(path, revision=revision, trust_remote_code=code, chat_template=template)
    if config.reference.model is not None:
        other = resolve_model_path(config.reference.model)
        reference_tokenizer = load_tokenizer(other, revision=config.reference.revision, trust_remote_code=code)
        check_same_tokenizer(tokenizer, reference_tokenizer, path, other)
    return tokenizer, model_config


def resolve_layout(config: Config) -> LayoutChoice:
    """Write what `data.layout` comes to into the config, and say it once. Before the run lays out any batch.

    The models' check may still change it, so what is planned by it before they are loaded is planned again then.

    Raises:
        ConfigError: if a layout was asked for by name that the policy or the reference cannot take.
    """
    choice = choose_layout(config, _model_configs(config))
    make_groups(choice.groups.sizes, config.deepspeed.timeout_minutes)
    ranks.log(choice.option.describe())
    of_machine = ranks.local_world_size()
    if of_machine is not None and choice.groups.largest > of_machine:
        ranks.log(
            f"train.sequence_parallel_size: a row may be shared by {choice.groups.largest} ranks, and a machine has "
            f"{of_machine}; the exchange around attention then goes over the network between machines"
        )
    return choice


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, model_config: PreTrainedConfig) -> None:
    """Refuse a tokenizer whose ids the model has no embeddings for."""
    size = model_config.get_text_config().vocab_size
    largest = max(tokenizer.get_vocab().values())  # not the number of tokens: ids may have gaps
    if largest >= size:
        raise ModelError(
            f"{tokenizer.name_or_path}: its tokenizer has ids up to {largest}, but the model "
            f"{model_config.name_or_path} has embeddings for {size} tokens: they do not fit"
        )


def check_same_tokenizer(
    policy: PreTrainedTokenizerBase, reference: PreTrainedTokenizerBase, policy_path: str, reference_path: str
) -> None:
    """Refuse a reference whose tokenizer would read the same ids as other text.

    Raises:
        ModelError: naming both and an example of the difference.
    """
    ours, theirs = policy.get_vocab(), reference.get_vocab()
    if ours != theirs:
        differing = next(token for token in {**ours, **theirs} if ours.get(token) != theirs.get(token))
        raise ModelError(
            f"reference.model = {reference_path}: its tokenizer differs from that of {policy_path} "
            f"({len(theirs)} against {len(ours)} tokens; {differing!r} is {theirs.get(differing)} there and "
            f"{ours.get(differing)} here); log-probs of the two can't be compared"
        )
