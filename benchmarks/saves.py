"""What a checkpoint costs a run: seconds that training stands still, saved at once and in the background.

    python benchmarks/saves.py [--model builtin:smollm2-135m-instruct] [--ranks 2] [--rounds 2] [--output FOLDER]

Trains on the pairs that the package ships, ZeRO 2, with a checkpoint every fourth step: `checkpoint.async_save` false
and true in turn, `--rounds` times. Stalls are what each save's line in the log says. A step that a save runs beside
takes longer, so the mean time of all steps but the first two of a run is reported too, and the run's total for the
training: steps and stalls.
"""

from __future__ import annotations

import argparse
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import accelerator, circumstances, describe_circumstances, markdown_table, write_results

from dpo_scale.observe.metrics_file import METRICS_FILE, read_metrics

ROOT = Path(__file__).resolve().parents[1]
SAID = re.compile(r"checkpoint of step (\d+) saved in ([\d.]+) s; training stood still for ([\d.]+) s")
ARMS = {"at once": "false", "in the background": "true"}
SAVE_STEPS = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="builtin:smollm2-135m-instruct")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=12, help="of each run")
    parser.add_argument("--output", type=Path, help="folder for saves.md and .json")
    arguments = parser.parse_args()
    report: dict[str, Any] = circumstances(accelerator(), "torch", "deepspeed")
    report |= {"model": arguments.model, "ranks": arguments.ranks}
    runs: dict[str, list[dict[str, Any]]] = {arm: [] for arm in ARMS}
    with tempfile.TemporaryDirectory() as folder:
        for k in range(arguments.rounds):
            for arm, in_background in ARMS.items():
                runs[arm].append(run(Path(folder) / f"{k}-{in_background}", in_background, arguments))
    report["runs"] = runs
    text = "\n".join([describe_circumstances(report), "", *table(runs)]) + "\n"
    write_results("saves", report, text, arguments.output)


def run(run_dir: Path, in_background: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """One training run: the saves as the log tells them, and the seconds of its steps."""
    command = [
        *(str(Path(sys.executable).parent / "deepspeed"), "--num_accelerators", str(arguments.ranks)),
        *(
            str(ROOT / "launch" / "train.py"),
            f"model.path={arguments.model}",
            "data.train=builtin:plain_sentence_train",
        ),
        *("deepspeed.stage=2", "train.global_batch_size=4", "train.micro_batch_size=2", "train.learning_rate=1e-6"),
        *(f"train.max_steps={arguments.steps}", f"checkpoint.save_steps={SAVE_STEPS}", "checkpoint.save_total_limit=1"),
        *("reference.mode=store", f"checkpoint.async_save={in_background}", f"output_dir={run_dir}"),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stdout[-3000:] + done.stderr[-3000:])
    saves = [
        {"step": int(step), "seconds": float(seconds), "stall": float(stall)}
        for step, seconds, stall in SAID.findall(done.stdout)
    ]
    steps = [record["step_seconds"] for record in read_metrics(run_dir / METRICS_FILE) if record["phase"] == "train"]
    return {"saves": saves, "step_seconds": steps}


def table(runs: dict[str, list[dict[str, Any]]]) -> list[str]:
    """A row an arm, and what the second is of the first."""
    rows, values = [], []
    for arm, of_arm in runs.items():
        saves = [save for one in of_arm for save in one["saves"]]
        stall = statistics.median(save["stall"] for save in saves)
        until = statistics.median(save["seconds"] for save in saves)
        step = statistics.mean(seconds for one in of_arm for seconds in one["step_seconds"][2:])
        total = statistics.mean(
            sum(one["step_seconds"][2:]) + sum(save["stall"] for save in one["saves"]) for one in of_arm
        )
        values.append((stall, until, step, total))
        rows.append([arm, f"{stall:.2f} s", f"{until:.2f} s", f"{step:.2f} s", f"{total:.1f} s"])
    rows.append(["ratio", *(f"{second / first:.2f}" for first, second in zip(*values, strict=True))])
    return markdown_table(["saved", "training stands still", "until it is committed", "step", "run"], rows)


if __name__ == "__main__":
    main()
