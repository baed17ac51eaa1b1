"""How reference values are computed, as far as it decides the numbers: part of what a stored value is looked up by.

Batch composition, layout, device and number of ranks are left out. They move a value by rounding only, within the
tolerance that stored values are verified with.
"""

from __future__ import annotations

import copy
from importlib.metadata import version

from dpo_scale.settings.tree import Config

# Implementations of a class agree to rounding in fp32; see `dpo_scale.logprobs`.
PRECISION_CLASSES = {"naive": "fp32 logits", "chunked": "fp32 logits", "triton": "fp32 logits"}
# The libraries whose code computes the numbers, by minor release: a patch release changes no kernel and no model.
LIBRARIES = ("torch", "transformers")
IMPORTED = {"computed": "elsewhere"}  # the numerics of values that others have computed


def numerics_of(config: Config) -> dict[str, str]:
    """The numerics of a run's reference, readable, for `BookKey`."""
    from dpo_scale.logprobs import choose_implementation
    from dpo_scale.models.load import uses_liger

    implementation, _ = choose_implementation(config.logprobs.implementation)
    return {
        "dtype": config.model.dtype,
        # transformers' version and the model decide which one is the default
        "attention": config.model.attn_implementation or "default",
        "logprobs": PRECISION_CLASSES[implementation],
        # Compiling moves bf16 values by as much as another order of sums does: 0.3 a completion was measured. There is
        # no entry where nothing is compiled, so that older books stay valid.
        **({"layers": "compiled"} if config.model.compile else {}),
        # Liger rounds in other places. There is no entry without it, for the same reason.
        **({"elementwise": f"liger {_minor_version(version('liger-kernel'))}"} if uses_liger(config)[0] else {}),
        # Their products are summed in another order. There is no entry without experts, for the same reason again.
        **({"experts": experts} if (experts := _experts_implementation(config)) else {}),
        **{library: _minor_version(version(library)) for library in LIBRARIES},
    }


def _experts_implementation(config: Config) -> str | None:
    """How the reference's experts are computed; None if it has none.

    transformers decides it when it builds a model, by the model's config and its class. So one is built, without any
    memory.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from dpo_scale.models.load import load_model_config, reference_source

    source, code = reference_source(config), config.model.trust_remote_code
    found = load_model_config(source.path, revision=source.revision, trust_remote_code=code)
    text = found.get_text_config()
    if not any(getattr(text, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts")):
        return None
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(found), trust_remote_code=code)
    return model.config.get_text_config()._experts_implementation


def _minor_version(full: str) -> str:
    """Major and minor version: "2.13.0+cpu" is "2.13"."""
    return ".".join(full.split("+")[0].split(".")[:2])
