"""The shapes that preference rows come in, all turned into one: prompt, chosen, rejected.

A schema is one record: a row of `SCHEMAS`, at the end of this file (docs/extending.md). Each ends in the same
`Preference`: three texts, or three lists of messages where a chat template is in force. Whole conversations are
split where they first differ, which must be at an answer of the assistant; what they share is the prompt. The first
rows decide the schema of a file. A row of another shape is then a bad row with a reason, not a second schema.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple, get_args

from dpo_scale.data.sources import RowProblem, type_name
from dpo_scale.settings.data import Schema, SourceSettings

Row = dict[str, Any]  # column values as JSON would give them
Message = dict[str, Any]

_ROLES = {name: name for name in ("system", "developer", "user", "assistant", "tool")} | {
    "human": "user",  # and the names of ShareGPT
    "gpt": "assistant",
    "function_call": "assistant",
    "observation": "tool",
}
_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")


@dataclass(frozen=True)
class Preference:
    """One pair before tokenizing: all three texts, or all three lists of messages.

    Attributes:
        prompt_hash: 64 bits of the prompt's content, the same for every schema, tokenizer and chat template.
        multi_turn: a completion has messages that aren't the assistant's; their tokens are scored too.
    """

    prompt: str | list[Message]
    chosen: str | list[Message]
    rejected: str | list[Message]
    tools: list[Any] | None
    prompt_hash: int
    multi_turn: bool = False


@dataclass(frozen=True)
class Columns:
    """What a file calls its columns, and which schema its rows have."""

    schema: str
    prompt: str
    chosen: str
    rejected: str

    @property
    def required(self) -> list[str]:
        """Names of the columns without which a file does not have the schema."""
        names = {"prompt": self.prompt, "chosen": self.chosen, "rejected": self.rejected}
        return [names.get(column, column) for column in SCHEMAS[self.schema].columns]


class Parts(NamedTuple):
    """What a row holds: messages, and the same as three texts if rows like it can be trained on without a template."""

    prompt: list[Message]
    chosen: list[Message]
    rejected: list[Message]
    texts: tuple[str, str, str] | None = None


@dataclass(frozen=True)
class RowSchema:
    """One shape of rows.

    Attributes:
        meaning: what a row holds, for messages.
        read: the row's parts. Raises `RowProblem` with the reason why the row cannot be used.
        matches: whether a row that has the columns has this schema. The first schema that matches a row is taken.
        columns: what a row must have: prompt, chosen, rejected, which `data.*_column` may rename, or others.
        prompt_column: what `prompt` is called where `data.prompt_column` does not say.
        of_messages: rows hold messages, so a chat template must be in force.
        optional: which of `system` and `tools` a row may have besides.
    """

    meaning: str
    read: Callable[[Row, Columns], Parts]
    matches: Callable[[Row, Columns], bool] = lambda row, columns: True
    columns: tuple[str, ...] = ("prompt", "chosen", "rejected")
    prompt_column: str = "prompt"
    of_messages: bool = False
    optional: tuple[str, ...] = ("system", "tools")


def columns_of(source: SourceSettings, schema: str) -> Columns:
    """The column names of a source, under `schema`."""
    return Columns(
        schema,
        source.prompt_column or SCHEMAS[schema].prompt_column,
        source.chosen_column or "chosen",
        source.rejected_column or "rejected",
    )


def detect_schema(rows: Iterable[Row], source: SourceSettings) -> str | None:
    """The schema of the first row that has one, None if no row has."""
    candidates = [columns_of(source, name) for name in SCHEMAS]
    for row in rows:
        for columns in candidates:
            has_columns = all(row.get(name) is not None for name in columns.required)
            if has_columns and SCHEMAS[columns.schema].matches(row, columns):
                return columns.schema
    return None


def to_preference(row: Row, columns: Columns, *, chat: bool) -> Preference:
    """Read a row by its schema.

    Args:
        row: column values as JSON would give them.
        columns: schema and column names.
        chat: a chat template is in force, and texts become messages of user and assistant. Otherwise texts stay
            texts; schemas of messages are refused before any row gets here.

    Raises:
        RowProblem: with the reason why this row cannot be used.
    """
    schema = SCHEMAS[columns.schema]
    assert chat or not schema.of_messages
    prompt, chosen, rejected, texts = schema.read(row, columns)
    if "system" in schema.optional:
        system = _system(row)
        if system and not chat:
            raise RowProblem("has a system message, which plain text has no place for; give data.chat_template")
        if system and not (prompt and prompt[0]["role"] == "system"):
            prompt = [{"role": "system", "content": system}, *prompt]
    for name, messages in (("chosen", chosen), ("rejected", rejected)):
        _check_completion(name, messages)
    if chosen == rejected:
        raise RowProblem("chosen is equal to rejected")
    prompt_hash = _hash_prompt(prompt)
    if not chat:
        assert texts is not None
        return Preference(*texts, None, prompt_hash)
    _check_prompt(prompt)
    multi_turn = any(message["role"] != "assistant" for message in chosen + rejected)
    return Preference(prompt, chosen, rejected, _tools(row), prompt_hash, multi_turn)


# --- one reader a schema


def _read_prompt_completion(row: Row, columns: Columns) -> Parts:
    return of_texts(*(text_field(row, name) for name in (columns.prompt, columns.chosen, columns.rejected)))


def _read_prompt_messages(row: Row, columns: Columns) -> Parts:
    return _behind_prompt(_text_or_messages(row, columns.prompt, "user"), row, columns)


def _read_sharegpt(row: Row, columns: Columns) -> Parts:
    return _behind_prompt(messages_field(row, columns.prompt), row, columns)


def _behind_prompt(prompt: list[Message], row: Row, columns: Columns) -> Parts:
    completions: list[list[Message]] = []
    for name in (columns.chosen, columns.rejected):
        messages = _text_or_messages(row, name, "assistant")
        if len(messages) > len(prompt) and messages[: len(prompt)] == prompt:
            messages = messages[len(prompt) :]  # some files repeat the prompt in the completions
        completions.append(messages)
    chosen, rejected = completions
    return Parts(prompt, chosen, rejected)


def _read_conversation(row: Row, columns: Columns) -> Parts:
    return _split_conversations(messages_field(row, columns.chosen), messages_field(row, columns.rejected))


def _read_transcript(row: Row, columns: Columns) -> Parts:
    texts = [text_field(row, name) for name in (columns.chosen, columns.rejected)]
    (chosen, chosen_ends), (rejected, rejected_ends) = map(_parse_transcript, texts)
    parts = _split_conversations(chosen, rejected)
    # in plain text the answer's "Assistant:" belongs to the prompt; up to there the texts differ in spaces only
    end, rejected_end = chosen_ends[len(parts.prompt)], rejected_ends[len(parts.prompt)]
    return parts._replace(texts=(texts[0][:end], texts[0][end:], texts[1][rejected_end:]))


# --- parts of rows


def of_texts(prompt: str, chosen: str, rejected: str) -> Parts:
    """One question and two answers."""
    texts = prompt, chosen, rejected
    return Parts(_said("user", prompt), _said("assistant", chosen), _said("assistant", rejected), texts)


def _split_conversations(chosen: list[Message], rejected: list[Message]) -> Parts:
    """What two whole conversations share, and the rest of each."""
    if chosen == rejected:
        raise RowProblem("chosen is equal to rejected")
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    for name, messages in (("chosen", chosen), ("rejected", rejected)):
        if shared == len(messages):
            raise RowProblem(f"{name} ends where the other goes on; expected two different answers to one prompt")
        if messages[shared]["role"] != "assistant":
            raise RowProblem(
                f"the conversations first differ in message {shared + 1}, which is the "
                f"{messages[shared]['role']}'s in {name}; expected the same up to an answer of the assistant"
            )
    return Parts(chosen[:shared], chosen[shared:], rejected[shared:])


def _parse_transcript(text: str) -> tuple[list[Message], list[int]]:
    """The messages of a transcript, and where in it each one's text begins (behind the colon)."""
    turns = list(_TURN.finditer(text))
    if not turns or text[: turns[0].start()].strip():
        raise RowProblem('a transcript does not begin with "Human:" or "Assistant:"')
    messages, starts = [], []
    for turn, following in zip(turns, [*turns[1:], None], strict=True):
        end = following.start() if following else len(text)
        role = "user" if turn.group(1) == "Human" else "assistant"
        messages.append({"role": role, "content": text[turn.end() : end].strip()})
        starts.append(turn.end())
    return messages, starts


