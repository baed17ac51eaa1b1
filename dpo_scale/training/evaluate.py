"""From a batch of pairs to losses and metrics: the part that training and evaluation share, and evaluation itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from dpo_scale.data.batching import MicroBatch, counted_pairs, forward_batches, split_among_ranks
from dpo_scale.data.dataset import PairDataset, load_pairs
from dpo_scale.data.layout import Layout, PairBatch, make_batch
from dpo_scale.data.prefetch import BATCHES_AHEAD, Ahead
from dpo_scale.distributed import engine
from dpo_scale.logprobs.pair_loss import PairLoss
from dpo_scale.losses import ld_token_weights, preference_loss, sum_token_logps, wpo_weights
from dpo_scale.models.load import (
    check_liger,
    check_logprobs,
    check_vocabulary,
    load_reference,
    load_scoring_model,
    load_tokenizers,
    policy_source,
    settle_layout,
)
from dpo_scale.models.scorer import backbone_and_head
from dpo_scale.observe.metrics import MetricSums
from dpo_scale.progress import beat
from dpo_scale.reference.columns import ColumnReference
from dpo_scale.reference.stored import StoredReference
from dpo_scale.reference.values import ReferenceValues
from dpo_scale.settings.loss import LossSettings
from dpo_scale.settings.tree import Config


def sequence_logps(scorer: Any, batch: PairBatch, settings: LossSettings) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Summed completion log-probs under a model, and the pairs' WPO weights if the loss uses them.

    Returns:
        ([P, 2] fp32 with chosen in column 0, [P] or None).
    """
    by_products = ("log_sum_p2",) if settings.use_weighting else ()
    scored = scorer(**batch.scorer_inputs, by_products=by_products)
    token_values, extra = scored if by_products else (scored, {})
    sums = sum_token_logps(
        token_values, batch.score_segments, batch.num_pairs, batch.lengths, ld_alpha=settings.ld_alpha
    )
    if not by_products:
        return sums, None
    return sums, wpo_weights(token_values, extra["log_sum_p2"], batch.score_segments, batch.num_pairs)


def takes_loss_by_pair(config: Config, policy: Any) -> tuple[bool, str]:
    """Whether training takes loss and gradient pair by pair (`logprobs.pair_loss`), and why, for the log."""
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


