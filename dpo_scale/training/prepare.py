"""What every entry point does before it loads a model: the ranks meet, tokenizer, layout and pairs are read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dpo_scale.data.dataset import LoadedData, load_pairs
from dpo_scale.distributed import engine, ranks
from dpo_scale.models.layout_choice import LayoutChoice
from dpo_scale.models.load import check_liger, check_logprobs, check_vocabulary, load_tokenizers, resolve_layout
from dpo_scale.settings.data import DataSettings
from dpo_scale.settings.tree import Config

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase


def start(config: Config) -> None:
    """Let the ranks meet, and refuse what this machine cannot do. Every entry point calls it first.

    Raises:
        ConfigError: naming the setting and what the device or the installed packages lack for it.
    """
    ranks.init_distributed(config.deepspeed.timeout_minutes)
    ranks.quiet_libraries()
    engine.check_dtype(config.model.dtype)
    check_logprobs(config)
    check_liger(config)


@dataclass(frozen=True)
class Prepared:
    """What a config names, read and checked, but for the weights.

    Attributes:
        model_config: the policy's.
        layout: of the batches of all models; their check may still change it.
    """

    tokenizer: PreTrainedTokenizerBase
    model_config: PretrainedConfig
    layout: LayoutChoice
    data: LoadedData

    @property
    def pad_token_id(self) -> int:
        assert isinstance(self.tokenizer.pad_token_id, int)
        return self.tokenizer.pad_token_id


def prepare(config: Config, data: DataSettings | None = None, report_dir: Path | None = None) -> Prepared:
    """Load tokenizer and pairs, and resolve `data.layout` in the config. Every rank calls it, after `start`.

    Args:
        data: which pairs; those of the config if not given.
        report_dir: gets a list of the rows that were skipped, if any.

    Raises:
        UserError: for what is wrong with a model folder, the layout or the data.
    """
    tokenizer, model_config = load_tokenizers(config)
    check_vocabulary(tokenizer, model_config)
    layout = resolve_layout(config)
    settings, seed = config.data if data is None else data, config.train.seed
    pairs = ranks.main_first(lambda: load_pairs(settings, tokenizer, seed=seed, log=ranks.log, report_dir=report_dir))
    return Prepared(tokenizer, model_config, layout, pairs)