def text_field(row: Row, name: str) -> str:
    """A column's text; `RowProblem` if it holds none."""
    value = _field(row, name)
    if not isinstance(value, str):
        raise RowProblem(f"field {name!r} is {type_name(value)}, expected text")
    return value


def messages_field(row: Row, name: str) -> list[Message]:
    """A column's messages; `RowProblem` if it holds none."""
    value = _field(row, name)
    if isinstance(value, dict):
        value = [value]  # ShareGPT's chosen and rejected are single messages
    if not isinstance(value, list):
        raise RowProblem(f"field {name!r} is {type_name(value)}, expected a list of messages")
    return [_message(item, f"{name}[{i}]") for i, item in enumerate(value)]


def _text_or_messages(row: Row, name: str, role: str) -> list[Message]:
    return _said(role, row[name]) if isinstance(row.get(name), str) else messages_field(row, name)


def _field(row: Row, name: str) -> Any:
    if row.get(name) is None:
        raise RowProblem(f"field {name!r} is {'null' if name in row else 'missing'}")
    return row[name]


def _said(role: str, text: str) -> list[Message]:
    return [{"role": role, "content": text}]


def _message(value: Any, where: str) -> Message:
    """One message with the keys that chat templates read, without the nulls that Arrow fills in."""
    if not isinstance(value, dict):
        raise RowProblem(f"{where} is {type_name(value)}, expected a message with role and content")
    sharegpt = "from" in value and "role" not in value
    role_key, content_key = ("from", "value") if sharegpt else ("role", "content")
    name = value.get(role_key)
    role = _ROLES.get(name) if isinstance(name, str) else None
    if role is None:
        raise RowProblem(f"{where}.{role_key} is {name!r}, expected one of {', '.join(_ROLES)}")
    content = _content(value.get(content_key), f"{where}.{content_key}", optional=bool(value.get("tool_calls")))
    if name == "function_call":
        return {"role": role, "content": "", "tool_calls": _function_calls(content, f"{where}.{content_key}")}
    others = {key: item for key, item in value.items() if item is not None and key not in (role_key, content_key)}
    return {"role": role, "content": content, **({} if sharegpt else others)}


