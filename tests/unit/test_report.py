"""The report at the end of the quickstart: its own numbers, prompts as trained on, commands that work."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from dpo_scale.errors import UserError
from dpo_scale.observe.report import (
    PROMPT_SHARES,
    forecast_lines,
    held_out_prompts,
    metrics_table,
    print_report,
    what_next,
)
from dpo_scale.settings.tree import load_config

QUICKSTART = Path(__file__).resolve().parents[2] / "configs" / "quickstart.yaml"


def test_table_shows_both_evaluations_and_leaves_out_what_one_lacks():
    before = {"pairs": 60.0, "rewards/accuracies": 0.0, "rewards/margins": 0.0, "loss": 0.693147}
    after = {
        "pairs": 60.0,
        "rewards/accuracies": 0.95,
        "rewards/margins": 1.5,
        "loss": 0.25,
        "accuracy/policy": 1.0,
    }
    lines = [line.split() for line in metrics_table(before, after)]
    assert lines[0] == ["60", "held-out", "pairs", "before", "after"]
    assert lines[2:5] == [
        ["reward", "accuracy", "0.0%", "95.0%"],
        ["reward", "margin", "0.000", "1.500"],
        ["loss", "0.6931", "0.2500"],
    ]


def test_what_was_predicted_is_in_the_report():
    record = {"peak_memory_bytes": 1.5e9, "peak_memory_bytes/predicted": 1.4e9}
    assert [line.split() for line in forecast_lines(record)][3:] == [["memory,", "GB", "1.400", "1.500"]]


def test_prompts_are_answered_from_the_ids_that_training_sees():
    from dpo_scale.data.dataset import load_pairs
    from dpo_scale.data.tokenize import load_tokenizer
    from dpo_scale.models.builtin import resolve_model_path

    config = load_config(QUICKSTART)
    tokenizer = load_tokenizer(resolve_model_path(config.model.path))
    data = load_pairs(config.data, tokenizer, seed=0, log=lambda line: None).eval
    trained_on = [data[int(share * len(data))].prompt_ids.tolist() for share in PROMPT_SHARES]
    prompts = held_out_prompts(config, tokenizer)
    assert [list(ids) for _, ids in prompts] == trained_on
    assert all(text in tokenizer.decode(ids) for text, ids in prompts)


def test_the_commands_it_recommends_are_accepted(tmp_path):
    lines = what_next(tmp_path / "run", load_config(QUICKSTART))
    commands = lines[next(k for k, line in enumerate(lines) if line.startswith("What next")) + 1 :]
    words = shlex.split(" ".join(line.rstrip("\\") for line in commands if "#" not in line))
    overrides = [word for word in words if word.startswith("data.")]
    config = load_config(QUICKSTART, overrides)
    assert [source.path for source in config.data.train] == ["my_pairs.jsonl"]
    assert config.data.eval == [] and config.data.eval_fraction == 0.05
    for word in words:
        if word.endswith((".py", ".sh")):
            assert (QUICKSTART.parents[1] / word).is_file()


@pytest.mark.parametrize("present", [[], ["config.yaml"], ["config.yaml", "metrics.jsonl"]])
def test_folder_of_an_unfinished_run_is_refused(tmp_path, present):
    for name in present:
        (tmp_path / name).touch()
    missing = ["config.yaml", "metrics.jsonl", "model"][len(present)]
    with pytest.raises(UserError, match=f"no {missing} there; expected the folder of a finished run"):
        print_report(tmp_path)
