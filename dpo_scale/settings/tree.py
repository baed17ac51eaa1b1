"""The one tree of settings: a YAML file, then `section.key=value` overrides, into dataclasses.

The tree is plain dataclasses rather than a configuration library's objects because it has to be three things
at once: importable in milliseconds (no torch, so `--help` and a typing mistake cost nothing), strict (an
unknown key is a mistake, never ignored), and the run's own record (`save` writes the resolved tree, and loading
that file gives the same tree). What one field takes stands beside it (`dpo_scale.settings.fields`); the rules between
fields are in `dpo_scale.settings.rules`. Field names are those of TRL and Hugging Face wherever the thing is the same.
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from dpo_scale.settings.data import DataSettings
from dpo_scale.settings.deepspeed import DeepspeedSettings
from dpo_scale.settings.fields import setting
from dpo_scale.settings.loss import LossSettings
from dpo_scale.settings.reader import apply_override, build, read_yaml, to_mapping
from dpo_scale.settings.resume import run_to_continue
from dpo_scale.settings.rules import check_rules


@dataclass
class ModelSettings:
    """The policy: which weights, in what precision, how its activations are kept."""

    path: str = setting("", "Hugging Face folder, hub id, or `builtin:` name")
    revision: str | None = setting(None, "branch, tag or commit of a hub id")
    tokenizer: str | None = setting(None, "folder or hub id; null: the model's own")
    dtype: Literal["float32", "bfloat16", "float16"] = setting("bfloat16", "precision of the weights in a forward pass")
    attn_implementation: str | None = setting(None, "sdpa, flash_attention_2, ...; null: the run chooses")
    gradient_checkpointing: bool = setting(
        False, "keep only the layers' inputs; the backward pass computes the rest again"
    )
    gradient_checkpointing_offload: bool = setting(False, "keep those inputs in host memory")
    compile: bool = setting(False, "torch.compile of the layers")
    liger: bool | Literal["auto"] = setting("auto", "Liger's RMSNorm, rotary embedding, SwiGLU; auto: where possible")
    disable_dropout: bool = setting(True, "turn off the model's own dropout; lora.dropout is apart")
    trust_remote_code: bool = setting(False, "run Python code that lies in the model's folder")


@dataclass
class LoraSettings:
    """Low-rank adapters on a frozen policy (arXiv 2106.09685), through peft."""

    r: int | None = setting(None, "rank of a new adapter; null: train all weights", at_least=1)
    alpha: float = setting(16.0, "a new adapter's updates are scaled by alpha / r", above=0)
    target_modules: str | list[str] = setting("all-linear", "layers of a new adapter, by peft's names; never the head")
    adapter: str | None = setting(None, "an existing adapter (folder or hub id) to train further, instead of a new one")
    dropout: float = setting(0.0, "share of the adapter's inputs dropped while training", at_least=0, below=1)
    merge: bool = setting(True, "write model/ with the adapter merged into the weights; false: the adapter alone")

    @property
    def enabled(self) -> bool:
        return self.r is not None or self.adapter is not None


@dataclass
class ReferenceSettings:
    """The frozen model that log-ratios are taken against; independent of the policy's ZeRO stage."""

    mode: Literal["live", "store", "adapter", "columns"] = setting(
        "live",
        "live: a second model; store: stored values; adapter: the policy with its adapter off; columns: the data's own",
    )
    model: str | None = setting(None, "folder or hub id; null: the policy's initial weights, lora.adapter among them")
    revision: str | None = setting(None, "branch, tag or commit of reference.model")
    adapter: str | None = setting(None, "the reference's LoRA adapter; none: without lora.adapter")
    stage: Literal[0, 3] = setting(0, "0: a copy on each rank; 3: sharded over the ranks")
    offload_param: Literal["none", "cpu"] = setting("none", "cpu: weights in host memory; needs reference.stage 3")
    store: str | None = setting(None, "folder of the reference store; null: one in the cache folder, for all runs")
    on_missing: Literal["compute", "error"] = setting("compute", "what to do about rows that the store lacks")
    verify: int = setting(8, "how many to compute again and compare at the start; 0: none", unit="rows", at_least=0)
    verify_with_model: bool = setting(False, "load the reference to verify, where the policy does not start from it")
    max_tokens_per_micro_batch: int = setting(16384, "size of a forward pass", unit="token slots", at_least=1)
    seconds_per_shard: float = setting(
        60.0,
        "how often a rank saves what it computed: what a kill can cost; 0: after every micro-batch",
        unit="seconds",
        at_least=0,
    )
    sync_steps: int | None = setting(
        None,
        "how often the reference moves towards the policy (TR-DPO, mode live); null: never",
        unit="steps",
        at_least=1,
    )
    sync_mixup: float = setting(1.0, "share of the policy in the moved reference; 1 replaces it", above=0, at_most=1)


@dataclass
class LogprobSettings:
    """How token log-probs are computed from hidden states (see `dpo_scale.logprobs`)."""

    implementation: Literal["auto", "naive", "chunked", "triton"] = setting("auto", "auto: what fits the device")
    pair_loss: Literal["auto", "fused", "tokens"] = setting(
        "auto", "fused: loss and gradient pair by pair; tokens: log-probs first, then the loss"
    )


