"""Counted FLOPs against torch's own counter, and worked out by hand where it has no say."""

import numpy as np
import pytest
import torch
from tiny import tiny_config
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, MixtralConfig

from dpo_scale.data.flops import ForwardFlops, forward_flops
from dpo_scale.data.planning import passes_of
from dpo_scale.observe.devices import peak_flops
from dpo_scale.settings.tree import load_config


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen3", "cohere"])
def test_a_forward_pass_is_what_torch_counts(architecture, tied):
    config = tiny_config(architecture, tied=tied)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=torch.zeros(3, 24, dtype=torch.long), use_cache=False)
    ours = forward_flops(config)
    ((window, attention),) = ours.attention
    assert window is None
    # eager attention multiplies all 24 x 24 keys; the rotary angles are a product of matrices too, 24 x 1 x size/2
    rotary = 2 * 24 * config.head_dim // 2 * 3 if architecture in ("qwen3",) else None
    if rotary is None:
        rotary = 0 if architecture == "gpt2" else 2 * 24 * (32 // 4) // 2 * 3
    expected = 3 * 24 * (ours.per_token + ours.per_scored_token) + 3 * 24 * 24 * attention
    assert counter.get_total_flops() == pytest.approx(expected, abs=rotary)


def test_pairs_by_hand():
    flops = ForwardFlops(per_token=1.0, per_scored_token=10.0, attention=((None, 100.0),))
    lengths = np.array([[3, 2, 1]])
    # shared: 6 tokens; the prompt's queries see 1 + 2 + 3 keys, the completions' 4 + 5 and 4
    assert flops.of_pairs(lengths, "shared_prefix")[0] == 6 + 30 + 1900
    # packed: rows of 5 and 4 tokens, 15 and 10 keys
    assert flops.of_pairs(lengths, "packed")[0] == 9 + 30 + 2500
    # padded: two rows of 5
    assert flops.of_pairs(lengths, "padded")[0] == 10 + 30 + 3000
    assert flops.of_pairs(lengths, "packed", weights=2, attention=3)[0] == 2 * 39 + 7500
    assert flops.of_sequences(np.array([4]))[0] == 4 + 1000


def test_a_window_lets_no_more_keys_through():
    flops = ForwardFlops(0.0, 0.0, attention=((3, 1.0), (None, 100.0)))
    lengths = np.array([[4, 2, 0]])
    # positions 0 to 3 see 1, 2, 3, 3 keys; 4 and 5 see 3 each
    assert flops.of_pairs(lengths, "shared_prefix")[0] == 9 + 6 + 100 * (10 + 11)


def test_windows_and_experts_are_read_off_the_config():
    gemma = forward_flops(tiny_config("gemma2"))  # one layer of each kind, 4 heads of 8
    assert sorted(gemma.attention, key=str) == [(16, 128.0), (None, 128.0)]
    shape = {
        "vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 2, "num_local_experts": 4, "sliding_window": None,
    }  # fmt: skip
    one, two = (forward_flops(MixtralConfig(**shape, num_experts_per_tok=n)) for n in (1, 2))
    assert two.per_token - one.per_token == 2 * 3 * 16 * 32  # one expert more, of three matrices


@pytest.mark.parametrize(
    ("architecture", "experts"),
    # of a layer: two experts of three matrices each, and the router
    [
        ("mixtral", 2 * 3 * 32 * 64 + 4 * 32),
        ("qwen3_moe", 2 * 3 * 32 * 16 + 8 * 32),
        ("olmoe", 2 * 3 * 32 * 64 + 8 * 32),
        ("gpt_oss", 2 * 3 * 32 * 64 + 4 * 32),
    ],
)
def test_of_experts_the_ones_a_token_meets_are_counted(architecture, experts):
    attention = 2 * 32 * 32 + 2 * 32 * 16  # queries and output of four heads, keys and values of two
    assert forward_flops(tiny_config(architecture)).per_token == 2 * 2 * (attention + experts)


def test_passes_over_a_pair():
    common = ["model.path=m", "data.train=t.jsonl"]
    for overrides, expected in (
        ([], (4, 4)),
        (["reference.mode=store"], (3, 3)),
        (["loss.loss_type=simpo"], (3, 3)),
        (["lora.r=4", "reference.mode=adapter"], (3, 4)),
    ):
        assert passes_of(load_config(None, [*common, *overrides])) == expected, overrides


def test_peaks_by_device_name():
    for name, tflops in (
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.5),
        ("NVIDIA H200", 989.4),
        ("NVIDIA B200", 2250),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362.05),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("AMD Instinct MI300X", 1307.4),
    ):
        assert peak_flops(name) == tflops * 1e12, name
    assert peak_flops("cpu") is None
