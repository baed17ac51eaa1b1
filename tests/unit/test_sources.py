"""Files of every format to rows, and each way in which a file or a row can be unreadable."""

import csv
import gzip
import io
import json
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_scale.data import json_rows
from dpo_scale.data.sources import RowProblem, find_files, parse_record
from dpo_scale.errors import ConfigError, DataError
from dpo_scale.settings.data import SourceSettings
from dpo_scale.settings.tree import load_config

ROWS = [
    {"prompt": 'a,b\n"c"', "chosen": "ü {[", "rejected": "]} \\ 'x'"},
    {"prompt": "second", "chosen": "y\ts", "rejected": "n\u2028o"},
    {"prompt": "third", "chosen": "1", "rejected": "2"},
]
DEMO = Path(__file__).resolve().parents[3] / "shared/data/dpo_en_demo.json"


def jsonl(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def read(path, **source):
    return [
        (number, parse_record(content))
        for file in find_files(SourceSettings(str(path), **source))
        for number, content in file.records()
    ]


def contents(path, text):
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8"))
    return path


NUMBERED = list(enumerate(ROWS, start=1))


def as_csv(rows, delimiter=","):
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("rows.json", json.dumps(ROWS)),
        ("indented.json", json.dumps(ROWS, indent=2, ensure_ascii=False)),
        ("wrapped.json", json.dumps({"version": 1, "about": "x [", "data": ROWS, "end": []})),
        ("lines.json", jsonl(ROWS)),
        ("objects.json", "\n".join(json.dumps(row, indent=1) for row in ROWS)),
        ("rows.jsonl", jsonl(ROWS)),
        ("rows.ndjson", "\ufeff" + jsonl(ROWS).replace("\n", "\r\n")),
        ("rows.csv", as_csv(ROWS)),
        ("rows.tsv", as_csv(ROWS, "\t")),
    ],
)
def test_text_formats_plain_and_gzipped_give_the_same_rows(tmp_path, name, text):
    assert read(contents(tmp_path / name, text)) == NUMBERED
    assert read(contents(tmp_path / f"{name}.gz", gzip.compress(text.encode()))) == NUMBERED


def test_parquet_saved_folders_and_plain_folders_give_the_same_rows(tmp_path):
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "rows.parquet", row_group_size=2)
    assert read(tmp_path / "rows.parquet") == NUMBERED
    dataset = datasets.Dataset.from_list(ROWS)
    dataset.save_to_disk(tmp_path / "saved")
    assert read(tmp_path / "saved") == NUMBERED
    datasets.DatasetDict(test=dataset.select([1, 0]), other=dataset).save_to_disk(tmp_path / "splits")
    assert read(tmp_path / "splits", split="test") == [(1, ROWS[1]), (2, ROWS[0])]
    with pytest.raises(DataError, match="no split 'train'; there are test, other"):
        read(tmp_path / "splits")
    (tmp_path / "plain").mkdir()
    contents(tmp_path / "plain/b.jsonl", jsonl(ROWS[2:]))
    contents(tmp_path / "plain/a.jsonl", jsonl(ROWS[:2]))
    assert [row for _, row in read(tmp_path / "plain")] == ROWS


def test_a_glob_is_its_files_in_order_of_name(tmp_path):
    for name, rows in (("2.jsonl", ROWS[1:]), ("1.jsonl", ROWS[:1])):
        contents(tmp_path / name, jsonl(rows))
    assert read(tmp_path / "*.jsonl") == [(1, ROWS[0]), (1, ROWS[1]), (2, ROWS[2])]


def test_blank_lines_are_no_rows_but_count_as_lines(tmp_path):
    path = contents(tmp_path / "a.jsonl", "\n" + jsonl(ROWS[:1]) + "  \n\n" + jsonl(ROWS[1:2]))
    assert read(path) == [(2, ROWS[0]), (5, ROWS[1])]


def test_csv_cells_that_hold_messages_become_messages(tmp_path):
    messages = [{"role": "assistant", "content": "x"}]
    row = {"prompt": "[1]", "chosen": json.dumps(messages), "rejected": '[{"a": 1}]'}
    assert read(contents(tmp_path / "a.csv", as_csv([row]))) == [(1, {**row, "chosen": messages})]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.text('a"\\{}[],é\n', max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("kq", max_size=2), inner, max_size=3),
    max_leaves=8,
)


