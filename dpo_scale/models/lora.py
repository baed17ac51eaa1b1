"""Low-rank adapters (LoRA, arXiv 2106.09685) on a frozen policy, through peft.

An adapter lives inside the layers of the model it is put on, so a policy with an adapter is also, with the adapter off,
the model it started from: the reference costs no second model. A run that starts from an existing adapter can carry a
second, frozen copy of it, and with that one in use it is the reference.

Only plain LoRA of linear layers is taken: what this file computes by itself (the merged weights) and what a run takes
for granted (the head is frozen) hold for nothing else. Adapters have the model's dtype; ZeRO keeps their fp32 masters.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from dpo_scale.errors import ConfigError, ModelError, first_line
from dpo_scale.models.builtin import resolve_model_path
from dpo_scale.models.files import looks_like_folder
from dpo_scale.models.scorer import causal_lm

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel

    from dpo_scale.settings.tree import LoraSettings

POLICY_ADAPTER = "default"  # the name that peft saves without a folder of its own
REFERENCE_ADAPTER = "reference"
ADAPTER_CONFIG = "adapter_config.json"
_PEFT_PREFIX = "base_model.model."  # what peft puts before the names of the model's own weights


def read_adapter_config(path: str) -> LoraConfig:
    """The peft config of an adapter's folder or hub id, without its weights.

    Raises:
        ModelError: if there is none, or it is not a LoRA adapter.
    """
    from peft import LoraConfig, PeftConfig

    if looks_like_folder(path) and not (Path(path) / ADAPTER_CONFIG).is_file():
        raise ModelError(f"{path}: no {ADAPTER_CONFIG} there; expected the folder of a LoRA adapter")
    try:
        config = PeftConfig.from_pretrained(path)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{path}: not an adapter that peft can load: {first_line(error)}") from None
    if not isinstance(config, LoraConfig):
        raise ModelError(f"{path}: an adapter of type {config.peft_type}; expected LORA")
    if config.init_lora_weights not in (True, False, "gaussian", "orthogonal"):
        raise ModelError(
            f"{path}: an adapter on changed weights of its base (init_lora_weights = {config.init_lora_weights!r}); "
            "expected one on the base as it is; peft's save_pretrained can convert it"
        )
    return config


def add_adapter(model: nn.Module, settings: LoraSettings, seed: int) -> PeftModel:
    """Freeze a causal LM and put the policy's adapter on it: a new one, which changes nothing yet, or a saved one.

    Args:
        model: the transformers model, whole or a ZeRO-3 shard.
        seed: decides the new adapter's weights, the same on every rank, device and stage.

    Returns:
        The peft model; only the adapter's weights require a gradient.

    Raises:
        ConfigError, ModelError: if the settings or the saved adapter do not fit the model.
    """
    from peft import LoraConfig

    if settings.adapter is not None:
        return wear_adapter(model, settings.adapter, trainable=True, dropout=settings.dropout)
    assert settings.r is not None
    options: dict[str, Any] = {"lora_alpha": settings.alpha}  # peft takes a fraction too, but says int
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.r,
        lora_dropout=settings.dropout,
        target_modules=_target_modules(model, settings),
        **options,
    )
    # drawn on the host, apart from the run's random state, of which loading uses more or less, as the stage may be
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return _wrapped(model, config, "lora.target_modules")


def wear_adapter(model: nn.Module, path: str, *, trainable: bool = False, dropout: float = 0.0) -> PeftModel:
    """A causal LM with a saved adapter on it, all of it frozen unless `trainable`.

    Args:
        dropout: this run's, in place of the one that the adapter was trained with before.

    Raises:
        ModelError: if the adapter's weights do not fit the model.
    """
    config = read_adapter_config(path)
    config.inference_mode, config.lora_dropout = not trainable, dropout
    wrapped = _wrapped(model, config, path)
    _load_weights(wrapped, path, POLICY_ADAPTER)
    return wrapped


def add_reference_adapter(model: Any, path: str) -> None:
    """Put a second, frozen adapter beside the policy's, not in use outside `in_reference_state`.

    Raises:
        ModelError: if the adapter's weights do not fit the model.
    """
    config = read_adapter_config(path)
    config.inference_mode = True
    try:
        model.add_adapter(REFERENCE_ADAPTER, config, autocast_adapter_dtype=False)
    except (ValueError, RuntimeError) as error:
        raise ModelError(f"{path}: does not fit the model: {first_line(error)}") from None
    _check_layers(model, REFERENCE_ADAPTER, path)
    _load_weights(model, path, REFERENCE_ADAPTER)
    model.base_model.set_adapter(POLICY_ADAPTER)


@contextmanager
def in_reference_state(model: Any) -> Iterator[None]:
    """Within it a peft model is the reference: its frozen adapter in use if it has one, otherwise none."""
    tuner = model.base_model
    if REFERENCE_ADAPTER in model.peft_config:
        tuner.set_adapter(REFERENCE_ADAPTER, inference_mode=True)
    else:
        tuner.disable_adapter_layers()
    try:
        yield
    finally:
        tuner.enable_adapter_layers()
        tuner.set_adapter(POLICY_ADAPTER)  # which also makes it the one that requires a gradient


def merged_weights(model: Any, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The model's own weights with the policy's adapter added, W + scaling * B @ A, rounded once to W's dtype.

    Args:
        model: the peft model, for its layers' scaling; its weights are not touched.
        weights: all of them, by the peft model's names.

    Returns:
        By the names of the model without an adapter; merged ones are on the host.
    """
    from peft.tuners.lora import LoraLayer

    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    merged = {}
    for name, tensor in weights.items():
        if ".lora_" in name:
            continue
        owner = name.removesuffix(".base_layer.weight")
        if owner != name and POLICY_ADAPTER in layers[owner].lora_A:
            a, b = (weights[f"{owner}.lora_{side}.{POLICY_ADAPTER}.weight"].float() for side in "AB")
            delta = layers[owner].scaling[POLICY_ADAPTER] * (b @ a)
            delta = delta.T if getattr(layers[owner], "fan_in_fan_out", False) else delta
            tensor = (tensor.float() + delta).to(tensor.dtype).cpu()
        merged[name.removeprefix(_PEFT_PREFIX).replace(".base_layer.", ".")] = tensor
    return merged


