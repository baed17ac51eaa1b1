"""Train a policy: `deepspeed launch/train.py --config FILE [section.key=value ...] [--resume [WHAT]]`.

Also runs under `torchrun` and plain `python` (one rank).
"""

from __future__ import annotations

from dpo_scale.run.cli import config_parser, print_config, run
from dpo_scale.settings.tree import load_config


def main() -> None:
    parser = config_parser("Tune a language model on preference pairs.")
    parser.add_argument(
        "--resume",
        metavar="WHAT",
        nargs="?",
        const="latest",
        help="latest (the default): the newest checkpoint of output_dir, or of the newest runs/<config name>-<time>; "
        "auto: the same, or a fresh start if there is none; or a checkpoint or run folder",
    )
    parser.add_argument(
        "--profile",
        metavar="STEPS",
        help="write a profiler's trace of these optimizer steps (3, or 3-5) into the run folder, one file a rank",
    )
    arguments = parser.parse_args()
    if arguments.resume is not None and "=" in arguments.resume:  # `--resume section.key=value`
        arguments.overrides.insert(0, arguments.resume)
        arguments.resume = "latest"
    config = load_config(arguments.config, arguments.overrides, resume=arguments.resume)
    if arguments.print_config:
        return print_config(config)
    from dpo_scale.observe.profiler import parse_steps
    from dpo_scale.training.loop import train

    train(config, resume=arguments.resume, profile=parse_steps(arguments.profile) if arguments.profile else None)


if __name__ == "__main__":
    run(main)
