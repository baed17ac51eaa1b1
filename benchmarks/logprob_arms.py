"""Whom the log-prob benchmark compares, each called the way its own documentation or trainer calls it.

An arm is made for one case and then run any number of times. Ours are all of `dpo_scale.logprobs.IMPLEMENTATIONS`,
and `pair_loss`, the fused loss. The naive forms hold all logits; `naive` of ours keeps them in fp32, the others, like
nearly everyone, in the operands' dtype and convert them afterwards. Peers are used in the version that is installed:

    trl        the autograd function behind TRL's fused head, with the tile sizes and outputs of its DPOTrainer
    liger_dpo  Liger's fused linear DPO, one pair a chunk, its default; liger_dpo_4: four, fewer passes over the weight
    liger_ce   Liger's fused linear cross entropy, reduction "none": its sums would have no pairs
    cce        cut-cross-entropy, reduction "none", with its default filter, which skips small gradients; on a CPU
               its torch.compile implementation, which is what it offers there

An arm that can't run says why by raising `Absent`, and the table shows that.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec

import torch
from logprob_case import BETA, Case, loss_of_sums
from torch import Tensor

from dpo_scale.logprobs import IMPLEMENTATIONS, token_logps
from dpo_scale.logprobs.pair_loss import PairLoss, fused_pair_loss

FORWARD, TRAIN, FROZEN = "forward", "forward_backward", "frozen_head"
MODES = {FORWARD: 1, TRAIN: 3, FROZEN: 2}  # and the passes of 2NHV FLOPs that each can't do without
OURS = (*IMPLEMENTATIONS, "pair_loss")
NAIVE = ("naive", "log_softmax", "logsumexp")
FULL_LOGITS = (*NAIVE, "compiled")
COMPILED = ("compiled", "cce", "liger_dpo", "liger_dpo_4")  # compile something in their first run


class Absent(Exception):
    """Why an arm has no part in a case."""


@dataclass(frozen=True)
class Output:
    """What one run gives: log-probs [N] in the case's order if the arm yields them, and their sums [P, 2]."""

    logps: Tensor | None
    sums: Tensor


@dataclass(frozen=True)
class Arm:
    """Ready to run: `run()` does forward and, if the mode has one, backward, into the leaves' gradients.

    `hidden` and `weight` are its leaves; `order`, if its tokens are in another order than the case's: token i of the
    case is the arm's token order[i].
    """

    hidden: Tensor
    weight: Tensor
    run: Callable[[], Output]
    order: Tensor | None = None


def make_arm(name: str, case: Case, mode: str) -> Arm:
    """Raises Absent where this arm can't do this."""
    return ARMS[name](case, mode)


