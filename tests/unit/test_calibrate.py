"""Measuring this machine for a run: what is stored, found again, and used."""

from pathlib import Path

import numpy as np
import pytest

from dpo_scale.data.batching import PairOrder
from dpo_scale.data.flops import forward_flops
from dpo_scale.data.groups import Groups
from dpo_scale.data.planning import make_planner
from dpo_scale.errors import ConfigError
from dpo_scale.forecast.calibrate import calibrate, calibrated, calibrated_device
from dpo_scale.forecast.parts import Workload
from dpo_scale.settings.tree import load_config

pytestmark = pytest.mark.slow


def tiny_llama(hidden=64):
    from transformers import LlamaConfig

    return LlamaConfig(
        hidden_size=hidden, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=256,
    )  # fmt: skip


def config_of(dtype="float32"):
    return load_config(None, ["model.path=m", "data.train=[t.jsonl]", "reference.mode=store", f"model.dtype={dtype}"])


def workload(config, model_config, lengths=(60, 30, 30)):
    table = np.tile(np.array(lengths, dtype=np.int32), (8, 1))
    planner = make_planner(config, "shared_prefix", Groups(1), forward_flops(model_config), table)
    order = PairOrder(8, 8, 0)
    return Workload(planner, order, 1, planner.first_plans(order, 1), 0, 0, "made up")


def test_what_is_measured_is_stored_and_found_for_this_run_only(tmp_path, monkeypatch):
    monkeypatch.setenv("DPO_SCALE_CACHE", str(tmp_path))
    config, model_config = config_of(), tiny_llama()
    of_run = workload(config, model_config)
    assert calibrated(config, model_config, of_run) is None
    assert calibrated_device(config, model_config, of_run) is None
    found = calibrate(config, model_config, of_run)
    assert calibrated(config, model_config, of_run) == found
    device = calibrated_device(config, model_config, of_run)
    assert device == found.as_device() and device.source.startswith("measured here")
    # another width, dtype, number of ranks and length of rows were not measured
    wider = tiny_llama(hidden=128)
    assert calibrated(config, wider, workload(config, wider)) is None
    assert calibrated(config_of("bfloat16"), model_config, of_run) is None
    assert calibrated(config, model_config, of_run, ranks=2) is None
    assert calibrated(config, model_config, workload(config, model_config, (600, 300, 300))) is None
    # how deep the model is does not matter
    deeper = tiny_llama()
    deeper.num_hidden_layers = 5
    assert calibrated(config, deeper, of_run) == found

    assert found.products > 1e8 and found.bandwidth > 1e8 and found.memory > 1e8
    assert 0.0 < found.efficiency <= 1.0
    rates = found.rates
    for line in (rates.layers_train, rates.layers_forward, rates.head_train, rates.head_forward):
        assert line.base >= 0.0 and line.flops > 0.0
    assert rates.optimizer > 0.0 and rates.reduce is None and rates.exchange is None  # one rank sends nothing


def test_a_damaged_file_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("DPO_SCALE_CACHE", str(tmp_path))
    config, model_config = config_of(), tiny_llama()
    of_run = workload(config, model_config)
    calibrate(config, model_config, of_run)
    (stored,) = Path(tmp_path, "calibration").iterdir()
    for content in ("", "[]", '{"device": "cpu"}'):
        stored.write_text(content)
        with pytest.raises(ConfigError, match="not a calibration"):
            calibrated(config, model_config, of_run)
