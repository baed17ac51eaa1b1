"""Several precomputes in one launch: `precompute_many.py jobs.json`.

`jobs.json` is a list of {"overrides": [...], "copy": null or [from, to]}; a file is copied before its job. The numbers
of rows that were computed go to `jobs.json.computed`.
"""

import json
import shutil
import sys
from pathlib import Path

from dpo_scale.distributed import ranks
from dpo_scale.distributed.join import join
from dpo_scale.run.cli import run
from dpo_scale.settings.tree import load_config
from dpo_scale.training.precompute import precompute


def main() -> None:
    path = next(argument for argument in sys.argv[1:] if argument.endswith(".json"))
    join(5)
    computed = []
    for job in json.loads(Path(path).read_text()):
        if job["copy"] and ranks.is_main():
            shutil.copyfile(*job["copy"])
        ranks.barrier()
        computed.append(precompute(load_config(None, job["overrides"])))
    if ranks.is_main():
        Path(path + ".computed").write_text(json.dumps(computed))


if __name__ == "__main__":
    run(main)
