"""Lengths of the pairs of a run: those of its data where that can be read, otherwise assumed ones.

Assumed lengths are log-normal: a median and a 99th percentile, the tail. What is published of data sets is their size
in bytes on their cards, from which only a mean follows; the spread is assumed for all of them alike.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dpo_scale.data.dataset import LoadedData, load_pairs
from dpo_scale.data.tokenize import load_tokenizer
from dpo_scale.errors import ConfigError, UserError
from dpo_scale.models.builtin import resolve_model_path
from dpo_scale.models.load import check_vocabulary
from dpo_scale.settings.tree import Config

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# Assumed where nothing says more: of English text with vocabularies of 100,000 tokens and more, the prompt's share of a
# pair's tokens, the 99th percentile over the median, and sizes of data that is not at hand.
BYTES_PER_TOKEN = 4.2
PROMPT_SHARE = 0.3
TAIL = 4.0
PAIRS = 60_000
HELD_OUT_PAIRS = 2_000
_PERCENTILE_99 = 2.326  # of a normal distribution, in standard deviations


@dataclass(frozen=True)
class Lengths:
    """Tokens of prompt, chosen and rejected of the pairs to train on [N, 3] and held out [M, 3], and their origin."""

    train: np.ndarray
    held_out: np.ndarray
    origin: str


@dataclass(frozen=True)
class PublishedSize:
    """The size of a data set as its card states it.

    Attributes:
        text_bytes: of all its texts; a table of strings has little else.
        prompts: how often a row holds the prompt, beside each completion once.
        source: the card.
    """

    pairs: int
    text_bytes: int
    prompts: int
    source: str

    @property
    def tokens(self) -> float:
        """Mean of a pair, each text once."""
        once = self.text_bytes / self.pairs / (1 + (self.prompts - 1) * PROMPT_SHARE)
        return once / BYTES_PER_TOKEN


PUBLISHED_SIZES = {
    "ultrafeedback": PublishedSize(63_966, 204_606_629, 1, "argilla/ultrafeedback-binarized-preferences"),
    "hh-rlhf": PublishedSize(43_835, 45_013_681, 1, "trl-lib/hh-rlhf-helpful-base"),
    "tulu-3": PublishedSize(334_367, 2_282_537_650, 3, "allenai/llama-3.1-tulu-3-70b-preference-mixture"),
    "nectar": PublishedSize(3_842_034, 8_651_355_540, 1, "kashif/nectar_dpo_pairs"),
    "orca": PublishedSize(12_859, 35_237_249, 1, "Sharathhebbar24/orca_dpo_pairs"),
}


def read_lengths(config: Config, model_config: PreTrainedConfig, log: Callable[[str], None]) -> Lengths:
    """The lengths of the config's own data, tokenized as a run does it, or found tokenized in the cache.

    Raises:
        UserError: if tokenizer or data cannot be read; it names `--lengths`, which needs neither.
    """
    model = config.model
    path, revision = resolve_model_path(model.tokenizer or model.path), None if model.tokenizer else model.revision
    template, code = config.data.chat_template, model.trust_remote_code
    try:
        tokenizer = load_tokenizer(path, revision=revision, trust_remote_code=code, chat_template=template)
        check_vocabulary(tokenizer, model_config)
        data = load_pairs(config.data, tokenizer, seed=config.train.seed, log=log)
    except UserError as error:
        raise type(error)(f"{error}; to plan without reading data, give --lengths") from None
    names = ", ".join(source.path for source in config.data.train)
    return lengths_of(data, f"the lengths of {names}, {len(data.train):,} pairs")


def lengths_of(data: LoadedData, origin: str) -> Lengths:
    """The lengths of data that is read."""
    held_out = data.eval.lengths if data.eval is not None else np.zeros((0, 3), dtype=np.int32)
    return Lengths(data.train.lengths, held_out, origin)


def assumed_lengths(config: Config, text: str, pairs: int | None = None) -> Lengths:
    """Lengths without data.

    Args:
        text: `MEDIAN[:TAIL]`, the median and the 99th percentile of a pair's tokens (prompt and both completions), or
            a name in `PUBLISHED_SIZES`.
        pairs: to train on; None: as published, or `PAIRS`.

    Raises:
        ConfigError: if the text is neither.
    """
    published = PUBLISHED_SIZES.get(text.strip().lower())
    if published is not None:
        median = published.tokens / math.exp(_spread(TAIL) ** 2 / 2)
        tail, pairs = TAIL * median, pairs or published.pairs
        about = f"{published.tokens:.0f} tokens a pair, from the size of {published.source} on its card"
    else:
        median, tail = _parse(text)
        pairs = pairs or PAIRS
        about = f"a median of {median:.0f} tokens a pair, 99% below {tail:.0f}"
    held_out = round(pairs * config.data.eval_fraction) or (HELD_OUT_PAIRS if config.data.eval else 0)
    drawn = _draw(pairs + held_out, median, tail / median, config)
    origin = f"assumed: {pairs:,} pairs, {about}, {PROMPT_SHARE:.0%} of it prompt, log-normal"
    return Lengths(drawn[:pairs], drawn[pairs:], origin)


def _parse(text: str) -> tuple[float, float]:
    names = ", ".join(PUBLISHED_SIZES)
    expected = f"expected MEDIAN or MEDIAN:TAIL in tokens a pair, such as 800:4000, or one of {names}"
    found = re.fullmatch(r"(\d{1,9})(?::(\d{1,9}))?", text.strip())
    if found is None or int(found[1]) < 3:
        raise ConfigError(f"--lengths {text!r}: {expected}")
    median = float(found[1])
    tail = float(found[2]) if found[2] else TAIL * median
    if tail < median:
        raise ConfigError(f"--lengths {text!r}: the tail is below the median; {expected}")
    return median, tail


def _spread(tail: float) -> float:
    """Standard deviation of the logarithm, for a 99th percentile that is `tail` medians."""
    return math.log(tail) / _PERCENTILE_99


def _draw(count: int, median: float, tail: float, config: Config) -> np.ndarray:
    """Lengths [count, 3] from the seed, cut as `data.max_length` and `data.max_prompt_length` say."""
    rng, data = np.random.default_rng(config.train.seed), config.data
    tokens = median * np.exp(_spread(tail) * rng.standard_normal(count))
    chosen = rng.uniform(0.35, 0.65, count)  # share of the completions' tokens
    shares = np.column_stack([np.full(count, PROMPT_SHARE), *((1 - PROMPT_SHARE) * of for of in (chosen, 1 - chosen))])
    lengths = np.maximum(1, np.rint(tokens[:, None] * shares)).astype(np.int32)
    if data.prompt_limit is not None:
        lengths[:, 0] = np.minimum(lengths[:, 0], data.prompt_limit)
    if data.max_length is not None:
        lengths[:, 1:] = np.minimum(lengths[:, 1:], data.max_length - lengths[:, :1])
    return lengths
