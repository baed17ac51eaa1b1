"""Run many training jobs in one launch, since starting ranks costs more than these runs: `run_many.py JOBS.json`.

JOBS.json is a list of {"overrides": [...], "resume": null or text, "profile": [first, last step] if any, "full_disk":
[rank, step] if that rank is to write no file above 4 KiB while it saves the checkpoint of that step, "attention":
"raises" or "wrong" if that is what `blocks` does on rank 1, "refused": true where a `UserError` is expected, on every
rank}; every rank runs them one after another. `JOBS.json.messages` gets the errors' messages, null for a run that ended
well.
"""

import json
import resource
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from dpo_scale.checkpoint.save import Saver
from dpo_scale.distributed import ranks
from dpo_scale.errors import UserError
from dpo_scale.models.attention_backends import BACKENDS
from dpo_scale.run.cli import run
from dpo_scale.settings.tree import load_config
from dpo_scale.training import loop as trainer

start_save = Saver.start
BLOCKS = BACKENDS["blocks"]


def main() -> None:
    torch.use_deterministic_algorithms(True)
    path = next(argument for argument in sys.argv[1:] if argument.endswith(".json"))
    messages = []
    for job in json.loads(Path(path).read_text()):
        resume = job.get("resume")
        Saver.start = on_a_full_disk(*job["full_disk"]) if job.get("full_disk") else start_save
        kind = job.get("attention") if ranks.rank() == 1 else None
        BACKENDS["blocks"] = replace(BLOCKS, attend=partial(broken_blocks, kind)) if kind else BLOCKS
        try:
            first, last = job.get("profile", (0, -1))
            profile = range(first, last + 1)
            # forecasts have tests of their own, and each would take longer than these steps
            overrides = ["train.check_memory=off", *job["overrides"]]
            trainer.train(load_config(None, overrides, resume=resume), resume=resume, profile=profile)
            messages.append(None)
        except UserError as error:
            if not job.get("refused"):
                raise
            messages.append(str(error))
    if ranks.is_main():
        Path(path + ".messages").write_text(json.dumps(messages))


def broken_blocks(kind, *arguments, **settings):
    if kind == "raises":
        raise RuntimeError("no kernel image is available for execution on the device")
    return BLOCKS.attend(*arguments, **settings)[0].flip(1), None


def on_a_full_disk(rank, step):
    def start(saver, policy, state, reference):
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        if (ranks.rank(), state.step) == (rank, step):
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
        try:
            start_save(saver, policy, state, reference)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return start


if __name__ == "__main__":
    run(main)
