"""Where time goes: phases on a CPU, waiting told from computing, and which steps are profiled."""

import json
import time

import pytest
import torch

from dpo_scale.errors import ConfigError
from dpo_scale.observe.profiler import StepProfiler, parse_steps
from dpo_scale.observe.timing import StepTimer
from dpo_scale.settings.metric_names import PHASES


def compute(seconds):
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass


def test_waiting_inside_a_pass_is_communication_and_not_computing():
    timer = StepTimer(torch.device("cpu"), 2)
    timer.start()
    with timer.phase("data"):
        time.sleep(0.05)
    with timer.phase("backward"):
        compute(0.05)
        time.sleep(0.1)
    busy = timer.busy_seconds
    shares = timer.shares()
    seconds = shares.pop("step_seconds")
    assert set(shares) == {f"time/{phase}" for phase in PHASES}
    assert busy == pytest.approx(shares["time/backward"] * seconds)
    assert 0.045 < busy < 0.09
    assert shares["time/communication"] * seconds > 0.095
    assert shares["time/data"] * seconds > 0.045
    assert shares["time/forward"] == 0
    assert sum(shares.values()) <= 1 + 1e-6


def test_a_rank_alone_waits_for_nobody():
    timer = StepTimer(torch.device("cpu"), 1)
    with timer.phase("backward"):
        time.sleep(0.05)
    shares = timer.shares()
    assert shares["time/communication"] == 0 and shares["time/backward"] > 0.9


def test_steps_are_counted_anew():
    timer = StepTimer(torch.device("cpu"), 2)
    with timer.phase("forward"):
        compute(0.02)
    assert timer.shares()["time/forward"] > 0
    timer.start()
    assert timer.shares()["time/forward"] == 0 and timer.busy_seconds == 0


def test_profiled_steps_are_read_off_the_command_line():
    assert parse_steps("3") == range(3, 4)
    assert parse_steps("3-5") == range(3, 6)
    for wrong in ("", "0", "5-3", "-3", "3-", "three", "1-2-3"):
        with pytest.raises(ConfigError, match="--profile"):
            parse_steps(wrong)


def test_a_trace_holds_the_chosen_steps_and_their_phases(tmp_path):
    timer = StepTimer(torch.device("cpu"), 1)
    with StepProfiler(tmp_path / "profile", range(2, 4)) as profiler:
        for step in range(1, 6):
            with profiler.step(step), timer.phase("forward" if step < 4 else "backward"):
                torch.ones(step + 4) * step
    (path,) = (tmp_path / "profile").iterdir()
    assert path.name == "steps-2-3-rank-0.json"
    names = [event.get("name") for event in json.loads(path.read_text())["traceEvents"]]
    assert names.count("dpo_scale: forward") == 2 and "dpo_scale: backward" not in names
    assert names.count("aten::mul") == 2


def test_no_trace_of_a_run_that_fails_within_the_steps(tmp_path):
    with pytest.raises(ValueError, match="boom"), StepProfiler(tmp_path / "profile", range(1, 9)) as profiler:
        with profiler.step(1):
            pass
        raise ValueError("boom")
    assert not (tmp_path / "profile").exists()
