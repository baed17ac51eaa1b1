"""The one tree of settings: a YAML file, then `section.key=value` overrides, into dataclasses.

The tree is plain dataclasses rather than a configuration library's objects because it has to be three things
at once: importable in milliseconds (no torch, so `--help` and a typing mistake cost nothing), strict (an
unknown key is a mistake, never ignored), and the run's own record (`save` writes the resolved tree, and loading
that file gives the same tree). Reading is in `dpo_scale.settings.reader`; here are the sections and the rules that
hold between them. Field names are those of TRL and Hugging Face wherever the thing is the same.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import yaml

from dpo_scale.errors import CheckpointError, ConfigError
from dpo_scale.settings.data import DataSettings
from dpo_scale.settings.deepspeed import (
    clean_user_config,
    known_optimizer,
    optimizer_names,
    policy_deepspeed_config,
    read_deepspeed_json,
    zero_settings_of,
)
from dpo_scale.settings.loss import LossSettings
from dpo_scale.settings.reader import apply_override, build, read_yaml, to_mapping
from dpo_scale.settings.resume import RATE_SETTINGS, may_be_allowed

# parts of a step whose share of its time is measured, in their order (`dpo_scale.observe.timing`)
PHASES = ("data", "reference", "forward", "backward", "optimizer", "communication")
CONFIG_FILE = "config.yaml"  # of a run folder
MANIFEST_FILE = "manifest.json"  # of a complete checkpoint
FINISHED_FILE = "finished.json"  # of the folder of a run that came to its end
CHECKPOINTS_DIR = "checkpoints"
# what a training step measures beside the loss's own metrics
STEP_METRICS = (
    "grad_norm",
    "learning_rate",
    "epoch",
    "tokens",
    "pairs",
    "step_seconds",
    "tokens_per_second",
    "pairs_per_second",
    "mfu",  # where the device's peak is known
    "padding_fraction",
    "rank_idle",
    "peak_memory_bytes",
    *(f"time/{phase}" for phase in PHASES),
)


def _check(condition: bool, key: str, value: object, expected: str) -> None:
    if not condition:
        raise ConfigError(f"{key} = {value!r}: expected {expected}")


@dataclass
class ModelSettings:
    """The policy: which weights, in what precision, how its activations are kept."""

    path: str = ""  # Hugging Face folder, hub id, or `builtin:` name
    revision: str | None = None  # branch, tag or commit of a hub id
    tokenizer: str | None = None  # folder or hub id; null: the model's own
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"  # of the weights in a forward pass
    attn_implementation: str | None = None  # null: the run chooses; else sdpa, flash_attention_2, ...
    gradient_checkpointing: bool = False  # keep only the layers' inputs; compute activations again in the backward pass
    gradient_checkpointing_offload: bool = False  # keep those inputs in host memory
    compile: bool = False  # torch.compile of the layers
    liger: bool | Literal["auto"] = "auto"  # Liger's RMSNorm, rotary embedding, SwiGLU; auto: where they can be had
    disable_dropout: bool = True  # of the model itself; lora.dropout is apart
    trust_remote_code: bool = False  # run Python code that lies in the model's folder

    def validate(self) -> None:
        _check(bool(self.path), "model.path", self.path, "a model folder, hub id or builtin: name")
        _check(
            self.gradient_checkpointing or not self.gradient_checkpointing_offload,
            "model.gradient_checkpointing_offload",
            True,
            "model.gradient_checkpointing=true with it: it moves what that keeps",
        )
        _check(
            not (self.compile and self.gradient_checkpointing_offload),
            "model.gradient_checkpointing_offload",
            True,
            "false with model.compile: a compiled layer decides itself what it keeps",
        )
        _check(
            not (self.compile and self.liger is True),
            "model.liger",
            True,
            "auto or false with model.compile, which fuses the layers' elementwise operations by itself",
        )


@dataclass
class ReferenceSettings:
    """The frozen model that log-ratios are taken against; independent of the policy's ZeRO stage."""

    # live: a second model; store: stored values; adapter: the policy with its adapter off; columns: the data's own
    mode: Literal["live", "store", "adapter", "columns"] = "live"
    model: str | None = None  # folder or hub id; null: the policy's initial weights, lora.adapter among them
    revision: str | None = None  # branch, tag or commit of reference.model
    adapter: str | None = None  # the reference's LoRA adapter; none: without lora.adapter
    stage: Literal[0, 3] = 0  # 0: a copy on each rank; 3: sharded over the ranks
    offload_param: Literal["none", "cpu"] = "none"  # cpu: weights in host memory; needs reference.stage 3
    store: str | None = None  # folder of the reference store; null: one in the cache folder, for all runs
    on_missing: Literal["compute", "error"] = "compute"  # mode store: what becomes of rows that the store lacks
    verify: int = 8  # modes store, columns: rows that are computed again at the start and compared; 0: none
    verify_with_model: bool = False  # load the reference to verify, where the policy does not start from it
    max_tokens_per_micro_batch: int = 16384  # token slots of a pass, in a step or filling the store
    seconds_per_shard: float = 60.0  # how often a rank saves what it computed: what a kill can cost
    sync_steps: int | None = None  # mode live: steps between moves of the reference towards the policy (TR-DPO)
    sync_mixup: float = 1.0  # share of the policy in the moved reference; 1 replaces it

    def validate(self) -> None:
        _check(
            self.offload_param == "none" or self.stage == 3,
            "reference.offload_param",
            self.offload_param,
            "'none' unless reference.stage is 3",
        )
        _check(self.verify >= 0, "reference.verify", self.verify, "a number of rows, 0 or more")
        _check(
            self.max_tokens_per_micro_batch >= 1,
            "reference.max_tokens_per_micro_batch",
            self.max_tokens_per_micro_batch,
            "at least 1",
        )
        _check(
            0 <= self.seconds_per_shard < float("inf"),
            "reference.seconds_per_shard",
            self.seconds_per_shard,
            "a number of seconds, 0 (after every micro-batch) or more",
        )
        _check(
            self.sync_steps is None or self.sync_steps >= 1,
            "reference.sync_steps",
            self.sync_steps,
            "null or at least 1",
        )
        _check(
            self.sync_steps is None or self.mode == "live",
            "reference.sync_steps",
            self.sync_steps,
            f"null with reference.mode {self.mode}: only a live reference can move",
        )
        for name, default, modes in (
            ("on_missing", "compute", ["store"]),
            ("verify_with_model", False, ["store", "columns"]),
        ):
            value = getattr(self, name)
            expected = f"reference.mode={' or '.join(modes)} with it"
            _check(self.mode in modes or value == default, f"reference.{name}", value, expected)
        _check(0 < self.sync_mixup <= 1, "reference.sync_mixup", self.sync_mixup, "above 0, at most 1")


