"""Each schema's rows as prompt, chosen and rejected; each kind of bad row refused with its reason."""

import pytest

from dpo_scale.data.schemas import columns_of, detect_schema, to_preference
from dpo_scale.data.sources import RowProblem
from dpo_scale.settings.data import SourceSettings

SOURCE = SourceSettings("rows.jsonl")


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def read(row, schema=None, *, chat=True, source=SOURCE):
    schema = schema or detect_schema([row], source)
    return to_preference(row, columns_of(source, schema), chat=chat)


def triple(preference):
    return preference.prompt, preference.chosen, preference.rejected


TEXTS = {"prompt": "Hi?", "chosen": "Yes.", "rejected": "No."}
MESSAGES = ([user("Hi?")], [assistant("Yes.")], [assistant("No.")])
HH = {"chosen": "\n\nHuman: Hi?\n\nAssistant: Yes.", "rejected": "\n\nHuman: Hi?\n\nAssistant: No."}
ROWS = {
    "prompt_completion": TEXTS,
    "prompt_messages": dict(zip(("prompt", "chosen", "rejected"), MESSAGES, strict=True)),
    "conversation": {"chosen": MESSAGES[0] + MESSAGES[1], "rejected": MESSAGES[0] + MESSAGES[2]},
    "transcript": HH,
    "sharegpt": {
        "conversations": [{"from": "human", "value": "Hi?"}],
        "chosen": {"from": "gpt", "value": "Yes."},
        "rejected": {"from": "gpt", "value": "No."},
    },
}


@pytest.mark.parametrize("schema", ROWS)
def test_each_schema_is_recognised_and_gives_the_same_messages_and_prompt_hash(schema):
    assert detect_schema([ROWS[schema]], SOURCE) == schema
    preference = read(ROWS[schema])
    assert triple(preference) == MESSAGES
    assert preference.prompt_hash == read(TEXTS).prompt_hash != read({**TEXTS, "prompt": "Ho?"}).prompt_hash


def test_without_a_chat_template_texts_stay_as_they_are():
    assert triple(read(TEXTS, chat=False)) == ("Hi?", "Yes.", "No.")
    assert triple(read(HH, chat=False)) == ("\n\nHuman: Hi?\n\nAssistant:", " Yes.", " No.")


@pytest.mark.parametrize(
    ("row", "schema", "expected"),
    [
        pytest.param(  # UltraFeedback: the prompt once as text, and again in both conversations
            {"prompt": "Hi?", **ROWS["conversation"]}, "conversation", MESSAGES, id="prompt repeated as text"
        ),
        pytest.param(
            {"prompt": MESSAGES[0], **ROWS["conversation"]},
            "prompt_messages",
            MESSAGES,
            id="prompt repeated as list",
        ),
        pytest.param(
            {"prompt": "Hi?", "chosen": MESSAGES[1], "rejected": MESSAGES[2]},
            "prompt_messages",
            MESSAGES,
            id="mixed",
        ),
        pytest.param(
            {"prompt": MESSAGES[0], "chosen": "Yes.", "rejected": "No."},
            "prompt_messages",
            MESSAGES,
            id="texts at end",
        ),
        pytest.param({**ROWS["sharegpt"], "chosen": "Yes.", "rejected": "No."}, "sharegpt", MESSAGES, id="sharegpt"),
        pytest.param(
            {
                **TEXTS,
                "prompt": [{"role": "user", "content": [{"type": "text", "text": "Hi?"}], "name": None}],
            },
            "prompt_messages",
            MESSAGES,
            id="parts and nulls",
        ),
    ],
)
def test_common_variants_are_understood(row, schema, expected):
    assert detect_schema([row], SOURCE) == schema
    assert triple(read(row)) == expected


def test_the_common_part_of_longer_conversations_is_the_prompt():
    shared = [{"role": "system", "content": "Be kind."}, user("a"), assistant("b"), user("c")]
    row = {
        "chosen": [*shared, assistant("d")],
        "rejected": [*shared, assistant("e"), user("f"), assistant("g")],
    }
    preference = read(row)
    assert triple(preference) == (shared, [assistant("d")], [assistant("e"), user("f"), assistant("g")])
    assert preference.multi_turn and not read(TEXTS).multi_turn


def test_a_transcript_of_several_turns_splits_at_the_last_shared_assistant():
    head = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"
    row = {"chosen": head + " d", "rejected": head + " d e"}
    assert triple(read(row, chat=False)) == (head, " d", " d e")
    assert triple(read(row)) == ([user("a"), assistant("b"), user("c")], [assistant("d")], [assistant("d e")])


