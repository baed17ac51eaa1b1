"""DeepSpeed's JSON: what the settings say, what a user's file may add, and what contradicts."""

import json

import pytest

from dpo_scale.errors import ConfigError
from dpo_scale.settings.deepspeed import policy_deepspeed_config, reference_deepspeed_config
from dpo_scale.settings.tree import load_config

MINIMAL = ["model.path=some/model", "data.train=pairs.jsonl"]


def load(tmp_path, user=None, *overrides):
    extra = []
    if user is not None:
        (tmp_path / "ds.json").write_text(json.dumps(user))
        extra = [f"deepspeed.config={tmp_path / 'ds.json'}"]
    return load_config(None, [*MINIMAL, *extra, *overrides])


def test_settings_become_deepspeed_keys(tmp_path):
    config = load(tmp_path, None, "deepspeed.stage=3", "deepspeed.offload_optimizer=cpu", "train.max_grad_norm=0.5")
    made = policy_deepspeed_config(config, micro_steps=4, device_type="cpu")
    assert made["zero_optimization"]["stage"] == 3
    assert made["zero_optimization"]["offload_optimizer"]["device"] == "cpu"
    assert made["gradient_clipping"] == 0.5
    assert made["gradient_accumulation_steps"] == 4
    assert made["bf16"]["enabled"] is True and made["fp16"]["enabled"] is False
    assert made["optimizer"]["params"]["torch_adam"] is True


def test_no_clipping_is_said_since_deepspeed_would_clip_at_1(tmp_path):
    config = load(tmp_path, None, "train.max_grad_norm=0")
    assert policy_deepspeed_config(config, 1, "cpu")["gradient_clipping"] == 0


def test_a_users_file_adds_keys_and_overrides_mere_defaults(tmp_path):
    user = {"zero_optimization": {"stage": 3, "reduce_bucket_size": 1000}, "steps_per_print": 5}
    config = load(tmp_path, user)
    made = policy_deepspeed_config(config, 1, "cpu")
    assert config.deepspeed.stage == 3
    assert made["zero_optimization"]["reduce_bucket_size"] == 1000
    assert made["steps_per_print"] == 5


def test_auto_counts_as_not_said(tmp_path):
    user = {
        "train_batch_size": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "optimizer": {"type": "AdamW", "params": {"lr": "auto"}},
        "scheduler": "auto",
    }
    made = policy_deepspeed_config(load(tmp_path, user), 1, "cpu")
    assert made["gradient_clipping"] == 1.0
    assert "auto" not in json.dumps(made)


@pytest.mark.parametrize(
    ("user", "parts"),
    [
        ({"gradient_cliping": 1}, ["gradient_cliping", "gradient_clipping"]),
        ({"gradient_clipping": 0.3}, ["gradient_clipping = 0.3", "train.max_grad_norm = 1.0"]),
        ({"fp16": {"enabled": True}}, ["fp16.enabled", "model.dtype"]),
        ({"optimizer": {"type": "Lamb"}}, ["optimizer.type", "train.optim"]),
        ({"optimizer": {"params": {"lr": 1}}}, ["optimizer.params.lr", "train.learning_rate"]),
        ({"scheduler": {"type": "WarmupLR"}}, ["scheduler", "train.lr_scheduler_type"]),
        ({"zero_optimization": {"stage": 7}}, ["deepspeed.config: deepspeed.stage = 7", "0, 1, 2, 3"]),
        ({"zero_optimization": {"stage": True}}, ["deepspeed.config: deepspeed.stage = True"]),
        ({"zero_optimization": {"offload_param": {"device": None}}}, ["deepspeed.config: deepspeed.offload_param"]),
        ({"zero_optimization": 3}, ["zero_optimization", "object"]),
        ({"bf16": {"bf16_optimizer_states": 1}}, ["deepspeed.bf16_optimizer_states", "1"]),
        ([1], ["JSON object"]),
    ],
)
def test_unknown_keys_and_contradictions_name_both_places(tmp_path, user, parts):
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, user)
    for part in parts:
        assert part in str(caught.value)


def test_stage_said_twice_must_agree(tmp_path):
    user = {"zero_optimization": {"stage": 2}}
    assert load(tmp_path, user, "deepspeed.stage=2").deepspeed.stage == 2
    with pytest.raises(ConfigError, match="zero_optimization.stage = 2 contradicts deepspeed.stage = 3"):
        load(tmp_path, user, "deepspeed.stage=3")


def test_an_offload_of_the_json_is_not_kept_against_a_setting_that_turns_it_off(tmp_path):
    user = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}
    assert load(tmp_path, user).deepspeed.offload_optimizer == "cpu"
    with pytest.raises(ConfigError, match="device = 'cpu' contradicts deepspeed.offload_optimizer = 'none'"):
        load(tmp_path, user, "deepspeed.offload_optimizer=none")


def test_broken_json_is_named(tmp_path):
    (tmp_path / "ds.json").write_text("{")
    with pytest.raises(ConfigError, match="ds.json"):
        load_config(None, [*MINIMAL, f"deepspeed.config={tmp_path / 'ds.json'}"])
    with pytest.raises(ConfigError, match="no such file"):
        load_config(None, [*MINIMAL, f"deepspeed.config={tmp_path / 'absent.json'}"])


