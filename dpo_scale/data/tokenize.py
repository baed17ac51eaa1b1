"""Pairs of texts or messages to token ids, with the boundary between prompt and completion where it belongs.

Tokens merge across that boundary. To tokenize prompt and completion apart gives sequences that the tokenizer would
never produce; to tokenize only the joined text loses the boundary. So three texts are tokenized: prompt, prompt +
chosen, prompt + rejected. The prompt's ids are the longest common prefix of the three. prompt_ids + chosen_ids are then
exactly the ids of the joined text, and both completions have the same prompt. A token that spans the boundary belongs
to the completion.

Completions end in the chat template's end of turn, or in the EOS, exactly once. What a template writes behind its end
of turn (ChatML's line break) is never generated and is left out.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from dpo_scale.data.schemas import Message, Preference
from dpo_scale.data.sources import RowProblem
from dpo_scale.errors import ConfigError, ModelError
from dpo_scale.settings.data import DataSettings

# Some templates write today's date. The same rows must give the same tokens tomorrow, since tokens are the keys of
# stored reference values. So training has one date, the default of Llama 3.1's template.
TEMPLATE_DATE = datetime(2024, 7, 26)
_DATE_CALL = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")


@dataclass(frozen=True)
class TokenizedPair:
    """A pair as the model sees it, and what was cut to get there."""

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    prompt_cut: bool = False
    completion_cut: bool = False
    generation_prompt_differs: bool = False


@dataclass(frozen=True)
class Dropped:
    """A pair that is left out for its length. `reason` is `overlong` or `identical_after_cut`."""

    reason: str


def pair_key(prompt_ids: np.ndarray, chosen_ids: np.ndarray, rejected_ids: np.ndarray) -> bytes:
    """128-bit hash of what the model sees: the three lists of ids, each behind its length, int32 little-endian."""
    digest = hashlib.blake2b(digest_size=16)
    for ids in (prompt_ids, chosen_ids, rejected_ids):
        digest.update(struct.pack("<i", len(ids)))
        digest.update(np.ascontiguousarray(ids, dtype="<i4").data)
    return digest.digest()


def load_tokenizer(
    path: str | os.PathLike[str],
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    chat_template: str | None = None,
) -> Any:
    """A model's tokenizer, with a pad token (its EOS if it has none).

    Args:
        path: folder or hub id.
        revision: of a hub id.
        trust_remote_code: run the code that the folder or hub id brings along.
        chat_template: as in `data.chat_template`. It becomes the tokenizer's own, so that it is saved with the model.

    Raises:
        ModelError: if it cannot be loaded, or has no EOS token.
        ConfigError: if `chat_template` names no readable file.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=trust_remote_code)
    except Exception as error:  # damaged files raise anything, from KeyError to errors of the Rust library
        where = "folder" if Path(path).is_dir() else "hub (no such folder here, and no answer from the hub)"
        message = " ".join(str(error).split())[:300]
        raise ModelError(f"{path}: no tokenizer could be loaded from this {where}: {message}") from None
    if tokenizer.eos_token_id is None:
        raise ModelError(f"{path}: the tokenizer has no EOS token, which completions end in")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if chat_template not in (None, "none"):
        tokenizer.chat_template = resolve_chat_template(chat_template, tokenizer)
    return tokenizer


def resolve_chat_template(value: str | None, tokenizer: Any) -> str | dict[str, str] | None:
    """The template that `data.chat_template` stands for: text, a tokenizer's named templates, or None for plain text.

    Raises:
        ConfigError: if it names no readable file.
    """
    if value is None:
        return tokenizer.chat_template or None
    if value == "none":
        return None
    if "{{" in value or "{%" in value:
        return value
    try:
        return Path(value).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"data.chat_template = {value!r}: expected 'none', a jinja template or a readable file with one ({error})"
        ) from None