@dataclass
class LoraSettings:
    """Low-rank adapters on a frozen policy (arXiv 2106.09685), through peft."""

    r: int | None = None  # rank of a new adapter; null: train all weights
    alpha: float = 16.0  # a new adapter's updates are scaled by alpha / r
    target_modules: str | list[str] = "all-linear"  # layers of a new adapter, by peft's names; never the head
    adapter: str | None = None  # instead of a new one: an existing adapter (folder or hub id) to train further
    dropout: float = 0.0  # on the adapter's input, while training
    merge: bool = True  # write model/ with the adapter merged into the weights; otherwise the adapter alone

    @property
    def enabled(self) -> bool:
        return self.r is not None or self.adapter is not None

    def validate(self) -> None:
        _check(self.r is None or self.r >= 1, "lora.r", self.r, "null or at least 1")
        for name in ("r", "alpha", "target_modules"):
            value, default = getattr(self, name), LoraSettings.__dataclass_fields__[name].default
            expected = (
                "lora.r to be set with it" if self.adapter is None else "no value with lora.adapter, which has its own"
            )
            _check(self.r is not None and self.adapter is None or value == default, f"lora.{name}", value, expected)
        _check(self.alpha > 0, "lora.alpha", self.alpha, "more than 0")
        _check(0 <= self.dropout < 1, "lora.dropout", self.dropout, "from 0 to below 1")


