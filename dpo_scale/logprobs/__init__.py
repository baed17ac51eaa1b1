"""Log-probs of given tokens from hidden states and the output head: one signature, several implementations.

    naive     full logits, log_softmax, gather: the yardstick
    chunked   plain torch in bounded tiles of the logits, any device
    triton    Triton kernels that keep logits in registers, and cuBLAS: CUDA, 16 bits or fp32

Training with a loss that is a function of each pair's sums alone goes further while the tiles are there, and takes loss
and gradient pair by pair: `dpo_scale.logprobs.pair_loss`.

Letters: S scored tokens, H hidden size, V vocabulary. Only positions that predict a completion token come in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from importlib.util import find_spec
from typing import Any, overload

import torch
from torch import Tensor

from dpo_scale.logprobs.chunked import chunked_token_logps
from dpo_scale.logprobs.naive import naive_token_logps
from dpo_scale.logprobs.tiles import Head

Implementation = Callable[[Tensor, Head, Tensor, Sequence[str]], tuple[Tensor, dict[str, Tensor]]]


def _triton_token_logps(*arguments: Any) -> tuple[Tensor, dict[str, Tensor]]:
    # torch's builds for CPUs come without Triton
    from dpo_scale.logprobs.triton_logps import triton_token_logps

    return triton_token_logps(*arguments)


IMPLEMENTATIONS: dict[str, Implementation] = {
    "naive": naive_token_logps,
    "chunked": chunked_token_logps,
    "triton": _triton_token_logps,
}

BY_PRODUCTS = ("logsumexp", "entropy", "log_sum_p2", "argmax_is_target")


def choose_implementation(
    implementation: str = "auto", device: torch.device | None = None, dtype: torch.dtype | None = None
) -> tuple[str, str]:
    """The name of the implementation that `implementation` stands for, and the reason, for the caller to log.

    Args:
        implementation: a name in `IMPLEMENTATIONS`, or "auto".
        device: where the tensors are; None: CUDA where there is one.
        dtype: of hidden states and head; None: one of 16 bits.

    Raises:
        ValueError: for an unknown name, and for "triton" where it cannot run.
    """
    if device is None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if implementation == "auto":
        if device.type != "cuda":
            return "chunked", f"exact on any device, this one is a {device.type}, and never holds the full logits"
        if not has_triton():
            return "chunked", "Triton is not installed, or its kernels would be faster"
        if dtype not in (None, torch.bfloat16, torch.float16):
            return "chunked", f"products of {dtype} are faster in cuBLAS than in a Triton kernel"
        return "triton", "on CUDA its kernels never write the logits to memory"
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"unknown log-prob implementation {implementation!r}; known: auto, {', '.join(IMPLEMENTATIONS)}"
        )
    if implementation == "triton":
        _check_triton(device, dtype)
    return implementation, "asked for by name"


@lru_cache
def has_triton() -> bool:
    """Whether Triton is installed."""
    return find_spec("triton") is not None


def _check_triton(device: torch.device, dtype: torch.dtype | None) -> None:
    asked = "log-prob implementation 'triton'"
    if not has_triton():
        raise ValueError(f"{asked}: Triton is not installed; 'auto' and 'chunked' need none")
    from dpo_scale.logprobs.triton_logps import INTERPRETED

    if device.type != "cuda" and not (device.type == "cpu" and INTERPRETED):
        raise ValueError(f"{asked}: its kernels run on CUDA, not on a {device.type}; 'auto' and 'chunked' run anywhere")
    if dtype == torch.float64:
        raise ValueError(f"{asked}: its statistics are fp32, too little for fp64; 'auto' and 'chunked' take fp64")


@overload
def token_logps(
    hidden: Tensor,
    head_weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    implementation: str = "auto",
) -> Tensor: ...


@overload
def token_logps(
    hidden: Tensor,
    head_weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    implementation: str = "auto",
    by_products: Sequence[str],
) -> Tensor | tuple[Tensor, dict[str, Tensor]]: ...


def token_logps(
    hidden: Tensor,
    head_weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    implementation: str = "auto",
    by_products: Sequence[str] = (),
) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
    """log softmax(logits)[target] for each token, differentiable once in hidden, head_weight and bias.

    logits = z for z = (hidden @ head_weight.T + bias) * logit_scale, or softcap * tanh(z / softcap) if given.

    hidden: [S, H] bf16, fp16, fp32 or fp64; S may be 0. head_weight: [V, H] and bias: [V], of the same dtype.
    targets: [S] int64 in 0 .. V - 1. Any strides. Autocast is left aside: operands keep their own dtype, and
    logits are accumulated and kept in fp32.

    Returns fp32 [S] (fp64 for fp64 inputs). With `by_products`, also a dict of tensors [S] without gradient:
    `logsumexp` of the logits; `entropy` of the distribution, in nats; `log_sum_p2`, log of the sum over the
    vocabulary of squared probabilities; `argmax_is_target` (bool), no other token being more likely.

    Raises ValueError for shapes, dtypes or devices that do not fit, unknown names, and targets out of range.
    On CUDA an out-of-range target is found on the device, without waiting for it, and fails there as an
    assertion.
    """
    name, _ = choose_implementation(implementation, hidden.device, hidden.dtype)
    head = Head(head_weight, bias, logit_scale, softcap)
    check_arguments(hidden, head, targets, by_products)
    with torch.autocast(hidden.device.type, enabled=False):
        logps, extras = IMPLEMENTATIONS[name](hidden, head, targets, by_products)
    return (logps, extras) if by_products else logps


def check_arguments(hidden: Tensor, head: Head, targets: Tensor, by_products: Sequence[str] = ()) -> None:
    head_weight, bias, _, softcap = head
    if hidden.ndim != 2 or head_weight.ndim != 2 or hidden.shape[1] != head_weight.shape[1]:
        raise ValueError(
            f"hidden [S, H] and head_weight [V, H] expected, got {_shape(hidden)} and {_shape(head_weight)}"
        )
    vocabulary = head_weight.shape[0]
    if vocabulary == 0:
        raise ValueError("head_weight has no rows; under ZeRO-3 it is only there inside the head's own forward")
    if targets.shape != hidden.shape[:1]:
        raise ValueError(f"targets [{hidden.shape[0]}] expected, got {_shape(targets)}")
    if bias is not None and bias.shape != (vocabulary,):
        raise ValueError(f"bias [{vocabulary}] expected, got {_shape(bias)}")
    parameters = [head_weight] if bias is None else [head_weight, bias]
    if not hidden.is_floating_point() or any(p.dtype != hidden.dtype for p in parameters):
        dtypes = ", ".join(str(t.dtype) for t in (hidden, *parameters))
        raise ValueError(f"hidden, head_weight and bias must have one floating-point dtype, got {dtypes}")
    if targets.dtype != torch.int64:
        raise ValueError(f"targets must be int64, got {targets.dtype}")
    if any(t.device != hidden.device for t in (*parameters, targets)):
        raise ValueError("hidden, head_weight, bias and targets must be on one device")
    if softcap is not None and softcap <= 0:
        raise ValueError(f"softcap must be above 0, got {softcap}")
    for name in by_products:
        if name not in BY_PRODUCTS:
            raise ValueError(f"unknown by-product {name!r}; known: {', '.join(BY_PRODUCTS)}")
    in_range = ((targets >= 0) & (targets < vocabulary)).all()
    if in_range.is_cuda:
        torch._assert_async(in_range, f"token_logps: a target is outside 0 .. {vocabulary - 1}")
    elif not in_range:
        raise ValueError(
            f"targets must be in 0 .. {vocabulary - 1}, got {targets.min().item()} .. {targets.max().item()}"
        )


def _shape(tensor: Tensor) -> str:
    return str(list(tensor.shape))