class PairTokenizer:
    """Tokenizes preferences under one tokenizer and one set of settings. Picklable, for worker processes.

    Attributes:
        chat: whether a chat template is in force.
    """

    def __init__(self, tokenizer: Any, settings: DataSettings):
        self.tokenizer = tokenizer
        self.template = resolve_chat_template(settings.chat_template, tokenizer)
        self.template_kwargs = settings.chat_template_kwargs
        self.max_length = settings.max_length
        self.max_prompt_length = settings.prompt_limit
        self.keep_end = settings.truncation_mode == "keep_end"
        self.overlong = settings.overlong
        self.chat = self.template is not None
        self.eos = tokenizer.eos_token_id
        if self.eos is None:
            raise ModelError("the tokenizer has no EOS token, which completions end in")
        # what the tokenizer itself puts around text
        around = tokenizer("a", add_special_tokens=True)["input_ids"]
        self.adds_bos = len(around) > 1 and around[0] == tokenizer.bos_token_id
        self.adds_eos = len(around) > 1 and around[-1] == self.eos
        self.added = {index: str(token.content) for index, token in tokenizer.added_tokens_decoder.items()}
        self.special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special} | {self.eos}
        if self.chat:
            self._check_template()

    @cached_property
    def identity(self) -> str:
        """Hash of everything here that decides a pair's ids."""
        import tokenizers
        import transformers

        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is not None:
            vocabulary = json.loads(backend.to_str())
            vocabulary.update(truncation=None, padding=None)  # left behind by earlier calls, reset by ours
        else:
            vocabulary = [type(self.tokenizer).__qualname__, sorted(self.tokenizer.get_vocab().items())]
        parts = {
            "vocabulary": vocabulary,
            "special": [self.tokenizer.bos_token_id, self.eos, self.adds_bos, self.adds_eos, sorted(self.special)],
            "template": [self.template, self.template_kwargs, str(TEMPLATE_DATE)],
            "lengths": [self.max_length, self.max_prompt_length, self.keep_end, self.overlong],
            "versions": [tokenizers.__version__, transformers.__version__],
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()

    def tokenize(self, preferences: Sequence[Preference]) -> list[TokenizedPair | Dropped | RowProblem]:
        """Tokenize pairs; the i-th result is the i-th pair's, or why it is left out."""
        results: list[Any] = []  # texts at first, all of which the tokenizer then gets at once
        for preference in preferences:
            try:
                results.append(self._render(preference))
            except RowProblem as problem:
                results.append(problem)
        encoded = iter(self._encode([text for item in results if isinstance(item, tuple) for text in item[:3]]))
        for i, item in enumerate(results):
            if isinstance(item, tuple):
                ids = next(encoded), next(encoded), next(encoded)
                try:
                    results[i] = self._pair(preferences[i], ids, generation_prompt_differs=item[3])
                except RowProblem as problem:
                    results[i] = problem
        return results

    def _encode(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        ids = self.tokenizer(
            texts, add_special_tokens=not self.chat, return_attention_mask=False, verbose=False, padding=False
        )["input_ids"]
        if self.adds_eos and not self.chat:
            ids = [one[:-1] if one and one[-1] == self.eos else one for one in ids]
        return ids

    def _render(self, preference: Preference) -> tuple[str, str, str, bool]:
        """Texts of prompt, prompt + chosen, prompt + rejected, and whether the others do not begin with the first."""
        prompt = preference.prompt
        differs = False
        if isinstance(prompt, str):
            texts = prompt, f"{prompt}{preference.chosen}", f"{prompt}{preference.rejected}"
        else:
            tools = preference.tools
            start = self._apply_template(prompt, tools, add_generation_prompt=True)
            texts = (
                start,
                self._apply_template([*prompt, *preference.chosen], tools),
                self._apply_template([*prompt, *preference.rejected], tools),
            )
            if not all(text.startswith(start) for text in texts[1:]):
                # e.g. a generation prompt that opens a thinking block, which answers without one don't have
                differs = True
                bare = self._apply_template(prompt, tools)
                if not all(text.startswith(bare) for text in texts[1:]):
                    raise RowProblem("the chat template renders the prompt differently once an answer follows it")
        try:
            for text in texts:
                text.encode("utf-8")
        except UnicodeEncodeError:
            raise RowProblem("text is not Unicode: it holds half of a surrogate pair") from None
        return *texts, differs

    def _apply_template(
        self, messages: list[Message], tools: list[Any] | None, *, add_generation_prompt: bool = False
    ) -> str:
        try:
            template = self.template if isinstance(self.template, str) else None
            return self.tokenizer.apply_chat_template(
                messages,
                tools=tools,
                chat_template=_with_fixed_date(self.tokenizer.get_chat_template(template, tools)),
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
                **self.template_kwargs,
            )
        except Exception as error:  # a template is foreign code and raises anything
            raise RowProblem(f"the chat template refused it: {' '.join(str(error).split())[:300]}") from error

    def _check_template(self) -> None:
        """Refuse a template that no row can be rendered with, rather than call every row bad."""
        import jinja2

        try:
            self._apply_template([{"role": "user", "content": "a"}], None, add_generation_prompt=True)
        except RowProblem as problem:
            if isinstance(problem.__cause__, jinja2.TemplateSyntaxError):
                line = problem.__cause__.lineno
                message = f"data.chat_template: not a jinja template: line {line}: {problem.__cause__}"
                raise ConfigError(message) from None

    def _pair(
        self,
        preference: Preference,
        ids: tuple[list[int], list[int], list[int]],
        *,
        generation_prompt_differs: bool,
    ) -> TokenizedPair | Dropped:
        prompt = ids[0]
        for full in ids[1:]:
            prompt = prompt[: _common_prefix(prompt, full)]
        if not prompt:
            raise RowProblem(
                "the prompt has no tokens (it is empty, or merges with the completion), expected at least 1"
            )
        chosen = self._close(ids[1][len(prompt) :], preference.chosen)
        rejected = self._close(ids[2][len(prompt) :], preference.rejected)
        if chosen == rejected:
            raise RowProblem("chosen and rejected have the same tokens")

        whole_prompt = len(prompt)
        if self.max_prompt_length is not None:
            prompt = self._cut_prompt(prompt, self.max_prompt_length)
        longer = max(len(chosen), len(rejected))
        room = longer if self.max_length is None else self.max_length - len(prompt)
        completion_cut = longer > room
        if completion_cut:
            if self.overlong == "error":
                tokens = f"{len(prompt)} prompt and {longer} completion tokens"
                raise RowProblem(f"{tokens}, more than data.max_length = {self.max_length}")
            if self.overlong == "drop":
                return Dropped("overlong")
            chosen, rejected = chosen[:room], rejected[:room]
            if chosen == rejected:
                return Dropped("identical_after_cut")
        return TokenizedPair(
            prompt, chosen, rejected, len(prompt) < whole_prompt, completion_cut, generation_prompt_differs
        )

    def _cut_prompt(self, prompt: list[int], limit: int) -> list[int]:
        if len(prompt) <= limit:
            return prompt
        if not self.keep_end:
            return prompt[:limit]
        # models attend to their BOS heavily, and it is not part of what the user wrote
        if self.adds_bos and prompt[0] == self.tokenizer.bos_token_id and limit > 1:
            return [prompt[0], *prompt[-(limit - 1) :]]
        return prompt[-limit:]

    def _close(self, ids: list[int], completion: str | list[Message]) -> list[int]:
        """End a completion in one end of turn or EOS."""
        if not ids:
            raise RowProblem("a completion has no tokens")
        if isinstance(completion, str):
            return ids if ids[-1] == self.eos else [*ids, self.eos]
        end = len(ids)
        while end > 1 and ids[end - 1] not in self.added and not self.tokenizer.decode([ids[end - 1]]).strip():
            end -= 1
        last = ids[end - 1]
        # an added token that the answer itself ends in (</tool_call>) is not the template's end of turn
        written_by_template = last in self.added and not completion[-1]["content"].rstrip().endswith(self.added[last])
        if last in self.special or written_by_template:
            return ids[:end]
        return [*ids, self.eos]


def _common_prefix(a: list[int], b: list[int]) -> int:
    if b[: len(a)] == a:
        return len(a)
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


@lru_cache(maxsize=8)
def _with_fixed_date(template: str) -> str:
    return _DATE_CALL.sub(lambda call: json.dumps(TEMPLATE_DATE.strftime(call.group(2))), template)
