"""Several training runs in one launch (a launch costs more than a tiny run): `run_many.py jobs.json`.

`jobs.json` is a list of {"overrides": [...], "resume": null or text}; every rank runs them one after another.
"""

import json
import sys
from pathlib import Path

import torch

from dpo_scale.cli import run
from dpo_scale.config import load_config
from dpo_scale.trainer import train


def main() -> None:
    torch.use_deterministic_algorithms(True)
    for job in json.loads(Path([a for a in sys.argv[1:] if a.endswith(".json")][0]).read_text()):
        train(load_config(None, job["overrides"]), resume=job.get("resume"))


if __name__ == "__main__":
    run(main)
