"""What must hold between settings. What one setting takes by itself stands beside its field.

Each rule that is broken yields the key to change and what is expected of it. The first becomes the error.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.util import find_spec
from typing import TYPE_CHECKING

from dpo_scale.errors import ConfigError
from dpo_scale.settings.deepspeed import OPTIMIZERS, policy_deepspeed_config
from dpo_scale.settings.metric_names import ROUTER_AUX_LOSS, STEP_METRICS
from dpo_scale.settings.resume import RATE_SETTINGS, may_be_allowed

if TYPE_CHECKING:
    from dpo_scale.settings.tree import Config

Broken = Iterator[tuple[str, str]]  # (key, what is expected of it) of each broken rule


def check_rules(config: Config, *, for_training: bool) -> None:
    """Refuse settings that exclude each other.

    Args:
        for_training: False leaves out what only a training run needs (training data).

    Raises:
        ConfigError: naming the key, its value and what is expected.
    """
    config.loss.validate()
    for rules in (_model, _lora, _data, _train, _deepspeed, _reference, _evaluation, _checkpoint_and_logging):
        _refuse_first(config, rules(config))
    if for_training and not config.data.train:
        _refuse_first(config, iter([("data.train", "at least one data file, folder or hub name")]))
    policy_deepspeed_config(config, micro_steps=1, device_type="cpu")  # refuses a JSON that contradicts the settings


def _refuse_first(config: Config, broken: Broken) -> None:
    for key, expected in broken:
        value: object = config
        for part in re.findall(r"\w+", key):
            value = value[int(part)] if isinstance(value, list) else getattr(value, part)
        raise ConfigError(f"{key} = {value!r}: expected {expected}")


def _model(config: Config) -> Broken:
    model = config.model
    if not model.path:
        yield "model.path", "a model folder, hub id or builtin: name"
    if model.gradient_checkpointing_offload:
        key = "model.gradient_checkpointing_offload"
        if not model.gradient_checkpointing:
            yield key, "model.gradient_checkpointing=true with it: it moves what that keeps"
        if model.compile:
            yield key, "false with model.compile: a compiled layer decides itself what it keeps"
    if model.compile and model.liger is True:
        yield "model.liger", "auto or false with model.compile, which fuses the same operations by itself"


def _lora(config: Config) -> Broken:
    lora, fresh = config.lora, type(config.lora)
    for name in ("r", "alpha", "target_modules"):
        if getattr(lora, name) == getattr(fresh, name):
            continue
        if lora.adapter is not None:
            yield f"lora.{name}", "no value with lora.adapter, which has its own"
        if lora.r is None:
            yield f"lora.{name}", "lora.r to be set with it"
    adapters = {"lora.r": lora.r, "lora.adapter": lora.adapter, "reference.adapter": config.reference.adapter}
    for key, value in adapters.items():
        if value is not None and find_spec("peft") is None:
            yield key, "the package peft to be installed with it (pip install 'dpo-scale[lora]')"


def _data(config: Config) -> Broken:
    data = config.data
    for split in ("train", "eval"):
        for i, source in enumerate(getattr(data, split)):
            if not source.path.strip():
                yield f"data.{split}[{i}].path", "a file, glob, folder, hub or builtin: name"
    if data.eval and data.eval_fraction > 0:
        yield "data.eval_fraction", "0 where data.eval names the held-out data"
    if data.max_length is not None and (data.max_prompt_length or 0) >= data.max_length:
        yield "data.max_prompt_length", f"less than data.max_length = {data.max_length}: completions need room"


def _train(config: Config) -> Broken:
    train = config.train
    if train.max_tokens_per_micro_batch is not None and train.micro_batch_size != 1:
        yield "train.micro_batch_size", "no value with train.max_tokens_per_micro_batch, which decides in its place"
    if train.sequence_parallel_size != 1 and config.data.layout == "padded":
        yield (
            "data.layout",
            "shared_prefix, packed or auto with train.sequence_parallel_size: padded rows are not split",
        )
    if train.sequence_parallel_size == "auto":
        if train.max_tokens_per_micro_batch is None:
            yield (
                "train.max_tokens_per_micro_batch",
                "a number with train.sequence_parallel_size auto, which goes by it",
            )
        if train.eval_micro_batch_size is not None:
            yield "train.eval_micro_batch_size", "null with train.sequence_parallel_size auto, which goes by tokens"
    if train.optim.lower() not in OPTIMIZERS:
        yield "train.optim", f"one of {', '.join(OPTIMIZERS.values())}"
    if train.optim.lower() in ("muadam", "muadamw", "musgd") and find_spec("mup") is None:
        yield "train.optim", "the package mup to be installed with it (pip install mup)"
    if config.logprobs.pair_loss == "fused" and not config.loss.is_pairwise:
        yield (
            "logprobs.pair_loss",
            "auto or tokens with this loss: aot and aot_unpaired need all pairs, loss.use_weighting needs by-products",
        )


def _deepspeed(config: Config) -> Broken:
    settings, dtype = config.deepspeed, config.model.dtype
    if settings.stage == 0 and settings.offload_optimizer != "none":
        yield "deepspeed.offload_optimizer", "'none' at stage 0: optimizer states are offloaded from stage 1 on"
    if settings.stage != 3 and settings.offload_param != "none":
        yield "deepspeed.offload_param", "'none' below stage 3: parameters are offloaded at stage 3 only"
    if settings.stage == 0 and dtype == "bfloat16":
        yield (
            "deepspeed.stage",
            "1, 2 or 3 with model.dtype bfloat16 (DeepSpeed's stage 0 updates bf16 weights wrongly); "
            "stage 0 trains in float32 or float16",
        )
    if settings.bf16_optimizer_states:  # what DeepSpeed 0.19 keeps in bf16
        key = "deepspeed.bf16_optimizer_states"
        if dtype != "bfloat16":
            yield "model.dtype", f"bfloat16 with {key}"
        if settings.stage not in (2, 3):
            yield "deepspeed.stage", f"2 or 3 with {key}: at stage 1 DeepSpeed keeps fp32 copies all the same"
        offloads = settings.offload_optimizer == "cpu"
        names = ("Adam", "AdamW") if offloads else ("adamw_torch", "Adam", "AdamW")
        if config.train.optim.lower() not in (name.lower() for name in names):
            where = "deepspeed.offload_optimizer cpu and " if offloads else ""
            yield "train.optim", f"{' or '.join(names)} with {where}{key}"


def _reference(config: Config) -> Broken:
    reference, lora = config.reference, config.lora
    if reference.offload_param != "none" and reference.stage != 3:
        yield "reference.offload_param", "'none' unless reference.stage is 3"
    if reference.on_missing != "compute" and reference.mode != "store":
        yield "reference.on_missing", "reference.mode=store with it"
    if reference.verify_with_model and reference.mode not in ("store", "columns"):
        yield "reference.verify_with_model", "reference.mode=store or columns with it"
    if reference.mode == "adapter" and (not lora.enabled or reference.model is not None):
        yield (
            "reference.mode",
            "lora.r or lora.adapter to be set and reference.model to be null: the reference is in the policy's layers",
        )
    if reference.mode == "columns" and config.loss.ld_alpha is not None:
        yield "loss.ld_alpha", "null with reference.mode columns: they hold sums, and LD-DPO weights tokens"
    if reference.sync_steps is not None:
        key = "reference.sync_steps"
        if reference.mode != "live":
            yield key, f"null with reference.mode {reference.mode}: only a live reference can move"
        if lora.enabled or reference.adapter:
            yield key, "null with LoRA: a reference moves only towards a policy whose weights are all trained"
        if config.deepspeed.stated.get("zero_optimization", {}).get("mics_shard_size", -1) > 0:
            yield key, "null with deepspeed.config's mics_shard_size: slices are cut for all ranks"
    if not config.loss.needs_reference:
        for name in ("model", "adapter", "sync_steps"):
            if getattr(reference, name) is not None:
                yield f"reference.{name}", f"null: loss.loss_type {config.loss.loss_type!r} uses no reference model"


def _evaluation(config: Config) -> Broken:
    needing = {
        "train.eval_steps": config.train.eval_steps is not None,
        "train.eval_on_start": config.train.eval_on_start,
        "checkpoint.metric_for_best_model": config.checkpoint.metric_for_best_model is not None,
    }
    for key, is_set in needing.items():
        if is_set and not config.data.eval and config.data.eval_fraction == 0:
            yield key, "held-out data with it: data.eval or data.eval_fraction"


def _checkpoint_and_logging(config: Config) -> Broken:
    checkpoint, metrics = config.checkpoint, [*config.loss.metric_names, ROUTER_AUX_LOSS]
    for i, name in enumerate(checkpoint.allow_changes):
        if not may_be_allowed(name):
            yield f"checkpoint.allow_changes[{i}]", f"{', '.join(RATE_SETTINGS)} or a setting of loss"
    if checkpoint.metric_for_best_model not in (None, *metrics):
        yield "checkpoint.metric_for_best_model", f"one of {', '.join(metrics)}"
    if checkpoint.load_best_model_at_end and checkpoint.metric_for_best_model is None:
        yield "checkpoint.load_best_model_at_end", "checkpoint.metric_for_best_model to be set with it"
    known = (*metrics, *STEP_METRICS)
    for i, name in enumerate(config.logging.console_metrics):
        if name not in known:
            yield f"logging.console_metrics[{i}]", f"one of {', '.join(known)}"
