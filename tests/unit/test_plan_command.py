"""`launch/plan.py`: what it prints, and that each mistake is one clear error."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys

import pytest
from tiny import ROOT, run_overrides

from dpo_scale.errors import ConfigError, DataError, ModelError, UserError


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    overrides = run_overrides(folder)
    for file in (folder / "start").glob("*.safetensors"):
        file.unlink()  # a plan needs no weights
    return overrides


@pytest.fixture
def command(monkeypatch, tmp_path, capsys):
    """Runs `launch/plan.py` in this process, in an empty folder; returns what it printed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DPO_SCALE_CACHE", str(tmp_path / "cache"))
    spec = importlib.util.spec_from_file_location("launch_plan", ROOT / "launch" / "plan.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def call(*arguments: str) -> str:
        monkeypatch.setattr("sys.argv", ["plan.py", *arguments])
        capsys.readouterr()
        module.main()
        return capsys.readouterr().out

    return call


def test_a_plan_without_weights_reads_the_data_and_says_memory_time_and_price(command, tiny):
    out = command("--gpus", "2", "--price", "2.5", *tiny)
    for said in ("on 2 x h100", "train.jsonl, 22 pairs", "memory of the fullest rank", "context and libraries", "fits",
                 "time of a step", "bound by", "the run: 3 steps", "at 2.5 an hour", "not modelled: "):  # fmt: skip
        assert said in out


@pytest.mark.slow
def test_a_plan_of_a_hub_id_needs_neither_hub_nor_data(command):
    asked = ["--lengths", "ultrafeedback", "--pairs", "640", "--gpus", "8", "--device", "rtx-4090"]
    out = command(*asked, "model.path=Qwen/Qwen3-8B")
    assert "DOES NOT FIT" in out and "from the size of argilla/ultrafeedback-binarized-preferences" in out
    solution = out.partition("the cheapest changes that make it fit, together:\n")[2].splitlines()[0].split()
    again = command(*asked, "model.path=Qwen/Qwen3-8B", *solution)
    assert "DOES NOT FIT" not in again and "fits, " in again


def test_solve_prints_a_command_whose_plan_fits(command, tiny):
    out = command("--solve", "--gpus", "2", *tiny)
    line = next(line for line in out.splitlines() if "launch/train.py" in line)
    assert line.strip().startswith("deepspeed --num_gpus 2 launch/train.py ")
    overrides = line.split("launch/train.py ")[1].split()
    assert all(any(word.startswith(key.split("=")[0]) for word in overrides) for key in tiny)
    assert "fits, " in command("--gpus", "2", *overrides)
    assert "deepspeed --num_gpus 1 " in command("--solve", "--cheapest", "--gpus", "4", *tiny)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        (["--gpus", "0"], ConfigError, r"^--gpus '0': expected a number"),
        (["--gpus", "4x"], ConfigError, r"^--gpus '4x': expected"),
        (["--device", "rtx-4080"], ConfigError, r"^--device 'rtx-4080': not in the table .*did you mean"),
        (["--interconnect", "string"], ConfigError, r"^--interconnect 'string': unknown link"),
        (["--interconnect", "nvlink+tin7"], ConfigError, r"^--interconnect .*unknown network 'tin7'"),
        (["--lengths", "long"], ConfigError, r"^--lengths 'long': expected MEDIAN"),
        (["--price", "-1"], ConfigError, r"^--price -1: expected"),
        (["--pairs", "10"], ConfigError, r"^--pairs: is for --lengths"),
        (["--cheapest"], ConfigError, r"^--cheapest: is for --solve"),
        (["--calibrate", "--gpus", "2x8"], ConfigError, r"^--calibrate: measures this machine alone"),
        (["--calibrate", "--device", "h100"], ConfigError, r"^--device 'h100': --calibrate measures the device"),
        (["data.train=nowhere.jsonl"], DataError, r"nowhere.jsonl.*--lengths"),
        (["model.path=./nowhere"], ModelError, r"nowhere: no config.json there"),
        (["train.sequence_parallel_size=3"], ConfigError, r"sequence_parallel_size = 3: expected a divisor"),
        (["deepspeed.stage=7"], ConfigError, r"^deepspeed.stage = 7: expected"),
    ],
)
def test_each_mistake_is_one_error(command, tiny, arguments, error, message):
    with pytest.raises(UserError, match=message) as raised:
        command(*[word for word in arguments if word.startswith("--") or "=" not in word], *tiny,
                *[word for word in arguments if "=" in word])  # fmt: skip
    assert raised.type is error


def test_mistakes_end_the_command_with_code_2_and_help_imports_no_torch(tmp_path):
    done = subprocess.run(
        [sys.executable, ROOT / "launch" / "plan.py", "--gpus", "0", "--lengths", "800", "model.path=Qwen/Qwen3-8B"],
        capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and done.stderr.startswith("error: --gpus")
    program = (
        "import runpy, sys, json; sys.argv = ['plan.py', '--help']\n"
        "try: runpy.run_path(PATH, run_name='plan')['main']()\n"
        "except SystemExit: print(json.dumps('torch' in sys.modules))"
    ).replace("PATH", repr(str(ROOT / "launch" / "plan.py")))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path)
    assert json.loads(done.stdout.splitlines()[-1]) is False and "--interconnect" in done.stdout
