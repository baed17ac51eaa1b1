"""What makes the host wait in a training step, on an emulated CUDA device: `step_waits.py JOBS.json`.

JOBS.json is {name: overrides}. Each is a real run, engine and all, that is broken off after its second step, which is
the one that is watched: in the first one DeepSpeed sets things up. `JOBS.json.waits` gets {name: [[what, where, line],
...]} of this rank in order, and {name: races} under "races".
"""

from __future__ import annotations

import dataclasses
import json
import sys
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import torch

from dpo_scale import engine, trainer
from dpo_scale.cli import run
from dpo_scale.config import load_config
from dpo_scale.data.layout import PairBatch

sys.path.insert(0, str(Path(__file__).parent.parent))
from emulated_cuda import EmulatedCuda, Event, Stream  # noqa: E402

WATCHED_STEP = 2


class BrokenOffError(Exception):
    """The watched step is done."""


def main() -> None:
    path = next(argument for argument in sys.argv[1:] if argument.endswith(".json"))
    engine.init_distributed(timeout_minutes=5)
    found = {}
    for name, overrides in json.loads(Path(path).read_text()).items():
        found[name] = watched_run(overrides)
        print(f"{name}:", *found[name]["waits"], *found[name]["races"], sep="\n    ", flush=True)
    if engine.is_main():
        Path(path + ".waits").write_text(json.dumps(found))


def watched_run(overrides: list[str]) -> dict:
    cuda, found = EmulatedCuda(), {}
    train_step = trainer.train_step

    def watched(run, state, batches, timer):
        cuda.waits.clear(), cuda.races.clear()
        # the thread that made the batch is not watched: where it would be on a machine with a GPU is said here
        result = train_step(run, state, pinned(cuda, batches), timer)
        if state.step < WATCHED_STEP:
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


@contextmanager
def emulated_accelerator(cuda: EmulatedCuda):
    """DeepSpeed's view of the device: its CPU accelerator, which works like CUDA's for the thread that is watched."""
    from deepspeed.accelerator import get_accelerator

    def tensor_of(dtype):
        return property(lambda _: lambda data: torch.tensor(data, dtype=dtype, device="cuda"))

    answers = {
        **dict.fromkeys(("is_synchronized_device", "resolves_data_dependency"), lambda self: False),
        **dict.fromkeys(("handles_memory_backpressure", "use_host_timers"), lambda self: False),
        "device_name": lambda self, index=None: "cuda" if cuda.active else "cpu",
        "current_device_name": lambda self: "cuda:0" if cuda.active else "cpu",
        "on_accelerator": lambda self, tensor: cuda.on_device(tensor),
        "stream": lambda self, stream: cuda.on_stream(stream),
        "current_stream": lambda self, index=None: cuda.current,
        "default_stream": lambda self, index=None: cuda.default,
        "synchronize": lambda self, index=None: cuda.synchronize(),
        "Stream": property(lambda self: Stream),
        "Event": property(lambda self: Event),
        "FloatTensor": tensor_of(torch.float32),
        "ByteTensor": tensor_of(torch.uint8),
    }
    accelerator = get_accelerator()
    before = type(accelerator)
    accelerator.__class__ = type("Emulated", (before,), answers)
    try:
        yield
    finally:
        accelerator.__class__ = before


if __name__ == "__main__":
    run(main)
