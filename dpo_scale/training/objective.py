"""From a batch of pairs to its loss and metrics: the training equation, in one of three ways.

    from_logps      policy(batch) -> token log-probs -> sums [P, 2] -> losses [P] -> total; autograd goes back through
                    the head, which computes its logits again
    fused_by_pair   policy(batch, loss) -> the head, chunk by chunk of whole pairs: logits -> sums -> loss(sums) ->
                    gradients of hidden states and head -> total, whose backward pass only hands these gradients on
    across_ranks    as from_logps, but the losses are taken over the pairs of all ranks (AOT sorts them)

In `fused_by_pair` the head calls the loss, not the other way round: only then is a pair's soft-max still in memory when
its loss is known (`dpo_scale.logprobs.pair_loss`). The numbers are the same; it saves one of four passes over the head.
`choose_objective` picks one for training. To the pair losses of a mixture of experts all three add its router's
balancing loss (`dpo_scale.models.router`), times `loss.router_aux_loss_coef`. All three return

    total      a scalar to differentiate: the weighted sum of this rank's pair losses
    losses     [P] as reported
    metrics    name -> [P]

Shapes: P pairs of a micro-batch, column 0 chosen, 1 rejected.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from dpo_scale.data.layout import PairBatch
from dpo_scale.distributed import ranks
from dpo_scale.logprobs.pair_loss import PairLoss
from dpo_scale.losses import ld_token_weights, preference_loss, sum_token_logps, wpo_weights
from dpo_scale.models.router import SHARES, Balance
from dpo_scale.models.scorer import Policy, Scorer, backbone_and_head
from dpo_scale.settings.loss import LossSettings
from dpo_scale.settings.metric_names import ROUTER_AUX_LOSS
from dpo_scale.settings.tree import Config

PairLosses = tuple[Tensor, Tensor, dict[str, Tensor]]  # total, losses, metrics


class Objective(Protocol):
    """One of the three ways."""

    def __call__(
        self,
        policy: Scorer,
        batch: PairBatch,
        settings: LossSettings,
        mean_chosen_tokens: float,
        pairs_of_ranks: Sequence[int],
    ) -> PairLosses:
        """Losses and metrics of one micro-batch.

        Args:
            batch: with `reference_logps`, if the loss needs them.
            mean_chosen_tokens: mean length of the chosen completions of the whole global batch (see `losses`).
            pairs_of_ranks: how many pairs that count each rank has in this micro-step; a group's count on its first.
        """


def choose_objective(config: Config, policy: Policy) -> tuple[Objective, str]:
    """How training takes loss and gradient (`logprobs.pair_loss`), and why, for the log."""
    if config.loss.needs_batch:
        return across_ranks, "over the pairs of all ranks: the loss sorts them"
    by_pair, reason = _takes_loss_by_pair(config, policy)
    return (fused_by_pair, f"pair by pair: {reason}") if by_pair else (from_logps, f"by way of log-probs: {reason}")


def objective_without_gradient(settings: LossSettings) -> Objective:
    """The way for evaluation: nothing is gained by fusing what is not differentiated."""
    return across_ranks if settings.needs_batch else from_logps


def _takes_loss_by_pair(config: Config, policy: Scorer) -> tuple[bool, str]:
    option, implementation = config.logprobs.pair_loss, config.logprobs.implementation
    if option != "auto":
        return option == "fused", "asked for by name"
    if not config.loss.is_pairwise:
        return False, "the loss is no function of each pair's sums alone"
    if implementation != "auto":
        return False, f"logprobs.implementation asks for {implementation} log-probs"
    _, head = backbone_and_head(policy.module.model)
    if not any(parameter.requires_grad for parameter in head.parameters()):
        return False, "the head is frozen, so neither way computes logits twice"
    return True, "computes logits once, where log-probs and then their gradient would compute them twice"


def from_logps(
    policy: Scorer,
    batch: PairBatch,
    settings: LossSettings,
    mean_chosen_tokens: float,
    pairs_of_ranks: Sequence[int],
) -> PairLosses:
    """Log-probs first, then the loss of each pair."""
    sums, weights, balance = _policy_sums(policy, batch, settings)
    losses, metrics = _losses_of(sums, batch, settings, mean_chosen_tokens, weights)
    return _with_balance(((losses * batch.weights).sum(), losses, metrics), balance, batch, settings)


def fused_by_pair(
    policy: Scorer,
    batch: PairBatch,
    settings: LossSettings,
    mean_chosen_tokens: float,
    pairs_of_ranks: Sequence[int],
) -> PairLosses:
    """Loss and gradient together, while a pair's soft-max is in memory; for losses that are pairwise."""

    def loss_of_sums(sums: Tensor) -> Tensor:
        return _losses_of(sums, batch, settings, mean_chosen_tokens)[0] * batch.weights

    token_weights = None
    if settings.ld_alpha is not None:
        token_weights = ld_token_weights(batch.score_segments, batch.num_pairs, batch.lengths, settings.ld_alpha)
    pair_loss = PairLoss(batch.score_segments, batch.scored_tokens, loss_of_sums, token_weights)
    (total, sums), balance = _scored(policy, batch, settings, pair_loss=pair_loss)
    losses, metrics = _losses_of(sums, batch, settings, mean_chosen_tokens)
    return _with_balance((total, losses, metrics), balance, batch, settings)


