"""The `data:` section of a config: which preference files, how they are read, rendered and cut.

Apart from everything that reads data, and free of heavy imports, so that `--help` and a refused config are
quick. Names are those of TRL and `datasets` where the thing is the same.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from dpo_scale.errors import ConfigError

Schema = Literal["auto", "prompt_completion", "prompt_messages", "conversation", "transcript", "sharegpt"]


@dataclass
class SourceSettings:
    """One source of preference pairs. In YAML a plain string stands for `path` alone.

    `schema` and the columns default to those of the whole `data:` section.
    """

    path: str = ""  # file, glob, folder, hub name, or `builtin:NAME`
    name: str | None = None  # a hub data set's subset ("config")
    split: str = "train"  # the split of a hub data set or of a saved `DatasetDict`
    schema: Schema = "auto"  # what a row looks like; auto: as data.schema says
    weight: float = 1.0  # times that each pair appears in an epoch; 0.5 is a seeded half of the pairs
    prompt_column: str | None = None  # the file's name for `prompt`; null: data.prompt_column
    chosen_column: str | None = None  # the file's name for `chosen`; null: data.chosen_column
    rejected_column: str | None = None  # the file's name for `rejected`; null: data.rejected_column

    @classmethod
    def parse(cls, value: Any) -> SourceSettings:
        """The source that a YAML value short of a mapping stands for."""
        if isinstance(value, cls):
            return value
        if isinstance(value, str):
            return cls(path=value)
        raise ConfigError(
            f"data source {value!r}: expected a file, folder, hub or builtin: name, or a mapping with path"
        )

    def validate(self, key: str) -> None:
        """Refuse what cannot be a source; `key` names it, e.g. `data.train[0]`."""
        if not self.path.strip():
            raise ConfigError(f"{key}.path = {self.path!r}: expected a file, glob, folder, hub or builtin: name")
        if not 0 < self.weight <= 1000:
            raise ConfigError(f"{key}.weight = {self.weight!r}: expected more than 0, at most 1000")


@dataclass
class DataSettings:
    """What to learn from. Lengths are in tokens.

    A prompt longer than `max_prompt_length` loses its start (`truncation_mode: keep_end`; a BOS that the
    tokenizer puts first stays) or its end (`keep_start`). A pair whose prompt and longer completion together
    still exceed `max_length` is treated as `overlong` says: `truncate` cuts completions at their end, which
    loses the end of turn.
    """

    train: list[SourceSettings] = field(default_factory=list)  # sources of training pairs
    eval: list[SourceSettings] = field(default_factory=list)  # sources of held-out pairs
    eval_fraction: float = 0.0  # share held out of train by a hash of the prompt: a growing file moves no pair across
    schema: Schema = "auto"  # what a row looks like; auto: detected and reported
    prompt_column: str | None = None  # the file's name for `prompt` (or for `conversations`, in ShareGPT files)
    chosen_column: str | None = None  # the file's name for `chosen`
    rejected_column: str | None = None  # the file's name for `rejected`
    chat_template: str | None = None  # a jinja file or its text; none: plain text; null: the tokenizer's
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)  # of the template: {enable_thinking: false}
    max_length: int | None = 1024  # tokens of the prompt and the longer completion; null: no limit
    max_prompt_length: int | None = None  # tokens of the prompt; null: half of max_length
    truncation_mode: Literal["keep_end", "keep_start"] = "keep_end"  # what is kept of a prompt that is too long
    overlong: Literal["truncate", "drop", "error"] = "truncate"  # what becomes of a pair that is still too long
    on_bad_row: Literal["error", "skip"] = "error"  # skip: leave bad rows out and list them in bad_rows.jsonl
    num_proc: int | None = None  # tokenizing processes; null: one for small data, else one a core
    cache_dir: str | None = None  # folder of tokenized data; null: $DPO_SCALE_CACHE, else ~/.cache/dpo_scale
    layout: Literal["auto", "padded", "packed", "shared_prefix"] = "auto"  # how pairs become rows of a forward pass

    def for_source(self, source: SourceSettings) -> SourceSettings:
        """The source with the section's schema and columns where it names none itself."""
        return replace(
            source,
            schema=self.schema if source.schema == "auto" else source.schema,
            prompt_column=source.prompt_column or self.prompt_column,
            chosen_column=source.chosen_column or self.chosen_column,
            rejected_column=source.rejected_column or self.rejected_column,
        )

    @property
    def prompt_limit(self) -> int | None:
        """Most tokens of a prompt: `max_prompt_length`, or half of `max_length`; None without any limit."""
        if self.max_prompt_length is not None or self.max_length is None:
            return self.max_prompt_length
        return self.max_length // 2

    def validate(self) -> None:
        """Refuse impossible values.

        Raises:
            ConfigError: naming the key, its value and what is allowed.
        """
        for split in ("train", "eval"):
            for i, source in enumerate(getattr(self, split)):
                source.validate(f"data.{split}[{i}]")
        _check(0 <= self.eval_fraction < 1, "eval_fraction", self.eval_fraction, "from 0 to below 1")
        _check(
            not (self.eval and self.eval_fraction > 0),
            "eval_fraction",
            self.eval_fraction,
            "0 where data.eval names the held-out data",
        )
        for key in ("max_length", "max_prompt_length", "num_proc"):
            value = getattr(self, key)
            _check(value is None or value >= 1, key, value, "null, or at least 1")
        if self.max_length is not None:
            _check(self.max_length >= 2, "max_length", self.max_length, "a prompt and a completion token, 2")
            _check(
                self.max_prompt_length is None or self.max_prompt_length < self.max_length,
                "max_prompt_length",
                self.max_prompt_length,
                f"less than data.max_length = {self.max_length}, so that completions have room",
            )


def _check(condition: bool, key: str, value: object, expected: str) -> None:
    if not condition:
        raise ConfigError(f"data.{key} = {value!r}: expected {expected}")
