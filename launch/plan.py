"""Whether a run fits, how long it takes, and what would help: `python launch/plan.py --config FILE [...]`.

Needs no weights and no GPU: a model's config.json and the data, or `--lengths`, are enough.
"""

from __future__ import annotations

import sys

from dpo_scale.run.cli import config_parser, print_config, run
from dpo_scale.settings.tree import load_config


def main() -> None:
    parser = config_parser("Predict memory, time and price of a run, without weights or GPUs.")
    parser.add_argument("--gpus", default="8", metavar="N", help="8: of one machine (the default); 4x8: of 4 machines")
    parser.add_argument("--device", metavar="NAME", help="h100 (the default), a100-40, rtx-4090, ...; or cpu")
    parser.add_argument("--interconnect", metavar="LINKS", help="within and between machines, e.g. nvlink+ib400")
    parser.add_argument("--price", type=float, metavar="AMOUNT", help="what one device costs an hour")
    parser.add_argument(
        "--lengths",
        metavar="MEDIAN[:TAIL]",
        help="instead of reading the data: median and 99th percentile of a pair's tokens; or ultrafeedback, hh-rlhf, "
        "tulu-3, nectar, orca",
    )
    parser.add_argument("--pairs", type=int, metavar="N", help="how many pairs to train on, with --lengths")
    parser.add_argument("--solve", action="store_true", help="search the fastest settings that fit; prints the command")
    parser.add_argument("--cheapest", action="store_true", help="with --solve: on the fewest GPUs, up to --gpus")
    parser.add_argument("--calibrate", action="store_true", help="measure this machine first, for about a minute")
    arguments = parser.parse_args()
    config = load_config(arguments.config, arguments.overrides, for_training=arguments.lengths is None)
    if arguments.print_config:
        return print_config(config)
    from dpo_scale.forecast.plan import Request, plan

    names = ("gpus", "device", "interconnect", "price", "lengths", "pairs", "solve", "cheapest", "calibrate")
    request = Request(
        **{name: getattr(arguments, name) for name in names},
        config_file=arguments.config,
        overrides=tuple(arguments.overrides),
    )
    print("\n".join(plan(config, request, log=lambda line: print(line, file=sys.stderr, flush=True))))


if __name__ == "__main__":
    run(main)
