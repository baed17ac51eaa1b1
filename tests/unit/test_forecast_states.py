"""Shapes of models beside real ones, and the memory of states by hand on a shape of a few thousand weights."""

import pytest
from tiny import save_adapter, save_model, tiny_config
from transformers import AutoModelForCausalLM

from dpo_scale.errors import ModelError
from dpo_scale.forecast.disk import checkpoint_bytes, disk_bytes, held_by_a_save
from dpo_scale.forecast.shape import ModelShape, Parameter, shape_of, shape_of_reference
from dpo_scale.forecast.states import (
    policy_host_states,
    policy_states,
    reference_host_states,
    reference_states,
    states_left_out,
)
from dpo_scale.models import lora
from dpo_scale.settings.tree import load_config


def config_of(*overrides):
    return load_config(None, ["model.path=somewhere", "data.train=pairs.jsonl", *overrides])


def weights(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("tied", [False, True])
def test_a_shape_counts_a_model_that_has_weights(tied):
    config = tiny_config("llama", tied=tied)
    model = AutoModelForCausalLM.from_config(config)
    shape = shape_of(config_of(), config)
    assert shape.total == shape.trained == weights(model) and shape.frozen == 0
    assert shape.largest_layer == shape.largest_trained_layer == weights(model.model.layers[0])
    assert shape.outside_layers == weights(model) - 2 * weights(model.model.layers[0])
    assert (shape.embeddings, shape.head, shape.tied) == (384 * 32, 384 * 32, tied)
    assert (shape.layers, shape.heads, shape.key_heads, shape.head_dim) == (2, 4, 2, 8)
    assert {p.numel for p in shape.parameters if not p.matrix} == {32}


def test_experts_are_counted_apart():
    config = tiny_config("mixtral")
    shape = shape_of(config_of(), config)
    assert (shape.experts, shape.experts_per_token) == (4, 2)
    assert shape.expert_parameters == 2 * 4 * 3 * 32 * 64


@pytest.mark.parametrize("architecture", ["llama", "mixtral", "gpt2"])
def test_an_adapter_is_counted_as_the_run_would_put_it_on(architecture):
    config = tiny_config(architecture)
    run = config_of("lora.r=4")
    model = lora.add_adapter(AutoModelForCausalLM.from_config(config), run.lora, seed=0)
    shape = shape_of(run, config)
    assert shape.trained == sum(p.numel() for p in model.parameters() if p.requires_grad) > 0
    assert shape.total == weights(model)


def test_saved_adapters_of_policy_and_reference_are_counted(tmp_path):
    model = save_model(tmp_path / "model")
    adapter = save_adapter(model, tmp_path / "adapter")
    config = tiny_config("llama")
    base = weights(AutoModelForCausalLM.from_config(config))
    added = 2 * 2 * (2 * 32 + 32 + 16)  # rank 2 on q_proj and v_proj of two layers
    run = config_of(f"lora.adapter={adapter}", "reference.mode=adapter", f"reference.adapter={adapter}")
    shape = shape_of(run, config)
    assert (shape.trained, shape.total) == (added, base + 2 * added)
    reference = shape_of_reference(config_of(f"lora.adapter={adapter}"), config)
    assert (reference.trained, reference.total) == (0, base + added)


def test_a_config_that_makes_no_model_is_an_error_that_names_it():
    config = tiny_config("llama")
    config.hidden_act = "no such thing"
    with pytest.raises(ModelError, match="somewhere: no model can be built from its config"):
        shape_of(config_of(), config)


def by_hand(*, trained=True):
    def parameter(numel, matrix, layer):
        return Parameter("", numel, trained, matrix, layer, False)

    layers = [parameter(n, n > 100, k) for k in range(2) for n in (2000, 10)]
    return ModelShape(
        parameters=(parameter(1000, True, None), *layers, parameter(1000, True, None)),
        hidden=10, vocab=100, layers=2, heads=1, key_heads=1, head_dim=10, embeddings=1000, head=1000, tied=False,
        experts=0, experts_per_token=0, buffers=0,
    )  # fmt: skip


def test_stage_2_by_hand():
    run = config_of("deepspeed.stage=2")
    # of 6000 in matrices and 20 in vectors a rank of 4 has 1500 and, aligned, 6
    rest = {"weights": 2 * 6024, "fp32 master weights": 4 * 1506, "optimizer states": 8 * 1506}
    assert policy_states(run, by_hand(), 4, "rest") == rest
    accumulators = {"gradient accumulators": 4 * 1506}
    # the bucket of all gradients is not reduced before the end
    assert policy_states(run, by_hand(), 4, "backward") == rest | accumulators | {"communication buckets": 2 * 6020}
    # then it is copied, and one matrix's slice is brought to fp32
    buckets = {"communication buckets": 2 * 6020 + 2 * 6020 + 4 * 1500}
    assert policy_states(run, by_hand(), 4, "reduce") == rest | accumulators | buckets
    # the norm of one matrix in fp64
    assert policy_states(run, by_hand(), 4, "step") == rest | accumulators | {"optimizer step": 8 * 1500}
    assert policy_host_states(run, by_hand(), 4) == {}


def test_stage_3_by_hand_and_offloaded():
    json = "deepspeed.config={zero_optimization: {stage3_param_persistence_threshold: 100}}"
    run = config_of("deepspeed.stage=3", json)
    cut = 500 + 3 + 500 + 3 + 250 + 250  # each parameter by itself
    rest = {
        "communication buckets": 2 * 6020,
        "weights": 2 * cut,
        "fp32 master weights": 4 * cut,
        "optimizer states": 8 * cut,
        "gradient accumulators": 4 * cut,
        "gathered layers": 2 * 20,  # the vectors
    }
    assert policy_states(run, by_hand(), 4, "rest") == rest
    # all is prefetched at once, by way of a copy, and kept for the backward pass
    assert policy_states(run, by_hand(), 4, "gather")["gathered layers"] == 2 * (2 * 6000 + 20)
    backward = policy_states(run, by_hand(), 4, "backward")
    assert backward["gathered layers"] == 2 * 6020 and backward["gradients"] == 2 * 2010
    assert "gathered layers" not in policy_states(run, by_hand(), 1, "gather")  # one rank's shard is the weights
    off = config_of("deepspeed.stage=3", json, "deepspeed.offload_optimizer=cpu", "deepspeed.offload_param=cpu")
    assert policy_states(off, by_hand(), 4, "rest") == {
        name: rest[name] for name in ("communication buckets", "gathered layers")
    }
    assert sum(policy_host_states(off, by_hand(), 4).values()) == (2 + 4 + 8 + 4 + 4) * cut


def test_what_a_users_json_says_of_buckets_is_followed():
    def states(stage, **zero):
        said = ", ".join(f"{key}: {value}" for key, value in zero.items())
        run = config_of(f"deepspeed.stage={stage}", f"deepspeed.config={{zero_optimization: {{{said}}}}}")
        return policy_states(run, by_hand(), 4, "backward")

    # filled from the head on: 1000 | 10 and 2000 | 10 and 2000 | 1000
    assert states(2, reduce_bucket_size=2500)["communication buckets"] == 2 * 2500 + 2 * 2010 + 4 * 1500
    assert states(2, reduce_bucket_size=2500, overlap_comm="true")["communication buckets"] == 2 * 5000 + 4020 + 6000
    # a layer, its flat copy and that of the layer before; 100 more come ahead
    small = states(
        3, stage3_max_reuse_distance=3000, stage3_prefetch_bucket_size=100, stage3_param_persistence_threshold=0
    )
    assert small["gathered layers"] == 2 * (3 * 2010 + 100)
    # of layers that are gathered in parts the largest matrix
    parts = states(
        3, stage3_max_reuse_distance=100, stage3_prefetch_bucket_size=100, stage3_param_persistence_threshold=0,
        stage3_max_live_parameters=1500,
    )  # fmt: skip
    assert parts["gathered layers"] == 2 * (3 * 2000 + 100)
    assert states(3, zero_hpz_partition_size=2)["weights of the node (hpZ)"] == 2 * 3010


def test_states_of_other_optimizers():
    def states(*overrides):
        return policy_states(config_of("deepspeed.stage=2", *overrides), by_hand(), 4, "rest").get("optimizer states")

    assert states("train.optim=SGD") is None
    assert states("train.optim=SGD", "train.optim_args={momentum: 0.9}") == 4 * 1506
    assert states("train.optim=Lion") == 4 * 1506
    assert states("train.optim_args={amsgrad: true}") == 12 * 1506
    assert states("deepspeed.bf16_optimizer_states=true") == 4 * 1506


def test_what_is_not_covered_is_named():
    assert states_left_out(config_of()) == ()
    json = "deepspeed.config={zero_optimization: {contiguous_gradients: false, zero_quantized_weights: true}}"
    named = "; ".join(states_left_out(config_of(json, "train.optim=Muon")))
    assert all(word in named for word in ("contiguous_gradients", "zero_quantized_weights", "Muon"))


def test_a_reference_by_hand():
    frozen = by_hand(trained=False)

    def device(*overrides, moment="rest"):
        return sum(reference_states(config_of("reference.mode=live", *overrides), frozen, 4, moment).values())

    cut = 500 + 3 + 500 + 3 + 250 + 250
    assert device() == 2 * 6020
    assert device("reference.sync_steps=8", "reference.sync_mixup=0.5") == 2 * 6020 + 4 * cut
    assert device("reference.sync_steps=8") == 2 * 6020  # replaced, not mixed
    assert device("reference.stage=3") == 2 * cut
    assert device("reference.stage=3", moment="pass") == 2 * cut + 2 * (2 * 6020)
    offloaded = config_of("reference.mode=live", "reference.stage=3", "reference.offload_param=cpu")
    assert reference_host_states(offloaded, frozen, 4) == {"reference": 2 * cut}
    for none in (["reference.mode=store"], ["reference.mode=columns"], ["loss.loss_type=simpo"]):
        assert reference_states(config_of(*none), frozen, 4) == {}


def test_what_a_run_writes():
    def written(*overrides, saves=10):
        return disk_bytes(
            config_of("reference.mode=store", *overrides), by_hand(),
            saves=saves, pairs=100, tokens=5000, completion_tokens=3000,
        )  # fmt: skip

    one = (2 + 4 + 8) * 6020
    assert written() == {
        "checkpoints": 3 * one, "model": 2 * 6020, "tokenized data": 4 * 5000 + 48 * 100, "reference store": 3200,
    }  # fmt: skip
    assert written(saves=1)["checkpoints"] == one
    assert written("checkpoint.save_total_limit=null")["checkpoints"] == 10 * one
    assert written("deepspeed.stage=3")["checkpoints"] == 3 * 12 * 6020
    assert checkpoint_bytes(config_of("deepspeed.stage=0", "model.dtype=float32"), by_hand()) == 12 * 6020
    assert held_by_a_save(config_of(), by_hand(), 4) == 0
    assert held_by_a_save(config_of("checkpoint.async_save=true"), by_hand(), 4) == 2 * 6020 + 12 * 6020 // 4
