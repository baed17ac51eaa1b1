"""What every entry point does before it loads a model: the ranks meet, tokenizer, layout and pairs are read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dpo_scale.data.cache import tokenized_folder
from dpo_scale.data.dataset import LoadedData, load_pairs
from dpo_scale.distributed import engine, ranks
from dpo_scale.distributed.folders import sees_folder_of_main
from dpo_scale.distributed.join import join
from dpo_scale.models.layout_choice import LayoutChoice
from dpo_scale.models.load import check_liger, check_logprobs, check_vocabulary, load_tokenizers, resolve_layout
from dpo_scale.models.router import resolve_router_loss
from dpo_scale.settings.data import DataSettings
from dpo_scale.settings.tree import Config

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

# A cache that is taken for each machine's own, though it is shared, is filled several times; nothing else is lost.
CACHE_LAG_SECONDS = 3.0


def start(config: Config) -> None:
    """Let the ranks meet, and refuse what this machine cannot do. Every entry point calls it first.

    Raises:
        ConfigError: naming the setting and what the device or the installed packages lack for it.
    """
    join(config.deepspeed.timeout_minutes, config.deepspeed.start_timeout_minutes)
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
    """Load tokenizer and pairs, resolve `data.layout` and `loss.router_aux_loss_coef` in the config.

    Every rank calls it, after `start`.

    Args:
        data: which pairs; those of the config if not given.
        report_dir: gets a list of the rows that were skipped, if any.

    Raises:
        UserError: for what is wrong with a model folder, the layout or the data.
    """
    tokenizer, model_config = load_tokenizers(config)
    check_vocabulary(tokenizer, model_config)
    resolve_router_loss(config, model_config)
    layout = resolve_layout(config)
    settings, seed = config.data if data is None else data, config.train.seed
    reported = report_dir if ranks.is_main() else None
    pairs = ranks.first_then_others(
        lambda: load_pairs(settings, tokenizer, seed=seed, log=ranks.log, report_dir=reported),
        is_first=tokenizes_first(tokenized_folder(settings)),
    )
    return Prepared(tokenizer, model_config, layout, pairs)


def tokenizes_first(cache: Path) -> bool:
    """Whether this rank tokenizes first: rank 0 into a cache that all share, else the first rank of each machine."""
    try:
        is_shared = all(sees_folder_of_main(cache, CACHE_LAG_SECONDS))
    except OSError:
        is_shared = False  # the tokenizing says what is wrong with it
    return ranks.is_main() if is_shared else ranks.local_rank() == 0