def save_adapter(model: Any, weights: dict[str, torch.Tensor], base: str, folder: Path) -> None:
    """Write the policy's adapter as peft does; `PeftModel.from_pretrained` loads it.

    Args:
        weights: the adapter's, by the peft model's names.
        base: what the adapter was trained on, as `model.path` says it.
    """
    base = resolve_model_path(base)
    on_disk = Path(base).expanduser()
    config = model.peft_config[POLICY_ADAPTER]
    config.base_model_name_or_path = str(on_disk.resolve()) if on_disk.is_dir() else base
    model.save_pretrained(folder, state_dict=weights, selected_adapters=[POLICY_ADAPTER], save_embedding_layers=False)


def describe(model: Any) -> str:
    """How much of a peft model is trained, for the log, and how much of it are experts that no adapter reaches."""
    trained = _count(p for p in model.parameters() if p.requires_grad)
    experts, total = _count(_stacks_of_experts(model)), _count(model.parameters())
    said = f"LoRA: {trained:,} weights are trained, {100 * trained / total:.3g} % of {total:,}"
    if experts:
        said += f"; the adapter does not reach the experts, {experts:,} weights or {100 * experts / total:.3g} %"
    return said


def _count(parameters: Iterable[Any]) -> int:
    return sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in parameters)


def _stacks_of_experts(model: nn.Module) -> list[Any]:
    """The weights of experts, which transformers holds as one [experts, n, m] and not as linear layers."""
    named = [(name, getattr(p, "ds_shape", p.shape), p) for name, p in model.named_parameters()]
    return [parameter for name, shape, parameter in named if ".experts." in name and len(shape) == 3]


def _target_modules(model: Any, settings: LoraSettings) -> str | list[str]:
    """The layers of a new adapter, by peft's names.

    By all-linear peft means more than linear layers on a mixture of experts: it would also wrap the router and the
    experts. There the linear layers are named one by one. Those called like a part of an expert, as in dense layers
    and shared experts, are left out: peft takes such a name for the experts.
    """
    if settings.target_modules != "all-linear" or not _stacks_of_experts(model):
        return settings.target_modules
    head, linear = model.get_output_embeddings(), [m for m in model.named_modules() if isinstance(m[1], nn.Linear)]
    names = {name.rpartition(".")[2] for name, module in linear if module is not head}
    return sorted(names - {"gate_proj", "up_proj", "down_proj"})


def _wrapped(model: nn.Module, config: LoraConfig, named: str) -> PeftModel:
    from peft import get_peft_model

    # GPT-2's layers hold their weights transposed; peft sees that by itself, and says so
    warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False")
    try:
        wrapped = get_peft_model(model, config, adapter_name=POLICY_ADAPTER, autocast_adapter_dtype=False)
    except (ValueError, RuntimeError) as error:
        kind = ConfigError if named.startswith("lora.") else ModelError
        raise kind(f"{named}: does not fit the model: {first_line(error)}") from None
    _check_layers(wrapped, POLICY_ADAPTER, named)
    return wrapped


def _check_layers(model: Any, adapter: str, named: str) -> None:
    """Make sure that an adapter is low-rank updates of linear layers, the head not among them, and nothing else."""
    from peft.tuners.lora import Linear, LoraLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    head = causal_lm(model).get_output_embeddings()
    for name, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            raise ModelError(f"{named}: the adapter also replaces {name}; expected one of low-rank updates alone")
        if not isinstance(module, LoraLayer) or adapter not in module.r:
            continue
        if module is head:
            raise ModelError(f"{named}: the output head {name} must be left out: it stays frozen")
        plain = not module.lora_variant.get(adapter) and not module.lora_bias.get(adapter)
        if type(module) is not Linear or not plain:
            raise ModelError(f"{named}: {name} would get another kind of adapter than plain LoRA of a linear layer")
    if model.peft_config[adapter].bias != "none":
        raise ModelError(f"{named}: the adapter also holds biases; expected one of low-rank updates alone")


def _load_weights(model: Any, path: str, adapter: str) -> None:
    from peft import set_peft_model_state_dict
    from peft.utils import load_peft_weights
    from safetensors import SafetensorError

    try:
        found: Any = set_peft_model_state_dict(model, load_peft_weights(path, device="cpu"), adapter_name=adapter)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"{path}: its weights cannot be loaded: {first_line(error)}") from None
    missing = [name for name in found.missing_keys if f".{adapter}." in name]
    wrong = missing or found.unexpected_keys
    if wrong:
        how = "lacks weights for" if missing else "has weights for other layers than the model's:"
        raise ModelError(f"{path}: the adapter {how} {wrong[0]}; was it trained on another model?")
