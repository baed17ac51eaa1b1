"""The identity of a run, out of its config, data and model: what its checkpoints will say that they are of."""

from __future__ import annotations

from typing import Any

from dpo_scale.checkpoint.compatibility import Identity, architecture_fingerprint, package_versions
from dpo_scale.data.dataset import PairDataset
from dpo_scale.distributed import ranks
from dpo_scale.models.load import policy_source, reference_source
from dpo_scale.reference.columns import ColumnReference
from dpo_scale.reference.modes import source_fingerprint
from dpo_scale.settings.reader import to_mapping
from dpo_scale.settings.resume import RATE_SETTINGS
from dpo_scale.settings.tree import Config


def identity_of(
    config: Config, model_config: Any, data: PairDataset, columns: ColumnReference | None = None
) -> Identity:
    """What a checkpoint of this run will say it is of.

    Args:
        data: the pairs to train on.
        columns: where reference log-probs come from, if that is the data's columns.
    """
    tree = to_mapping(config)
    order = ("global_batch_size", "seed", "shuffle", "drop_last")
    optimizer = ("optim", "optim_args", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm")
    rate = tuple(name.removeprefix("train.") for name in RATE_SETTINGS)
    moving = {name: tree["reference"][name] for name in ("sync_steps", "sync_mixup")}
    adapters = {name: tree["lora"][name] for name in ("r", "alpha", "target_modules", "adapter", "dropout")}
    settings = {
        "model.path": config.model.path,
        "model.dtype": config.model.dtype,
        "reference.model": config.reference.model,
        "reference.adapter": config.reference.adapter,
        **{f"reference.{name}": value for name, value in moving.items() if config.reference.sync_steps},
        **{f"lora.{name}": value for name, value in adapters.items() if config.lora.enabled},
        **{f"loss.{name}": value for name, value in tree["loss"].items() if name != "router_aux_loss_coef"},
        **{f"train.{name}": tree["train"][name] for name in (*order, *optimizer, *rate)},
    }
    # said only where it is so: older checkpoints know nothing of these
    if config.deepspeed.bf16_optimizer_states:
        settings["deepspeed.bf16_optimizer_states"] = True
    if config.loss.router_aux_loss_coef:
        settings["loss.router_aux_loss_coef"] = config.loss.router_aux_loss_coef
    # weights that a checkpoint does not hold, and that must still be the same ones behind their path
    if config.lora.enabled:
        settings["the weights of model.path and lora.adapter"] = source_fingerprint(config, policy_source(config))
    has_weights = config.loss.needs_reference and config.reference.mode != "columns"
    if has_weights and config.reference.sync_steps is None:
        named = "model.path" if config.reference.model is None else "reference.model"
        settings[f"the reference's weights ({named})"] = source_fingerprint(config, reference_source(config))
    if columns is not None:
        settings["the reference's log-probs (columns of data.train)"] = columns.fingerprint(data)
    assert config.deepspeed.stage is not None
    return Identity(
        architecture_fingerprint(model_config),
        data.fingerprint,
        settings,
        {f"train.{name}": tree["train"][name] for name in ("num_train_epochs", "max_steps")},
        ranks.world_size(),
        config.deepspeed.stage,
        package_versions(),
    )