def across_ranks(
    policy: Scorer,
    batch: PairBatch,
    settings: LossSettings,
    mean_chosen_tokens: float,
    pairs_of_ranks: Sequence[int],
) -> PairLosses:
    """Losses that sort the pairs of all ranks' micro-batches (AOT).

    Every rank takes the loss over all real pairs of the micro-step and differentiates the whole sum with respect to
    its own; what it reports is its share of the positions, so that sums over ranks count each once.
    """
    sums, weights, balance = _policy_sums(policy, batch, settings)
    # a group of ranks has the same pairs, which are counted on its first: their place is there for all of the group
    place = ranks.rank() - (0 if batch.share is None else batch.share.rank)
    rows = max(1, *pairs_of_ranks)  # of each rank's block; one with a filler alone still has that row

    def gathered(values: Tensor) -> Tensor:
        """The rows of all ranks that are no padding and no filler: the host knows which, the device is not asked."""
        padding = values.new_zeros((rows - values.shape[0], *values.shape[1:]))
        blocks = ranks.gather_rows(torch.cat([values, padding]), place).split(rows)
        return torch.cat([block[:count] for block, count in zip(blocks, pairs_of_ranks, strict=True)])

    losses, metrics = preference_loss(
        gathered(sums),
        None if batch.reference_logps is None else gathered(batch.reference_logps),
        gathered(batch.lengths),
        settings,
        mean_chosen_tokens=mean_chosen_tokens,
        pair_weights=None if weights is None else gathered(weights),
    )
    first = sum(pairs_of_ranks[:place])
    own = slice(first, first + pairs_of_ranks[place])
    # a filler takes part in the backward pass like any other, at zero
    total = losses.sum() + 0.0 * sums.sum()
    if own.start == own.stop:
        zero = torch.zeros_like(batch.weights)
        own_losses, metrics = zero, {name: zero for name in metrics}
    else:
        own_losses, metrics = losses[own], {name: values[own] for name, values in metrics.items()}
    return _with_balance((total, own_losses, metrics), balance, batch, settings)


def _scored(policy: Scorer, batch: PairBatch, settings: LossSettings, **how: Any) -> tuple[Any, Balance | None]:
    """What the policy says of a batch, and how evenly it used its experts, if it has any."""
    if policy.module.router is None:
        return policy(**batch.scorer_inputs, **how), None
    differentiable = bool(settings.router_aux_loss_coef)
    return policy(**batch.scorer_inputs, **how, router_runs=batch.runs, router_gradient=differentiable)


def _with_balance(
    of_pairs: PairLosses, balance: Balance | None, batch: PairBatch, settings: LossSettings
) -> PairLosses:
    """The pairs' losses with the router's balancing loss added to them."""
    if balance is None:
        return of_pairs
    total, losses, metrics = of_pairs
    if settings.router_aux_loss_coef:
        added = settings.router_aux_loss_coef * balance.loss
        total, losses = total + (added * batch.weights).sum(), losses + added.detach()
        metrics = {**metrics, "loss": losses}
    return total, losses, {**metrics, ROUTER_AUX_LOSS: balance.loss, SHARES: balance.shares}


def _policy_sums(
    policy: Scorer, batch: PairBatch, settings: LossSettings
) -> tuple[Tensor, Tensor | None, Balance | None]:
    """The policy's summed completion log-probs [P, 2], fp32, and what comes with them.

    Beside them the pairs' WPO weights [P] if the loss uses them, and the balance of the experts if there are any.
    """
    by_products = ("log_sum_p2",) if settings.use_weighting else ()
    scored, balance = _scored(policy, batch, settings, by_products=by_products)
    token_logps, extra = scored if by_products else (scored, {})
    segments, count = batch.score_segments, batch.num_pairs
    sums = sum_token_logps(token_logps, segments, count, batch.lengths, ld_alpha=settings.ld_alpha)
    weights = wpo_weights(token_logps, extra["log_sum_p2"], segments, count) if by_products else None
    return sums, weights, balance


def _losses_of(
    sums: Tensor, batch: PairBatch, settings: LossSettings, mean_chosen_tokens: float, weights: Tensor | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    return preference_loss(
        sums,
        batch.reference_logps,
        batch.lengths,
        settings,
        mean_chosen_tokens=mean_chosen_tokens,
        pair_weights=weights,
    )
