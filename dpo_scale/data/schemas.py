"""The shapes that preference rows come in, all turned into one: prompt, chosen, rejected.

Every schema ends in the same `Preference`: either three texts (no chat template: plain text) or three lists
of messages. Whole conversations are split where they first differ, which must be an answer of the assistant:
the part in common is the prompt. A schema is recognised from the first rows, then held for the file: a row of
another shape is a bad row with a reason, not a silent second schema.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from dpo_scale.data.sources import RowProblem, type_name
from dpo_scale.settings.data import SourceSettings

Message = dict[str, Any]

SCHEMAS = {
    "prompt_completion": "texts prompt, chosen, rejected",
    "prompt_messages": "prompt, chosen, rejected with at least one a list of messages",
    "conversation": "chosen and rejected as whole lists of messages, their common part is the prompt",
    "transcript": 'chosen and rejected as whole "\\n\\nHuman: ...\\n\\nAssistant: ..." texts',
    "sharegpt": "conversations (from/value), chosen, rejected",
}
MESSAGE_SCHEMAS = ("prompt_messages", "conversation", "sharegpt")

_ROLES = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "observation": "tool",
}
_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")


@dataclass(frozen=True)
class Preference:
    """One pair before tokenizing: all three texts, or all three lists of messages.

    Attributes:
        prompt_hash: 64 bits of the prompt's content, the same for every schema, tokenizer and chat template.
        multi_turn: a completion has messages that aren't the assistant's; their tokens are scored with the
            others.
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


def columns_of(source: SourceSettings, schema: str) -> Columns:
    """The column names of a source, under `schema`."""
    prompt = "conversations" if schema == "sharegpt" else "prompt"
    return Columns(
        schema,
        source.prompt_column or prompt,
        source.chosen_column or "chosen",
        source.rejected_column or "rejected",
    )


def detect_schema(rows: Iterable[dict[str, Any]], source: SourceSettings) -> str | None:
    """The schema of the first row that has one, None if no row has."""
    for row in rows:
        if schema := _schema_of_row(row, source):
            return schema
    return None


def to_preference(row: dict[str, Any], columns: Columns, *, chat: bool) -> Preference:
    """Read a row by its schema.

    Args:
        row: column values as JSON would give them.
        columns: schema and column names.
        chat: a chat template is in force: texts become user and assistant messages. Without, texts stay
            texts; message schemas are refused before any row gets here.

    Raises:
        RowProblem: with the reason why this row cannot be used.
    """
    assert chat or columns.schema not in MESSAGE_SCHEMAS
    reader = {
        "prompt_completion": _read_prompt_completion,
        "prompt_messages": _read_prompt_messages,
        "conversation": _read_conversation,
        "transcript": _read_transcript,
        "sharegpt": _read_sharegpt,
    }[columns.schema]
    prompt, chosen, rejected, plain = reader(row, columns)
    if columns.schema != "transcript":  # there, the system text would be part of the transcript
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
        assert plain is not None
        return Preference(*plain, None, prompt_hash)
    _check_prompt(prompt)
    multi_turn = any(message["role"] != "assistant" for message in chosen + rejected)
    return Preference(prompt, chosen, rejected, _tools(row), prompt_hash, multi_turn)


# --- one reader a schema: (prompt, chosen, rejected as messages, the same as texts where plain text can be
# trained)

_Read = tuple[list[Message], list[Message], list[Message], tuple[str, str, str] | None]


def _read_prompt_completion(row: dict[str, Any], columns: Columns) -> _Read:
    prompt, chosen, rejected = (_text(row, name) for name in (columns.prompt, columns.chosen, columns.rejected))
    return _user(prompt), _assistant(chosen), _assistant(rejected), (prompt, chosen, rejected)


def _read_prompt_messages(row: dict[str, Any], columns: Columns) -> _Read:
    prompt = _text_or_messages(row, columns.prompt, _user)
    completions = []
    for name in (columns.chosen, columns.rejected):
        messages = _text_or_messages(row, name, _assistant)
        if len(messages) > len(prompt) and messages[: len(prompt)] == prompt:
            messages = messages[len(prompt) :]  # some files repeat the prompt in the completions
        completions.append(messages)
    return prompt, completions[0], completions[1], None