@given(
    rows=st.lists(st.dictionaries(st.text('pq"', max_size=2), JSON, max_size=3), min_size=1, max_size=6),
    block=st.integers(1, 9),
    indent=st.sampled_from([None, 1]),
    wrapped=st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_arrays_cut_in_blocks_of_any_size_give_what_json_loads_gives(rows, block, indent, wrapped):
    text = json.dumps({"n": 1, "data": rows} if wrapped else rows, indent=indent, ensure_ascii=False).encode()
    original = json_rows._READ_BYTES, json_rows._HEAD_BYTES
    json_rows._READ_BYTES, json_rows._HEAD_BYTES = block, 40  # a head that holds {"n": 1, "data": [{
    try:
        found = [json.loads(row) for _, row in json_rows.read_json(io.BytesIO(text), "x")]
    finally:
        json_rows._READ_BYTES, json_rows._HEAD_BYTES = original
    assert found == rows


def line_17(bad):
    return b"".join(
        bad + b"\n" if number == 17 else json.dumps({**ROWS[2], "prompt": str(number)}).encode() + b"\n"
        for number in range(1, 31)
    )


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (b'{"prompt": "a" "chosen": 1}', "malformed JSON: Expecting ',' delimiter .character 16"),
        (b'{"prompt": "a', "malformed JSON: Unterminated string"),
        (b'{"prompt": "\xff"}', "not UTF-8: byte 0xff at byte 13"),
        (b"[1, 2]", "expected an object with prompt, chosen and rejected, found a list"),
        (b"null", "found null"),
        (b"[" * 100_000, "malformed JSON"),
    ],
)
def test_a_bad_line_spoils_only_itself(tmp_path, bad, reason):
    [file] = find_files(SourceSettings(str(contents(tmp_path / "train.jsonl", line_17(bad)))))
    records = dict(file.records())
    assert len(records) == 30
    for number, content in records.items():
        if number != 17:
            assert parse_record(content)["prompt"] == str(number)
    with pytest.raises(RowProblem, match=reason):
        parse_record(records[17])


@pytest.mark.parametrize("bad", ['{"prompt": "a" "chosen": 1}', "7", '{"a": 1}}', "", '{"prompt": nul}'])
def test_a_bad_element_of_an_array_spoils_only_itself(tmp_path, bad):
    good = json.dumps(ROWS[0])
    [file] = find_files(SourceSettings(str(contents(tmp_path / "a.json", f"[{good}, {bad}, {good}]"))))
    records = dict(file.records())
    assert [parse_record(records[i]) for i in (1, 3)] == [ROWS[0]] * 2
    with pytest.raises(RowProblem):
        parse_record(records[2])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"a": 1}, {"b": [2}, {"c": 3}]', "row 2: the file ends within it"),
        ('[{"a": 1}, {"b": "x}]', "row 2: the file ends within it"),
        ('[{"a": 1}', "row 1: the file ends within it"),
        ('[{"a": 1}] [{"a": 1}]', "text follows the array's end"),
        ('{"a": 1}\n{"b":\n', None),
        ("hello", None),
    ],
)
def test_an_array_that_cannot_be_cut_is_an_error_not_fewer_rows(tmp_path, text, message):
    path = contents(tmp_path / "a.json", text)
    with pytest.raises(DataError if message else RowProblem, match=message or "malformed"):
        read(path)


