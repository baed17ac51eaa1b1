"""The mark of a finished run: believed only if it is whole, and an error that says what to do otherwise."""

from __future__ import annotations

import json
import random

import pytest

from dpo_scale.errors import CheckpointError
from dpo_scale.run.finished import finished_step, mark_finished, unmark_finished


def test_a_marked_run_is_finished_at_its_step_until_the_mark_is_taken_back(tmp_path):
    assert finished_step(tmp_path) is None
    mark_finished(tmp_path, 12, tmp_path / "model")
    assert finished_step(tmp_path) == 12
    assert json.loads((tmp_path / "finished.json").read_text())["model"] == "model"
    unmark_finished(tmp_path)
    assert finished_step(tmp_path) is None


def test_no_changed_byte_makes_another_step_or_an_unfinished_run(tmp_path):
    mark_finished(tmp_path, 12, tmp_path / "model")
    path = tmp_path / "finished.json"
    whole, rng, accepted = path.read_bytes(), random.Random(0), 0
    for position in range(len(whole)):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << rng.randrange(8)
        for content in (bytes(damaged), whole[:position]):
            path.write_bytes(content)
            try:
                assert finished_step(tmp_path) == 12
                accepted += 1
            except CheckpointError as error:
                assert "finished.json: damaged" in str(error) and "remove it if the run is to go on" in str(error)
    assert accepted < 10  # a letter of the word "checksum" itself: the mark then reads as one of version 0.1


def test_a_mark_of_version_0_1_is_read(tmp_path):
    record = {"step": 6, "model": "model", "finished": "2025-01-01T00:00:00+00:00", "tool": "dpo_scale 0.1.0"}
    (tmp_path / "finished.json").write_text(json.dumps(record, indent=1) + "\n")
    assert finished_step(tmp_path) == 6


def test_a_mark_that_cannot_be_written_says_that_the_model_is_safe_and_what_to_do(tmp_path):
    (tmp_path / "run").write_text("")  # stands in the way of the folder
    with pytest.raises(CheckpointError, match="finished.json: cannot be written .*the model is written; .*--resume"):
        mark_finished(tmp_path / "run", 12, tmp_path / "model")
