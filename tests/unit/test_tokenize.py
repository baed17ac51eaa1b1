"""Pairs to token ids against tokenizing the joined text; cuts, ends of turn, splits, weights, the cache."""

import hashlib
import json
import os
import random
import shutil
import struct
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers_for_tests import CHATML, byte_level, metaspace

from dpo_scale.data import cache as cache_module
from dpo_scale.data.dataset import PairDataset, load_pairs
from dpo_scale.data.schemas import columns_of, to_preference
from dpo_scale.data.sources import RowProblem
from dpo_scale.data.tokenize import Dropped, PairTokenizer, load_tokenizer, pair_key
from dpo_scale.errors import ConfigError, DataError, ModelError
from dpo_scale.settings.data import DataSettings, SourceSettings
from dpo_scale.settings.tree import load_config

UNCUT = DataSettings(max_length=None, max_prompt_length=None)


def tokenize(tokenizer, prompt, chosen, rejected, data_settings=UNCUT, **row):
    encoder = PairTokenizer(tokenizer, data_settings)
    schema = "prompt_completion" if isinstance(prompt, str) else "prompt_messages"
    columns = columns_of(SourceSettings("x"), schema)
    row = {"prompt": prompt, "chosen": chosen, "rejected": rejected, **row}
    [result] = encoder.tokenize([to_preference(row, columns, chat=encoder.chat)])
    if isinstance(result, RowProblem):
        raise result
    return result


# --- the boundary between prompt and completion

TOKENIZERS = {
    "byte level": byte_level(),
    "byte level with bos": byte_level(bos=True),
    "byte level with bos and eos": byte_level(bos=True, adds_eos=True),
    "metaspace with bos": metaspace(),
    "metaspace": metaspace(bos=False),
}
PIECES = st.lists(
    st.sampled_from(["the answer", "is", " is", "no", " ", "  ", "\n", "Human: ", "é", "🙂", ",", "<s>", "</s>", "12"]),
    min_size=1,
    max_size=6,
).map("".join)


@pytest.mark.parametrize("name", TOKENIZERS)
@given(prompt=PIECES, chosen=PIECES, rejected=PIECES)
@settings(max_examples=60, deadline=None)
def test_prompt_and_completion_ids_join_to_the_ids_of_the_joined_text(name, prompt, chosen, rejected):
    assume(chosen.strip() and rejected.strip() and chosen != rejected)
    tokenizer = TOKENIZERS[name]
    eos = tokenizer.eos_token_id

    def ids_of(text):
        ids = tokenizer(text)["input_ids"]
        return ids[:-1] if "and eos" in name else ids

    wholes = [ids_of(prompt + completion) for completion in (chosen, rejected)]
    in_common = os.path.commonprefix([ids_of(prompt), *wholes])
    closed = [whole if whole[-1] == eos else [*whole, eos] for whole in wholes]
    if not in_common or in_common in wholes or closed[0] == closed[1]:
        with pytest.raises(RowProblem, match="no tokens|same tokens"):
            tokenize(tokenizer, prompt, chosen, rejected)
        return
    pair = tokenize(tokenizer, prompt, chosen, rejected)
    assert pair.prompt_ids == in_common
    assert [pair.prompt_ids + completion for completion in (pair.chosen_ids, pair.rejected_ids)] == closed


def test_a_token_that_spans_the_boundary_belongs_to_the_completions():
    tokenizer = byte_level()
    apart = tokenizer("the answ")["input_ids"] + tokenizer("er is no")["input_ids"]
    pair = tokenize(tokenizer, "the answ", "er is no", "er is yes")
    whole = tokenizer("the answer is no")["input_ids"]
    assert whole != apart, "the sample must merge across the boundary"
    assert pair.prompt_ids == tokenizer("the")["input_ids"]
    assert pair.prompt_ids + pair.chosen_ids == [*whole, tokenizer.eos_token_id]


def test_a_prompt_without_tokens_needs_a_bos():
    with pytest.raises(RowProblem, match="the prompt has no tokens"):
        tokenize(byte_level(), "", "yes", "no")
    assert tokenize(byte_level(bos=True), "", "yes", "no").prompt_ids == [0]


# --- chat templates and ends of turn

