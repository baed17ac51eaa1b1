"""Train small models and count what the reference costs in each step: `count_passes.py JOBS.json`.

JOBS.json is {name: overrides}. `JOBS.json.counts` gets {name: [of each optimizer step: {"gathered": {phase: weights
that ZeRO-3 gathered in it, 1 for every weight once}, "passes": of the reference, "beats": of each rank so far}]}, as
rank 0 saw it. Small weights are sharded too, as a large model's are.
"""

import json
import sys
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import deepspeed.comm.comm as communication
import torch

from dpo_scale.distributed import ranks
from dpo_scale.models import load
from dpo_scale.observe.timing import StepTimer
from dpo_scale.progress import progress
from dpo_scale.reference.live import LiveReference
from dpo_scale.run.cli import run
from dpo_scale.settings.tree import load_config
from dpo_scale.training import loop as trainer

GATHERS = ("all_gather_into_tensor", "all_gather", "all_gather_coalesced")

phases, gathered, steps = ["none"], Counter(), []


def main() -> None:
    torch.use_deterministic_algorithms(True)
    count_in_phases()
    load.reference_deepspeed_config = with_all_sharded(load.reference_deepspeed_config)
    path = Path(next(argument for argument in sys.argv[1:] if argument.endswith(".json")))
    counts = {}
    for name, overrides in json.loads(path.read_text()).items():
        steps.clear()
        trainer.train(load_config(None, overrides))
        counts[name] = list(steps)
    if ranks.is_main():
        Path(f"{path}.counts").write_text(json.dumps(counts))


def with_all_sharded(make):
    def config_of(*arguments):
        made = make(*arguments)
        made["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        return made

    return config_of


def count_in_phases() -> None:
    real_phase, real_step, real_score = StepTimer.phase, trainer.train_step, LiveReference.score

    @contextmanager
    def phase(self, name):
        phases.append(name)
        with real_phase(self, name):
            yield
        phases.pop()

    def train_step(training, *more):
        count_collectives()
        gathered.clear()
        result = real_step(training, *more)
        weights = sum(getattr(p, "ds_numel", p.numel()) * p.element_size() for p in training.policy.module.parameters())
        passes = gathered.pop("passes", 0)
        steps.append(
            {
                "gathered": {name: count / weights for name, count in gathered.items()},
                "passes": passes,
                "beats": ranks.gather_objects(progress().beats),
            }
        )
        return result

    def score(self, batch):
        gathered["passes"] += 1
        real_score(self, batch)

    StepTimer.phase, trainer.train_step, LiveReference.score = phase, train_step, score


def count_collectives() -> None:
    """Count what goes through DeepSpeed's communication, which exists once the ranks have met."""
    backend = communication.cdb
    if getattr(backend, "is_counted", False):
        return
    backend.is_counted = True
    for name in GATHERS:
        setattr(backend, name, counted(getattr(backend, name)))


def counted(collective):
    def gather(*arguments, **named):
        output = arguments[0] if arguments else next(iter(named.values()))
        tensors = output if isinstance(output, (list, tuple)) else [output]
        gathered[phases[-1]] += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        return collective(*arguments, **named)

    return gather


if __name__ == "__main__":
    run(main)
