"""The parameters of a model by its config alone: the model is built without memory, its adapter on it.

Its sizes are those of the very modules that a run would load, so nothing about architectures is written down here.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from dpo_scale.errors import ModelError, first_line
from dpo_scale.models import lora
from dpo_scale.models.load import reference_source
from dpo_scale.models.scorer import causal_lm
from dpo_scale.models.zero3 import decoder_layers
from dpo_scale.settings.tree import Config, LoraSettings

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@dataclass(frozen=True)
class Parameter:
    """One parameter of a model.

    Attributes:
        trained: whether it gets a gradient.
        matrix: of two dimensions or more, so that weight decay applies; the optimizer has two groups by that.
        layer: number of the decoder layer that it belongs to; None: of none.
        expert: of a layer's experts, which are one parameter together.
    """

    name: str
    numel: int
    trained: bool
    matrix: bool
    layer: int | None
    expert: bool


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a model. Numbers of parameters count a tied weight once.

    Attributes:
        parameters: in the order of the model; an adapter's among them.
        embeddings, head: elements of the two matrices; the same one where `tied`.
        layers: number of decoder layers; 0 where the model does not name them.
        key_heads: heads of keys and values.
        experts: of a layer; 0 in a dense model.
        experts_per_token: of these.
        buffers: elements that belong to the model and are no parameters.
    """

    parameters: tuple[Parameter, ...] = field(repr=False)
    hidden: int
    vocab: int
    layers: int
    heads: int
    key_heads: int
    head_dim: int
    embeddings: int
    head: int
    tied: bool
    experts: int
    experts_per_token: int
    buffers: int

    @cached_property
    def total(self) -> int:
        """Parameters in all."""
        return sum(p.numel for p in self.parameters)

    @cached_property
    def trained(self) -> int:
        return sum(p.numel for p in self.parameters if p.trained)

    @property
    def frozen(self) -> int:
        return self.total - self.trained

    @cached_property
    def largest_layer(self) -> int:
        """Parameters of the largest decoder layer."""
        return max(self._by_layer(trained_only=False).values(), default=0)

    @cached_property
    def largest_trained_layer(self) -> int:
        """Trained parameters of the decoder layer that has most of them."""
        return max(self._by_layer(trained_only=True).values(), default=0)

    @cached_property
    def outside_layers(self) -> int:
        """Parameters of no decoder layer: embeddings, head, last norm."""
        return sum(p.numel for p in self.parameters if p.layer is None)

    @cached_property
    def expert_parameters(self) -> int:
        return sum(p.numel for p in self.parameters if p.expert)

    def _by_layer(self, *, trained_only: bool) -> dict[int, int]:
        sizes: dict[int, int] = defaultdict(int)
        for p in self.parameters:
            if p.layer is not None and (p.trained or not trained_only):
                sizes[p.layer] += p.numel
        return sizes


def shape_of(config: Config, model_config: PreTrainedConfig) -> ModelShape:
    """The policy's shape, with the adapters that it wears.

    Raises:
        ModelError, ConfigError: as loading it would, where the adapter does not fit.
    """
    frozen_adapter = reference_source(config).adapter if config.reference.mode == "adapter" else None
    return _shape(config, model_config, config.lora if config.lora.enabled else None, frozen_adapter)


def shape_of_reference(config: Config, model_config: PreTrainedConfig) -> ModelShape:
    """The shape of a reference that is a model of its own; nothing of it is trained.

    Args:
        model_config: of `reference_source(config)`.
    """
    adapter = reference_source(config).adapter
    shape = _shape(config, model_config, LoraSettings(adapter=adapter) if adapter else None)
    return replace(shape, parameters=tuple(replace(p, trained=False) for p in shape.parameters))


def _shape(
    config: Config, model_config: PreTrainedConfig, adapter: LoraSettings | None, frozen_adapter: str | None = None
) -> ModelShape:
    model = _without_memory(config, model_config)
    if adapter is not None and adapter.r is not None:
        model = lora.add_adapter(model, adapter, seed=0)
    elif adapter is not None:
        model = _wearing(model, str(adapter.adapter))
    if frozen_adapter is not None:
        model.add_adapter(lora.REFERENCE_ADAPTER, _adapter_config(frozen_adapter), autocast_adapter_dtype=False)
        model.base_model.set_adapter(lora.POLICY_ADAPTER)
    whole, text = causal_lm(model), model_config.get_text_config()
    layer_of = {id(p): k for k, layer in enumerate(decoder_layers(whole)) for p in layer.parameters()}
    embeddings, head = whole.get_input_embeddings(), whole.get_output_embeddings()
    parameters = tuple(
        Parameter(name, p.numel(), p.requires_grad, p.ndim >= 2, layer_of.get(id(p)), ".experts." in name)
        for name, p in model.named_parameters()
    )
    heads = getattr(text, "num_attention_heads", None) or 0
    experts = getattr(text, "num_local_experts", None) or getattr(text, "num_experts", None) or 0
    return ModelShape(
        parameters=parameters,
        hidden=text.hidden_size,
        vocab=text.vocab_size,
        layers=len(decoder_layers(whole)),
        heads=heads,
        key_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_dim=getattr(text, "head_dim", None) or (text.hidden_size // heads if heads else 0),
        embeddings=embeddings.weight.numel(),
        head=head.weight.numel() if head is not None else 0,
        tied=head is not None and head.weight is embeddings.weight,
        experts=experts,
        experts_per_token=(getattr(text, "num_experts_per_tok", None) or 1) if experts else 0,
        buffers=sum(b.numel() for b in model.buffers()),
    )


def _wearing(model: Any, path: str) -> Any:
    from peft import get_peft_model

    config = _adapter_config(path)
    try:
        return get_peft_model(model, config, adapter_name=lora.POLICY_ADAPTER, autocast_adapter_dtype=False)
    except (ValueError, RuntimeError) as error:
        raise ModelError(f"{path}: does not fit the model: {first_line(error)}") from None


def _adapter_config(path: str) -> Any:
    config = lora.read_adapter_config(path)
    config.base_model_name_or_path = None  # peft warns of another name, and this model has none
    config.inference_mode = False  # saved adapters say True; `reference` is frozen by not being the one in use
    return config


def _without_memory(config: Config, model_config: PreTrainedConfig) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    code = config.model.trust_remote_code
    try:
        with torch.device("meta"):
            # a copy, because building a model writes into its config
            return AutoModelForCausalLM.from_config(copy.deepcopy(model_config), trust_remote_code=code)
    except (ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        raise ModelError(f"{config.model.path}: no model can be built from its config: {first_line(error)}") from None
