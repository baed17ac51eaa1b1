"""Several training runs in one launch (a launch costs more than a tiny run): `run_many.py jobs.json`.

`jobs.json` is a list of {"overrides": [...], "resume": null or text, "profile": [first, last step] if any, "refused":
true where a `UserError` is expected, on every rank}; every rank runs them one after another. `jobs.json.messages` gets
the errors' messages, null for a run that ended well.
"""

import json
import sys
from pathlib import Path

import torch

from dpo_scale import engine
from dpo_scale.cli import run
from dpo_scale.config import load_config
from dpo_scale.errors import UserError
from dpo_scale.trainer import train


def main() -> None:
    torch.use_deterministic_algorithms(True)
    path = next(argument for argument in sys.argv[1:] if argument.endswith(".json"))
    messages = []
    for job in json.loads(Path(path).read_text()):
        resume = job.get("resume")
        try:
            first, last = job.get("profile", (0, -1))
            profile = range(first, last + 1)
            train(load_config(None, job["overrides"], resume=resume), resume=resume, profile=profile)
            messages.append(None)
        except UserError as error:
            if not job.get("refused"):
                raise
            messages.append(str(error))
    if engine.is_main():
        Path(path + ".messages").write_text(json.dumps(messages))


if __name__ == "__main__":
    run(main)
