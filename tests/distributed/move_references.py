"""What `test_moving_reference` launches: `move_references.py FOLDER`, with a `jobs.json` of named settings.

For each job a policy takes optimizer steps on a made-up loss and the reference moves after each. Rank 0 writes what the
policy's and the reference's weights were after each move, and what the reference says of some tokens at the end, to
`NAME.safetensors`. A second reference, at the other stage, is then restored from the first one's state.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from dpo_scale.distributed import engine, ranks
from dpo_scale.distributed.join import join
from dpo_scale.models.load import load_policy, load_reference
from dpo_scale.reference.moving import MovingReference
from dpo_scale.run.cli import run
from dpo_scale.settings.tree import load_config

IDS = torch.arange(1, 25).view(2, 12)


def score(model) -> torch.Tensor:
    """Log-probs of each token of `IDS` but the first of a row, [2 * 11]."""
    index = torch.arange(24).view(2, 12)[:, :-1].flatten()
    return model(IDS, index, IDS[:, 1:].flatten())


def whole(model, prefix: str) -> dict[str, torch.Tensor]:
    state = engine.consolidated_state_dict(model) or {}
    return {prefix + name.removeprefix("model."): tensor.clone() for name, tensor in state.items()}


def main() -> None:
    folder = Path(next(argument for argument in sys.argv[1:] if not argument.startswith("--")))
    join(5)
    ranks.quiet_libraries()
    for name, job in json.loads((folder / "jobs.json").read_text()).items():
        config = load_config(None, [*job["overrides"], "data.layout=padded"])
        policy, reference = load_policy(config, micro_steps=1), load_reference(config)
        moving = MovingReference(reference, policy, mixup=config.reference.sync_mixup, sync_steps=1)
        seen = {}
        for move in range(job["moves"]):
            engine.backward(policy, score(policy).sum() * (1 + ranks.rank()), last_micro_step=True)
            engine.optimizer_step(policy, 0.01 * (move + 1), 1.0)
            with torch.no_grad():
                score(reference)  # small weights stay gathered after a pass at stage 3
            moving.after_step(move + 1)
            seen |= whole(policy, f"policy.{move}.") | whole(reference, f"reference.{move}.")
        with torch.no_grad():
            seen |= {"ids": IDS, "logps": score(reference)}
        state = moving.state()
        assert sum(tensor.numel() for tensor in state.values()) <= sum(  # a share of it, not the model
            getattr(p, "ds_numel", p.numel()) for p in reference.module.parameters()
        ) // ranks.world_size() + len(state)
        config.reference.stage = 3 - config.reference.stage
        other = load_reference(config)
        restored = MovingReference(other, policy, mixup=config.reference.sync_mixup, sync_steps=1)
        with torch.no_grad():
            score(other)
        restored.load_state(ranks.gather_objects(state))
        seen |= whole(other, "restored.")
        restored.move()
        moving.move()
        seen |= whole(reference, "next.") | whole(other, "restored_next.")
        if ranks.is_main():
            save_file({key: tensor.contiguous().cpu() for key, tensor in seen.items()}, folder / f"{name}.safetensors")


if __name__ == "__main__":
    run(main)