@dataclass
class LogprobSettings:
    """How token log-probs are computed from hidden states (see `dpo_scale.logprobs`)."""

    implementation: Literal["auto", "naive", "chunked", "triton"] = "auto"  # auto: the first that fits the device
    pair_loss: Literal["auto", "fused", "tokens"] = "auto"  # fused: loss and gradient pair by pair


@dataclass
class TrainSettings:
    """The optimization: batches counted in preference pairs, steps in optimizer steps."""

    global_batch_size: int = 64  # pairs an optimizer step sees, over all ranks and micro-steps
    micro_batch_size: int = 1  # pairs of one forward pass on one rank
    max_tokens_per_micro_batch: int | None = None  # instead: tokens of one forward pass, as data.layout computes them
    eval_micro_batch_size: int | None = None  # pairs of one forward pass on held-out data; null: as in training
    num_train_epochs: float = 1.0  # times that the training data is gone through
    max_steps: int | None = None  # optimizer steps; overrides num_train_epochs
    drop_last: bool = False  # drop an epoch's last, incomplete global batch instead of using it
    shuffle: bool = True  # a new order in each epoch, drawn from the seed
    learning_rate: float = 1.0e-6  # the highest one, after the warm-up
    lr_scheduler_type: Literal["cosine", "linear", "constant"] = "linear"  # how the rate falls after the warm-up
    warmup_ratio: float = 0.0  # share of the steps over which the rate rises from 0
    warmup_steps: int | None = None  # optimizer steps; overrides warmup_ratio
    min_lr_ratio: float = 0.0  # share of the learning rate left at the end of cosine and linear
    optim: str = "adamw_torch"  # PyTorch's AdamW; or the name of any DeepSpeed optimizer
    optim_args: dict[str, Any] = field(default_factory=dict)  # further arguments of that optimizer
    weight_decay: float = 0.0  # of matrices; norms and biases have none
    adam_beta1: float = 0.9  # decay of Adam's mean of gradients
    adam_beta2: float = 0.999  # decay of Adam's mean of squared gradients
    adam_epsilon: float = 1.0e-8  # added to Adam's denominator
    max_grad_norm: float = 1.0  # gradients are scaled down to this 2-norm; 0: no clipping
    # dtype in which gradients are summed over the ranks; null: what deepspeed.config says, else model.dtype
    reduce_dtype: Literal["float32", "bfloat16"] | None = None
    seed: int = 42  # of the order of pairs, fractions of sources, dropout and new adapters
    eval_steps: int | None = None  # steps between evaluations; null: at the end only, if there is held-out data
    eval_on_start: bool = False  # also evaluate before the first step
    on_nonfinite: Literal["stop", "skip"] = "stop"  # skip: leave out a step that is not finite
    max_nonfinite: int = 10  # steps that `skip` may leave out in the whole run; one more stops it
    max_hours: float | None = None  # save and exit, to be resumed, after so many hours; null: no limit
    hang_timeout_minutes: float | None = 20.0  # end a run without progress after so long; null: never

    def validate(self) -> None:
        for name in ("global_batch_size", "micro_batch_size"):
            _check(getattr(self, name) >= 1, f"train.{name}", getattr(self, name), "at least 1 pair")
        _check(
            self.max_tokens_per_micro_batch is None or self.micro_batch_size == 1,
            "train.micro_batch_size",
            self.micro_batch_size,
            "no value with train.max_tokens_per_micro_batch, which decides how many pairs go together",
        )
        for name in ("max_tokens_per_micro_batch", "eval_micro_batch_size", "max_steps", "eval_steps"):
            value = getattr(self, name)
            _check(value is None or value >= 1, f"train.{name}", value, "null or at least 1")
        _check(self.num_train_epochs > 0, "train.num_train_epochs", self.num_train_epochs, "more than 0")
        _check(self.learning_rate >= 0, "train.learning_rate", self.learning_rate, "0 or more")
        _check(0 <= self.warmup_ratio <= 1, "train.warmup_ratio", self.warmup_ratio, "a share from 0 to 1")
        _check(
            self.warmup_steps is None or self.warmup_steps >= 0,
            "train.warmup_steps",
            self.warmup_steps,
            "null, or 0 or more",
        )
        _check(0 <= self.min_lr_ratio <= 1, "train.min_lr_ratio", self.min_lr_ratio, "a share from 0 to 1")
        _check(known_optimizer(self.optim), "train.optim", self.optim, f"one of {', '.join(optimizer_names())}")
        _check(
            self.optim.lower() not in ("muadam", "muadamw", "musgd") or find_spec("mup") is not None,
            "train.optim",
            self.optim,
            "the package mup to be installed with it",
        )
        _check(self.weight_decay >= 0, "train.weight_decay", self.weight_decay, "0 or more")
        for name in ("adam_beta1", "adam_beta2"):
            _check(0 <= getattr(self, name) < 1, f"train.{name}", getattr(self, name), "from 0 to below 1")
        _check(self.adam_epsilon > 0, "train.adam_epsilon", self.adam_epsilon, "more than 0")
        _check(self.max_grad_norm >= 0, "train.max_grad_norm", self.max_grad_norm, "0 (no clipping) or more")
        _check(0 <= self.seed < 2**63, "train.seed", self.seed, "from 0 to below 2**63")
        _check(self.max_nonfinite >= 1, "train.max_nonfinite", self.max_nonfinite, "at least 1")
        for name in ("max_hours", "hang_timeout_minutes"):
            value = getattr(self, name)
            _check(value is None or value > 0, f"train.{name}", value, "null or more than 0")