def _content(value: Any, where: str, *, optional: bool) -> str:
    if value is None and optional:
        return ""
    if isinstance(value, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in value):
        value = "".join(str(part.get("text") or "") for part in value)
    if not isinstance(value, str):
        raise RowProblem(f"{where} is {type_name(value)}, expected text")
    return value


def _function_calls(text: str, where: str) -> list[dict[str, Any]]:
    """ShareGPT writes a call as JSON text, {"name": ..., "arguments": {...}} or a list of them."""
    try:
        calls = json.loads(text)
    except (ValueError, RecursionError):
        calls = None
    calls = calls if isinstance(calls, list) else [calls]
    if not calls or not all(isinstance(call, dict) and "name" in call for call in calls):
        raise RowProblem(f"{where} of a function_call is not JSON with name and arguments")
    return [
        {"type": "function", "function": {"name": call["name"], "arguments": call.get("arguments", {})}}
        for call in calls
    ]


def _system(row: Row) -> str:
    value = row.get("system")
    if value is not None and not isinstance(value, str):
        raise RowProblem(f"field 'system' is {type_name(value)}, expected text")
    return value or ""


def _tools(row: Row) -> list[Any] | None:
    value = row.get("tools")
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise RowProblem("field 'tools' is not JSON") from None
    if not value:
        return None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise RowProblem("field 'tools' is not a list of JSON schemas")
    return value