def test_reference_is_independent_of_the_policys_stage(tmp_path):
    config = load(tmp_path, None, "deepspeed.stage=1", "reference.stage=3", "reference.offload_param=cpu")
    made = reference_deepspeed_config(config, "cpu")
    assert made["zero_optimization"] == {"stage": 3, "offload_param": {"device": "cpu", "pin_memory": False}}
    assert "optimizer" not in made


def test_the_reference_is_gathered_by_layers_of_up_to_the_policys_size(tmp_path):
    stated = {"zero_optimization": {"stage": 3, "stage3_max_live_parameters": 5, "stage3_prefetch_bucket_size": 7}}
    assert reference_deepspeed_config(load(tmp_path, stated, "reference.stage=3"), "cpu")["zero_optimization"] == {
        "stage": 3,
        "stage3_max_live_parameters": 5,
    }
    assert reference_deepspeed_config(load(tmp_path, stated), "cpu")["zero_optimization"] == {"stage": 0}


@pytest.mark.parametrize(("stage", "expected"), [(2, None), (3, False)])
def test_compiled_layers_at_stage_3_use_torchs_linear_function(tmp_path, stage, expected):
    overrides = (f"deepspeed.stage={stage}", f"reference.stage={3 if stage == 3 else 0}")
    config = load(tmp_path, None, "model.compile=true", *overrides)
    for made in (policy_deepspeed_config(config, 1, "cpu"), reference_deepspeed_config(config, "cpu")):
        assert made["zero_optimization"].get("memory_efficient_linear") is expected
    config = load(tmp_path, None, *overrides)
    assert "memory_efficient_linear" not in policy_deepspeed_config(config, 1, "cpu")["zero_optimization"]


@pytest.mark.parametrize(("device_type", "pinned"), [("cpu", False), ("cuda", True)])
def test_offload_is_pinned_wherever_the_device_is_not_a_cpu(tmp_path, device_type, pinned):
    offloads = ["deepspeed.stage=3", "deepspeed.offload_optimizer=cpu", "deepspeed.offload_param=cpu"]
    config = load(tmp_path, None, *offloads, "reference.stage=3", "reference.offload_param=cpu")
    policy = policy_deepspeed_config(config, 1, device_type)["zero_optimization"]
    reference = reference_deepspeed_config(config, device_type)["zero_optimization"]
    for offload in (policy["offload_optimizer"], policy["offload_param"], reference["offload_param"]):
        assert offload == {"device": "cpu", "pin_memory": pinned}


def test_a_users_file_decides_what_is_pinned(tmp_path):
    user = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu", "pin_memory": False}}}
    made = policy_deepspeed_config(load(tmp_path, user), 1, "cuda")
    assert made["zero_optimization"]["offload_optimizer"] == {"device": "cpu", "pin_memory": False}


def test_reduce_dtype_is_said_in_deepspeeds_words_and_only_where_it_is_set(tmp_path):
    assert "communication_data_type" not in policy_deepspeed_config(load(tmp_path), 1, "cpu")
    for name, short in (("float32", "fp32"), ("bfloat16", "bf16")):
        config = load(tmp_path, None, f"train.reduce_dtype={name}")
        assert policy_deepspeed_config(config, 1, "cpu")["communication_data_type"] == short
    user = {"communication_data_type": "fp32"}
    assert policy_deepspeed_config(load(tmp_path, user), 1, "cpu")["communication_data_type"] == "fp32"
    load(tmp_path, user, "train.reduce_dtype=float32")
    with pytest.raises(ConfigError, match="communication_data_type = 'fp32' contradicts train.reduce_dtype = 'bf16'"):
        load(tmp_path, user, "train.reduce_dtype=bfloat16")


def test_bf16_optimizer_states_are_the_same_setting_here_and_in_a_users_file(tmp_path):
    setting = load(tmp_path, None, "deepspeed.bf16_optimizer_states=true")
    user = {"bf16": {"bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}}
    for config in (setting, load(tmp_path, user)):
        assert config.deepspeed.bf16_optimizer_states is True
        made = policy_deepspeed_config(config, 1, "cpu")["bf16"]
        assert made["bf16_master_weights_and_grads"] is made["bf16_optimizer_states"] is True
    assert policy_deepspeed_config(load(tmp_path), 1, "cpu")["bf16"] == {"enabled": True}
    with pytest.raises(ConfigError, match="bf16_optimizer_states = False contradicts deepspeed.bf16_optimizer_states"):
        load(tmp_path, {"bf16": {"bf16_optimizer_states": False}}, "deepspeed.bf16_optimizer_states=true")


def test_engines_are_made_for_the_device_that_they_run_on(tmp_path, monkeypatch):
    import torch

    from dpo_scale.distributed import engine, ranks
    from dpo_scale.models import load as loading

    class LoadsNoWeights(Exception):
        pass

    made = []

    def stop(deepspeed_config):
        made.append(deepspeed_config["zero_optimization"]["offload_param"]["pin_memory"])
        raise LoadsNoWeights

    monkeypatch.setattr(engine, "partitioned_loading", stop)
    monkeypatch.setattr(loading, "resolve_layout", lambda config: None)
    options = ["deepspeed.stage=3", "deepspeed.offload_param=cpu", "reference.stage=3", "reference.offload_param=cpu"]
    config = load(tmp_path, None, *options)
    for device in ("cpu", "cuda:0"):
        monkeypatch.setattr(ranks, "device", lambda device=device: torch.device(device))
        for start in (lambda: loading.load_policy(config, 1), lambda: loading.load_reference(config)):
            with pytest.raises(LoadsNoWeights):
                start()
    assert made == [False, False, True, True]
