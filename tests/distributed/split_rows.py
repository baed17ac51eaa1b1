"""Rows split over 2 and 4 ranks beside the same rows whole, in plain torch: `split_rows.py OUT.json`, on 4 ranks.

Each case is an architecture (with heads, key heads), a layout and a way to take the loss. Every rank computes the whole
row by itself first. OUT.json gets, by case and size of the group, the largest difference of log-probs and, relative to
the largest entry of each parameter's gradient, of gradients summed over the group.
"""

import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tiny import tiny_config
from transformers import AutoModelForCausalLM

from dpo_scale.data.dataset import Pair
from dpo_scale.data.layout import make_batch
from dpo_scale.distributed import join, ranks, sequence_parallel
from dpo_scale.losses import sum_token_logps
from dpo_scale.models.activations import enable_checkpointing
from dpo_scale.models.attention_backends import use_attention
from dpo_scale.models.load import switch_off_dropout
from dpo_scale.models.scorer import PairScorer
from dpo_scale.run.cli import run
from dpo_scale.settings.loss import LossSettings
from dpo_scale.training.objective import from_logps, fused_by_pair

SIZES = (2, 4)
# tokens of prompt, chosen, rejected: rows of 214 and 302 tokens, which 4 does not divide; a completion of one token
PAIRS = [(90, 7, 25), (1, 1, 8), (33, 20, 29)]
# one pair alone, with fewer scored tokens than ranks
SHORT = [(9, 1, 1)]
CASES = {
    "llama": {},
    "llama, 1 key head": {"num_key_value_heads": 1},
    "llama, 4 key heads": {"num_key_value_heads": 4},
    "llama, 6 heads, 3 key heads": {"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 8},
    "qwen3": {},
    "gemma2": {},
    "gemma3": {},
    "gpt_oss": {},
    "gpt2": {},
}
LOSSES = {
    "dpo": LossSettings(),
    "ld": LossSettings(ld_alpha=0.3),
    "wpo": LossSettings(use_weighting=True),
}


def main():
    join.join(5)
    torch.use_deterministic_algorithms(True)
    sequence_parallel.make_groups(SIZES, 5)
    found = {}
    for case, settings in CASES.items():
        for layout in ("shared_prefix", "packed"):
            found[f"{case}, {layout}"] = compare(case.split(",")[0], settings, layout)
    for way in ("dpo", "ld", "wpo"):
        found[f"loss {way} by way of log-probs"] = compare("llama", {}, "shared_prefix", way, from_logps)
    for way in ("dpo", "ld"):
        found[f"loss {way}, fused"] = compare("llama", {}, "shared_prefix", way, fused_by_pair)
    found["fused, fewer scored tokens than ranks"] = compare("llama", {}, "packed", "dpo", fused_by_pair, SHORT)
    found["fewer scored tokens than ranks"] = compare("llama", {}, "shared_prefix", "dpo", from_logps, SHORT)
    found["checkpointing"] = compare("gemma3", {}, "shared_prefix", "dpo", fused_by_pair, checkpointing=True)
    gathered = ranks.gather_objects(found)
    if ranks.is_main():
        worst = {
            case: {size: [max(of_rank[case][size][i] for of_rank in gathered) for i in (0, 1)] for size in SIZES}
            for case in found
        }
        Path(sys.argv[-1]).write_text(json.dumps(worst))


def compare(architecture, changes, layout, loss="dpo", objective=from_logps, sizes=PAIRS, checkpointing=False):
    scorer = PairScorer(make(architecture, changes, checkpointing), "chunked", layout)
    expected_logps, expected = measure(scorer, batch_of(layout, sizes, 1), LOSSES[loss], objective)
    found = {}
    for size in SIZES:
        group = sequence_parallel.group_of(size)
        logps, gradients = measure(scorer, batch_of(layout, sizes, size), LOSSES[loss], objective)
        apart = 0.0
        for name, gradient in gradients.items():
            dist.all_reduce(gradient, group=group.process_group)
            largest = expected[name].abs().max().clamp(min=1e-9)
            apart = max(apart, ((gradient - expected[name]).abs().max() / largest).item())
        found[size] = ((logps - expected_logps).abs().max().item(), apart)
    return found


def make(architecture, changes, checkpointing):
    config = tiny_config(architecture)
    for name, value in changes.items():
        setattr(config, name, value)
    switch_off_dropout(config)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).float().train()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(4.0)
    if checkpointing:
        enable_checkpointing(model, offload=False)
    use_attention(model, "blocks")
    return model


def batch_of(layout, sizes, group_size):
    draw = np.random.default_rng(1)
    pairs = [Pair(*(draw.integers(0, 384, n) for n in of_pair), b"", i) for i, of_pair in enumerate(sizes)]
    share = {"group_size": group_size, "group_rank": ranks.rank() % group_size}
    batch = make_batch(layout, pairs, np.ones(len(pairs), dtype=np.float32), 0, **share)
    return replace(batch, reference_logps=torch.tensor([[-40.0, -60.0]] * len(pairs)))


def measure(scorer, batch, settings, objective):
    """Log-probs summed by completion, and gradients by name."""
    scorer.zero_grad()
    engine = partial(scorer)
    engine.module = scorer
    total, _, _ = objective(engine, batch, settings, 9.0, (len(batch.lengths),))
    total.backward()
    gradients = {name: p.grad.clone() for name, p in scorer.named_parameters() if p.grad is not None}
    with torch.no_grad():
        logps = scorer(**batch.scorer_inputs)
    return sum_token_logps(logps, batch.score_segments, batch.num_pairs, batch.lengths), gradients


if __name__ == "__main__":
    run(main)
