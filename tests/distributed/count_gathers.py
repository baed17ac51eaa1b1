"""Train small models and count what ZeRO-3 gathers in each phase of a step: `count_gathers.py JOBS.json`.

JOBS.json is {name: overrides}. `JOBS.json.counts` gets {name: [per optimizer step: {phase: bytes gathered / bytes of
the model's weights}]}, as rank 0 saw it; a phase that gathers every weight once says 1. Small weights are sharded too,
as large models' weights are.
"""

import json
import sys
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import deepspeed.comm.comm as communication

from dpo_scale import engine, trainer
from dpo_scale.cli import run
from dpo_scale.config import load_config
from dpo_scale.models import load
from dpo_scale.timing import StepTimer

GATHERS = ("all_gather_into_tensor", "all_gather", "all_gather_coalesced")

phases, gathered, steps = ["none"], Counter(), []


def main() -> None:
    shard_everything()
    path = Path(next(argument for argument in sys.argv[1:] if argument.endswith(".json")))
    counts = {}
    for name, overrides in json.loads(path.read_text()).items():
        steps.clear()
        trainer.train(load_config(None, overrides))
        counts[name] = list(steps)
    if engine.is_main():
        Path(f"{path}.counts").write_text(json.dumps(counts))


def shard_everything() -> None:
    real = load.reference_deepspeed_config

    def sharded(config):
        made = real(config)
        made["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        return made

    load.reference_deepspeed_config = sharded


def count_in_phases() -> None:
    backend, real_phase, real_step = communication.cdb, StepTimer.phase, trainer.train_step
    for name in GATHERS:
        setattr(backend, name, counted(getattr(backend, name)))

    @contextmanager
    def phase(self, name):
        phases.append(name)
        with real_phase(self, name):
            yield
        phases.pop()

    def train_step(training, *more):
        gathered.clear()
        result = real_step(training, *more)
        weights = sum(
            getattr(p, "ds_numel", p.numel()) * p.element_size() for p in training.policy.module.parameters()
        )
        steps.append({name: count / weights for name, count in gathered.items()})
        return result

    StepTimer.phase, trainer.train_step = phase, train_step


def counted(collective):
    def gather(*arguments, **named):
        output = arguments[0] if arguments else next(iter(named.values()))
        tensors = output if isinstance(output, (list, tuple)) else [output]
        gathered[phases[-1]] += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        return collective(*arguments, **named)

    return gather


real_init = engine.init_distributed


def init_distributed(timeout_minutes):
    started = communication.cdb is not None
    real_init(timeout_minutes)
    if not started:
        count_in_phases()


if __name__ == "__main__":
    trainer.engine.init_distributed = init_distributed
    run(main)
