"""A model of fake tensors that keeps what a run's model keeps: its first layers, adapter, checkpointing, attention.

The code that runs is transformers' own, with two exceptions. What runs as a kernel on a GPU is stood in for by
functions that keep and make the same tensors: attention, and what Liger fuses. And a backbone is cut to as many of its
layers as have each kind among them.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dpo_scale.distributed.sequence_parallel import by_rank, key_repeats
from dpo_scale.errors import ModelError, first_line
from dpo_scale.models import lora
from dpo_scale.models.activations import enable_checkpointing
from dpo_scale.models.attention import blockwise_attention
from dpo_scale.models.load import switch_off_dropout
from dpo_scale.models.scorer import causal_lm
from dpo_scale.models.zero3 import decoder_layers
from dpo_scale.settings.tree import Config, LoraSettings

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

STAND_IN = "dpo_scale_forecast"  # the name of the attention that stands in for a GPU's kernel


def layer_kinds(model_config: PreTrainedConfig) -> list[tuple[Any, ...]]:
    """What tells the decoder's layers apart, layer by layer: their kind of attention and their weights' shapes."""
    with torch.device("meta"):
        layers = decoder_layers(_build(model_config, "bfloat16"))
    stated = getattr(model_config.get_text_config(), "layer_types", None) or [None] * len(layers)
    shapes = (tuple((name, p.shape) for name, p in layer.named_parameters()) for layer in layers)
    return list(zip(stated, shapes, strict=True))


def layers_needed(kinds: list[tuple[Any, ...]]) -> int:
    """How many of the first layers show each kind, and the first layer's once more: it also makes what all share."""
    places = [kinds.index(kind) for kind in dict.fromkeys(kinds)]
    again = kinds.index(kinds[0], 1) if kinds.count(kinds[0]) > 1 else 0
    return max(*places, again) + 1


def build_model(
    config: Config, model_config: PreTrainedConfig, layers: int, *, policy: bool, adapter: str | None, liger: bool
) -> Any:
    """The first layers of a run's policy or reference, on the meta device.

    Args:
        adapter: that the reference wears.

    Raises:
        ModelError, ConfigError: as loading it would.
    """
    with torch.device("meta"):
        model = _build(_cut(model_config, layers), config.model.dtype, config)
        if config.model.disable_dropout:
            switch_off_dropout(model.config)
        if liger:
            _keep_as_liger(model)
        settings = config.lora if policy and config.lora.enabled else LoraSettings(adapter=adapter) if adapter else None
        if settings is not None and settings.adapter is not None:
            from peft import get_peft_model

            model = get_peft_model(model, lora.read_adapter_config(settings.adapter), autocast_adapter_dtype=False)
        elif settings is not None:
            model = lora.add_adapter(model, settings, seed=0)
        for name, parameter in model.named_parameters():
            if ".lora_" in name:  # peft leaves it in fp32 where the base has no data
                parameter.data = parameter.data.to(getattr(torch, config.model.dtype))
    if not policy:
        return model.eval().requires_grad_(False)
    if config.model.gradient_checkpointing:
        enable_checkpointing(causal_lm(model), offload=False)  # what an offload moves is known without running it
    return model.train()


def make_fake(model: nn.Module) -> None:
    """Put fake tensors in the place of a model's own, within a `FakeTensorMode`. Tied weights stay tied."""
    made: dict[int, Tensor] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) not in made:
                new = torch.empty(parameter.shape, dtype=parameter.dtype)
                made[id(parameter)] = nn.Parameter(new, requires_grad=parameter.requires_grad)
            if parameter is not None:
                module._parameters[name] = made[id(parameter)]  # type: ignore[assignment]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def _build(model_config: PreTrainedConfig, dtype: str, config: Config | None = None) -> Any:
    from transformers import AutoModelForCausalLM

    code = config is not None and config.model.trust_remote_code
    try:
        model = AutoModelForCausalLM.from_config(
            copy.deepcopy(model_config), dtype=getattr(torch, dtype), trust_remote_code=code
        )
    except (ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        name = getattr(model_config, "model_type", "model")
        raise ModelError(f"no {name} can be built from its config: {first_line(error)}") from None
    model.config.use_cache = False
    return model


def _cut(model_config: PreTrainedConfig, layers: int) -> PreTrainedConfig:
    """The config of a model of the first layers: lists of all layers are cut too."""
    model_config = copy.deepcopy(model_config)
    text = model_config.get_text_config()
    count = text.num_hidden_layers
    for name, value in list(vars(text).items()):
        if isinstance(value, list) and len(value) == count:
            setattr(text, name, value[:layers])
    text.num_hidden_layers = layers
    return model_config


def stand_in_attention(model: Any, *, in_blocks: bool, copied_keys: int, group_size: int) -> None:
    """Have a model's attention keep what that of a run keeps, for one row of many sequences.

    Args:
        model: without peft's wrapper.
        in_blocks: as a CPU runs it, by `blockwise_attention` itself; otherwise as kernels do.
        copied_keys: tokens whose keys and values are copied for branches behind a shared prompt.
        group_size: ranks that share the row.
    """
    from transformers import AttentionInterface

    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **settings: Any
    ) -> tuple[Tensor, None]:
        heads, tokens = query.shape[1:3]
        if group_size > 1:
            query, key, value = _exchanged(query, key, value, group_size)
        if in_blocks:
            output, _ = blockwise_attention(module, query, key, value, attention_mask, **settings)
        else:
            if copied_keys:
                index = torch.zeros(key.shape[2] + copied_keys, dtype=torch.long)
                key, value = key.index_select(2, index), value.index_select(2, index)
            output = _Kernel.apply(query, key, value).transpose(1, 2)
        if group_size > 1:
            width = output.shape[-1]
            whole = _Exchange.apply(output.reshape(output.shape[1], -1))
            output = whole.view(group_size, tokens, -1, width).transpose(0, 1).flatten(1, 2)[None, :, :heads]
        return output, None

    AttentionInterface.register(STAND_IN, attend)
    model.set_attn_implementation(STAND_IN)


