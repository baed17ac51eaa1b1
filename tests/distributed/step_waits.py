"""What makes the host wait in a training step, on an emulated CUDA device: `step_waits.py JOBS.json`.

JOBS.json is {name: overrides}. Each is a real run, engines and all, that is broken off after its third step, which is
the one that is watched: before, DeepSpeed sets things up and learns in which order weights are gathered. What was found
on rank 0 goes to `JOBS.json.found`: {name: {"waits": [[what, where, line], ...], "races": [text, ...]}}, in order.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from unittest.mock import patch

from dpo_scale.data.layout import PairBatch
from dpo_scale.distributed import ranks
from dpo_scale.distributed.join import join
from dpo_scale.run.cli import run
from dpo_scale.settings.tree import load_config
from dpo_scale.training import loop as trainer

sys.path.insert(0, str(Path(__file__).parent.parent))
from emulated_cuda import EmulatedCuda  # noqa: E402
from emulated_cuda_modes import emulated_accelerator  # noqa: E402

WATCHED_STEP = 3


class BrokenOffError(Exception):
    """The watched step is done."""


def main() -> None:
    path = next(argument for argument in sys.argv[1:] if argument.endswith(".json"))
    join(timeout_minutes=5)
    found = {}
    for name, overrides in json.loads(Path(path).read_text()).items():
        found[name] = watched_run(overrides)
        print(f"{name}:", *found[name]["waits"], *found[name]["races"], sep="\n    ", flush=True)
    if ranks.is_main():
        Path(path + ".found").write_text(json.dumps(found))


def watched_run(overrides: list[str]) -> dict:
    cuda, found = EmulatedCuda(), {}
    train_step = trainer.train_step

    def watched(run, batches, timer):
        cuda.waits.clear(), cuda.races.clear()
        # the thread that made the batch is not watched: where it would be on a machine with a GPU is said here
        result = train_step(run, pinned(cuda, batches), timer)
        if run.state.step < WATCHED_STEP:
            return result
        found.update(waits=[dataclasses.astuple(wait) for wait in cuda.waits], races=list(cuda.races))
        raise BrokenOffError

    with cuda, emulated_accelerator(cuda), patch.object(trainer, "train_step", watched):
        try:
            trainer.train(load_config(None, overrides))
        except BrokenOffError:
            return found
    raise AssertionError("the run ended before the watched step")


def pinned(cuda, batches):
    for micro in batches:
        for value in vars(micro).values():
            for batch in value if isinstance(value, list) else [value]:
                if isinstance(batch, PairBatch):
                    batch.map_tensors(lambda tensor: cuda.put(tensor, on_host=True, pinned=True))
        yield micro


if __name__ == "__main__":
    run(main)
