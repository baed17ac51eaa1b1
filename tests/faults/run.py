"""Does anything get lost? `python tests/faults/run.py --rounds 1 --seed 0 [--only kills,saves,...]` tries and reports.

A round has 20 kills, 10 preemptions, every file boundary of a save, full disks, damaged files, malformed inputs, hangs
and bad numbers. One soak of 2,000 steps comes on top, whatever the rounds. Exit code 1 if anything was lost.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
import time
from math import ceil
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[2])]

from faults import cases, rig  # noqa: E402
from faults.damage import damages  # noqa: E402
from faults.malformed import malformed  # noqa: E402
from faults.soak import soak  # noqa: E402

FAULTS = {
    "kills": lambda folder, rng, rounds: cases.kills(folder, rng, round(20 * rounds)),
    "preemptions": lambda folder, rng, rounds: cases.preemptions(folder, rng, round(10 * rounds)),
    "evaluations": lambda folder, rng, rounds: cases.preempted_evaluations(folder, rng, ceil(3 * rounds)),
    "launchers": lambda folder, rng, rounds: cases.killed_launchers(folder, rng, ceil(3 * rounds)),
    "requeues": lambda folder, rng, rounds: cases.requeues(folder, rng, ceil(2 * rounds)),
    "saves": lambda folder, rng, rounds: cases.kills_in_saves(folder, rng, rounds),
    "disks": lambda folder, rng, rounds: cases.full_disks(folder, rng, ceil(5 * rounds)),
    "damage": lambda folder, rng, rounds: damages(folder, rng, ceil(rounds)),
    "malformed": lambda folder, rng, rounds: malformed(folder, rng.randrange(2**32), ceil(40 * rounds)),
    "hangs": lambda folder, rng, rounds: cases.hangs(folder, rng, ceil(4 * rounds)),
    "deaths": lambda folder, rng, rounds: cases.deaths(folder, rng, ceil(3 * rounds)),
    "requeued": lambda folder, rng, rounds: cases.requeued_deaths(folder, rng, ceil(2 * rounds)),
    "slow": lambda folder, rng, rounds: cases.slow_saves(folder, rng, ceil(rounds)),
    "numbers": lambda folder, rng, rounds: cases.bad_numbers(
        folder, rng, [(stage, what) for stage in range(4) for what in ("loss", "gradient")]
    ),
    "soak": lambda folder, rng, rounds: soak(folder, 2000),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=float, default=1.0, help="a share of a round makes fewer tries")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default=",".join(FAULTS), help=f"some of {','.join(FAULTS)}")
    parser.add_argument("--async-save", action="store_true", help="all runs save in the background")
    arguments = parser.parse_args()
    if arguments.async_save:
        rig.EXTRA.append("checkpoint.async_save=true")
    names = arguments.only.split(",")
    unknown = [name for name in names if name not in FAULTS]
    if unknown:
        parser.error(f"no fault named {', '.join(unknown)}; there are {', '.join(FAULTS)}")
    outcomes = []
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        for name in names:
            started = time.monotonic()
            # each fault draws from the seed alone, whichever others are run
            outcomes.append(FAULTS[name](Path(folder), random.Random(f"{arguments.seed} {name}"), arguments.rounds))
            print(f"{name}: {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
    print(cases.table(outcomes))
    return int(any(outcome.lost for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
