"""Commands of README and docs, executed on a tiny model and a tiny file of pairs.

What is changed in a command stands in `SUBSTITUTES` and `TINY`: where model and data come from, and how many steps
there are. Launchers are left out, and one launch of two ranks runs all scripts that train or score.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from doc_commands import COMMANDS, HERE, fate
from tiny import ROOT, free_port, launch, preference_rows, save_adapter, save_model, write_rows

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

OURS = [command for command in COMMANDS if (fate(command) or "").startswith(HERE)]
IN_ONE_LAUNCH = [command for command in OURS if re.match(r"(?!bash).*launch/(train|precompute|evaluate)\.py", command)]
(REQUEUE,) = [command for command in OURS if "requeue.sh" in command]
OTHERS = [command for command in OURS if command not in (*IN_ONE_LAUNCH, REQUEUE)]

SUBSTITUTES = {
    "builtin:smollm2-135m-instruct": "start",
    "builtin:plain_sentence_heldout": "my_pairs.jsonl",
    "lora.adapter=runs/mine/model": "lora.adapter=adapter",
    "checkpoints/step-200": "checkpoints/step-2",
    "~/.cache/dpo_scale/reference_store": "store",
    "benchmarks/store.py": "benchmarks/store.py --quick --output .",
}
TINY = {
    "model.path": "start",
    "data.train": "my_pairs.jsonl",
    "data.eval": "my_pairs.jsonl",
    "data.eval_fraction": "0",
    "data.cache_dir": "cache",
    "reference.store": "store",
    "train.global_batch_size": "4",
    "train.max_steps": "2",
}
# The run that a bare `--resume` finds is the one that a default folder was made for.
HAS_DEFAULT_FOLDER = "configs/smollm2-135m-cpu.yaml data.train=my_pairs.jsonl"
# What a command that does what the page says must print, by what is in the command.
SAID = {
    r"train\.py": r"model saved in \S+/model",
    r"--resume": r"resumed from \S+/checkpoints/step-\d",
    r"allow_changes": r"train.learning_rate was 5e-06, is 1e-06",
    r"--profile 3-5": r"profile of steps 3 to 5 in",
    r"lora\.r": r"LoRA: [\d,]+ weights are trained",
    r"mode=store": r"reference store \S+: all 24 pairs are there",
    r"precompute\.py": r"reference store \S+: 0 pairs computed, 32 were there",
    r"evaluate\.py": r"rewards/accuracies +[01]",
    r"launch/store\.py list": r" 16 +1 .* start",
    r"launch/store\.py inspect": r"16 of 16 pairs are here",
    r"launch/store\.py verify": r"16 rows computed again",
    r"launch/store\.py compact": r"16 rows, 0 copies removed",
    r"launch/store\.py export": r"values\.parquet: 16 rows",
    r"benchmarks/store\.py": r"random look-ups",
    r"walk\.py": r"every result is what the page says",
}


def with_substitutes(command: str) -> str:
    for documented, tiny in SUBSTITUTES.items():
        command = command.replace(documented, tiny)
    return command


def tiny_arguments(arguments: list[str], **more: str) -> list[str]:
    """The arguments, with what makes the run tiny behind its config, where they do not say it themselves."""
    named = {word.partition("=")[0] for word in arguments}
    behind = arguments.index("--config") + 2
    added = [f"{key}={value}" for key, value in {**TINY, **more}.items() if key not in named]
    return arguments[:behind] + added + arguments[behind:]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A folder like a user's checkout."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("configs", "launch", "benchmarks", "tests", "docs"):
        (folder / name).symlink_to(ROOT / name)
    save_model(folder / "start")
    save_adapter(folder / "start", folder / "adapter")
    write_rows(folder / "my_pairs.jsonl", preference_rows(16))
    return folder


@pytest.fixture(scope="module")
def requeued(checkout) -> str:
    """What the run in runs/mine printed, to which others go back."""
    words = shlex.split(with_substitutes(REQUEUE))
    deepspeed = words.index("deepspeed")
    words[deepspeed : deepspeed + 1] = ["deepspeed", "--num_accelerators", "2", "--master_port", str(free_port())]
    return run_alone(checkout, tiny_arguments(words))


@pytest.fixture(scope="module")
def in_one_launch(checkout, requeued) -> dict[str, str]:
    """What each script that trains or scores printed. They run in an order in which each finds what it needs."""
    # the store is filled first; what resumes comes last, each a step longer than the one before
    order = sorted(IN_ONE_LAUNCH, key=lambda command: ("--resume" in command, "learning_rate" in command, command))
    scripts = [tiny_arguments(["launch/precompute.py", "--config", "configs/quickstart.yaml"])]
    steps, default_folder = 2, False
    for number, command in enumerate(order):
        words = shlex.split(with_substitutes(command))
        words = words[next(i for i, word in enumerate(words) if word.startswith("launch/")) :]
        if words[0] == "launch/evaluate.py":
            scripts.append([words[0], "data.max_length=128", *words[1:]])
            continue
        resumes = "--resume" in words
        steps += resumes
        named = resumes or (not default_folder and HAS_DEFAULT_FOLDER in command)
        default_folder |= named and not resumes
        more = {} if named else {"output_dir": f"runs/{number}"}
        scripts.append(tiny_arguments(words, **more, **({"train.max_steps": str(steps)} if resumes else {})))
    (checkout / "commands.json").write_text(json.dumps(scripts))
    done = launch("tests/e2e/run_scripts.py", "commands.json", cwd=checkout)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    outputs = re.split(r"^\$ ", done.stdout, flags=re.MULTILINE)[2:]
    return dict(zip(order, outputs, strict=True))


def run_alone(folder: Path, words: list[str]) -> str:
    """What a command prints, which must end well."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, shlex.join(words) + "\n" + done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def check(command: str, printed: str) -> None:
    """Whether a command printed what it must."""
    expected = [said for part, said in SAID.items() if re.search(part, command)]
    assert expected
    assert [said for said in expected if not re.search(said, printed)] == [], printed


def test_the_requeued_run_trains_to_its_end(requeued):
    check(REQUEUE, requeued)


@pytest.mark.parametrize("command", IN_ONE_LAUNCH)
def test_what_trains_or_scores_does_what_the_page_says(command, in_one_launch):
    check(command, in_one_launch[command])


@pytest.mark.parametrize("command", OTHERS)
def test_what_looks_after_a_store_measures_or_explains_does_what_the_page_says(command, checkout, in_one_launch):
    words = shlex.split(with_substitutes(command))
    check(command, run_alone(checkout, tiny_arguments(words) if "--config" in words else words))
