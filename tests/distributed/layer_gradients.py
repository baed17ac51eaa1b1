"""Gradients of a model whose layers are gathered whole, beside plain torch's, on one rank: `layer_gradients.py FILE`.

For each arm FILE gets the largest relative difference, how many layers were leaves, and, where layers are compiled, how
many graphs were made and how often one broke.
"""

import json
import sys
from pathlib import Path

import torch
from deepspeed.utils import get_z3_leaf_modules, safe_get_full_grad
from tiny import tiny_config
from transformers import AutoModelForCausalLM

from dpo_scale.distributed import engine
from dpo_scale.distributed.join import join
from dpo_scale.models.activations import compile_layers, enable_checkpointing
from dpo_scale.models.load import switch_off_dropout
from dpo_scale.models.scorer import PairScorer, causal_lm
from dpo_scale.models.zero3 import decoder_layers, make_leaves
from dpo_scale.run.cli import run

ARMS = {
    "plain": (),
    "checkpointed": ("checkpointing",),
    "on the host": ("checkpointing", "offload"),
    "without a gradient": ("unused", "checkpointing"),
    "partly frozen": ("frozen",),
    "adapter": ("lora",),
    "compiled": ("compile",),
    "compiled, checkpointed, partly frozen": ("compile", "checkpointing", "frozen"),
}
SHAPES = [(2, 17), (3, 40), (1, 33), (1, 64)]


def main() -> None:
    join(timeout_minutes=5)
    results = {name: measure(set(traits)) for name, traits in ARMS.items()}
    Path(sys.argv[1]).write_text(json.dumps(results))


def make(traits):
    torch.manual_seed(0)
    config = tiny_config("llama")
    config.num_hidden_layers = 4
    switch_off_dropout(config)
    model = AutoModelForCausalLM.from_config(config)
    layers = decoder_layers(model)
    if "unused" in traits:
        for layer in layers:
            layer.unused = torch.nn.Parameter(torch.ones(40, 3))
    if "frozen" in traits:
        for part in (model.get_input_embeddings(), *layers[1:3]):
            part.requires_grad_(False)
    if "lora" in traits:
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", init_lora_weights=False)
        model = get_peft_model(model, config)
    return model


def batch(shape):
    ids = torch.randint(3, 384, shape, generator=torch.Generator().manual_seed(shape[1]))
    index = torch.arange(3, ids.numel() - 1)
    return ids, index, ids.flatten()[index + 1]


def measure(traits):
    plain = PairScorer(make(traits))
    for shape in SHAPES:
        plain(*batch(shape)).sum().backward()
    expected = {name: p.grad for name, p in plain.named_parameters() if p.requires_grad}

    model = make(traits)
    inner = causal_lm(model)
    if "checkpointing" in traits:
        enable_checkpointing(inner, offload="offload" in traits)
    make_leaves(inner, 10**9)
    if "compile" in traits:
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        compile_layers(inner, in_hooks=True, backend="aot_eager")
    config = {
        "train_batch_size": len(SHAPES),
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": len(SHAPES),
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0, "memory_efficient_linear": False},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }
    policy = engine.initialize_policy(PairScorer(model), config, weight_decay=0.0)
    for shape in SHAPES:
        policy.eval()
        with torch.no_grad():
            policy(*batch(shape))
        policy.train()
        engine.backward(policy, policy(*batch(shape)).sum(), last_micro_step=shape == SHAPES[-1])
    worst = 0.0
    for name, parameter in policy.module.named_parameters():
        if parameter.requires_grad:
            gradient, exact = safe_get_full_grad(parameter), expected[name]
            exact = torch.zeros_like(gradient) if exact is None else exact
            size = exact.abs().max().clamp(min=1e-9)
            worst = max(worst, ((gradient - exact).abs().max() / size).item())
    counters = torch._dynamo.utils.counters
    return {
        "worst": worst,
        "leaves": len(get_z3_leaf_modules(inner)),
        "graphs": counters["stats"]["unique_graphs"] if "compile" in traits else 0,
        "breaks": sum(counters["graph_break"].values()),
    }


if __name__ == "__main__":
    run(main)