def test_system_tools_and_function_calls_reach_the_messages():
    tools = [{"type": "function", "function": {"name": "clock"}}]
    row = {
        "system": "Be brief.",
        "tools": '[{"type": "function", "function": {"name": "clock"}}]',
        "conversations": [
            {"from": "human", "value": "Time?"},
            {"from": "function_call", "value": '{"name": "clock", "arguments": {"zone": "UTC"}}'},
            {"from": "observation", "value": "12:00"},
        ],
        "chosen": {"from": "gpt", "value": "Noon."},
        "rejected": {"from": "gpt", "value": "Late."},
    }
    preference = read(row)
    call = {"type": "function", "function": {"name": "clock", "arguments": {"zone": "UTC"}}}
    assert preference.prompt == [
        {"role": "system", "content": "Be brief."},
        user("Time?"),
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "12:00"},
    ]
    assert preference.tools == tools
    assert read({**TEXTS, "system": "Be brief."}).prompt[0] == {"role": "system", "content": "Be brief."}
    with pytest.raises(RowProblem, match="system message"):
        read({**TEXTS, "system": "Be brief."}, chat=False)


def test_a_transcript_holds_its_system_text_itself_and_may_have_tools_beside_it():
    preference = read({**HH, "system": "Be brief.", "tools": [{"name": "clock"}]})
    assert triple(preference) == MESSAGES and preference.tools == [{"name": "clock"}]


def test_columns_of_other_names_are_read():
    source = SourceSettings("x", prompt_column="question", chosen_column="good", rejected_column="bad")
    row = {"question": "Hi?", "good": "Yes.", "bad": "No.", "chosen": 3}
    assert triple(read(row, source=source)) == MESSAGES
    turns = {**ROWS["sharegpt"], "talk": ROWS["sharegpt"]["conversations"]}
    del turns["conversations"]
    assert triple(read(turns, source=SourceSettings("x", prompt_column="talk"))) == MESSAGES


def test_rows_of_no_schema_are_not_recognised():
    for row in (
        {},
        {"prompt": "a"},
        {"chosen": "a", "rejected": "b"},
        {"prompt": 1, "chosen": 2, "rejected": 3},
    ):
        assert detect_schema([row], SOURCE) is None
    assert detect_schema([{}, TEXTS], SOURCE) == "prompt_completion"


BAD_ROWS = [
    ("prompt_completion", {"prompt": "a", "chosen": "b"}, "field 'rejected' is missing"),
    ("prompt_completion", {**TEXTS, "chosen": None}, "field 'chosen' is null"),
    ("prompt_completion", {**TEXTS, "chosen": 7}, "field 'chosen' is a number, expected text"),
    ("prompt_completion", {**TEXTS, "prompt": ["a"]}, "field 'prompt' is a list, expected text"),
    ("prompt_completion", {**TEXTS, "prompt": " \n"}, "the prompt is empty"),
    ("prompt_completion", {**TEXTS, "chosen": " "}, "chosen is empty"),
    ("prompt_completion", {**TEXTS, "rejected": "Yes."}, "chosen is equal to rejected"),
    ("prompt_completion", {**TEXTS, "tools": "{"}, "field 'tools' is not JSON"),
    ("prompt_completion", {**TEXTS, "system": 3}, "field 'system' is a number"),
    ("prompt_messages", {**TEXTS, "prompt": []}, "the prompt is empty"),
    ("prompt_messages", {**TEXTS, "prompt": ["a"]}, r"prompt\[0\] is text, expected a message"),
    (
        "prompt_messages",
        {**TEXTS, "prompt": [{"role": "boss", "content": "a"}]},
        r"prompt\[0\].role is 'boss'",
    ),
    (
        "prompt_messages",
        {**TEXTS, "prompt": [{"role": "user", "content": 4}]},
        r"prompt\[0\].content is a number",
    ),
    (
        "prompt_messages",
        {**TEXTS, "prompt": [user("a"), assistant("b")]},
        "the prompt ends in an assistant message",
    ),
    ("prompt_messages", {**TEXTS, "chosen": [user("a")]}, "chosen begins with the user's message"),
    ("prompt_messages", {**TEXTS, "chosen": []}, "chosen begins with no message"),
    (
        "prompt_messages",
        {**TEXTS, "chosen": [assistant("a"), user("b")]},
        "chosen ends with the user's message",
    ),
    ("conversation", {"chosen": MESSAGES[0], "rejected": MESSAGES[0]}, "chosen is equal to rejected"),
    (
        "conversation",
        {"chosen": [user("a"), assistant("b")], "rejected": [user("x"), assistant("b")]},
        "first differ in message 1, which is the user's",
    ),
    (
        "conversation",
        {"chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("b"), user("c")]},
        "chosen ends where the other goes on",
    ),
    ("conversation", {"chosen": [assistant("b")], "rejected": [assistant("c")]}, "the prompt is empty"),
    ("transcript", {"chosen": "Hello", "rejected": "Bye"}, 'does not begin with "Human:"'),
    ("transcript", {**HH, "chosen": "\n\nHuman: Hi?\n\nAssistant: "}, "chosen is empty"),
    ("sharegpt", {**ROWS["sharegpt"], "conversations": "a"}, "field 'conversations' is text"),
    (
        "sharegpt",
        {**ROWS["sharegpt"], "conversations": [{"from": "function_call", "value": "clock"}]},
        "function_call is not JSON",
    ),
]


@pytest.mark.parametrize(("schema", "row", "reason"), BAD_ROWS)
def test_a_bad_row_is_refused_with_its_reason(schema, row, reason):
    with pytest.raises(RowProblem, match=reason):
        read(row, schema)