HEAD = [{"role": "user", "content": "the answer"}]


@given(prompt=PIECES, chosen=PIECES, rejected=PIECES)
@settings(max_examples=60, deadline=None)
def test_chat_pairs_join_to_the_rendered_conversation_up_to_its_end_of_turn(prompt, chosen, rejected):
    assume(prompt.strip() and chosen.strip() and rejected.strip() and chosen != rejected)
    tokenizer = byte_level(chat_template=CHATML, bos=True)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    pair = tokenize(tokenizer, prompt, chosen, rejected)
    for completion, ids in ((chosen, pair.chosen_ids), (rejected, pair.rejected_ids)):
        text = f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n{completion}<|im_end|>"
        assert pair.prompt_ids + ids == tokenizer(text, add_special_tokens=False)["input_ids"]
        assert ids[-1] == end and ids.count(end) == 1


@pytest.mark.parametrize(
    ("ending", "extra", "expected"),
    [
        ("<|im_end|>\n", (), "yes<|im_end|>"),
        ("<|im_end|> \n\n", (), "yes<|im_end|>"),
        ("</s>", (), "yes</s>"),
        ("", (), "yes</s>"),
        ("\n\n", (), "yes\n\n</s>"),
        ("<turn>\n", ("<turn>",), "yes<turn>"),  # an end of turn that is an added but no special token
    ],
)
def test_completions_end_in_one_end_of_turn(ending, extra, expected):
    template = f"{{% for m in messages %}}{{{{ m.role }}}}: {{{{ m.content }}}}{ending}{{% endfor %}}"
    tokenizer = byte_level(chat_template=template, extra=extra)
    # this template has no generation prompt, so "assistant: " is the completion's
    assert tokenizer.decode(tokenize(tokenizer, HEAD, "yes", "no").chosen_ids) == f"assistant: {expected}"


def test_an_added_token_of_the_answer_itself_is_no_end_of_turn():
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}"
    tokenizer = byte_level(chat_template=template, extra=("</call>",))
    assert tokenizer.decode(tokenize(tokenizer, HEAD, "a</call>", "b").chosen_ids) == "assistant: a</call></s>"


def test_a_generation_prompt_that_answers_do_not_begin_with_is_left_out_and_counted():
    thinking = CHATML.replace("assistant\n{% endif", "assistant\n<think>\n{% endif")
    tokenizer = byte_level(chat_template=thinking)
    pair = tokenize(tokenizer, HEAD, "yes", "no")
    assert tokenizer.decode(pair.prompt_ids).endswith("<|im_start|>assistant\n")
    assert tokenizer.decode(pair.chosen_ids) == "yes<|im_end|>"
    assert pair.generation_prompt_differs and not tokenize(byte_level(chat_template=CHATML), HEAD, "a", "b").prompt_cut


def test_an_empty_thinking_block_that_a_template_adds_to_answers_is_theirs():
    template = CHATML.replace(
        "{{ m['content'] }}",
        "{{ '<think></think>' if loop.last and m.role == 'assistant' }}" + "{{ m['content'] }}",
    )
    tokenizer = byte_level(chat_template=template)
    pair = tokenize(tokenizer, HEAD, "yes", "no")
    assert tokenizer.decode(pair.prompt_ids).endswith("<|im_start|>assistant\n")
    assert tokenizer.decode(pair.chosen_ids) == "<think></think>yes<|im_end|>"


def test_a_template_that_rewrites_the_prompt_once_answered_makes_a_bad_row():
    template = "{{ messages | length }}" + CHATML
    with pytest.raises(RowProblem, match="renders the prompt differently"):
        tokenize(byte_level(chat_template=template), HEAD, "yes", "no")


def test_a_templates_own_refusal_becomes_the_rows_reason():
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHATML
    with pytest.raises(RowProblem, match="the chat template refused it: no system role"):
        tokenize(byte_level(chat_template=template), [{"role": "system", "content": "a"}, *HEAD], "yes", "no")


