"""The `data:` section of a config: which preference files, how they are read, rendered and cut.

Apart from everything that reads data, and free of heavy imports, so that `--help` and a refused config are
quick. Names are those of TRL and `datasets` where the thing is the same.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from dpo_scale.errors import ConfigError
from dpo_scale.settings.fields import setting

Schema = Literal["auto", "prompt_completion", "prompt_messages", "conversation", "transcript", "sharegpt"]


@dataclass
class SourceSettings:
    """One source of preference pairs. In YAML a plain string stands for `path` alone.

    `schema` and the columns default to those of the whole `data:` section.
    """

    path: str = setting("", "file, glob, folder, hub name, or `builtin:NAME`")
    name: str | None = setting(None, 'a hub data set\'s subset ("config")')
    split: str = setting("train", "the split of a hub data set or of a saved `DatasetDict`")
    schema: Schema = setting("auto", "what a row looks like; auto: as data.schema says")
    weight: float = setting(1.0, "how often a pair appears in an epoch; 0.5: a seeded half", above=0, at_most=1000)
    prompt_column: str | None = setting(None, "the file's name for `prompt`; null: data.prompt_column")
    chosen_column: str | None = setting(None, "the file's name for `chosen`; null: data.chosen_column")
    rejected_column: str | None = setting(None, "the file's name for `rejected`; null: data.rejected_column")

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


@dataclass
class DataSettings:
    """What to learn from. Lengths are in tokens.

    A prompt longer than `max_prompt_length` loses its start (`truncation_mode: keep_end`; a BOS that the
    tokenizer puts first stays) or its end (`keep_start`). A pair whose prompt and longer completion together
    still exceed `max_length` is treated as `overlong` says: `truncate` cuts completions at their end, which
    loses the end of turn.
    """

    train: list[SourceSettings] = setting([], "sources of training pairs")
    eval: list[SourceSettings] = setting([], "sources of held-out pairs")
    eval_fraction: float = setting(0.0, "share of train held out, by a hash of the prompt", at_least=0, below=1)
    schema: Schema = setting("auto", "what a row looks like; auto: detected and reported")
    prompt_column: str | None = setting(None, "the file's name for `prompt`, or ShareGPT's `conversations`")
    chosen_column: str | None = setting(None, "the file's name for `chosen`")
    rejected_column: str | None = setting(None, "the file's name for `rejected`")
    chat_template: str | None = setting(None, "a jinja file or its text; none: plain text; null: the tokenizer's")
    chat_template_kwargs: dict[str, Any] = setting({}, "arguments of the template, e.g. {enable_thinking: false}")
    max_length: int | None = setting(
        1024, "limit of the prompt and the longer completion together; null: no limit", unit="tokens", at_least=2
    )
    max_prompt_length: int | None = setting(None, "prompt limit; null: half of max_length", unit="tokens", at_least=1)
    truncation_mode: Literal["keep_end", "keep_start"] = setting("keep_end", "what is kept of an overlong prompt")
    overlong: Literal["truncate", "drop", "error"] = setting("truncate", "what to do about a pair still too long")
    on_bad_row: Literal["error", "skip"] = setting("error", "skip: leave bad rows out and list them in bad_rows.jsonl")
    num_proc: int | None = setting(None, "how many tokenize; null: by the data's size", unit="processes", at_least=1)
    cache_dir: str | None = setting(None, "folder of tokenized data; null: $DPO_SCALE_CACHE, else ~/.cache/dpo_scale")
    layout: Literal["auto", "padded", "packed", "shared_prefix"] = setting("auto", "how pairs are laid out in rows")

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