def _read_conversation(row: dict[str, Any], columns: Columns) -> _Read:
    chosen, rejected = _messages(row, columns.chosen), _messages(row, columns.rejected)
    return *_split_conversations(chosen, rejected), None


def _read_transcript(row: dict[str, Any], columns: Columns) -> _Read:
    texts = [_text(row, name) for name in (columns.chosen, columns.rejected)]
    (chosen, chosen_ends), (rejected, rejected_ends) = map(_parse_transcript, texts)
    prompt, chosen_rest, rejected_rest = _split_conversations(chosen, rejected)
    # in plain text the answer's "Assistant:" belongs to the prompt; both texts agree up to there but for
    # spaces
    ends = chosen_ends[len(prompt)], rejected_ends[len(prompt)]
    plain = texts[0][: ends[0]], texts[0][ends[0] :], texts[1][ends[1] :]
    return prompt, chosen_rest, rejected_rest, plain


def _read_sharegpt(row: dict[str, Any], columns: Columns) -> _Read:
    prompt = _messages(row, columns.prompt)
    chosen, rejected = (_text_or_messages(row, name, _assistant) for name in (columns.chosen, columns.rejected))
    return prompt, chosen, rejected, None


# --- parts


def _split_conversations(
    chosen: list[Message], rejected: list[Message]
) -> tuple[list[Message], list[Message], list[Message]]:
    """(common part, rest of chosen, rest of rejected) of two whole conversations."""
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
    return chosen[:shared], chosen[shared:], rejected[shared:]


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


def _text(row: dict[str, Any], name: str) -> str:
    value = _field(row, name)
    if not isinstance(value, str):
        raise RowProblem(f"field {name!r} is {type_name(value)}, expected text")
    return value


def _messages(row: dict[str, Any], name: str) -> list[Message]:
    value = _field(row, name)
    if isinstance(value, dict):
        value = [value]  # ShareGPT's chosen and rejected are single messages
    if not isinstance(value, list):
        raise RowProblem(f"field {name!r} is {type_name(value)}, expected a list of messages")
    return [_message(item, f"{name}[{i}]") for i, item in enumerate(value)]


def _text_or_messages(row: dict[str, Any], name: str, wrap: Any) -> list[Message]:
    return wrap(_text(row, name)) if isinstance(row.get(name), str) else _messages(row, name)


def _field(row: dict[str, Any], name: str) -> Any:
    if row.get(name) is None:
        raise RowProblem(f"field {name!r} is {'null' if name in row else 'missing'}")
    return row[name]


def _user(text: str) -> list[Message]:
    return [{"role": "user", "content": text}]


def _assistant(text: str) -> list[Message]:
    return [{"role": "assistant", "content": text}]


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


def _system(row: dict[str, Any]) -> str:
    value = row.get("system")
    if value is not None and not isinstance(value, str):
        raise RowProblem(f"field 'system' is {type_name(value)}, expected text")
    return value or ""


def _tools(row: dict[str, Any]) -> list[Any] | None:
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
    # "surrogatepass": text that isn't Unicode is refused by the tokenizing step, whichever field it is in
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def _schema_of_row(row: dict[str, Any], source: SourceSettings) -> str | None:
    names = columns_of(source, "prompt_completion")
    prompt, chosen, rejected = row.get(names.prompt), row.get(names.chosen), row.get(names.rejected)
    if chosen is None or rejected is None:
        return None
    turns = row.get(columns_of(source, "sharegpt").prompt)
    if isinstance(turns, list) and turns and isinstance(turns[0], dict) and "from" in turns[0]:
        return "sharegpt"
    if isinstance(row.get("conversations"), list) and prompt is None:
        return "sharegpt"
    if prompt is None:
        if isinstance(chosen, list):
            return "conversation"
        return "transcript" if isinstance(chosen, str) and _TURN.search(chosen) else None
    if isinstance(chosen, list) and isinstance(prompt, str) and not _begins_with_assistant(chosen):
        return "conversation"  # the prompt again as text (UltraFeedback): the conversations have all of it
    if isinstance(prompt, list) or isinstance(chosen, list | dict):
        return "prompt_messages"
    return "prompt_completion" if isinstance(prompt, str) and isinstance(chosen, str) else None


def _begins_with_assistant(messages: list[Any]) -> bool:
    first = messages[0] if messages else None
    return isinstance(first, dict) and _ROLES.get(str(first.get("role", first.get("from")))) == "assistant"
