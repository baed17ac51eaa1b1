"""Held-out metrics: in the middle of a training run, or of any model on any pairs (`launch/evaluate.py`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from dpo_scale.data.batching import MicroBatch, counted_pairs, forward_batches, split_among_ranks
from dpo_scale.data.dataset import PairDataset
from dpo_scale.data.groups import Groups
from dpo_scale.data.layout import Layout
from dpo_scale.data.prefetch import BATCHES_AHEAD, Prefetcher
from dpo_scale.distributed import ranks
from dpo_scale.models.load import load_reference, load_scoring_model, policy_source
from dpo_scale.models.router import share_metrics
from dpo_scale.models.scorer import Scorer
from dpo_scale.observe.metrics import MetricSums
from dpo_scale.progress import heartbeat
from dpo_scale.reference.live import LiveReference
from dpo_scale.reference.protocol import NoReference, Reference
from dpo_scale.settings.tree import Config
from dpo_scale.training.objective import objective_without_gradient
from dpo_scale.training.plan import load_batch
from dpo_scale.training.prepare import prepare, start


@torch.no_grad()
def evaluate(
    policy: Scorer,
    reference: Reference,
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
    chosen_tokens = float(lengths[:, 1].mean())
    loss_of = objective_without_gradient(config.loss)
    plan = evaluation_plan(config, pairs, lengths, policy.module.layout, policy.module.groups)
    to_come = (
        load_batch(dataset, of_ranks[ranks.rank()], pad_token_id, reference, policy.module.layout) for of_ranks in plan
    )
    broken_off, stops = False, torch.zeros(1, device=ranks.device())
    with Prefetcher(to_come, BATCHES_AHEAD) as batches:
        for k, (of_ranks, batch) in enumerate(zip(plan, batches, strict=True)):
            heartbeat(f"evaluation, micro-batch {k + 1} of {len(plan)}")
            batch = reference.attach(batch.to(ranks.device()))
            counts = counted_pairs(of_ranks)
            _, losses, metrics = loss_of(policy, batch, config.loss, chosen_tokens, counts)
            sums.add({"loss": losses, **metrics}, batch.counted)
            # read one micro-batch later, when the device has the next one to work on
            stops_before, stops = stops, ranks.sum_over_ranks(torch.full_like(stops, should_stop()))
            broken_off = stops_before.item() > 0
            if broken_off:
                break
    policy.train(was_training)
    if broken_off:
        return None
    means, _, _ = sums.reduce().read()
    return {**share_metrics(means, policy.module.router), "pairs": float(len(dataset))}


def evaluation_plan(
    config: Config, pairs: np.ndarray, lengths: np.ndarray, layout: Layout, groups: Groups
) -> list[list[MicroBatch]]:
    """How held-out pairs are laid out: by the training's budget of tokens, or by pairs where that is what is set."""
    settings = config.train
    if settings.eval_micro_batch_size is None and settings.max_tokens_per_micro_batch is not None:
        budget = settings.max_tokens_per_micro_batch
        return forward_batches(pairs, lengths, max_tokens=budget, groups=groups, layout=layout)
    micro_batch_size = settings.eval_micro_batch_size or settings.micro_batch_size
    return split_among_ranks(pairs, lengths, micro_batch_size=micro_batch_size, groups=groups)


def evaluate_model(config: Config) -> dict[str, float]:
    """Metrics of `model.path` against `reference.model` on the pairs of `data.eval`; every rank calls it.

    Both models run forward only, under the engine that the reference has in training (`reference.stage` decides
    how they are sharded).
    """
    start(config)
    prepared = prepare(config, replace(config.data, train=config.data.eval, eval=[], eval_fraction=0.0))
    policy = load_scoring_model(config, policy_source(config), prepared.layout)
    reference: Reference = NoReference()
    if config.loss.needs_reference:
        reference = LiveReference(load_reference(config, prepared.layout, beside=[policy]), config.loss.ld_alpha)
    metrics = evaluate(policy, reference, prepared.data.train, config, prepared.pad_token_id)
    assert metrics is not None
    return metrics