@dataclass
class DeepspeedSettings:
    """ZeRO stage and offloads; anything else of DeepSpeed's goes through `config`."""

    stage: Literal[0, 1, 2, 3] | None = None  # ZeRO stage; null: what `config` says, else 2
    offload_optimizer: Literal["none", "cpu"] | None = None  # cpu: in host memory; null: what `config` says
    offload_param: Literal["none", "cpu"] | None = None  # cpu: weights in host memory, at stage 3; null: as `config`
    # Adam's moments and the weights it updates in bf16, without fp32 copies; null: what `config` says, else false
    bf16_optimizer_states: bool | None = None
    config: str | dict[str, Any] | None = None  # a DeepSpeed JSON (path or mapping), merged with the settings
    timeout_minutes: float = 30.0  # a collective that takes longer ends the run

    def resolve(self) -> None:
        """Read the DeepSpeed JSON into the tree, and take from it what the settings leave open."""
        if isinstance(self.config, str):
            self.config = read_deepspeed_json(self.config)
        stated = {}
        if self.config is not None:
            self.config = clean_user_config(self.config)
            stated = zero_settings_of(self.config)
        allowed: dict[str, tuple[Any, ...]] = {
            "stage": (0, 1, 2, 3),
            "offload_optimizer": ("none", "cpu"),
            "offload_param": ("none", "cpu"),
            "bf16_optimizer_states": (False, True),
        }
        defaults = {"stage": 2, "offload_optimizer": "none", "offload_param": "none", "bf16_optimizer_states": False}
        for name, values in allowed.items():
            if getattr(self, name) is None:
                setattr(self, name, stated.get(name, defaults[name]))
            value = getattr(self, name)
            known = any(value == one and type(value) is type(one) for one in values)  # to Python, True equals 1
            _check(known, f"deepspeed.{name}", value, f"one of {values}")

    def validate(self) -> None:
        _check(
            self.offload_optimizer == "none" or self.stage >= 1,
            "deepspeed.offload_optimizer",
            self.offload_optimizer,
            "'none' at stage 0: optimizer states are offloaded from stage 1 on",
        )
        _check(
            self.offload_param == "none" or self.stage == 3,
            "deepspeed.offload_param",
            self.offload_param,
            "'none' below stage 3: parameters are offloaded at stage 3 only",
        )
        _check(self.timeout_minutes > 0, "deepspeed.timeout_minutes", self.timeout_minutes, "more than 0")


