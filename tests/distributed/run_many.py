"""Run many training jobs in one launch, since starting ranks costs more than these runs: `run_many.py JOBS.json`.

JOBS.json is a list of `{"overrides": [...], "resume": null, "refused": false, "full_disk": null}`. A job that must be
refused leaves the message of its UserError in `JOBS.json.messages`, in the order of the jobs. `full_disk: [rank, step]`
lets that rank write no file above 4 KiB while it saves the checkpoint of that step.
"""

import json
import resource
import sys
from pathlib import Path

import torch

from dpo_scale import engine, trainer
from dpo_scale.cli import run
from dpo_scale.config import load_config
from dpo_scale.errors import UserError

save_checkpoint = trainer.save_checkpoint


def main() -> None:
    torch.use_deterministic_algorithms(True)
    path = next(argument for argument in sys.argv[1:] if argument.endswith(".json"))
    messages = []
    for job in json.loads(Path(path).read_text()):
        resume = job.get("resume")
        trainer.save_checkpoint = on_a_full_disk(*job["full_disk"]) if job.get("full_disk") else save_checkpoint
        try:
            trainer.train(load_config(None, job["overrides"], resume=resume), resume=resume)
            messages.append(None)
        except UserError as error:
            if not job.get("refused"):
                raise
            messages.append(str(error))
    if engine.is_main():
        Path(path + ".messages").write_text(json.dumps(messages))


def on_a_full_disk(rank, step):
    def save(policy, state, *arguments, **more):
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        if (engine.rank(), state.step) == (rank, step):
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
        try:
            return save_checkpoint(policy, state, *arguments, **more)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return save


if __name__ == "__main__":
    run(main)
