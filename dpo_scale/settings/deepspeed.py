"""The `deepspeed:` section, and DeepSpeed's JSON made from our settings and a user's own JSON. No torch.

DeepSpeed accepts unknown top-level keys in silence. It fills gaps with defaults that change training
(`gradient_clipping` 1.0). And its JSON is a second place for most of what our settings say. So the settings decide
what they cover (`binding`); a user's JSON may set everything else and override what is only a default of ours. Where
both say the same thing they must agree, and a key that DeepSpeed does not know is refused. "auto", by which Hugging
Face's Trainer marks a value that it fills in, counts as not said.
"""

from __future__ import annotations

import difflib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dpo_scale.errors import ConfigError
from dpo_scale.settings.fields import setting
from dpo_scale.settings.reader import build, set_nested

if TYPE_CHECKING:
    from dpo_scale.settings.tree import Config

# DeepSpeed 0.19's top-level keys (deepspeed/runtime/config.py and the files it reads sections through)
KNOWN_KEYS = frozenset(
    """activation_checkpointing aio amp autotuning bf16 bfloat16 checkpoint comms_logger communication_data_type
    compile compression_training csv_monitor curriculum_learning data_efficiency data_types dataloader_drop_last
    disable_allgather disable_python_gc dump_state eigenvalue elasticity expert_parallel flops_profiler fp16
    gradient_accumulation_dtype gradient_accumulation_steps gradient_allreduce_op gradient_clipping
    gradient_predivide_factor hybrid_engine keep_in_fp32_modules log_level managed_gradient_accumulation
    memory_breakdown monitor_config nebula optimizer pipeline prescale_gradients progressive_layer_drop scheduler
    seq_parallel_communication_data_type sequence_parallel_size sparse_attention sparse_gradients steps_per_print
    tensor_parallel tensorboard timers torch_autocast train_batch_size train_micro_batch_size_per_gpu
    use_data_before_expert_parallelism vocabulary_size wall_clock_breakdown wandb weight_quantization
    zero_allow_untested_optimizer zero_force_ds_cpu_optimizer zero_optimization""".split()
)
# What our settings decide alone; a user's JSON could only contradict them.
OWNED_KEYS = {
    "train_batch_size": "train.global_batch_size",
    "scheduler": "train.lr_scheduler_type, train.warmup_ratio, train.warmup_steps",
    "torch_autocast": "model.dtype",
    "amp": "model.dtype",
    "bfloat16": "model.dtype",
    "managed_gradient_accumulation": "train.global_batch_size and train.micro_batch_size",
    "pipeline": "nothing: pipeline parallelism is not supported",
    "tensor_parallel": "nothing: tensor parallelism is not supported",
    "sequence_parallel_size": "train.sequence_parallel_size",
    "seq_parallel_communication_data_type": "nothing: rows are split by train.sequence_parallel_size, in model.dtype",
    "expert_parallel": "nothing: experts are sharded as all weights are, by ZeRO",
    "use_data_before_expert_parallelism": "nothing: experts are sharded as all weights are, by ZeRO",
    "data_efficiency": "nothing: the order of pairs is fixed by train.seed",
    "curriculum_learning": "nothing: the order of pairs is fixed by train.seed",
    "checkpoint": "checkpoint.*; files are written and read by our own engine",
    "nebula": "checkpoint.*; files are written and read by our own engine",
    "hybrid_engine": "nothing: no text is generated while training",
}
# `train.optim` in lower case -> DeepSpeed's spelling. A name that DeepSpeed does not know, it looks up in torch.optim.
_OPTIMIZER_NAMES = "adamw_torch Adam AdamW Lamb Lion Adagrad Muon MuAdam MuAdamW MuSGD SGD RMSprop NAdam RAdam Adamax"
OPTIMIZERS = {name.lower(): name for name in _OPTIMIZER_NAMES.split()}

Offload = Literal["none", "cpu"]


