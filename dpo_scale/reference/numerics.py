"""How reference values were computed, as far as it decides the numbers: part of what a stored value is looked up by.

Batch composition, layout, device and number of ranks are left out: they move a value by rounding only, within the
tolerance that stored values are verified with.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version

# Implementations of a class agree to rounding in fp32; see `dpo_scale.logprobs`.
PRECISION_CLASSES = {"naive": "fp32 logits", "chunked": "fp32 logits"}
# Those whose code computes the numbers. A patch release repairs; a minor one may change a kernel or a model.
_LIBRARIES = ("torch", "transformers")


def reference_numerics(*, dtype: str, attention: str, logprobs: str) -> dict[str, str]:
    """The numerics of a computation, readable, for `BookKey`.

    Args:
        dtype: of weights and activations: float32, bfloat16 or float16.
        attention: the implementation in use, as a loaded model's config names it (never None or "auto").
        logprobs: a name in `dpo_scale.logprobs.IMPLEMENTATIONS`.
    """
    numerics = {"dtype": dtype, "attention": attention, "logprobs": PRECISION_CLASSES[logprobs]}
    return numerics | {library: _minor_version(version(library)) for library in _LIBRARIES}


def imported_numerics(described: Mapping[str, str]) -> dict[str, str]:
    """The numerics of values computed elsewhere: whatever is known of them, as text."""
    return {"computed": "elsewhere", **described}


def _minor_version(full: str) -> str:
    """Major and minor version: "2.13.0+cpu" is "2.13"."""
    return ".".join(full.split("+")[0].split(".")[:2])