def test_tools_and_template_arguments_reach_the_template_and_dates_are_fixed():
    template = "{{ tools[0].name }}|{{ mood }}|{{ strftime_now('%Y-%m') }}|" + CHATML
    tokenizer = byte_level(chat_template=template)
    given = replace(UNCUT, chat_template_kwargs={"mood": "calm"})
    pair = tokenize(tokenizer, HEAD, "yes", "no", given, tools=[{"name": "clock"}])
    assert tokenizer.decode(pair.prompt_ids).startswith("clock|calm|2024-07|<|im_start|>user")


def test_half_a_surrogate_pair_is_a_bad_row():
    with pytest.raises(RowProblem, match="not Unicode"):
        tokenize(byte_level(), "a", "b \ud83d", "c")


# --- templates given in the settings


def test_chat_templates_are_given_as_text_as_a_file_or_switched_off(tmp_path):
    tokenizer = byte_level(chat_template=CHATML, bos=True)
    answer = "{% for m in messages %}<{{ m.content }}>{% endfor %}"
    (tmp_path / "t.jinja").write_text(answer.replace("<", "[").replace(">", "]"), encoding="utf-8")
    prompts = {}
    for value in (None, "none", answer, str(tmp_path / "t.jinja")):
        pair = tokenize(tokenizer, "the answer", "yes", "no", replace(UNCUT, chat_template=value))
        prompts[value] = tokenizer.decode(pair.prompt_ids)
    assert prompts == {
        None: "<|im_start|>user\nthe answer<|im_end|>\n<|im_start|>assistant\n",
        "none": "<s>the answer",
        answer: "<the answer>",
        str(tmp_path / "t.jinja"): "[the answer]",
    }
    with pytest.raises(ConfigError, match="data.chat_template = 'absent.jinja'"):
        PairTokenizer(tokenizer, replace(UNCUT, chat_template="absent.jinja"))
    with pytest.raises(ConfigError, match="data.chat_template: not a jinja template: line 2"):
        PairTokenizer(tokenizer, replace(UNCUT, chat_template="{{ a }}\n{% for %}"))


def test_load_tokenizer_pads_with_eos_takes_a_template_and_names_what_is_wrong(tmp_path):
    byte_level().save_pretrained(tmp_path / "plain")
    tokenizer = load_tokenizer(tmp_path / "plain", chat_template="{{ messages }}")
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 1
    assert tokenizer.chat_template == "{{ messages }}"
    no_eos = byte_level()
    no_eos.eos_token = None
    no_eos.save_pretrained(tmp_path / "no_eos")
    with pytest.raises(ModelError, match="no EOS token"):
        load_tokenizer(tmp_path / "no_eos")
    (tmp_path / "hollow").mkdir()
    with pytest.raises(ModelError, match="hollow: no tokenizer could be loaded"):
        load_tokenizer(tmp_path / "hollow")


# --- cutting


def words(count, word="no"):
    return " ".join([word] * count)


def test_a_long_prompt_keeps_the_end_that_is_asked_for_and_its_bos():
    ids = byte_level(bos=True)("a b c d e f")["input_ids"]

    def prompt(limit, mode, bos):
        given = replace(UNCUT, max_prompt_length=limit, truncation_mode=mode)
        pair = tokenize(byte_level(bos=bos), "a b c d e f", " yes", " no", given)
        assert pair.prompt_cut
        return pair.prompt_ids

    assert prompt(4, "keep_start", bos=True) == ids[:4]
    assert prompt(4, "keep_end", bos=True) == [ids[0], *ids[-3:]]
    assert prompt(4, "keep_end", bos=False) == ids[-4:]
    assert prompt(1, "keep_end", bos=True) == ids[-1:]


def test_a_pair_that_is_still_too_long_is_cut_dropped_or_refused():
    tokenizer = byte_level()
    whole = tokenize(tokenizer, "the answer", " a b c d e f", " no")
    longest = len(whole.prompt_ids) + len(whole.chosen_ids)

    def given(**changes):
        return tokenize(tokenizer, "the answer", " a b c d e f", " no", replace(UNCUT, **changes))

    assert given(max_length=longest) == whole
    cut = given(max_length=longest - 2)
    assert cut.chosen_ids == whole.chosen_ids[:-2] and cut.rejected_ids == whole.rejected_ids and cut.completion_cut
    assert given(max_length=longest - 1, overlong="drop") == Dropped("overlong")
    with pytest.raises(RowProblem, match=f"more than data.max_length = {longest - 1}"):
        given(max_length=longest - 1, overlong="error")
    halved = given(max_length=2)  # without a limit of its own, the prompt gets half
    assert halved.prompt_ids == whole.prompt_ids[-1:] and halved.prompt_cut and len(halved.chosen_ids) == 1
    same = tokenize(tokenizer, "the", " a b c", " a b d", replace(UNCUT, max_length=2))
    assert same == Dropped("identical_after_cut")