@dataclass
class DeepspeedSettings:
    """ZeRO stage and offloads; anything else of DeepSpeed's goes through `config`."""

    stage: Literal[0, 1, 2, 3] | None = setting(None, "ZeRO stage; null: what `config` says, else 2")
    offload_optimizer: Offload | None = setting(None, "cpu: optimizer states in host memory; null: as in `config`")
    offload_param: Offload | None = setting(None, "cpu: weights in host memory, at stage 3; null: as in `config`")
    bf16_optimizer_states: bool | None = setting(
        None, "Adam's moments and the weights it updates in bf16, without fp32 copies; null: as in `config`"
    )
    config: str | dict[str, Any] | None = setting(None, "a DeepSpeed JSON (path or mapping), merged with the settings")
    timeout_minutes: float = setting(30.0, "a collective that takes longer ends the run", unit="minutes", above=0)
    start_timeout_minutes: float = setting(10.0, "ranks that do not meet by then end", unit="minutes", above=0)

    @property
    def stated(self) -> dict[str, Any]:
        """The DeepSpeed JSON, once it is read (`resolve`); empty if there is none."""
        assert not isinstance(self.config, str)
        return self.config or {}

    def resolve(self) -> None:
        """Read the DeepSpeed JSON into the tree, and take from it what the settings leave open."""
        if isinstance(self.config, str):
            self.config = read_deepspeed_json(self.config)
        if self.config is not None:
            self.config = clean_user_config(self.config)
        stated = zero_settings_of(self.stated)
        build(DeepspeedSettings, stated, "deepspeed.config: deepspeed")  # refuses impossible values
        defaults = {"stage": 2, "offload_optimizer": "none", "offload_param": "none", "bf16_optimizer_states": False}
        for name, value in (defaults | stated).items():
            if value is None:
                raise ConfigError(f"deepspeed.config: deepspeed.{name} = None: leave it out, or give a value")
            if getattr(self, name) is None:
                setattr(self, name, value)


def read_deepspeed_json(path: str) -> dict[str, Any]:
    """A user's DeepSpeed JSON as it stands.

    Raises:
        ConfigError: naming the file if it is missing or not a JSON object.
    """
    try:
        mapping = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"deepspeed.config = {path!r}: no such file") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"deepspeed.config = {path!r}: not a readable JSON file: {error}") from None
    if not isinstance(mapping, dict):
        raise ConfigError(f"deepspeed.config = {path!r}: expected a JSON object")
    return mapping


def clean_user_config(mapping: dict[str, Any]) -> dict[str, Any]:
    """Check the top-level keys of a user's DeepSpeed config and drop what is "auto"."""
    for key in mapping:
        if key not in KNOWN_KEYS:
            nearest = difflib.get_close_matches(str(key), sorted(KNOWN_KEYS), n=1)
            hint = f"; did you mean {nearest[0]}?" if nearest else ""
            raise ConfigError(f"deepspeed.config: DeepSpeed has no top-level key {key!r}{hint}")
    kept = _without_auto(mapping)
    for key, owner in OWNED_KEYS.items():
        if key in kept:
            raise ConfigError(f"deepspeed.config: {key} is not taken from a DeepSpeed config; it is set by {owner}")
    for key in ("zero_optimization", "optimizer", "fp16", "bf16"):
        if key in kept and not isinstance(kept[key], dict):
            raise ConfigError(f"deepspeed.config: {key} = {kept[key]!r}: expected an object")
    return kept


def zero_settings_of(user: dict[str, Any]) -> dict[str, Any]:
    """What a user's DeepSpeed config states of `deepspeed.*`; only what is stated is in the result."""
    zero = user.get("zero_optimization", {})
    stated: dict[str, Any] = {}
    if "stage" in zero:
        stated["stage"] = zero["stage"]
    for name in ("offload_optimizer", "offload_param"):
        if isinstance(zero.get(name), dict):
            stated[name] = zero[name].get("device", "none")
    if "bf16_optimizer_states" in user.get("bf16", {}):
        stated["bf16_optimizer_states"] = user["bf16"]["bf16_optimizer_states"]
    return stated


