"""Metrics of any model on any preference file: `launch/evaluate.py --model M --reference R --data FILE`.

Runs under `deepspeed`, `torchrun` and plain `python`. Takes the same config and overrides as training, e.g.
`deepspeed.stage=3` to shard a model that fits on no single GPU.
"""

from __future__ import annotations

import json
from pathlib import Path

from dpo_scale.errors import ConfigError
from dpo_scale.run.cli import config_parser, print_config, run
from dpo_scale.settings.tree import load_config


def main() -> None:
    parser = config_parser("Print the metrics of a model on preference pairs.")
    parser.add_argument("--model", help="the policy: a model folder, hub id or builtin: name (model.path)")
    parser.add_argument("--reference", help="the reference; needed unless the loss uses none (reference.model)")
    parser.add_argument("--data", nargs="+", help="preference files (instead of the config's held-out data)")
    parser.add_argument("--output", metavar="FILE", help="also write the metrics as JSON")
    arguments = parser.parse_args()
    overrides = list(arguments.overrides)
    for key, value in (
        ("model.path", arguments.model),
        ("reference.model", arguments.reference),
        ("reference.mode", "live" if arguments.reference else None),
        ("data.eval", arguments.data),
    ):
        if value is not None:
            overrides.append(f"{key}={json.dumps(value)}")  # JSON is YAML, with every odd character quoted
    if arguments.data:
        overrides.append("data.eval_fraction=0")
    config = load_config(arguments.config, overrides, for_training=False)
    if arguments.print_config:
        return print_config(config)
    if arguments.output and not Path(arguments.output).resolve().parent.is_dir():
        raise ConfigError(f"--output {arguments.output}: its folder does not exist; make it first")
    if config.loss.needs_reference and config.reference.model is None:
        raise ConfigError("--reference (reference.model) is missing: the model that rewards are measured against")
    if not config.data.eval:
        raise ConfigError("--data (data.eval) is missing: a file with preference pairs")

    from dpo_scale.distributed import ranks
    from dpo_scale.training.evaluate import evaluate_model

    metrics = evaluate_model(config)
    if ranks.is_main():
        width = max(map(len, metrics))
        for name, value in metrics.items():
            print(f"{name:<{width}}  {value:.6g}")
        if arguments.output:
            Path(arguments.output).write_text(json.dumps(metrics, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run(main)