# --- data sets

PAIRS = [
    {"prompt": f"the answer {i}", "chosen": f" yes {i}", "rejected": f" no {i}{' a' * (i % 7)}"} for i in range(60)
]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PAIRS), encoding="utf-8")
    return tmp_path


def load(folder, *sources, tokenizer=None, lines=None, seed=0, **changes):
    train = [SourceSettings(str(folder / "train.jsonl"))] if not sources else list(sources)
    given = DataSettings(train=train, cache_dir=str(folder / "cache"), **changes)
    log = (lines if lines is not None else []).append
    return load_pairs(given, tokenizer or byte_level(), seed=seed, log=log, report_dir=folder)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return SourceSettings(str(path))


def test_the_data_set_holds_every_pair_in_order_with_lengths_key_and_origin(folder):
    lines = []
    tokenizer = byte_level()
    data = load(folder, tokenizer=tokenizer, lines=lines).train
    assert len(data) == 60 and data.lengths.dtype == np.int32 and data.lengths.shape == (60, 3)
    for i, row in enumerate(PAIRS):
        expected = tokenize(tokenizer, row["prompt"], row["chosen"], row["rejected"])
        pair = data[i]
        ids = [pair.prompt_ids, pair.chosen_ids, pair.rejected_ids]
        assert [one.tolist() for one in ids] == [
            expected.prompt_ids,
            expected.chosen_ids,
            expected.rejected_ids,
        ]
        assert all(one.dtype == np.int32 for one in ids)
        assert data.lengths[i].tolist() == [len(one) for one in ids]
        packed = b"".join(struct.pack(f"<i{len(one)}i", len(one), *one.tolist()) for one in ids)
        assert pair.pair_key == hashlib.blake2b(packed, digest_size=16).digest() == data.pair_keys[i].tobytes()
        assert pair.index == i and data.describe(i) == f"{folder / 'train.jsonl'} row {i + 1}"
    assert any("60 rows, schema prompt_completion (prompt, chosen, rejected); tokenized in" in line for line in lines)
    chosen = data.select(np.array([5, 2]))
    assert len(chosen) == 2 and chosen[1].pair_key == data[2].pair_key and chosen.describe(0).endswith("row 6")
    assert chosen.lengths.tolist() == data.lengths[[5, 2]].tolist() and chosen.fingerprint != data.fingerprint
    with pytest.raises(IndexError):
        data[60]


def test_several_sources_are_one_data_set_with_their_own_schemas_and_columns(folder):
    talks = [{"q": f"why {i}", "chosen": "a", "rejected": "b"} for i in range(3)]
    other = replace(write(folder / "other.jsonl", talks), prompt_column="q")
    data = load(folder, SourceSettings(str(folder / "train.jsonl")), other)
    assert len(data.train) == 63 and data.train.describe(61) == f"{folder / 'other.jsonl'} row 2"
    assert [source["columns"] for source in data.report["train"]] == [
        ["prompt", "chosen", "rejected"],
        ["q", "chosen", "rejected"],
    ]


@pytest.mark.parametrize(("weight", "expected"), [(0.5, 30), (2, 120), (1.25, 75), (0.001, None)])
def test_weights_repeat_whole_and_choose_fractions_by_seed(folder, weight, expected):
    source = SourceSettings(str(folder / "train.jsonl"), weight=weight)
    if expected is None:
        with pytest.raises(DataError, match="the weights leave no pair"):
            load(folder, source)
        return
    data = load(folder, source).train
    keys, counts = np.unique([pair.tobytes() for pair in data.pair_keys], return_counts=True)
    assert len(data) == expected and set(counts) <= {int(weight) or 1, int(weight) + 1}
    assert len(keys) == min(expected, 60)
    assert load(folder, source).train.fingerprint == data.fingerprint
    assert weight == 2 or load(folder, source, seed=1).train.fingerprint != data.fingerprint