def _leaves(case: Case, mode: str, hidden: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Inputs that share memory with the case's, asking for the gradients that the mode is about."""
    hidden = case.hidden if hidden is None else hidden
    return hidden.detach().requires_grad_(mode != FORWARD), case.weight.detach().requires_grad_(mode == TRAIN)


def _token_arm(logps_of: Callable[[Tensor, Tensor, Case], Tensor], case: Case, mode: str) -> Arm:
    """The loss on top of a function that gives log-probs of tokens."""
    hidden, weight = _leaves(case, mode)

    def run() -> Output:
        with torch.set_grad_enabled(mode != FORWARD):
            logps = logps_of(hidden, weight, case)
            sums = logps.new_zeros(2 * case.pairs).index_add(0, case.segments, logps).view(-1, 2)
            if mode != FORWARD:
                loss_of_sums(sums).mean().backward()
        return Output(logps.detach(), sums.detach())

    return Arm(hidden, weight, run)


def _ours(implementation: str, case: Case, mode: str) -> Arm:
    if implementation.startswith("triton") and case.hidden.device.type != "cuda":
        raise Absent("needs a GPU")

    def logps_of(hidden: Tensor, weight: Tensor, case: Case) -> Tensor:
        return token_logps(hidden, weight, case.targets, softcap=case.softcap, implementation=implementation)

    return _token_arm(logps_of, case, mode)


def _pair_loss(case: Case, mode: str) -> Arm:
    if mode == FORWARD:
        raise Absent("loss and gradient come together; forward only is the token path's work")
    hidden, weight = _leaves(case, mode)
    tokens_of_pairs = [case.tokens // case.pairs] * case.pairs
    pair_loss = PairLoss(case.segments, tokens_of_pairs, lambda sums: loss_of_sums(sums) / case.pairs)

    def run() -> Output:
        loss, sums = fused_pair_loss(hidden, weight, case.targets, pair_loss, softcap=case.softcap)
        loss.backward()
        return Output(None, sums)

    return Arm(hidden, weight, run)


def _logits(hidden: Tensor, weight: Tensor, softcap: float | None) -> Tensor:
    logits = (hidden @ weight.t()).float()
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def _log_softmax(hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float | None) -> Tensor:
    return _logits(hidden, weight, softcap).log_softmax(1).gather(1, targets[:, None]).squeeze(1)


def _logsumexp(hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float | None) -> Tensor:
    logits = _logits(hidden, weight, softcap)
    return logits.gather(1, targets[:, None]).squeeze(1) - logits.logsumexp(1)


def _naive(form: Callable[..., Tensor], case: Case, mode: str) -> Arm:
    return _token_arm(lambda hidden, weight, case: form(hidden, weight, case.targets, case.softcap), case, mode)


def _compiled(case: Case, mode: str) -> Arm:
    # Each case gets code of its own shapes: the best that the compiler can do.
    return _naive(torch.compile(_log_softmax, dynamic=False), case, mode)


def _trl(case: Case, mode: str) -> Arm:
    _need("trl")
    try:
        from trl.kernels.chunked_logprob import ChunkedLogProbFunction
        from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as columns
    except ImportError as error:
        raise Absent(f"this version of trl has no chunked log-prob function ({error})") from error
    outputs = ("log_probs", "entropy", "mean_logits", "is_top1")  # DPOTrainer always asks for these

    def logps_of(hidden: Tensor, weight: Tensor, case: Case) -> Tensor:
        return ChunkedLogProbFunction.apply(
            hidden, weight, None, case.targets, 1.0, columns, case.softcap, 1.0, outputs
        )[0]

    return _token_arm(logps_of, case, mode)


def _liger_dpo(pairs_a_chunk: int, case: Case, mode: str) -> Arm:
    _need("liger_kernel", "liger-kernel")
    if case.softcap is not None:
        raise Absent("takes no soft-cap")
    if pairs_a_chunk > 1 and case.pairs <= pairs_a_chunk:
        raise Absent(f"all pairs fit into one chunk of {pairs_a_chunk}")
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    loss_of = LigerFusedLinearDPOLoss(beta=BETA, use_ref_model=False, chunk_size=pairs_a_chunk)  # compiled by default
    # It wants all chosen completions before all rejected ones: [2P, tokens of a completion, H].
    order = torch.arange(case.tokens, device=case.hidden.device).view(case.pairs, 2, -1).transpose(0, 1).flatten()
    hidden, weight = _leaves(case, mode, case.hidden[order])
    targets = case.targets[order].view(2 * case.pairs, -1)

    def run() -> Output:
        with torch.set_grad_enabled(mode != FORWARD):
            batch = hidden.view(*targets.shape, -1)
            loss, (chosen, rejected, *_) = loss_of(weight, batch, targets)
            if mode != FORWARD:
                loss.backward()
        return Output(None, torch.stack([chosen, rejected], 1).detach())

    return Arm(hidden, weight, run, order.argsort())


def _liger_ce(case: Case, mode: str) -> Arm:
    _need("liger_kernel", "liger-kernel")
    if not case.hidden.is_cuda:
        raise Absent("needs a GPU")
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss_of = LigerFusedLinearCrossEntropyLoss(reduction="none", softcap=case.softcap)
    return _token_arm(lambda hidden, weight, case: -loss_of(weight, hidden, case.targets), case, mode)


def _cce(case: Case, mode: str) -> Arm:
    _need("cut_cross_entropy", "cut-cross-entropy")
    _need("triton")
    from cut_cross_entropy import linear_cross_entropy

    implementation = "cce" if case.hidden.is_cuda else "torch_compile"

    def logps_of(hidden: Tensor, weight: Tensor, case: Case) -> Tensor:
        return -linear_cross_entropy(
            hidden, weight, case.targets, softcap=case.softcap, reduction="none", impl=implementation
        )

    return _token_arm(logps_of, case, mode)


def _need(module: str, package: str | None = None) -> None:
    if find_spec(module) is None:
        raise Absent(f"{package or module} is not installed")


ARMS: dict[str, Callable[[Case, str], Arm]] = {
    **{name: partial(_ours, name) for name in IMPLEMENTATIONS},
    "pair_loss": _pair_loss,
    "log_softmax": partial(_naive, _log_softmax),
    "logsumexp": partial(_naive, _logsumexp),
    "compiled": _compiled,
    "trl": _trl,
    "liger_dpo": partial(_liger_dpo, 1),
    "liger_dpo_4": partial(_liger_dpo, 4),
    "liger_ce": _liger_ce,
    "cce": _cce,
}

DESCRIPTIONS = {
    "naive": "ours, naive: fp32 logits, log_softmax, gather",
    "log_softmax": "naive: log_softmax, gather",
    "logsumexp": "naive: gather - logsumexp",
    "compiled": "naive, torch.compile",
    "trl": "TRL, chunked",
    "liger_dpo": "Liger, fused linear DPO",
    "liger_dpo_4": "Liger, fused linear DPO, 4 pairs a chunk",
    "liger_ce": "Liger, fused linear cross entropy",
    "cce": "cut-cross-entropy",
}


def describe(name: str) -> str:
    """An arm's name in tables and plots."""
    return DESCRIPTIONS.get(name, "ours, fused pair loss" if name == "pair_loss" else f"ours, {name}")


def naive_bytes(case: Case) -> int:
    """About the most that a naive form holds at once: five tensors of fp32 logits."""
    return 20 * case.tokens * case.weight.shape[0]
