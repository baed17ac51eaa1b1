"""Liger-Kernel for a CPU: its kernels in plain torch, counted, behind the real package or behind a stand-in for it.

The real kernels want a GPU, and Triton's interpreter does not run them. The stand-in does to a Llama or Mixtral what
the real package does, replacements in transformers' own file among them.
"""

from __future__ import annotations

import sys
import types
from collections import Counter
from importlib.machinery import ModuleSpec
from importlib.metadata import version

import pytest
import torch
from torch.nn import functional as F

CALLS: Counter[str] = Counter()
VERSION = "0.8.5"
NORM_SCALE = 1.0  # anything else makes the norm a wrong one


def rms_norm(x, weight, eps, offset=0.0, casting_mode="llama", *options):
    CALLS["norm"] += 1
    wide = NORM_SCALE * x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + eps)
    return wide.to(x.dtype) * (offset + weight)


def silu_mul(gate, up, *multipliers):
    CALLS["swiglu"] += 1
    return F.silu(gate) * up


def rotate(q, k, cos, sin, position_ids=None, unsqueeze_dim=1):
    CALLS["rope"] += 1
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)

    def rotated(x):
        first, second = x.chunk(2, dim=-1)
        return x * cos + torch.cat([-second, first], dim=-1) * sin

    return rotated(q), rotated(k)


def use_stand_in(patch: pytest.MonkeyPatch) -> None:
    """A module `liger_kernel` with what `dpo_scale.models.liger` uses of it."""

    def bind(module, name, forward):
        vars(module)["forward"] = types.MethodType(forward, module)
        vars(module)["_get_name"] = lambda: name

    def of_norm(self, x):
        return rms_norm(x, self.weight, self.variance_epsilon)

    def of_mlp(self, x):
        return self.down_proj(silu_mul(self.gate_proj(x), self.up_proj(x)))

    def patches(kind, classes):
        def apply(
            rope: bool = True,
            cross_entropy: bool = False,
            fused_linear_cross_entropy: bool = True,
            rms_norm: bool = True,
            swiglu: bool = True,
            model=None,
        ) -> None:
            assert not cross_entropy and not fused_linear_cross_entropy
            modeling = sys.modules[f"transformers.models.{kind}.modeling_{kind}"]
            if rope:
                modeling.apply_rotary_pos_emb = rotate
            if rms_norm:
                setattr(modeling, f"{classes}RMSNorm", type("LigerRMSNorm", (), {}))
                norms = [model.model.norm]
                for layer in model.model.layers:
                    norms += [layer.input_layernorm, layer.post_attention_layernorm]
                for norm in norms:
                    bind(norm, "LigerRMSNorm", of_norm)
            if swiglu:
                setattr(modeling, f"{classes}MLP", type("LigerSwiGLUMLP", (), {}))
                for layer in model.model.layers:
                    bind(layer.mlp, "LigerSwiGLUMLP", of_mlp)

        return apply

    def of_nemotron(relu_squared: bool = True, fused_linear_cross_entropy: bool = True, model=None, **others) -> None:
        raise AssertionError("none of our kernels is there")

    package = types.ModuleType("liger_kernel")
    package.__spec__ = ModuleSpec("liger_kernel", None)
    monkey_patch = types.ModuleType("liger_kernel.transformers.monkey_patch")
    monkey_patch.MODEL_TYPE_TO_APPLY_LIGER_FN = {
        "llama": patches("llama", "Llama"),
        "mixtral": patches("mixtral", "Mixtral"),
        "nemotron": of_nemotron,
    }
    patch.setitem(sys.modules, "liger_kernel", package)
    patch.setitem(sys.modules, "liger_kernel.transformers", types.ModuleType("liger_kernel.transformers"))
    patch.setitem(sys.modules, "liger_kernel.transformers.monkey_patch", monkey_patch)
    _say_version(patch, VERSION)


def use_installed(patch: pytest.MonkeyPatch) -> None:
    """The real package with its three kernels replaced."""
    from liger_kernel.transformers import rms_norm as norms
    from liger_kernel.transformers import rope, swiglu

    patch.setattr(norms, "LigerRMSNormFunction", types.SimpleNamespace(apply=rms_norm))
    patch.setattr(swiglu, "LigerSiLUMulFunction", types.SimpleNamespace(apply=silu_mul))
    patch.setattr(rope, "dispatch", lambda name, *arguments: rotate(*arguments))


def _say_version(patch: pytest.MonkeyPatch, answer: str) -> None:
    from dpo_scale.models import liger
    from dpo_scale.reference import numerics

    for module in (liger, numerics):
        patch.setattr(module, "version", lambda name: answer if name == "liger-kernel" else version(name))