def prompts(data, tokenizer):
    return {tokenizer.decode(data[i].prompt_ids) for i in range(len(data))}


def test_growing_data_moves_no_pair_across_the_held_out_split_and_prompts_stay_together(folder):
    tokenizer = byte_level()
    before = load(folder, tokenizer=tokenizer, eval_fraction=0.25)
    assert len(before.train) + len(before.eval) == 60 and 5 <= len(before.eval) <= 27
    grown = [{"prompt": f"new {i}", "chosen": "a", "rejected": "b"} for i in range(40)]
    again = [{**row, "chosen": row["chosen"] + " again"} for row in PAIRS]  # the same prompts, other answers
    rows = grown + PAIRS + again
    random.Random(0).shuffle(rows)
    after = load(folder, write(folder / "more.jsonl", rows), tokenizer=tokenizer, eval_fraction=0.25)
    assert prompts(before.eval, tokenizer) <= prompts(after.eval, tokenizer)
    assert prompts(before.train, tokenizer) <= prompts(after.train, tokenizer)
    assert not prompts(after.train, tokenizer) & prompts(after.eval, tokenizer)
    # another tokenizer and template hold out the same prompts
    chat = load(folder, tokenizer=byte_level(chat_template=CHATML), eval_fraction=0.25)
    rows_of = [{data.describe(i) for i in range(len(data))} for data in (before.eval, chat.eval)]
    assert rows_of[0] == rows_of[1]


def test_held_out_pairs_that_are_also_trained_on_are_reported(folder):
    lines = []
    held_out = write(folder / "eval.jsonl", [*PAIRS[:4], {"prompt": "x", "chosen": "y", "rejected": "z"}])
    data = load(folder, eval=[held_out], lines=lines)
    assert (len(data.train), len(data.eval), data.report["pairs_in_both"]) == (60, 5, 4)
    assert any("WARNING: 4 of the 5 held-out pairs are also trained on" in line for line in lines)
    assert load(folder).eval is None


def test_cuts_and_drops_are_counted_and_logged(folder):
    lines = []
    counts = load(folder, lines=lines, max_prompt_length=2, max_length=9).report["train"][0]
    assert counts["prompt_cut"] == counts["kept"] == 60 and 0 < counts["completion_cut"] < 60
    assert any(
        f"60 pairs kept; 60 prompts cut to data.max_prompt_length; {counts['completion_cut']} pairs with a" in line
        for line in lines
    )
    dropped = load(folder, max_prompt_length=2, max_length=9, overlong="drop").report["train"][0]
    assert dropped["overlong"] == counts["completion_cut"] and dropped["kept"] == 60 - dropped["overlong"]


def test_a_bad_row_stops_the_run_or_is_skipped_counted_and_listed(folder):
    lines = (folder / "train.jsonl").read_text().splitlines()
    lines[16] = '{"prompt": "a" "chosen": 1}'
    lines[40] = json.dumps({"prompt": "a", "chosen": "b", "rejected": "b"})
    lines[20] = json.dumps({"prompt": "", "chosen": "b", "rejected": "c"})
    (folder / "train.jsonl").write_text("\n".join(lines))
    refusal = r"train.jsonl row 17: malformed JSON: Expecting ',' delimiter .* \(data.on_bad_row=skip"
    with pytest.raises(DataError, match=refusal):
        load(folder)
    for _ in range(2):  # built, then from the cache
        data = load(folder, on_bad_row="skip")
        assert len(data.train) == 57 and data.report["train"][0]["bad"] == 3
        listed = [json.loads(line) for line in (folder / "bad_rows.jsonl").read_text().splitlines()]
        assert [(bad["row"], bad["reason"][:9]) for bad in listed] == [
            (17, "malformed"),
            (21, "the promp"),
            (41, "chosen is"),
        ]
        assert data.train.describe(16).endswith("row 18")
    with pytest.raises(DataError, match=refusal):
        load(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("\n", "holds no rows"),
        (
            '{"question": "a", "answer": "b"}\n',
            "no known schema; columns found: question, answer; expected one of",
        ),
        ('{"chosen": "a"}\n', "no known schema; columns found: chosen"),
        ('{"prompt": "a", "chosen": "b", "rejected": "b"}\n', "none of the 1 rows can be used .1 bad"),
        ("oops\n" * 3, "row 1: malformed JSON"),
        (
            '{"prompt": [{"role": "user", "content": "a"}], "chosen": "b", "rejected": "c"}\n',
            "need a chat template",
        ),
    ],
)
def test_a_file_without_usable_rows_is_one_error(folder, text, message):
    (folder / "train.jsonl").write_text(text)
    with pytest.raises(DataError, match=message) as error:
        load(folder, on_bad_row="skip")
    assert "train.jsonl" in str(error.value)
    assert not list((folder / "cache").rglob("building-*"))


