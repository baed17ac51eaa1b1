"""`launch/store.py`: what it prints, what it refuses, and values that go out of a store and into it."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from store_rows import KEY, add, random_rows, shard_names
from tiny import ROOT, preference_rows, save_model, write_rows

from dpo_scale.data.dataset import load_pairs
from dpo_scale.data.tokenize import load_tokenizer
from dpo_scale.errors import DataError, StoreError
from dpo_scale.reference.store import Book, ReferenceStore
from dpo_scale.reference.store_manifest import BookKey
from dpo_scale.settings.data import DataSettings, SourceSettings

TRAIN_ROWS = 12


@pytest.fixture
def command(monkeypatch, tmp_path, capsys):
    """Runs `launch/store.py` in this process, in an empty folder; returns what it printed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DPO_SCALE_CACHE", str(tmp_path / "cache"))
    spec = importlib.util.spec_from_file_location("launch_store", ROOT / "launch" / "store.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def call(*arguments: str) -> str:
        monkeypatch.setattr("sys.argv", ["store.py", *map(str, arguments)])
        capsys.readouterr()
        module.main()
        return capsys.readouterr().out

    return call


@pytest.fixture
def book(tmp_path):
    book = ReferenceStore(tmp_path / "store").book(KEY, {"path": "some/model"})
    for seed in range(3):
        add(book, random_rows(20, seed, tokens=seed == 2))
    add(book, random_rows(20).take(slice(0, 10)))
    return book


@pytest.fixture
def config(tmp_path):
    """A config of a tiny model and a data file, whose pairs have reference values as in a data set of TRL."""
    save_model(tmp_path / "model")
    rows = preference_rows(TRAIN_ROWS)
    for i, row in enumerate(rows):
        row |= {"ref_chosen_logps": -1.5 - i, "ref_rejected_logps": -100 - i}
    write_rows(tmp_path / "rows.jsonl", rows)
    (tmp_path / "run.yaml").write_text("model: {path: model, dtype: float32}\ndata: {train: [rows.jsonl]}\n")
    return rows


def loaded_pairs(tmp_path):
    settings = DataSettings(train=[SourceSettings(str(tmp_path / "rows.jsonl"))], cache_dir=str(tmp_path / "cache"))
    return load_pairs(settings, load_tokenizer(tmp_path / "model"), seed=0, log=lambda line: None).train


def test_list_shows_every_book_on_a_line_and_a_damaged_one_as_such(command, book):
    add(ReferenceStore(book.folder.parent).book(BookKey("0" * 64, {"dtype": "bfloat16"}, "imported")), random_rows(7))
    lines = command("list", "store").splitlines()
    assert len(lines) == 3
    (mine,) = (line for line in lines if line.startswith(KEY.id[:12]))
    assert mine.split()[1:3] == ["70", "4"] and mine.endswith("some/model")
    (other,) = (line for line in lines if "imported" in line)
    assert other.split()[1] == "7" and "bfloat16" in other
    (book.folder / shard_names(book)[0]).write_bytes(b"")
    lines = command("list", "store").splitlines()
    assert len(lines) == 3 and sum("damaged" in line for line in lines) == 1


def test_inspect_shows_the_manifest_and_the_share_of_a_configs_pairs(command, book, config, tmp_path):
    text = command("inspect", "store")
    assert KEY.fingerprint in text and "70 in 4 shards, 20 with per-token values" in text and "sdpa" in text
    pairs = loaded_pairs(tmp_path)
    some = random_rows(3)
    with book.writer() as writer:
        writer.add(pairs.pair_keys[:3], some.sums, some.counts)
    text = command("inspect", "store", "--book", KEY.id[:4], "--config", "run.yaml")
    assert f"3 of {TRAIN_ROWS} pairs are here (25.0%)" in text
    cut = command("inspect", "store", "--config", "run.yaml", "data.max_prompt_length=1")
    assert f"0 of {TRAIN_ROWS} pairs are here" in cut


def test_verify_passes_a_whole_store_and_names_each_damaged_file(command, book):
    assert "60 rows, 20 with per-token values; 10 further copies, 0 of them different" in command("verify", "store")
    first, second, *_ = (book.folder / name for name in shard_names(book))
    first.write_bytes(first.read_bytes()[:-1])
    content = bytearray(second.read_bytes())
    content[-1] ^= 1
    second.write_bytes(content)
    with pytest.raises(StoreError, match="compact store --drop-damaged"):
        command("verify", "store")


def test_compact_reports_and_repairs(command, book):
    assert "4 shards" in (text := command("compact", "store")) and "60 rows, 10 copies removed" in text
    names = shard_names(book)
    assert len(names) == 2
    (book.folder / names[0]).write_bytes(b"")
    with pytest.raises(StoreError, match="header is cut off"):
        command("compact", "store")
    assert "set aside: store/damaged" in command("compact", "store", "--drop-damaged")
    assert "damaged" not in command("verify", "store")


def test_export_writes_every_row_once_with_its_tokens(command, book):
    assert "60 rows" in command("export", "store", "out.parquet")
    table = pq.read_table("out.parquet").to_pylist()
    assert len(table) == 60
    assert len({row["pair_key"] for row in table}) == 60
    keys = np.array([np.frombuffer(bytes.fromhex(row["pair_key"]), "<u8") for row in table])
    expected = Book(book.folder).lookup(keys)
    assert expected.found.all()
    for row, sums, counts in zip(table, expected.sums, expected.counts, strict=True):
        assert [row["ref_chosen_logps"], row["ref_rejected_logps"]] == sums.tolist()
        assert [row["chosen_tokens"], row["rejected_tokens"]] == counts.tolist()
        for side, name in enumerate(("chosen", "rejected")):
            values = row[f"ref_{name}_token_logps"]
            if values is not None:
                assert len(values) == counts[side] and math.isclose(sum(values), sums[side], rel_tol=1e-5)
    assert sum(row["ref_chosen_token_logps"] is not None for row in table) == 20


def test_import_then_export_gives_back_the_columns_with_their_texts(command, config, tmp_path):
    assert f"{TRAIN_ROWS} pairs imported" in command("import", "store", "--config", "run.yaml", "--note", "TRL 1.0")
    (book,) = ReferenceStore("store").books()
    assert book.manifest.key.source == "imported" and book.manifest.model["note"] == "TRL 1.0"
    assert book.manifest.key.numerics == {"computed": "elsewhere"}
    pairs = loaded_pairs(tmp_path)
    found, sums, counts = book.lookup(pairs.pair_keys)
    assert found.all()
    np.testing.assert_array_equal(sums, [[r["ref_chosen_logps"], r["ref_rejected_logps"]] for r in config])
    np.testing.assert_array_equal(counts, pairs.lengths[:, 1:])

    add(book, random_rows(5))  # rows of other data
    command("export", "store", "out.parquet", "--config", "run.yaml")
    table = {row["ref_chosen_logps"]: row for row in pq.read_table("out.parquet").to_pylist()}
    assert len(table) == TRAIN_ROWS
    for row in config:
        out = table[row["ref_chosen_logps"]]
        assert row["prompt"] in out["prompt"]
        assert out["chosen"] == row["chosen"] + "<|im_end|>" and out["rejected"] == row["rejected"] + "<|im_end|>"


@pytest.mark.parametrize("value", [None, "NaN", "much", float("inf"), True, [1.0]])
def test_import_names_the_row_whose_value_cannot_be_one(command, config, tmp_path, value):
    config[4]["ref_rejected_logps"] = value
    write_rows(tmp_path / "rows.jsonl", config)
    with pytest.raises(DataError, match="rows.jsonl row 5: ref_rejected_logps = .*summed log-prob"):
        command("import", "store", "--config", "run.yaml")
    assert not Path("store").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["list", "nowhere"], "nowhere: no such folder"),
        (["verify", "store", "--book", "zz"], "no book begins like this"),
        (["export", "store", "missing/out.parquet"], "missing/out.parquet: cannot be written"),
    ],
)
def test_mistakes_are_named(command, book, arguments, message):
    with pytest.raises(StoreError, match=message):
        command(*arguments)


def test_what_is_not_understood_is_refused(command, book, capsys):
    for arguments in (["list", "store", "data.x=1"], ["verify", "store", "--nonsense"], ["verify", "store", "word"]):
        with pytest.raises(SystemExit):
            command(*arguments)
        assert "unrecognized arguments" in capsys.readouterr().err