@dataclass
class TrainSettings:
    """The optimization: batches counted in preference pairs, steps in optimizer steps."""

    global_batch_size: int = setting(64, "how many an optimizer step sees, over all ranks", unit="pairs", at_least=1)
    micro_batch_size: int = setting(1, "how many are in one forward pass on one rank", unit="pairs", at_least=1)
    max_tokens_per_micro_batch: int | None = setting(
        None,
        "instead of micro_batch_size: size of one rank's forward pass, as data.layout computes it",
        unit="tokens",
        at_least=1,
    )
    sequence_parallel_size: int | Literal["auto"] = setting(
        1,
        "how many share each row; auto: as few as train.max_tokens_per_micro_batch allows for each pair",
        unit="ranks",
        at_least=1,
    )
    eval_micro_batch_size: int | None = setting(
        None, "how many are in one forward pass on held-out data; null: as in training", unit="pairs", at_least=1
    )
    num_train_epochs: float = setting(1.0, "how many times the training data is gone through", above=0)
    max_steps: int | None = setting(None, "length of training; overrides num_train_epochs", unit="steps", at_least=1)
    drop_last: bool = setting(False, "leave out an epoch's last, incomplete global batch")
    shuffle: bool = setting(True, "a new order in each epoch, drawn from the seed")
    learning_rate: float = setting(1.0e-6, "the highest rate, reached after the warm-up", at_least=0)
    lr_scheduler_type: Literal["cosine", "linear", "constant"] = setting("linear", "how the rate falls after warm-up")
    warmup_ratio: float = setting(0.0, "share of the steps over which the rate rises from 0", at_least=0, at_most=1)
    warmup_steps: int | None = setting(None, "length of the warm-up; overrides warmup_ratio", unit="steps", at_least=0)
    min_lr_ratio: float = setting(0.0, "share of the rate left at the end of cosine and linear", at_least=0, at_most=1)
    optim: str = setting("adamw_torch", "adamw_torch: PyTorch's AdamW; or any optimizer of DeepSpeed, by name")
    optim_args: dict[str, Any] = setting({}, "further arguments of that optimizer")
    weight_decay: float = setting(0.0, "decay of matrices; norms and biases have none", at_least=0)
    adam_beta1: float = setting(0.9, "decay of Adam's mean of gradients", at_least=0, below=1)
    adam_beta2: float = setting(0.999, "decay of Adam's mean of squared gradients", at_least=0, below=1)
    adam_epsilon: float = setting(1.0e-8, "added to Adam's denominator", above=0)
    max_grad_norm: float = setting(1.0, "gradients are scaled down to this 2-norm; 0: no clipping", at_least=0)
    reduce_dtype: Literal["float32", "bfloat16"] | None = setting(
        None, "dtype in which gradients are summed over the ranks; null: what deepspeed.config says, else model.dtype"
    )
    seed: int = setting(42, "for pair order, fractions of sources, dropout, new adapters", at_least=0, below=2**63)
    eval_steps: int | None = setting(None, "how often to evaluate; null: at the end only", unit="steps", at_least=1)
    eval_on_start: bool = setting(False, "also evaluate before the first step")
    on_nonfinite: Literal["stop", "skip"] = setting("stop", "skip: leave out a step that is not finite")
    max_nonfinite: int = setting(10, "how many `skip` may leave out; one more stops the run", unit="steps", at_least=1)
    check_memory: Literal["error", "warn", "off"] = setting(
        "warn", "predict memory before weights are loaded; error: refuse a run that cannot fit"
    )
    max_hours: float | None = setting(None, "save and exit after this time; null: no limit", unit="hours", above=0)
    hang_timeout_minutes: float | None = setting(
        20.0, "end a run that makes no progress for this long; null: never", unit="minutes", above=0
    )


@dataclass
class CheckpointSettings:
    """When a run's state is saved, what is kept, and which state becomes the final model."""

    save_steps: int | None = setting(None, "how often to save; null: at the end only", unit="steps", at_least=1)
    save_at_end: bool = setting(True, "also save a checkpoint of the last step")
    async_save: bool = setting(False, "write checkpoints from copies in host memory while training goes on")
    save_total_limit: int | None = setting(2, "newest checkpoints kept beside the best one; null: all", at_least=1)
    metric_for_best_model: str | None = setting(None, "a metric of the held-out data, e.g. rewards/accuracies")
    greater_is_better: bool = setting(True, "whether a greater metric_for_best_model is better; false for a loss")
    load_best_model_at_end: bool = setting(False, "write model/ from the best checkpoint, not from the last step")
    preempt_grace_seconds: float = setting(100.0, "time to save after SIGTERM or SIGUSR1", unit="seconds", above=0)
    allow_changes: list[str] = setting([], "settings that may differ from the checkpoint's on resume")


@dataclass
class LoggingSettings:
    """Where the metrics go besides `metrics.jsonl`, which always gets every step."""

    logging_steps: int = setting(1, "how often the console and the trackers get a line", unit="steps", at_least=1)
    console_metrics: list[str] = setting(
        ["loss", "rewards/accuracies", "rewards/margins", "grad_norm", "learning_rate"], "metrics of a console line"
    )
    report_to: list[str] = setting([], "trackers, by accelerate's names: tensorboard, wandb, mlflow, ...")
    project_name: str = setting("dpo_scale", "the project's name in the trackers")
    progress_bar: bool = setting(True, "show one; only where the console is a terminal")
    peak_tflops: float | None = setting(
        None, "peak of a rank's device, for mfu; null: by its name", unit="TFLOP/s", above=0
    )


@dataclass
class Config:
    """A whole run, by section."""

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
    output_dir: str | None = setting(None, "folder of the run; null: runs/<config name>-<time>")

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
    """Read a YAML file, apply `section.key=value` overrides, check it all, and name the output folder.

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
    check_rules(config, for_training=for_training)
    if config.output_dir is None:
        name = Path(path).stem if path is not None else "run"
        continued = run_to_continue(resume, name) if resume is not None else None
        config.output_dir = continued or f"runs/{name}-{(now or datetime.datetime.now()):%Y%m%d-%H%M%S}"
    return config
