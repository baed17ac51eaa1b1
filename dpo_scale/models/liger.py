"""`model.liger`: fused RMSNorm, rotary embedding and SwiGLU from Liger-Kernel (arXiv 2410.10989), where there is a GPU.

Each of the three is one kernel instead of several that read and write the layer's activations. Which modules they are
and how an architecture's norm rounds, Liger knows by the model's type; nothing else of it is taken, neither its losses
(the head has its own, `dpo_scale.logprobs`) nor its attention nor its fused experts.

Liger patches the modules of one model, but also puts its classes and its rotary function into the file of transformers
that the model is made of, and so into every other model of the process. That is undone here: the attention modules of
this model get a forward that finds Liger's rotary function where it looks for transformers' own.
"""

from __future__ import annotations

import inspect
import sys
import types
from collections import Counter
from collections.abc import Callable, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from dpo_scale.errors import ConfigError, ModelError
from dpo_scale.settings.tree import ModelSettings

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_PARTS = {"rms_norm": "RMSNorm", "rope": "rotary embedding", "swiglu": "SwiGLU"}  # by the names of Liger's switches
# Mean difference of hidden states, relative to their mean size, that another order of roundings may cause in many
# layers. A wrong norm or rotation differs by as much as there is.
_ALLOWED = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}


def choose_liger(
    settings: ModelSettings, device_type: str, model_configs: Callable[[], Sequence[PreTrainedConfig]]
) -> tuple[bool, str]:
    """Whether a run's models take Liger's kernels, and the reason, in words for the log.

    Args:
        model_configs: gives the transformers configs of the models that will run; not asked where they do not matter.

    Raises:
        ConfigError: if `model.liger: true` cannot be.
    """
    if settings.liger is False:
        return False, "model.liger = False"
    against = _why_not(settings, device_type, model_configs)
    if against is None:
        return True, f"liger-kernel {version('liger-kernel')} is installed and the device is {device_type}"
    if settings.liger is True:
        raise ConfigError(f"model.liger = True: {against}; expected auto or false for this run")
    return False, against


def _why_not(
    settings: ModelSettings, device_type: str, model_configs: Callable[[], Sequence[PreTrainedConfig]]
) -> str | None:
    if device_type != "cuda":
        return f"Liger's kernels are for a CUDA device, this one is a {device_type}"
    if settings.compile:
        return "model.compile fuses the layers' elementwise operations by itself"
    if find_spec("liger_kernel") is None:
        return "the package liger-kernel is not installed"
    try:
        known = _patches()
    except ImportError as error:
        return f"liger-kernel {version('liger-kernel')} cannot be imported: {error}"
    for model_config in model_configs():
        kind = getattr(model_config, "model_type", None)
        if getattr(model_config, "auto_map", None):
            return f"a {kind} model's code is not transformers' own"
        if not any(_switches(known[kind]).values() if kind in known else ()):
            return f"Liger has none of these kernels for a {kind} model"
    return None


def take_kernels(model: Any, *, check: bool) -> Counter[str]:
    """Have a transformers model, and no other, use Liger's kernels.

    Args:
        model: with transformers' own modules: before adapters are put on it.
        check: compare the hidden states before and after. Not for ZeRO-3 shards, whose weights are not there yet.

    Returns:
        How many modules now run which kernel, by Liger's name of it.

    Raises:
        ModelError: if nothing was found to replace, or if hidden states differ by more than rounding.
    """
    before = _hidden(model) if check else None
    patch = _patches()[model.config.model_type]
    switches = _switches(patch)
    if any(type(module).__name__.endswith("Experts") for module in model.modules()):
        switches["swiglu"] = False  # there it would be Liger's own mixture of experts
    names = vars(sys.modules[type(model).__module__])
    original = dict(names)
    try:
        patch(model=model, **switches)
    finally:
        replaced = {name: value for name, value in names.items() if original.get(name) is not value}
        names.update({name: original[name] for name in replaced})
    taken = Counter(module._get_name() for module in model.modules() if "forward" in vars(module))
    functions = {name: value for name, value in replaced.items() if isinstance(value, types.FunctionType)}
    for module in model.modules():
        used = functions.keys() & _names_in_forward(module)
        if used and "forward" not in vars(module):
            module.forward = types.MethodType(_with_globals(type(module).forward, {**names, **functions}), module)
            taken.update(used)
    if not taken:
        raise ModelError(f"{_pair(model)}: found nothing to replace; set model.liger=false")
    if before is not None:
        difference = ((_hidden(model) - before).abs().mean() / before.abs().mean()).item()
        if not difference <= _ALLOWED[model.dtype]:
            raise ModelError(
                f"{_pair(model)}: hidden states differ by {difference:.2g} of their size from the model's own; this "
                "version was not made for that model; set model.liger=false"
            )
    return taken


def _patches() -> dict[str, Callable[..., None]]:
    """Liger's functions that patch a model, by model type."""
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    return MODEL_TYPE_TO_APPLY_LIGER_FN


def _switches(patch: Callable[..., None]) -> dict[str, bool]:
    """All its switches: ours as Liger has them by default, which is off where it has no such kernel, others off."""
    parameters = inspect.signature(patch).parameters.items()
    return {name: p.default and name in _PARTS for name, p in parameters if isinstance(p.default, bool)}


def _names_in_forward(module: nn.Module) -> set[str]:
    """Global names that a module's forward looks up; none if it is wrapped in something."""
    forward = type(module).forward
    return set(forward.__code__.co_names) if isinstance(forward, types.FunctionType) else set()


def _with_globals(function: types.FunctionType, names: dict[str, Any]) -> types.FunctionType:
    """The same function, which finds its global names elsewhere."""
    made = types.FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
    made.__kwdefaults__ = function.__kwdefaults__
    return made


@torch.no_grad()
def _hidden(model: Any) -> torch.Tensor:
    """Last hidden states of a few tokens, fp32 [1, T, H]."""
    training = model.training
    model.eval()
    count = min(64, model.config.get_text_config().vocab_size)
    ids = torch.arange(count, device=next(model.parameters()).device)[None]
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state.float()
    model.train(training)
    return hidden


def _pair(model: Any) -> str:
    return f"model.liger: liger-kernel {version('liger-kernel')} in {type(model).__name__}"
