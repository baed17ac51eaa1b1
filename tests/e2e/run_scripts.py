"""Run many scripts in one launch, since starting ranks costs more than tiny runs: `run_scripts.py COMMANDS.json`.

COMMANDS.json is a list of [script, argument, ...]. Every rank runs the `main` of one after another.
"""

import json
import runpy
import sys
from pathlib import Path

from dpo_scale.distributed import ranks
from dpo_scale.run.cli import run


def main() -> None:
    path = next(argument for argument in sys.argv[1:] if argument.endswith(".json"))
    for command in json.loads(Path(path).read_text()):
        if ranks.is_main():
            print("$", *command, flush=True)
        sys.argv = command
        runpy.run_path(command[0], run_name="script")["main"]()


if __name__ == "__main__":
    run(main)