def test_a_named_schema_or_column_that_the_file_lacks_is_named(folder):
    with pytest.raises(
        DataError, match="no column 'conversations', which schema sharegpt takes; columns found: prompt"
    ):
        load(folder, schema="sharegpt", tokenizer=byte_level(chat_template=CHATML))
    with pytest.raises(DataError, match="no column 'question', which schema prompt_completion takes"):
        load(folder, schema="prompt_completion", prompt_column="question")


def test_impossible_settings_are_refused_by_name():
    for changes, key in (
        (["data.max_prompt_length=1024"], "data.max_prompt_length = 1024: expected less than data.max_length"),
        (["data.max_length=1"], "data.max_length = 1: expected null or a whole number of tokens, at least 2"),
        (["data.eval_fraction=1.0"], "data.eval_fraction = 1.0: expected a number, at least 0 and below 1"),
        (["data.eval_fraction=0.1", "data.eval=a"], "data.eval_fraction = 0.1: expected 0 where"),
        (["data.num_proc=0"], "data.num_proc = 0"),
        (["data.train=[{path: a, weight: -1}]"], "data.train.0..weight = -1"),
    ):
        with pytest.raises(ConfigError, match=key):
            load_config(None, ["model.path=m", "data.train=a", *changes])


# --- the cache


def count_builds(monkeypatch):
    """A list that grows by one whenever rows are tokenized."""
    builds, run = [], cache_module.run_chunks
    monkeypatch.setattr(cache_module, "run_chunks", lambda *given: builds.append(given) or run(*given))
    return builds


def test_what_decides_the_tokens_misses_the_cache_and_nothing_else_does(folder, monkeypatch):
    builds = count_builds(monkeypatch)
    chat = byte_level(chat_template=CHATML)
    first = load(folder, tokenizer=chat)

    def built(**changes):
        before = len(builds)
        data = load(folder, **{"tokenizer": chat, **changes})
        return len(builds) - before, data

    shutil.copy(folder / "train.jsonl", folder / "renamed.jsonl")
    renamed = SourceSettings(str(folder / "renamed.jsonl"), weight=2)
    for changes in (
        {},
        {"seed": 3},
        {"eval_fraction": 0.2},
        {"on_bad_row": "skip"},
        {"tokenizer": byte_level(chat_template=CHATML)},
    ):
        assert built(**changes)[0] == 0, changes
    before = len(builds)
    assert load(folder, renamed, tokenizer=chat).train.describe(0) == f"{folder / 'renamed.jsonl'} row 1"
    assert len(builds) == before
    assert built()[1].train.fingerprint == first.train.fingerprint

    other = CHATML.replace("assistant\n", "assistant:\n")
    for changes in (
        {"tokenizer": byte_level(chat_template=other)},
        {"tokenizer": byte_level(chat_template=CHATML, extra=("<new>",))},
        {"chat_template": "none"},
        {"chat_template_kwargs": {"a": 1}},
        {"max_length": 900},
        {"max_prompt_length": 5},
        {"truncation_mode": "keep_start"},
        {"overlong": "drop"},
        {"schema": "prompt_completion"},
    ):
        assert built(**changes)[0] == 1, changes
    with open(folder / "train.jsonl", "a") as stream:
        stream.write(json.dumps({"prompt": "x", "chosen": "y", "rejected": "z"}) + "\n")
    count, grown = built()
    assert count == 1 and len(grown.train) == 61


