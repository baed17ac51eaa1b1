"""Training on reference log-probs that the data brings along as columns, here computed by plain transformers."""

import json

import pytest
import torch
from plain_dpo import read_pairs, score
from tiny import read_metrics, run_jobs, run_overrides, without_timings, write_rows
from transformers import AutoModelForCausalLM

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


UNTIL_STEP_2 = ["train.max_steps=2", "checkpoint.save_at_end=true"]


def write_with_columns(path, source, model):
    """The rows of `source` with `ref_chosen_logps` and `ref_rejected_logps` under a model; returns them."""
    rows = [json.loads(line) for line in source.read_text().splitlines()]
    with torch.no_grad():
        for row, pair in zip(rows, read_pairs(source, source.parent / "start"), strict=True):
            for name in ("chosen", "rejected"):
                row[f"ref_{name}_logps"] = score(model, pair.prompt, getattr(pair, name))[0].sum().item()
    write_rows(path, rows)
    return rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("columns")
    common = [*run_overrides(folder), "train.max_steps=4", "train.eval_on_start=true", "checkpoint.save_at_end=false"]
    model = AutoModelForCausalLM.from_pretrained(folder / "start", dtype=torch.float32).eval()
    rows = write_with_columns(folder / "train_columns.jsonl", folder / "train.jsonl", model)
    write_with_columns(folder / "heldout_columns.jsonl", folder / "heldout.jsonl", model)
    write_rows(folder / "other_model.jsonl", [{**row, "ref_chosen_logps": row["ref_chosen_logps"] - 3} for row in rows])
    lacking = [dict(row) for row in rows]
    del lacking[6]["ref_rejected_logps"]
    write_rows(folder / "lacking.jsonl", lacking)
    columns = ["reference.mode=columns", f"data.eval={folder / 'heldout_columns.jsonl'}"]
    saved = str(folder / "cut/checkpoints/step-2")
    jobs = [
        ("live", [], False, None),
        ("columns", [*columns, f"data.train={folder / 'train_columns.jsonl'}"], False, None),
        ("other_model", [*columns, f"data.train={folder / 'other_model.jsonl'}"], True, None),
        ("lacking", [*columns, f"data.train={folder / 'lacking.jsonl'}"], True, None),
        ("cut", [*columns, f"data.train={folder / 'train_columns.jsonl'}", *UNTIL_STEP_2], False, None),
        # the same pairs with other values; nothing is computed again on a resume
        ("cut", [*columns, f"data.train={folder / 'other_model.jsonl'}"], True, saved),
        ("cut", [*columns, f"data.train={folder / 'train_columns.jsonl'}"], False, saved),
    ]
    messages = run_jobs(
        folder,
        [
            {
                "overrides": [*common, *extra, f"output_dir={folder / name}"],
                "refused": refused,
                "resume": resume,
            }
            for name, extra, refused, resume in jobs
        ],
    )
    (folder / "messages.json").write_text(json.dumps(messages))
    return folder


def test_columns_give_the_run_that_a_live_reference_gives(folder):
    for phase in ("train", "eval"):
        live, columns = (read_metrics(folder / name, phase) for name in ("live", "columns"))
        assert len(live) == len(columns) > 0
        for ours, theirs in zip(columns, live, strict=True):
            for name in ("loss", "rewards/margins", "ref_logps/margins", "kl"):
                assert ours[name] == pytest.approx(theirs[name], abs=1e-5, rel=1e-5), (ours["step"], name)


def test_values_of_another_model_stop_the_run(folder):
    message = json.loads((folder / "messages.json").read_text())[2]
    assert "not those of the model that training starts from" in message and "stored chosen" in message


def test_a_row_without_its_value_is_named(folder):
    message = json.loads((folder / "messages.json").read_text())[3]
    assert "lacking.jsonl row 7: ref_rejected_logps = 'None'" in message


def test_a_resumed_run_takes_the_values_that_it_began_with(folder):
    message = json.loads((folder / "messages.json").read_text())[5]
    assert "saved with other settings: the reference's log-probs (columns of data.train) was" in message
    ours, theirs = (without_timings(read_metrics(folder / name)) for name in ("cut", "columns"))
    assert ours == theirs
