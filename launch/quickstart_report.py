"""Show what a run learnt: `python launch/quickstart_report.py --run RUN_DIR`."""

from __future__ import annotations

import argparse
from pathlib import Path

from dpo_scale.run.cli import run


def main() -> None:
    parser = argparse.ArgumentParser(description="Held-out metrics and answers of a run, before and after.")
    parser.add_argument("--run", type=Path, required=True, metavar="FOLDER", help="the folder of a finished run")
    arguments = parser.parse_args()

    from dpo_scale.observe.report import print_report

    print_report(arguments.run)


if __name__ == "__main__":
    run(main)