def _exchanged(query: Tensor, key: Tensor, value: Tensor, size: int) -> list[Tensor]:
    """What `sequence_parallel.over_heads` makes of [1, heads, t, D]: [1, own heads, T, D]."""
    repeats = key_repeats(query.shape[1], key.shape[1], size)
    if repeats > 1:
        key, value = (tensor.repeat_interleave(repeats, dim=1) for tensor in (key, value))
    parts = [by_rank(tensor[0], size) for tensor in (query, key, value)]
    whole = _Exchange.apply(torch.cat(parts, dim=-1).flatten(0, 1))
    widths = [part.shape[-1] for part in parts]
    return [
        part.view(len(whole), -1, tensor.shape[-1]).transpose(0, 1)[None]
        for part, tensor in zip(whole.split(widths, dim=-1), (query, key, value), strict=True)
    ]


class _Exchange(torch.autograd.Function):
    """An all-to-all of equal parts: a new tensor of the same size, either way."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        return torch.empty_like(rows)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return torch.empty_like(gradient, memory_format=torch.contiguous_format)


class _Kernel(torch.autograd.Function):
    """Flash-attention: keeps query, key, value, output and a log-sum-exp, [H, T] fp32."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = query.new_empty((*query.shape[:-1], value.shape[-1]))
        ctx.save_for_backward(query, key, value, output, _fp32(query.shape[:-1]))
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value, *_ = ctx.saved_tensors
        working = _fp32(query.shape), _fp32(query.shape[:-1])  # dquery is summed in fp32, beside a number a query
        heads = query.shape[1]
        by_head = [tensor.new_empty((1, heads, *tensor.shape[2:])) for tensor in (key, value)]  # before they are summed
        gradients = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
        del working, by_head
        return gradients


def _fp32(shape: Any) -> Tensor:
    return torch.empty(shape, dtype=torch.float32)


def _keep_as_liger(model: nn.Module) -> None:
    """Have norms and gated layers keep what Liger's kernels keep."""
    for module in model.modules():
        name = type(module).__name__
        if name.endswith("RMSNorm") and hasattr(module, "weight"):
            module.forward = lambda hidden, weight=module.weight: _Norm.apply(hidden, weight)  # type: ignore[method-assign]
        gated = name.endswith("MLP") and all(hasattr(module, part) for part in ("gate_proj", "up_proj", "down_proj"))
        if gated and isinstance(getattr(module, "act_fn", None), nn.SiLU):
            module.forward = lambda hidden, of=module: of.down_proj(  # type: ignore[method-assign]
                _Gated.apply(of.gate_proj(hidden), of.up_proj(hidden))
            )


class _Norm(torch.autograd.Function):
    """Liger's RMSNorm: keeps its input and an fp32 number a row; the gradient takes the place of the one that came."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, weight, _fp32(hidden.shape[:-1]))
        return torch.empty_like(hidden)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None]:
        return gradient, torch.empty_like(ctx.saved_tensors[1]) if ctx.needs_input_grad[1] else None


class _Gated(torch.autograd.Function):
    """Liger's SwiGLU: keeps its two inputs; their gradients take their places."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return torch.empty_like(gate)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return gate.detach(), up.detach()
