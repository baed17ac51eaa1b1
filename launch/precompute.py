"""Fill the reference store for all data of a config: `deepspeed launch/precompute.py --config FILE [...]`.

Forward only, with the reference under DeepSpeed; training with `reference.mode=store` then loads no reference model.
Run it again after the data has grown: only new pairs are computed. Also under `torchrun` and plain `python`.
"""

from __future__ import annotations

from dpo_scale.run.cli import config_parser, print_config, run
from dpo_scale.settings.tree import load_config


def main() -> None:
    parser = config_parser("Compute and store reference log-probs.")
    arguments = parser.parse_args()
    config = load_config(arguments.config, arguments.overrides)
    if arguments.print_config:
        return print_config(config)
    from dpo_scale.training.precompute import precompute

    precompute(config)


if __name__ == "__main__":
    run(main)