def policy_deepspeed_config(config: Config, micro_steps: int, device_type: str) -> dict[str, Any]:
    """The policy engine's DeepSpeed config.

    Args:
        config: a validated config, its `deepspeed.stage` and offloads resolved.
        micro_steps: the most micro-steps an optimizer step can take; DeepSpeed sizes offload buffers by it.
        device_type: what the engine runs on, e.g. "cuda"; anything but "cpu" reads host memory by copies.

    Raises:
        ConfigError: where `deepspeed.config` says otherwise than the settings; both places are named.
    """
    binding, defaults = _precision(config.model.dtype)
    settings = config.deepspeed
    binding |= {
        ("train_micro_batch_size_per_gpu",): (config.train.micro_batch_size, "train.micro_batch_size"),
        # at least 2, whatever the batch: at 1 DeepSpeed's offload skips the buffers that accumulation needs
        ("gradient_accumulation_steps",): (max(2, micro_steps), "train.global_batch_size and train.micro_batch_size"),
        ("gradient_clipping",): (config.train.max_grad_norm, "train.max_grad_norm"),
        ("zero_optimization", "stage"): (settings.stage, "deepspeed.stage"),
    }
    optimizer_name, optimizer_params = _optimizer(config)
    binding[("optimizer", "type")] = (optimizer_name, "train.optim")
    for name, value in optimizer_params.items():
        binding[("optimizer", "params", name)] = (value, _OPTIMIZER_KEYS.get(name, "train.optim and train.optim_args"))
    for name in ("offload_optimizer", "offload_param"):
        device = getattr(settings, name)
        if device != "none" or name in zero_settings_of(settings.stated):
            binding[("zero_optimization", name, "device")] = (device, f"deepspeed.{name}")
        if device != "none":
            # a device copies page-locked memory several times as fast, and while it computes
            defaults[("zero_optimization", name, "pin_memory")] = device_type != "cpu"
    if config.train.reduce_dtype is not None:
        binding[("communication_data_type",)] = (_SHORT_DTYPES[config.train.reduce_dtype], "train.reduce_dtype")
    if settings.bf16_optimizer_states:
        for name in ("bf16_master_weights_and_grads", "bf16_optimizer_states"):  # DeepSpeed wants both
            binding[("bf16", name)] = (True, "deepspeed.bf16_optimizer_states")
    if config.train.optim.lower() == "adamw_torch" and settings.offload_optimizer == "cpu":
        # otherwise DeepSpeed insists on its own CPU Adam, which compiles on first use
        defaults[("zero_force_ds_cpu_optimizer",)] = False
    defaults[("zero_allow_untested_optimizer",)] = True
    defaults |= _COMMON_DEFAULTS | _compiled_defaults(config, settings.stage)
    return _merge(config.deepspeed.stated, binding, defaults)


def reference_deepspeed_config(config: Config, device_type: str) -> dict[str, Any]:
    """The reference engine's DeepSpeed config: no optimizer, ZeRO 3 or replicated, the policy's precision."""
    binding, defaults = _precision(config.model.dtype)
    zero: dict[str, Any] = {"stage": config.reference.stage}
    if config.reference.offload_param == "cpu":
        zero["offload_param"] = {"device": "cpu", "pin_memory": device_type != "cpu"}
    stated = config.deepspeed.stated.get("zero_optimization", {})
    if config.reference.stage == 3 and MAX_LIVE in stated:  # which also decides how it is gathered (`models.zero3`)
        zero[MAX_LIVE] = stated[MAX_LIVE]
    defaults |= _COMMON_DEFAULTS | _compiled_defaults(config, config.reference.stage)
    return _merge({"zero_optimization": zero, "train_micro_batch_size_per_gpu": 1}, binding, defaults)


def with_fitting_buckets(deepspeed_config: dict[str, Any], num_parameters: int) -> dict[str, Any]:
    """The same config with communication buckets no larger than the model, where the user did not size them.

    DeepSpeed's default of 5e8 elements is allocated in full at every backward pass: 2 GB in fp32, however small the
    model. A bucket that holds all gradients is as good; beyond 2e8 elements larger ones gain nothing measurable.
    """
    size = min(MAX_BUCKET_ELEMENTS, max(1, num_parameters))
    zero = {"reduce_bucket_size": size, "allgather_bucket_size": size, **deepspeed_config["zero_optimization"]}
    return {**deepspeed_config, "zero_optimization": zero}


