"""A model with Liger's kernels, a stand-in's, under ZeRO-3 on two ranks against the model itself: `liger_zero3.py OUT`.

Its layers are gathered as a whole, its activations are computed again. OUT gets both losses, the largest difference of
any gradient, and how often each kernel ran.
"""

import json
import sys
from pathlib import Path

import pytest
import torch
from deepspeed.utils import safe_get_full_grad, set_z3_leaf_modules
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

sys.path.insert(0, str(Path(__file__).parents[1]))
import liger_stand_in
from tiny import save_model

from dpo_scale.distributed import engine, ranks
from dpo_scale.distributed.join import join
from dpo_scale.models.activations import enable_checkpointing
from dpo_scale.models.liger import take_kernels
from dpo_scale.models.load import load_causal_lm
from dpo_scale.run.cli import run
from dpo_scale.settings.deepspeed import policy_deepspeed_config
from dpo_scale.settings.tree import load_config

IDS = torch.arange(3, 40)[None]


class Whole(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids):
        return self.model.base_model(input_ids=ids, use_cache=False).last_hidden_state.pow(3).mean()


def main():
    out = Path(next(argument for argument in sys.argv[1:] if argument.endswith(".json")))
    join(5)
    folder = out.parent / "model"
    ranks.first_then_others(lambda: folder.exists() or save_model(folder), is_first=ranks.local_rank() == 0)
    plain = Whole(load_causal_lm(str(folder), dtype="float32"))
    expected = plain(IDS)
    expected.backward()

    zero = "deepspeed.config={zero_optimization: {stage: 3, stage3_param_persistence_threshold: 0}}"
    config = load_config(None, [f"model.path={folder}", "data.train=none", "model.dtype=float32", zero])
    deepspeed_config = policy_deepspeed_config(config, 1, "cpu")
    with engine.partitioned_loading(deepspeed_config):
        model = load_causal_lm(str(folder), dtype="float32")
    assert model.model.norm.weight.numel() == 0, "not sharded"
    with pytest.MonkeyPatch.context() as patch:
        liger_stand_in.use_stand_in(patch)
        take_kernels(model, check=False)
    set_z3_leaf_modules(model, [LlamaDecoderLayer])
    enable_checkpointing(model, offload=False)
    policy = engine.initialize_policy(Whole(model), deepspeed_config, 0.0)
    policy.train()
    liger_stand_in.CALLS.clear()
    loss = policy(IDS)
    engine.backward(policy, loss, last_micro_step=True)
    differences = [
        (safe_get_full_grad(ours) - theirs.grad).abs().max().item()
        for ours, theirs in zip(policy.module.parameters(), plain.parameters(), strict=True)
        if theirs.grad is not None
    ]
    found = {"losses": [loss.item(), expected.item()], "worst": max(differences), "gradients": len(differences)}
    if ranks.is_main():
        out.write_text(json.dumps({**found, "calls": liger_stand_in.CALLS}))


if __name__ == "__main__":
    run(main)
