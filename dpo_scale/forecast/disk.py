"""What a run writes, and what host memory a save in the background takes. Sizes are bytes."""

from __future__ import annotations

from dpo_scale.forecast.shape import ModelShape
from dpo_scale.forecast.states import BYTES, states_per_weight
from dpo_scale.settings.tree import Config

CHECKPOINTS, MODEL = "checkpoints", "model"
STORE, CACHE = "reference store", "tokenized data"


def disk_bytes(
    config: Config, shape: ModelShape, *, saves: int, pairs: int, tokens: int, completion_tokens: int
) -> dict[str, int]:
    """Bytes on the disk at most over a run, part by part. Any number of ranks writes the same.

    Args:
        shape: the policy's.
        saves: checkpoints that the run begins, the one of its end among them.
        pairs: training and held-out ones together.
        tokens: of all their prompts, chosen and rejected completions.
        completion_tokens: of the completions alone.
    """
    keep = config.checkpoint
    # the oldest goes when the new one is there
    kept = saves if keep.save_total_limit is None else keep.save_total_limit + 1
    kept += keep.metric_for_best_model is not None
    adapter_alone = config.lora.enabled and not config.lora.merge
    parts = {
        CHECKPOINTS: min(kept, saves) * checkpoint_bytes(config, shape),
        MODEL: BYTES[config.model.dtype] * (shape.trained if adapter_alone else shape.total),
        CACHE: 4 * tokens + 48 * pairs,  # keys, offsets, and where each pair comes from
    }
    if config.reference.mode == "store" and config.loss.needs_reference:
        by_token = config.loss.ld_alpha is not None
        parts[STORE] = 40 * pairs + 4 * completion_tokens if by_token else 32 * pairs
    return {name: size for name, size in parts.items() if size}


def checkpoint_bytes(config: Config, shape: ModelShape) -> int:
    """One checkpoint, all ranks' files together; frozen weights are not in it."""
    return _weights_file(config, shape) + _state_files(config, shape)


def held_by_a_save(config: Config, shape: ModelShape, world_size: int) -> int:
    """Bytes of host memory that a machine's first rank holds while a save is written in the background."""
    if not config.checkpoint.async_save:
        return 0
    replicated = config.deepspeed.stage == 0  # rank 0 alone writes it
    return _weights_file(config, shape) + _state_files(config, shape) // (1 if replicated else world_size)


def _weights_file(config: Config, shape: ModelShape) -> int:
    """What rank 0 writes beside the optimizer; at stage 3 the weights are in the optimizer's files alone."""
    return 0 if config.deepspeed.stage == 3 else BYTES[config.model.dtype] * shape.trained


def _state_files(config: Config, shape: ModelShape) -> int:
    precise = 2 if config.deepspeed.bf16_optimizer_states else 4
    masters = not (config.deepspeed.stage == 0 and config.model.dtype == "float32")
    size = precise * (masters + states_per_weight(config)) * shape.trained
    reference = config.reference
    if reference.mode == "live" and reference.sync_steps is not None:
        size += (4 if reference.sync_mixup < 1 else BYTES[config.model.dtype]) * shape.total
    return size
