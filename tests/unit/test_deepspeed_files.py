"""DeepSpeed's files: what may be in them, what happens to what may not, and random states over a round trip."""

import os
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

from dpo_scale.checkpoint.deepspeed_files import DeepspeedFiles, load_file
from dpo_scale.distributed.random_state import random_state, restore_random_state
from dpo_scale.errors import CheckpointError


def round_trip(value, path):
    files = DeepspeedFiles()
    files.save(value, str(path))
    assert files.error is None and files.written[path.name]["bytes"] == path.stat().st_size
    return load_file(path)


def test_the_fp16_loss_scale_comes_back_with_all_its_counters(tmp_path, monkeypatch):
    monkeypatch.setattr("deepspeed.runtime.fp16.loss_scaler.log_dist", lambda *_, **__: None)  # wants ranks
    monkeypatch.setattr("deepspeed.runtime.fp16.loss_scaler.dist", SimpleNamespace(get_rank=lambda: 1))  # likewise
    scaler = DynamicLossScaler(2**16, 2, 1, 2, False, dtype=torch.half)
    for overflow in (False, True, False, False, True):
        scaler.update_scale(overflow)
    again = round_trip({"loss_scaler": scaler}, tmp_path / "file.pt")["loss_scaler"]
    assert vars(again) == vars(scaler) and scaler.cur_scale != 2**16
    for each in (scaler, again):
        each.update_scale(False)
    assert vars(again) == vars(scaler)


def test_a_file_that_would_run_code_is_refused_and_does_not(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"weight": torch.zeros(3), "more": Evil()}, tmp_path / "file.pt")
    with pytest.raises(CheckpointError, match="file.pt: refused: it holds more than tensors and plain values"):
        load_file(tmp_path / "file.pt")
    assert not (tmp_path / "ran").exists()


def test_every_generator_goes_on_where_it_was(tmp_path):
    def draw():
        return [random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(3).tolist()]

    draw()
    np.random.randn()  # an odd number of normals leaves one of a pair waiting
    random.gauss(0, 1)
    state = random_state()
    expected = [draw(), draw()]
    restore_random_state(round_trip(state, tmp_path / "random.pt"))
    assert [draw(), draw()] == expected


def test_after_an_error_nothing_more_is_written(tmp_path):
    files = DeepspeedFiles()
    files.save({"weight": torch.zeros(3)}, str(tmp_path / "none" / "first.pt"))
    files.save({"weight": torch.zeros(3)}, str(tmp_path / "second.pt"))
    assert isinstance(files.error, FileNotFoundError) and not files.written
    assert list(tmp_path.iterdir()) == []