def _check_prompt(prompt: list[Message]) -> None:
    if not prompt:
        raise RowProblem("the prompt is empty")
    last = prompt[-1]
    if last["role"] == "assistant":
        raise RowProblem("the prompt ends in an assistant message; expected the user's or a tool's")
    if not last["content"].strip():
        raise RowProblem("the prompt is empty")


def _check_completion(name: str, messages: list[Message]) -> None:
    for end, message in (("begin", messages[:1]), ("end", messages[-1:])):
        if not message or message[0]["role"] != "assistant":
            found = f"the {message[0]['role']}'s" if message else "no"
            raise RowProblem(f"{name} {end}s with {found} message; expected one of the assistant")
    if not messages[-1]["content"].strip() and not messages[-1].get("tool_calls"):
        raise RowProblem(f"{name} is empty")


def _hash_prompt(prompt: list[Message]) -> int:
    text = json.dumps(prompt, ensure_ascii=False, sort_keys=True, default=str)
    # "surrogatepass": text that isn't Unicode is refused when it is tokenized, whichever field it is in
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little")


# --- how each schema is recognised, in rows that have its columns


def _is_sharegpt(row: Row, columns: Columns) -> bool:
    turns = row[columns.prompt]
    if not isinstance(turns, list):
        return False
    if turns and isinstance(turns[0], dict) and "from" in turns[0]:
        return True
    return columns.prompt == "conversations" and row.get("prompt") is None


def _is_conversation(row: Row, columns: Columns) -> bool:
    prompt, chosen = row.get(columns.prompt), row[columns.chosen]
    if not isinstance(chosen, list):
        return False
    # UltraFeedback has the prompt again as text; the conversations have all of it
    return prompt is None or (isinstance(prompt, str) and not _begins_with_assistant(chosen))


def _begins_with_assistant(messages: list[Any]) -> bool:
    first = messages[0] if messages else None
    return isinstance(first, dict) and _ROLES.get(str(first.get("role", first.get("from")))) == "assistant"


def _is_transcript(row: Row, columns: Columns) -> bool:
    chosen = row[columns.chosen]
    return row.get(columns.prompt) is None and isinstance(chosen, str) and _TURN.search(chosen) is not None


def _is_prompt_messages(row: Row, columns: Columns) -> bool:
    return isinstance(row[columns.prompt], list) or isinstance(row[columns.chosen], list | dict)


def _is_prompt_completion(row: Row, columns: Columns) -> bool:
    return isinstance(row[columns.prompt], str) and isinstance(row[columns.chosen], str)


SCHEMAS = {
    "sharegpt": RowSchema(
        "conversations (from/value), chosen, rejected",
        _read_sharegpt, _is_sharegpt, prompt_column="conversations", of_messages=True,
    ),
    "conversation": RowSchema(
        "chosen and rejected as whole lists of messages, their common part is the prompt",
        _read_conversation, _is_conversation, columns=("chosen", "rejected"), of_messages=True,
    ),
    "prompt_messages": RowSchema(
        "prompt, chosen, rejected with at least one a list of messages",
        _read_prompt_messages, _is_prompt_messages, of_messages=True,
    ),
    "transcript": RowSchema(  # a system text is part of the transcript
        'chosen and rejected as whole "\\n\\nHuman: ...\\n\\nAssistant: ..." texts',
        _read_transcript, _is_transcript, columns=("chosen", "rejected"), optional=("tools",),
    ),
    "prompt_completion": RowSchema("texts prompt, chosen, rejected", _read_prompt_completion, _is_prompt_completion),
}  # fmt: skip
assert {"auto", *SCHEMAS} == set(get_args(Schema)), "settings.data.Schema lists other names"
