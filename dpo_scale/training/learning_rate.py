"""The learning rate as a pure function of the step, so that a resumed run needs no scheduler state."""

from __future__ import annotations

import math

from dpo_scale.settings.tree import TrainSettings


def warmup_steps(settings: TrainSettings, total_steps: int) -> int:
    """`warmup_steps` if given, else `warmup_ratio` of all steps, rounded up."""
    if settings.warmup_steps is not None:
        return settings.warmup_steps
    return math.ceil(settings.warmup_ratio * total_steps)


def learning_rate(step: int, total_steps: int, settings: TrainSettings) -> float:
    """The learning rate of optimizer step `step` (from 0).

    Linear warm-up from 0 (reached before the first step: step 0 of w warm-up steps has share 0 / w, as in Hugging
    Face's schedulers), then `constant`, `linear` to 0, or `cosine` (half a period, arXiv 1608.03983) to 0; the latter
    two end at `min_lr_ratio` of the peak instead if that is set.
    """
    warmup = warmup_steps(settings, total_steps)
    if step < warmup:
        return settings.learning_rate * step / warmup
    if settings.lr_scheduler_type == "constant":
        return settings.learning_rate
    progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
    share = 1.0 - progress if settings.lr_scheduler_type == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return settings.learning_rate * (settings.min_lr_ratio + (1.0 - settings.min_lr_ratio) * share)
