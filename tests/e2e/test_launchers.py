"""`launch/train.py` and `evaluate.py` as a user runs them: plain python, torchrun, deepspeed, on a terminal or not."""

import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import threading

import pytest
from tiny import ROOT, launch, read_metrics, run_overrides

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

METRICS = ("loss", "rewards/accuracies", "rewards/margins", "logps/chosen", "kl", "accuracy/policy")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the user stands: a config file, a model, data; runs go to `runs/`."""
    folder = tmp_path_factory.mktemp("here")
    overrides = run_overrides(folder)
    config = launch("launch/train.py", *overrides, "deepspeed.stage=1", "--print-config", launcher="python")
    assert config.returncode == 0, config.stderr
    lines = [line for line in config.stdout.splitlines() if not line.startswith("output_dir")]
    (folder / "mine.yaml").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def with_torchrun(folder):
    """A run of 2 ranks under torchrun: its launch and its folder, which is a default one."""
    done = launch(
        "launch/train.py", "--config", "mine.yaml", "train.max_steps=2", "train.eval_steps=1",
        "logging.console_metrics=[kl, padding_fraction]", launcher="torchrun", cwd=folder,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (run,) = (folder / "runs").iterdir()
    return done, run


@pytest.fixture(scope="module")
def in_a_terminal(folder, with_torchrun):
    """What plain python shows on a terminal while it trains on its own; the folder of that run."""
    terminal, side = pty.openpty()
    fcntl.ioctl(side, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 200, 0, 0))
    script = str(ROOT / "launch" / "train.py")
    chunks = []

    def read():
        try:
            while chunk := os.read(terminal, 4096):
                chunks.append(chunk)
        except OSError:  # the other side is closed
            pass

    process = subprocess.Popen(
        [sys.executable, script, "--config", "mine.yaml", "train.max_steps=2", "output_dir=alone"],
        cwd=folder, stdout=side, stderr=side, stdin=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm"},
    )  # fmt: skip
    os.close(side)
    reader = threading.Thread(target=read)
    reader.start()
    code = process.wait(timeout=200)
    reader.join()
    os.close(terminal)
    shown = b"".join(chunks).decode()
    assert code == 0, shown
    return shown, folder / "alone"


def test_a_run_without_output_dir_is_named_after_config_and_time(with_torchrun):
    _, run = with_torchrun
    assert re.fullmatch(r"mine-\d{8}-\d{6}", run.name)
    assert {path.name for path in run.iterdir()} == {
        "config.yaml",
        "metrics.jsonl",
        "checkpoints",
        "model",
        "finished.json",
    }


def test_without_a_terminal_there_is_a_line_a_step_with_the_metrics_asked_for(with_torchrun):
    done, run = with_torchrun
    lines = re.findall(r"^step (\d)/2  kl (\S+)  padding_fraction (\S+)  left \d+:\d\d$", done.stdout, re.MULTILINE)
    assert [line[0] for line in lines] == ["1", "2"]
    for (_, kl, padding), record in zip(lines, read_metrics(run), strict=True):
        assert float(kl) == pytest.approx(record["kl"], rel=1e-3, abs=1e-9)
        assert float(padding) == pytest.approx(record["padding_fraction"], rel=1e-3)
    assert len(re.findall(r"^eval at step \d: loss ", done.stdout, re.MULTILINE)) == 2
    assert "\r" not in done.stdout + done.stderr


def test_in_a_terminal_there_is_a_progress_bar_with_time_left(in_a_terminal):
    shown, _ = in_a_terminal
    assert "Traceback" not in shown
    assert re.search(r"2/2 \[\d\d:\d\d<\d\d:\d\d.*loss [\d.]+.*grad_norm", shown), shown
    assert not re.search(r"^step 1/2", shown, re.MULTILINE)


def test_plain_python_and_torchrun_give_the_same_numbers(with_torchrun, in_a_terminal):
    two_ranks, one_rank = read_metrics(with_torchrun[1]), read_metrics(in_a_terminal[1])
    assert len(two_ranks) == 2
    for ours, theirs in zip(two_ranks, one_rank, strict=True):
        for metric in (*METRICS, "grad_norm", "pairs", "tokens"):
            assert ours[metric] == pytest.approx(theirs[metric], abs=1e-5, rel=1e-5), metric


@pytest.mark.parametrize(("launcher", "settings"), [("python", []), ("deepspeed", ["reference.stage=3"])])
def test_evaluate_prints_what_training_measured_at_its_end(folder, with_torchrun, launcher, settings):
    _, run = with_torchrun
    output = folder / f"{launcher}.json"
    done = launch(
        "launch/evaluate.py", "--model", run / "model", "--reference", folder / "start",
        "--data", folder / "heldout.jsonl", "--output", output, "model.dtype=float32", *settings, launcher=launcher,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    printed = dict(re.findall(r"^(\S+)  +(-?[\d.]+(?:e[+-]?\d+)?)$", done.stdout, re.MULTILINE))
    written = json.loads(output.read_text())
    expected = read_metrics(run, "eval")[-1]
    assert expected["step"] == 2 and set(printed) == set(written) == set(expected) - {"phase", "step"}
    for name in written:
        assert written[name] == pytest.approx(expected[name], abs=1e-5, rel=1e-5), name
        assert float(printed[name]) == pytest.approx(expected[name], abs=1e-4, rel=1e-4), name


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ([], ["model.path"]),
        (["--model", "m"], ["--reference"]),
        (["--model", "m", "--reference", "r"], ["--data"]),
        (["--model", "m", "--reference", "r", "--data", "d", "--output", "no/where.json"], ["--output no/where.json"]),
    ],
)
def test_evaluate_says_which_argument_is_missing(arguments, parts):
    done = launch("launch/evaluate.py", *arguments, launcher="python")
    assert done.returncode == 2 and done.stderr.count("error: ") == 1 and "Traceback" not in done.stderr
    for part in parts:
        assert part in done.stderr


def test_bare_resume_finds_the_newest_run_of_the_config(folder, with_torchrun):
    """The run ended at step 2, so there is nothing left to do for it, on whatever number of ranks."""
    _, run = with_torchrun
    before = (run / "metrics.jsonl").read_bytes()
    arguments = ("--config", "mine.yaml", "train.max_steps=2", "--resume")
    done = launch("launch/train.py", *arguments, launcher="python", cwd=folder)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert f"runs/{run.name}: this run is finished, at step 2; nothing to do" in done.stdout
    assert (run / "metrics.jsonl").read_bytes() == before
