"""What `test_forecast_states` launches: `live_states.py FOLDER`, with a `jobs.json` of named overrides.

For each job real engines are built and take two steps of two micro-steps on a few tokens, so that activations are
next to nothing. FOLDER gets, by job and moment, the bytes that live tensors hold on this rank and what the formulas
say. A storage is counted from the operation that makes it until it is freed, so peaks within a pass are seen.
"""

import gc
import json
import sys
import weakref
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dpo_scale.distributed import engine, ranks
from dpo_scale.distributed.join import join
from dpo_scale.forecast import states
from dpo_scale.forecast.shape import shape_of, shape_of_reference
from dpo_scale.models.load import load_model_config, load_policy, load_reference
from dpo_scale.reference.moving import MovingReference
from dpo_scale.run.cli import run
from dpo_scale.settings.tree import load_config

IDS = torch.arange(1, 4).view(1, 3)


class LiveMemory(TorchDispatchMode):
    """Bytes of the storages that were made since, now and at most."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self._known = set()
        self._sweep(counted=False)

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._note(tensor)
        return result

    def at_rest(self):
        """Bytes now, without what only waits for the garbage collector."""
        gc.collect()
        return self.now

    def sweep(self):
        """Count tensors that no operation made, as those read from a file."""
        self._sweep()

    def peak_of(self, action):
        self.peak = self.now
        action()
        return self.peak

    def _sweep(self, counted=True):
        gc.collect()
        for item in gc.get_objects():
            if isinstance(item, torch.Tensor):
                self._note(item, counted)

    def _note(self, tensor, counted=True):
        if tensor.device.type != "cpu" or tensor.layout != torch.strided:
            return
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes() if counted else 0
        if key in self._known:
            return
        self._known.add(key)
        weakref.finalize(storage, self._freed, key, size)
        self.now += size
        self.peak = max(self.peak, self.now)

    def _freed(self, key, size):
        self._known.discard(key)
        self.now -= size


def score(model) -> torch.Tensor:
    return model(IDS, torch.tensor([1]), torch.tensor([2])).sum()


def measure(config) -> dict[str, tuple[int, dict]]:
    """Bytes by moment, measured and by formula, part by part."""
    world, model_config = ranks.world_size(), load_model_config(config.model.path)
    shape = shape_of(config, model_config)
    found = {}

    def formula(moment):
        device = states.policy_states(config, shape, world, moment, device_type="cpu")
        host = states.policy_host_states(config, shape, world)
        return device | {f"{name} (host)": size for name, size in host.items()}

    with LiveMemory() as live:
        policy = load_policy(config, micro_steps=2)
        live.sweep()
        # optimizer states come with the first step; at stage 3 two passes show DeepSpeed the order of modules
        for _ in range(3 if config.deepspeed.stage == 3 else 2):
            engine.backward(policy, score(policy), last_micro_step=False)
            live.at_rest()
            losses = []
            forward = live.peak_of(lambda losses=losses: losses.append(score(policy)))
            live.at_rest()
            backward = live.peak_of(lambda losses=losses: engine.backward(policy, losses.pop(), last_micro_step=True))
            live.at_rest()
            step = live.peak_of(lambda: engine.optimizer_step(policy, 1e-3, 1.0))
            rest = live.at_rest()
        found["rest"] = rest, formula("rest")
        if config.deepspeed.stage == 3:
            found["gather"] = forward, formula("gather")
        found["pass"] = backward, max(formula("backward"), formula("reduce"), key=lambda parts: sum(parts.values()))
        found["step"] = step, formula("step")
        if config.reference.mode == "live":
            reference = load_reference(config, beside=[policy])
            live.sweep()
            if config.reference.sync_steps:
                moving = MovingReference(reference, policy, mixup=config.reference.sync_mixup, sync_steps=1)
                moving.move()
            with torch.no_grad():
                score(reference)
                after = live.at_rest()
                peak = live.peak_of(lambda: score(reference))
            shape = shape_of_reference(config, model_config)
            host = states.reference_host_states(config, shape, world)
            for moment, measured in (("rest", after), ("pass", peak)):
                if moment == "pass" and config.reference.stage == 0:
                    continue  # only the head's own memory is added
                parts = states.reference_states(config, shape, world, moment)
                found[f"reference, {moment}"] = measured - rest, parts | {f"{k} (host)": v for k, v in host.items()}
            engine.release(reference)
        engine.release(policy)
    return found


def main() -> None:
    folder = Path(next(argument for argument in sys.argv[1:] if not argument.startswith("--")))
    join(5)
    ranks.quiet_libraries()
    found = {}
    gc.freeze()  # what is there already is nothing to look through again
    gc.set_threshold(100, 1, 1)  # DeepSpeed leaves cycles behind, which would hold tensors until the next collection
    for name, overrides in json.loads((folder / "jobs.json").read_text()).items():
        found[name] = measure(load_config(None, overrides, for_training=False))
        gc.collect()
    if ranks.is_main():
        (folder / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    run(main)