MAX_BUCKET_ELEMENTS = 200_000_000
MAX_LIVE = "stage3_max_live_parameters"
_SHORT_DTYPES = {"float32": "fp32", "bfloat16": "bf16"}  # DeepSpeed's names
_COMMON_DEFAULTS: dict[tuple[str, ...], Any] = {
    ("steps_per_print",): 10**9,
    # from the third step on it would have the host wait for the device before every forward pass
    ("timers", "throughput", "enabled"): False,
}
_OPTIMIZER_KEYS = {
    "lr": "train.learning_rate",
    "weight_decay": "train.weight_decay",
    "betas": "train.adam_beta1 and train.adam_beta2",
    "eps": "train.adam_epsilon",
}


def _optimizer(config: Config) -> tuple[str, dict[str, Any]]:
    train = config.train
    name = OPTIMIZERS[train.optim.lower()]
    params: dict[str, Any] = {"lr": train.learning_rate, "weight_decay": train.weight_decay}
    if name in ("adamw_torch", "Adam", "AdamW"):
        params |= {"betas": [train.adam_beta1, train.adam_beta2], "eps": train.adam_epsilon}
    if name == "adamw_torch":
        name = "AdamW"
        params |= {"torch_adam": True, "fused": True}  # one pass over memory instead of a dozen
    elif name in ("Adam", "AdamW"):
        params["adam_w_mode"] = name == "AdamW"
    return name, params | train.optim_args


def _precision(dtype: str) -> tuple[dict[tuple[str, ...], tuple[Any, str]], dict[tuple[str, ...], Any]]:
    binding: dict[tuple[str, ...], tuple[Any, str]] = {
        ("bf16", "enabled"): (dtype == "bfloat16", "model.dtype"),
        ("fp16", "enabled"): (dtype == "float16", "model.dtype"),
    }
    # gradients of micro-steps are summed in fp32: in bf16 the sum would depend on how pairs were laid out
    defaults: dict[tuple[str, ...], Any] = {("data_types", "grad_accum_dtype"): "fp32"} if dtype == "bfloat16" else {}
    return binding, defaults


def _compiled_defaults(config: Config, stage: int | None) -> dict[tuple[str, ...], Any]:
    """Torch's own linear function for compiled layers at stage 3.

    DeepSpeed's lets gathered weights go before the backward pass, which compiled layers do by themselves. It also looks
    at each weight's number, which makes torch 2.11 compile every layer anew.
    """
    return {("zero_optimization", "memory_efficient_linear"): False} if config.model.compile and stage == 3 else {}


def _merge(
    user: dict[str, Any],
    binding: dict[tuple[str, ...], tuple[Any, str]],
    defaults: dict[tuple[str, ...], Any],
) -> dict[str, Any]:
    merged = json.loads(json.dumps(user))
    for path, (value, key) in binding.items():
        stated = _get(merged, path)
        if stated is not _ABSENT and not _same(stated, value):
            raise ConfigError(
                f"deepspeed.config: {'.'.join(path)} = {stated!r} contradicts {key} = {value!r}; "
                f'remove it there (or write "auto"), or change {key}'
            )
        set_nested(merged, path, value)
    for path, value in defaults.items():
        if _get(merged, path) is _ABSENT:
            set_nested(merged, path, value)
    return merged


_ABSENT = object()


def _same(stated: Any, value: Any) -> bool:
    if isinstance(stated, str) and isinstance(value, str):
        return stated.lower() == value.lower()
    return isinstance(stated, bool) == isinstance(value, bool) and stated == value


def _get(mapping: Any, path: tuple[str, ...]) -> Any:
    for name in path:
        if not isinstance(mapping, dict) or name not in mapping:
            return _ABSENT
        mapping = mapping[name]
    return mapping


def _without_auto(value: Any) -> Any:
    if isinstance(value, dict):
        kept = {name: _without_auto(item) for name, item in value.items() if item != "auto"}
        return {name: item for name, item in kept.items() if item != {} or value[name] == {}}
    return value
