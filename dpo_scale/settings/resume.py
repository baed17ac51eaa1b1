"""Which settings may differ from a checkpoint's when a run resumes from it (`checkpoint.allow_changes`)."""

from __future__ import annotations

RATE_SETTINGS = tuple(
    f"train.{name}" for name in ("learning_rate", "lr_scheduler_type", "warmup_ratio", "warmup_steps", "min_lr_ratio")
)


def may_be_allowed(setting: str) -> bool:
    """Whether `checkpoint.allow_changes` may name a setting: those that only our own code reads, at each step anew.

    What the optimizer's saved state holds (weight decay, betas, clipping) would come back with it; what decides the
    order of pairs, the model or the reference would make it another run.
    """
    return setting in RATE_SETTINGS or setting.startswith("loss.")