def test_bad_rows_of_csv_and_parquet_spoil_only_themselves(tmp_path):
    text = b"prompt,chosen,rejected\na,b,c\na,b\na,\xff,c\nd,e,f\n"
    records = dict(find_files(SourceSettings(str(contents(tmp_path / "a.csv", text))))[0].records())
    assert [str(records[i]) for i in (2, 3)] == ["2 fields where the header has 3", "not UTF-8"]
    assert isinstance(records[2], RowProblem) and isinstance(records[3], RowProblem)
    assert [records[i]["prompt"] for i in (1, 4)] == ["a", "d"]

    raw = pa.array([b"good", b"\xff\xfe", b"fine"])
    column = pa.Array.from_buffers(pa.string(), 3, raw.buffers())
    pq.write_table(pa.table({"prompt": column}), tmp_path / "a.parquet")
    records = dict(find_files(SourceSettings(str(tmp_path / "a.parquet")))[0].records())
    assert records[1] == {"prompt": "good"} and records[3] == {"prompt": "fine"}
    assert isinstance(records[2], RowProblem) and "not UTF-8" in str(records[2])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.jsonl", b"", "the file is empty"),
        ("rows.txt", b"x", "unknown kind of file; expected .json, .jsonl"),
        ("a.parquet.gz", b"x", "unknown kind of file"),
        ("a.parquet", b"not parquet", "cannot be read as parquet"),
        ("a.jsonl.gz", b"not gzip", "cannot be read as gzipped jsonl"),
        (
            "cut.jsonl.gz",
            gzip.compress(jsonl(ROWS * 2000).encode())[:-30],
            r"cannot be read .*\(after row \d+\)",
        ),
        ("twice.csv", b"a,a\n1,2\n", "a column is named twice"),
    ],
)
def test_an_unusable_file_is_named_in_one_error(tmp_path, name, content, message):
    with pytest.raises(DataError, match=message) as error:
        read(contents(tmp_path / name, content))
    assert name in str(error.value) and "\n" not in str(error.value)


def test_a_missing_file_names_the_nearest(tmp_path):
    contents(tmp_path / "train.jsonl", "x")
    with pytest.raises(DataError, match=r"trian.jsonl: no such file or folder; did you mean .*train.jsonl"):
        read(tmp_path / "trian.jsonl")
    with pytest.raises(DataError, match="the folder .*nowhere does not exist"):
        read(tmp_path / "nowhere/train.jsonl")
    with pytest.raises(DataError, match="no file matches"):
        read(tmp_path / "*.csv")
    with pytest.raises(DataError, match=r"neither saved by `datasets` nor a folder"):
        (tmp_path / "hollow").mkdir()
        read(tmp_path / "hollow")


def test_a_hub_name_without_a_hub_is_one_error(monkeypatch):
    def no_network(*_, **__):
        raise ConnectionError("Couldn't reach\nthe Hub")

    monkeypatch.setattr(datasets, "load_dataset", no_network)
    with pytest.raises(DataError, match=r"org/pairs: no such file .* hub \(split 'train'\): Couldn't reach the Hub"):
        read("org/pairs")


def test_a_hub_data_set_is_read_by_subset_and_split(monkeypatch):
    asked = []

    def load(path, name, split):
        asked.append((path, name, split))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert read("org/pairs", name="small", split="test[:10]") == NUMBERED
    assert asked == [("org/pairs", "small", "test[:10]")]


def test_builtin_data_is_found_by_name_and_the_names_are_listed():
    assert len(read("builtin:plain_sentence_train")) >= 240
    with pytest.raises(DataError, match="builtin:nothing: .* builtin:plain_sentence_heldout, builtin:plain_sent"):
        read("builtin:nothing")


def test_identity_follows_content_not_name(tmp_path):
    def identity(name, text):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        return find_files(SourceSettings(str(contents(tmp_path / name, text))))[0].identity

    first = identity("a.jsonl", jsonl(ROWS))
    assert identity("x/other.jsonl", jsonl(ROWS)) == first
    assert identity("b.jsonl", jsonl(ROWS[:2])) != first
    assert identity("a.json", jsonl(ROWS)) != first


@pytest.mark.skipif(not DEMO.exists(), reason="the demonstration pairs are not beside this checkout")
def test_the_demonstration_pairs_are_read_as_json_reads_them():
    assert [row for _, row in read(DEMO)] == json.loads(DEMO.read_text(encoding="utf-8"))


def test_a_source_is_parsed_from_a_plain_name_and_checked():
    assert SourceSettings.parse("a.jsonl") == SourceSettings(path="a.jsonl")
    with pytest.raises(ConfigError, match="data source 3"):
        SourceSettings.parse(3)
    with pytest.raises(ConfigError, match=r"data.train\[0\].weight = 0"):
        load_config(None, ["model.path=m", "data.train=[{path: a, weight: 0}]"])
    with pytest.raises(ConfigError, match=r"data.eval\[1\].path = ''"):
        load_config(None, ["model.path=m", "data.train=a", "data.eval=[b, '']"])
