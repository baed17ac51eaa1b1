"""Train a policy: `deepspeed launch/train.py --config FILE [section.key=value ...] [--resume [WHAT]]`.

Also runs under `torchrun` and plain `python` (one rank).
"""

from __future__ import annotations

import sys

import yaml

from dpo_scale.cli import config_parser, run
from dpo_scale.config import load_config
from dpo_scale.config_reader import to_mapping


def main() -> None:
    parser = config_parser("Tune a language model on preference pairs.")
    parser.add_argument(
        "--resume",
        metavar="WHAT",
        nargs="?",
        const="latest",
        help="latest (the default): the newest checkpoint of output_dir; auto: the same, or a fresh start if there "
        "is none; or a checkpoint or run folder",
    )
    arguments = parser.parse_args()
    if arguments.resume is not None and "=" in arguments.resume:  # `--resume section.key=value`
        arguments.overrides.insert(0, arguments.resume)
        arguments.resume = "latest"
    config = load_config(arguments.config, arguments.overrides)
    if arguments.print_config:
        yaml.safe_dump(to_mapping(config), sys.stdout, sort_keys=False)
        return
    from dpo_scale.trainer import train

    train(config, resume=arguments.resume)


if __name__ == "__main__":
    run(main)
