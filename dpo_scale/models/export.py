"""The trained model as a Hugging Face folder: sharded safetensors, tokenizer, chat template, model card."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from dpo_scale import __version__
from dpo_scale.disk.atomic import sync_folder
from dpo_scale.distributed import engine, ranks
from dpo_scale.errors import TrainingError
from dpo_scale.models.files import MODEL_CARD, seal_model
from dpo_scale.models.lora import merged_weights, save_adapter
from dpo_scale.models.scorer import causal_lm
from dpo_scale.progress import noting_activity
from dpo_scale.settings.tree import Config

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MODEL_DIR = "model"
_WRAPPER_PREFIX = "model."  # the name under which PairScorer holds the Hugging Face model
MAX_SHARD_SIZE = "5GB"


def export_model(
    policy: Any, tokenizer: PreTrainedTokenizerBase, config: Config, run_dir: Path, results: dict[str, Any]
) -> Path:
    """Write `model/`, which `AutoModelForCausalLM.from_pretrained` loads. Every rank must call it.

    With LoRA it is the whole model with the adapter merged in or, if not `lora.merge`, the adapter alone, in peft's
    format.

    Args:
        policy: the DeepSpeed engine around a `PairScorer`.
        results: for the model card: `before` and `after` (held-out metrics or None), `steps`, `pairs`.

    Raises:
        TrainingError: on every rank, if it can't be written; an older `model/` is still there then.
    """
    adapter_alone = config.lora.enabled and not config.lora.merge
    state = engine.consolidated_state_dict(policy, trained_only=adapter_alone)
    folder = run_dir / MODEL_DIR

    def write() -> None:
        try:
            _write_model(policy.module.model, state, tokenizer, config, folder, results)
        except (OSError, SafetensorError) as error:
            reason = f"the model could not be written: {error}; the checkpoints are kept"
            raise TrainingError(f"{folder}: {reason}") from None

    ranks.on_main(write)
    return folder


def _write_model(
    model: Any,
    state: dict[str, Any] | None,
    tokenizer: PreTrainedTokenizerBase,
    config: Config,
    folder: Path,
    results: dict[str, Any],
) -> None:
    """Rank 0's part: the folder appears when all of it is on the disk."""
    assert state is not None
    weights = {name.removeprefix(_WRAPPER_PREFIX): tensor for name, tensor in state.items()}
    temporary, replaced = (folder.with_name(f"{folder.name}.{what}") for what in ("incomplete", "replaced"))
    for path in (temporary, replaced):
        shutil.rmtree(path, ignore_errors=True)
    try:
        if config.lora.enabled and not config.lora.merge:
            save_adapter(model, weights, config.model.path, temporary)
        else:
            if config.lora.enabled:
                weights = merged_weights(model, weights)
            _restore_config(causal_lm(model))
            with _noted_shards():
                causal_lm(model).save_pretrained(temporary, state_dict=weights, max_shard_size=MAX_SHARD_SIZE)
        tokenizer.save_pretrained(temporary)
        (temporary / MODEL_CARD).write_text(model_card(config, results), encoding="utf-8")
        seal_model(temporary)
        if folder.exists():
            os.replace(folder, replaced)
        os.replace(temporary, folder)
        sync_folder(folder.parent)
    finally:
        for path in (temporary, replaced):
            shutil.rmtree(path, ignore_errors=True)


@contextmanager
def _noted_shards() -> Iterator[None]:
    """Note each shard that transformers writes as activity; its progress bar is where it tells of them."""
    from transformers.utils.logging import set_tqdm_hook

    def noted_bar(make_bar: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
        return make_bar(*map(noting_activity, arguments[:1]), *arguments[1:], **options)

    before = set_tqdm_hook(noted_bar)
    try:
        yield
    finally:
        set_tqdm_hook(before)


def _restore_config(model: Any) -> None:
    text = model.config.get_text_config()
    for name, value in model.original_dropout.items():
        setattr(text, name, value)
    model.config.use_cache = True
    generation = model.generation_config
    if generation is not None:
        # folders in the wild set sampling parameters without do_sample, which transformers refuses to save
        samples = generation.temperature not in (None, 1.0) or generation.top_p not in (None, 1.0)
        generation.do_sample = generation.do_sample or samples


def model_card(config: Config, results: dict[str, Any]) -> str:
    """The model card's Markdown: what it is, from which data and settings, with which held-out results."""
    base = Path(config.model.path).name if Path(config.model.path).exists() else config.model.path
    loss = ", ".join(config.loss.loss_types)
    sources = "\n".join(f"- `{Path(source.path).name}`" for source in config.data.train)
    rows = ["| held-out metric | before | after |", "|---|---|---|"]
    before, after = results.get("before") or {}, results.get("after") or {}
    for name in ("loss", "rewards/accuracies", "rewards/margins", "accuracy/policy"):
        if name in after:
            start = f"{before[name]:.4f}" if name in before else "not measured"
            rows.append(f"| {name} | {start} | {after[name]:.4f} |")
    held_out = "\n".join(rows) if after else "No held-out data was given."
    train = config.train
    adapter_alone = config.lora.enabled and not config.lora.merge
    method = "Direct Preference Optimization, arXiv 2305.18290"
    if config.lora.enabled:
        method += f"; a LoRA adapter, {'to be loaded onto that model' if adapter_alone else 'merged into the weights'}"
    return f"""---
base_model: {base}
library_name: {"peft" if adapter_alone else "transformers"}
tags:
- dpo
- preference-tuning
- dpo_scale
---
# {base}, preference-tuned

Trained from `{base}` with dpo_scale {__version__} ({method}).

## Data
{results["pairs"]} preference pairs seen, from:
{sources}

## Settings
| setting | value |
|---|---|
| loss | {loss} |
| beta | {config.loss.beta} |
| optimizer steps | {results["steps"]} |
| pairs a step | {train.global_batch_size} |
| learning rate | {train.learning_rate}, {train.lr_scheduler_type} |
| precision | {config.model.dtype} |
| maximum length | {config.data.max_length} tokens |
| seed | {train.seed} |

## Results
{held_out}
"""