@dataclass
class CheckpointSettings:
    """When a run's state is saved, what is kept, and which state becomes the final model."""

    save_steps: int | None = None  # steps between checkpoints; null: at the end only
    save_at_end: bool = True  # a checkpoint of the last step
    save_total_limit: int | None = 2  # newest checkpoints kept, beside the best one; null: all
    metric_for_best_model: str | None = None  # a metric of the held-out data, e.g. rewards/accuracies
    greater_is_better: bool = True  # of metric_for_best_model; set it false for a loss
    load_best_model_at_end: bool = False  # write model/ from the best checkpoint, not from the last step
    preempt_grace_seconds: float = 100.0  # time to save after SIGTERM or SIGUSR1; then the run ends, saved or not
    allow_changes: list[str] = field(default_factory=list)  # settings that may differ from the checkpoint's on resume

    def validate(self) -> None:
        for name in self.allow_changes:
            expected = f"{', '.join(RATE_SETTINGS)} or a setting of loss"
            _check(may_be_allowed(name), "checkpoint.allow_changes", name, expected)
        for name in ("save_steps", "save_total_limit"):
            value = getattr(self, name)
            _check(value is None or value >= 1, f"checkpoint.{name}", value, "null or at least 1")
        grace = self.preempt_grace_seconds
        _check(grace > 0, "checkpoint.preempt_grace_seconds", grace, "more than 0")
        _check(
            not self.load_best_model_at_end or self.metric_for_best_model is not None,
            "checkpoint.load_best_model_at_end",
            True,
            "checkpoint.metric_for_best_model to be set with it",
        )


@dataclass
class LoggingSettings:
    """Where the metrics go besides `metrics.jsonl`, which always gets every step."""

    logging_steps: int = 1  # steps between console lines and trackers' entries; metrics.jsonl has every step
    # metrics of a console line
    console_metrics: list[str] = field(
        default_factory=lambda: ["loss", "rewards/accuracies", "rewards/margins", "grad_norm", "learning_rate"]
    )
    report_to: list[str] = field(default_factory=list)  # tensorboard, wandb, mlflow, ... (accelerate's names)
    project_name: str = "dpo_scale"  # in the trackers
    progress_bar: bool = True  # only where the console is a terminal
    peak_tflops: float | None = None  # of one rank's device, for mfu; null: by the device's name, where it is known

    def validate(self) -> None:
        _check(self.logging_steps >= 1, "logging.logging_steps", self.logging_steps, "at least 1")
        _check(self.peak_tflops is None or self.peak_tflops > 0, "logging.peak_tflops", self.peak_tflops, "more than 0")