def pair_losses(
    policy: Any,
    batch: PairBatch,
    settings: LossSettings,
    mean_chosen_tokens: float,
    pairs_of_ranks: Sequence[int],
    *,
    by_pair: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Losses and metrics of one micro-batch.

    Args:
        batch: with `reference_logps`, if the loss needs them.
        mean_chosen_tokens: mean length of the chosen completions of the whole global batch (see `losses`).
        pairs_of_ranks: how many pairs that count each rank has in this micro-step.
        by_pair: take loss and gradient together, pair by pair (`logprobs.pair_loss`): same numbers, one pass less.

    Returns:
        The sum to differentiate, the per-pair losses [P] as reported, and per-pair metrics, each [P].
    """

    def losses_of(sums: torch.Tensor, weights: torch.Tensor | None) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return preference_loss(
            sums,
            batch.reference_logps,
            batch.lengths,
            settings,
            mean_chosen_tokens=mean_chosen_tokens,
            pair_weights=weights,
        )

    if by_pair:
        total, sums = _loss_by_pair(policy, batch, settings, lambda sums: losses_of(sums, None)[0] * batch.weights)
        return total, *losses_of(sums, None)
    policy_sums, wpo = sequence_logps(policy, batch, settings)
    if settings.needs_batch:
        return _losses_across_ranks(policy_sums, wpo, batch, settings, mean_chosen_tokens, pairs_of_ranks)
    losses, metrics = losses_of(policy_sums, wpo)
    return (losses * batch.weights).sum(), losses, metrics


def _loss_by_pair(
    policy: Any, batch: PairBatch, settings: LossSettings, loss_of_sums: Callable[[torch.Tensor], torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum of the pairs' losses, with its gradient made, and the policy's sums [P, 2], detached."""
    weights = None
    if settings.ld_alpha is not None:
        weights = ld_token_weights(batch.score_segments, batch.num_pairs, batch.lengths, settings.ld_alpha)
    pair_loss = PairLoss(batch.score_segments, batch.scored_tokens, loss_of_sums, weights)
    return policy(**batch.scorer_inputs, pair_loss=pair_loss)


def _losses_across_ranks(
    policy_sums: torch.Tensor,
    wpo: torch.Tensor | None,
    batch: PairBatch,
    settings: LossSettings,
    mean_chosen_tokens: float,
    pairs_of_ranks: Sequence[int],
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Losses that sort the pairs of all ranks' micro-batches (AOT).

    Every rank takes the loss over all real pairs of the micro-step and differentiates the whole sum with respect to
    its own; what it reports is its share of the positions, so that sums over ranks count each once.
    """
    rows = max(1, *pairs_of_ranks)  # of each rank's block; one with a filler alone still has that row

    def gathered(values: torch.Tensor) -> torch.Tensor:
        """The rows of all ranks that are no padding and no filler: the host knows which, the device is not asked."""
        padding = values.new_zeros((rows - values.shape[0], *values.shape[1:]))
        blocks = engine.gather_rows(torch.cat([values, padding])).split(rows)
        return torch.cat([block[:count] for block, count in zip(blocks, pairs_of_ranks, strict=True)])

    losses, metrics = preference_loss(
        gathered(policy_sums),
        None if batch.reference_logps is None else gathered(batch.reference_logps),
        gathered(batch.lengths),
        settings,
        mean_chosen_tokens=mean_chosen_tokens,
        pair_weights=None if wpo is None else gathered(wpo),
    )
    first = sum(pairs_of_ranks[: engine.rank()])
    own = slice(first, first + pairs_of_ranks[engine.rank()])
    is_filler = own.start == own.stop
    # a filler takes part in the backward pass like any other, at zero
    total = losses.sum() + 0.0 * policy_sums.sum()
    if is_filler:
        zero = torch.zeros_like(batch.weights)
        return total, zero, {name: zero for name in metrics}
    return total, losses[own], {name: values[own] for name, values in metrics.items()}


def mean_chosen_tokens(pairs: np.ndarray, lengths: np.ndarray) -> float:
    """Mean chosen tokens of a global batch [G]; `lengths` is [N, 3] (prompt, chosen, rejected)."""
    return float(lengths[pairs, 1].mean())


def load_batch(
    dataset: PairDataset,
    micro_batch: MicroBatch,
    pad_token_id: int,
    reference: Any,
    settings: LossSettings,
    layout: Layout,
) -> PairBatch:
    """One rank's micro-batch on the host, ready to be copied; a stored reference's values come with it."""
    pairs = [dataset[int(i)] for i in micro_batch.indices]
    batch = make_batch(layout, pairs, micro_batch.weights, pad_token_id)
    if isinstance(reference, (StoredReference, ColumnReference)):
        batch = replace(batch, reference_logps=reference.logps(dataset, micro_batch.indices, settings))
    return batch.pinned() if engine.device().type == "cuda" else batch


@torch.no_grad()
def evaluate(
    policy: Any,
    reference: Any,
    dataset: PairDataset,
    config: Config,
    pad_token_id: int,
    should_stop: Callable[[], bool] = lambda: False,
) -> dict[str, float] | None:
    """Mean metrics over all pairs of a dataset, `loss` among them, each pair counted once. Every rank must call it.

    Args:
        should_stop: asked in each micro-batch; when it is true on any rank, all of them break off together.

    Returns:
        The metrics; None if it was broken off.
    """
    lengths = dataset.lengths
    pairs = np.arange(len(dataset))
    was_training = policy.module.training
    policy.eval()
    sums = MetricSums()
    chosen_tokens = mean_chosen_tokens(pairs, lengths)
    values = ReferenceValues(reference, config.loss)
    plan = evaluation_plan(config, pairs, lengths)
    to_come = (
        load_batch(dataset, ranks[engine.rank()], pad_token_id, reference, config.loss, policy.module.layout)
        for ranks in plan
    )
    broken_off, stops = False, torch.zeros(1, device=engine.device())
    with Ahead(to_come, BATCHES_AHEAD) as batches:
        for k, (ranks, batch) in enumerate(zip(plan, batches, strict=True)):
            beat(f"evaluation, micro-batch {k + 1} of {len(plan)}")
            batch = values.attach(batch.to(engine.device()))
            counts = counted_pairs(ranks)
            _, losses, metrics = pair_losses(policy, batch, config.loss, chosen_tokens, counts)
            sums.add({"loss": losses, **metrics}, batch.weights)
            # read one micro-batch later, when the device has the next one to work on
            stops_before, stops = stops, engine.sum_over_ranks(torch.full_like(stops, should_stop()))
            broken_off = stops_before.item() > 0
            if broken_off:
                break
    policy.train(was_training)
    if broken_off:
        return None
    means, _, _ = sums.reduce().read()
    return {**means, "pairs": float(len(dataset))}


def evaluation_plan(config: Config, pairs: np.ndarray, lengths: np.ndarray) -> list[list[MicroBatch]]:
    """How held-out pairs are laid out: by the training's budget of tokens, or by pairs where that is what is set."""
    settings = config.train
    if settings.eval_micro_batch_size is None and settings.max_tokens_per_micro_batch is not None:
        return forward_batches(
            pairs,
            lengths,
            max_tokens=settings.max_tokens_per_micro_batch,
            world_size=engine.world_size(),
            layout=config.data.layout,
        )
    return split_among_ranks(
        pairs,
        lengths,
        micro_batch_size=settings.eval_micro_batch_size or settings.micro_batch_size,
        world_size=engine.world_size(),
    )


def evaluate_model(config: Config) -> dict[str, float]:
    """Metrics of `model.path` against `reference.model` on the pairs of `data.eval`; every rank calls it.

    Both models run forward only, under the engine that the reference has in training (`reference.stage` decides
    how they are sharded).
    """
    engine.init_distributed(config.deepspeed.timeout_minutes)
    engine.quiet_libraries()
    engine.check_dtype(config.model.dtype)
    check_logprobs(config)
    check_liger(config)
    tokenizer, model_config = load_tokenizers(config)
    check_vocabulary(tokenizer, model_config)
    choice = settle_layout(config)
    settings = replace(config.data, train=config.data.eval, eval=[], eval_fraction=0.0)
    data = engine.main_first(lambda: load_pairs(settings, tokenizer, seed=config.train.seed, log=engine.log)).train
    policy = load_scoring_model(config, policy_source(config), choice)
    reference = load_reference(config, choice, beside=[policy]) if config.loss.needs_reference else None
    metrics = evaluate(policy, reference, data, config, tokenizer.pad_token_id)
    assert metrics is not None
    return metrics