@pytest.mark.parametrize("damage", ["cut", "keys", "meta", "missing", "rows"])
def test_a_damaged_cache_is_noticed_and_made_anew(folder, monkeypatch, damage):
    expected = load(folder).train.fingerprint
    [pairs] = (folder / "cache").rglob("pairs.arrow")
    content = bytearray(pairs.read_bytes())
    if damage == "cut":
        pairs.write_bytes(content[: len(content) // 2])
    elif damage == "keys":
        at = content.index(load(folder).train[7].pair_key)
        content[at] ^= 1
        pairs.write_bytes(content)
    elif damage == "meta":
        (pairs.parent / "meta.json").write_text("{")
    elif damage == "missing":
        pairs.unlink()
    else:
        (pairs.parent / "bad_rows.jsonl").write_text('{"file": 0, "row": 1, "reason": "x"}\n')
    builds, lines = count_builds(monkeypatch), []
    assert load(folder, lines=lines).train.fingerprint == expected
    assert len(builds) == 1 and "is damaged and made anew" in lines[0]


def test_damaged_tokens_are_an_error_when_read(folder):
    data = load(folder).train
    [pairs] = (folder / "cache").rglob("pairs.arrow")
    content = bytearray(pairs.read_bytes())
    at = content.index(data[3].chosen_ids.tobytes() + data[4].chosen_ids.tobytes())
    content[at] ^= 1
    pairs.write_bytes(content)
    data = load(folder).train
    assert len(data[4].chosen_ids) > 0
    with pytest.raises(DataError, match="the tokenized data is damaged .pair 3.; delete this folder"):
        data[3]


def test_a_build_that_fails_leaves_nothing_and_one_that_lost_the_race_uses_the_winners(folder, monkeypatch):
    run, winners = cache_module.run_chunks, []

    def overtaken(*given):
        yield from run(*given)
        monkeypatch.setattr(cache_module, "run_chunks", run)
        load(folder)  # by somebody else, who is done before
        winners.extend(
            (item.name, item.stat().st_ino)
            for item in (folder / "cache/tokenized").iterdir()
            if not item.name.startswith("building-")
        )

    monkeypatch.setattr(cache_module, "run_chunks", overtaken)
    assert len(load(folder).train) == 60
    assert [(item.name, item.stat().st_ino) for item in (folder / "cache/tokenized").iterdir()] == winners

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache_module, "run_chunks", full)
    with pytest.raises(DataError, match="cannot be written .*No space left.*; set data.cache_dir"):
        load(folder, max_length=800)
    assert len(list((folder / "cache/tokenized").iterdir())) == 1


def test_worker_processes_give_the_same_pairs_in_the_same_order(folder):
    rng = random.Random(1)
    rows = [{**rng.choice(PAIRS), "prompt": f"number {i} {'and ' * rng.randint(0, 9)}"} for i in range(700)]
    rows[300]["rejected"] = rows[300]["chosen"]
    source = write(folder / "many.jsonl", rows)
    tokenizer = byte_level(chat_template=CHATML)
    results = []
    for processes in (1, 2):
        shutil.rmtree(folder / "cache", ignore_errors=True)
        data = load(folder, source, tokenizer=tokenizer, on_bad_row="skip", num_proc=processes)
        listed = (folder / "bad_rows.jsonl").read_text()
        results.append((data.train.fingerprint, data.report, data.train.describe(400), listed))
    assert results[0] == results[1]
    assert results[0][2].endswith("row 402") and '"row": 301' in results[0][3]


def test_pair_keys_tell_where_one_list_ends():
    def key(*lists):
        return pair_key(*(np.array(one, dtype=np.int32) for one in lists))

    assert key([1, 2], [3], [4]) != key([1], [2, 3], [4]) != key([1], [2], [3, 4])
    assert key([1], [2], [3]) == key([1], [2], [3]) and len(key([1], [2], [3])) == 16


def test_an_empty_selection_is_a_data_set_of_no_pairs(folder):
    empty = load(folder).train.select(np.array([], dtype=np.int64))
    assert isinstance(empty, PairDataset) and len(empty) == 0 and empty.lengths.shape == (0, 3)