@dataclass
class Config:
    """A whole run. `output_dir` null means `runs/<config name>-<time>`."""

    model: ModelSettings = field(default_factory=ModelSettings)
    lora: LoraSettings = field(default_factory=LoraSettings)
    reference: ReferenceSettings = field(default_factory=ReferenceSettings)
    data: DataSettings = field(default_factory=DataSettings)
    loss: LossSettings = field(default_factory=LossSettings)
    logprobs: LogprobSettings = field(default_factory=LogprobSettings)
    train: TrainSettings = field(default_factory=TrainSettings)
    deepspeed: DeepspeedSettings = field(default_factory=DeepspeedSettings)
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings)
    logging: LoggingSettings = field(default_factory=LoggingSettings)
    output_dir: str | None = None  # folder of the run; null: runs/<config name>-<time>

    def validate(self, *, for_training: bool = True) -> None:
        """Refuse impossible values, within sections and between them.

        Args:
            for_training: False leaves out what only a training run needs (training data).

        Raises:
            ConfigError: naming the key, its value and what is allowed.
        """
        for name in ("model", "lora", "reference", "data", "loss", "train", "deepspeed", "checkpoint", "logging"):
            getattr(self, name).validate()
        if for_training:
            _check(bool(self.data.train), "data.train", self.data.train, "at least one data file, folder or hub name")
        _check(
            not (self.model.dtype == "bfloat16" and self.deepspeed.stage == 0),
            "deepspeed.stage",
            0,
            "1, 2 or 3 with model.dtype bfloat16 (DeepSpeed's stage 0 updates bf16 weights wrongly); "
            "stage 0 trains in float32 or float16",
        )
        _check(
            self.logprobs.pair_loss != "fused" or self.loss.is_pairwise,
            "logprobs.pair_loss",
            "fused",
            "auto or tokens with this loss: aot and aot_unpaired need all pairs, loss.use_weighting needs by-products",
        )
        if self.deepspeed.bf16_optimizer_states:
            self._check_bf16_optimizer_states()
        has_eval = bool(self.data.eval) or self.data.eval_fraction > 0
        # refuses a DeepSpeed JSON that contradicts the settings
        policy_deepspeed_config(self, micro_steps=1, device_type="cpu")
        for key, value in (
            ("train.eval_steps", self.train.eval_steps),
            ("train.eval_on_start", self.train.eval_on_start or None),
            ("checkpoint.metric_for_best_model", self.checkpoint.metric_for_best_model),
        ):
            _check(value is None or has_eval, key, value, "held-out data with it: data.eval or data.eval_fraction")
        metrics = self.loss.metric_names
        best = self.checkpoint.metric_for_best_model
        _check(
            best is None or best in metrics, "checkpoint.metric_for_best_model", best, f"one of {', '.join(metrics)}"
        )
        for name in self.logging.console_metrics:
            known = [*metrics, *STEP_METRICS]
            _check(name in known, "logging.console_metrics", name, f"names out of {', '.join(known)}")
        _check(
            self.reference.mode != "adapter" or (self.lora.enabled and self.reference.model is None),
            "reference.mode",
            self.reference.mode,
            "lora.r or lora.adapter to be set and reference.model to be null: the reference is in the policy's layers",
        )
        _check(
            self.reference.mode != "columns" or self.loss.ld_alpha is None,
            "loss.ld_alpha",
            self.loss.ld_alpha,
            "null with reference.mode columns: they hold sums, and LD-DPO weights tokens",
        )
        for key, value in (
            ("lora.r", self.lora.r),
            ("lora.adapter", self.lora.adapter),
            ("reference.adapter", self.reference.adapter),
        ):
            installed = value is None or find_spec("peft") is not None
            _check(installed, key, value, "the package peft to be installed with it (pip install 'dpo-scale[lora]')")
        _check(
            self.reference.sync_steps is None or not (self.lora.enabled or self.reference.adapter),
            "reference.sync_steps",
            self.reference.sync_steps,
            "null with LoRA: a reference moves only towards a policy whose weights are all trained",
        )
        zero = (self.deepspeed.config or {}).get("zero_optimization", {})
        _check(
            self.reference.sync_steps is None or zero.get("mics_shard_size", -1) <= 0,
            "reference.sync_steps",
            self.reference.sync_steps,
            "null with deepspeed.config's mics_shard_size: slices are cut for all ranks",
        )
        if not self.loss.needs_reference:
            for name in ("model", "adapter", "sync_steps"):
                value = getattr(self.reference, name)
                expected = f"null: loss.loss_type {self.loss.loss_type!r} uses no reference model"
                _check(value is None, f"reference.{name}", value, expected)

    def _check_bf16_optimizer_states(self) -> None:
        """Refuse what DeepSpeed 0.19 does not keep in bf16."""
        key = "deepspeed.bf16_optimizer_states"
        _check(self.model.dtype == "bfloat16", "model.dtype", self.model.dtype, f"bfloat16 with {key}")
        reason = "at stage 1 DeepSpeed's optimizer for bf16 keeps fp32 copies all the same"
        _check(self.deepspeed.stage in (2, 3), "deepspeed.stage", self.deepspeed.stage, f"2 or 3 with {key}: {reason}")
        offloads = self.deepspeed.offload_optimizer == "cpu"
        names = ("Adam", "AdamW") if offloads else ("adamw_torch", "Adam", "AdamW")
        allowed = self.train.optim.lower() in (name.lower() for name in names)
        where = "deepspeed.offload_optimizer cpu and " if offloads else ""
        _check(allowed, "train.optim", self.train.optim, f"{' or '.join(names)} with {where}{key}")

    def save(self, path: Path) -> None:
        """Write the resolved tree as YAML; `load_config(path)` gives an equal tree."""
        path.write_text(yaml.safe_dump(to_mapping(self), sort_keys=False, width=100), encoding="utf-8")


def load_config(
    path: str | Path | None,
    overrides: Sequence[str] = (),
    *,
    for_training: bool = True,
    resume: str | None = None,
    now: datetime.datetime | None = None,
) -> Config:
    """Read a YAML file, apply `section.key=value` overrides, validate, and name the output folder.

    Args:
        path: the YAML file; None starts from the defaults, so that overrides alone can describe a run.
        overrides: e.g. `["train.learning_rate=5e-7", "data.train=[a.jsonl, b.jsonl]"]`; values are YAML.
        for_training: False accepts a config without training data, for evaluation.
        resume: what `--resume` says; a resumed run continues in its own folder unless `output_dir` names another.
        now: the time in the default output folder's name.

    Raises:
        ConfigError: on a missing or malformed file, an unknown key, a wrong type or an impossible value.
        CheckpointError: if there is nothing where `resume` points.
    """
    mapping = read_yaml(Path(path)) if path is not None else {}
    for override in overrides:
        apply_override(mapping, override)
    config = build(Config, mapping)
    config.deepspeed.resolve()
    config.validate(for_training=for_training)
    if config.output_dir is None:
        name = Path(path).stem if path is not None else "run"
        continued = _run_to_continue(resume, name) if resume is not None else None
        config.output_dir = continued or f"runs/{name}-{(now or datetime.datetime.now()):%Y%m%d-%H%M%S}"
    return config


def _run_to_continue(resume: str, name: str) -> str | None:
    """The run folder that `--resume` means where no `output_dir` is given; None for a new one.

    Args:
        resume: "latest" or "auto" for the newest `runs/<name>-<time>` that has a checkpoint or is finished; or a run
            or checkpoint folder.
    """
    if resume in ("latest", "auto"):
        named = re.compile(re.escape(name) + r"-\d{8}-\d{6}")
        runs = {file.parents[2] for file in Path("runs").glob(f"*/{CHECKPOINTS_DIR}/step-*/{MANIFEST_FILE}")}
        runs |= {file.parent for file in Path("runs").glob(f"*/{FINISHED_FILE}")}
        runs = {run for run in runs if named.fullmatch(run.name)}
        if not runs and resume == "latest":
            raise CheckpointError(
                f"--resume: no runs/{name}-<time> has a checkpoint; name a run with output_dir=FOLDER"
            )
        return str(max(runs)) if runs else None
    folder = Path(resume)
    if not folder.is_dir():
        raise CheckpointError(f"--resume {resume}: no such folder; expected a run folder, a checkpoint, latest or auto")
    if folder.resolve().parent.name == CHECKPOINTS_DIR:
        folder = folder.resolve().parents[1]
    # a checkpoint copied out of its run leaves the run behind
    return str(folder) if (folder / CONFIG_FILE).is_file() else None
