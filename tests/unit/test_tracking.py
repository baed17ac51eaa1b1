"""What is written where: the metrics file over crashes and resumes, the console's lines, refused trackers."""

import json
import resource

import pytest

from dpo_scale.errors import ConfigError
from dpo_scale.observe.metrics_file import METRICS_FILE, read_metrics
from dpo_scale.observe.tracking import Tracker, check_trackers
from dpo_scale.settings.tree import Config

METRICS = {"loss": 0.5, "rewards/margins": 0.25, "learning_rate": 1e-6, "step_seconds": 60.0}


def config(**logging):
    result = Config()
    result.logging.console_metrics = ["loss"]
    for name, value in logging.items():
        setattr(result.logging, name, value)
    return result


def write(run_dir, steps, *, start=0, total=6, evaluations=(), settings=None):
    tracker = Tracker(settings or config(), run_dir, total, start)
    for step in steps:
        tracker.train(step, {**METRICS, "loss": step / 10})
        if step in evaluations:
            tracker.evaluation(step, {"loss": 0.1, "pairs": 3.0})
    tracker.close()


def written(run_dir):
    return [(record["phase"], record["step"]) for record in read_metrics(run_dir / METRICS_FILE)]


def test_a_resumed_run_continues_the_file_without_doubled_or_missing_lines(tmp_path):
    write(tmp_path, [1, 2, 3], evaluations=[2])
    with (tmp_path / METRICS_FILE).open("a") as file:
        file.write('{"phase": "train", "step": 4, "lo')  # cut by a crash
    write(tmp_path, [3, 4], start=2)
    assert written(tmp_path) == [("train", 1), ("train", 2), ("eval", 2), ("train", 3), ("train", 4)]
    assert [record["loss"] for record in read_metrics(tmp_path / METRICS_FILE)] == [0.1, 0.2, 0.1, 0.3, 0.4]


def test_a_fresh_start_in_the_same_folder_keeps_no_line(tmp_path):
    write(tmp_path, [1, 2, 3])
    write(tmp_path, [1])
    assert written(tmp_path) == [("train", 1)]


def test_lines_wait_while_the_disk_is_full_and_none_is_lost_or_halved(tmp_path, capsys):
    tracker = Tracker(config(), tmp_path, 6, 0)
    tracker.train(1, METRICS)
    size = (tmp_path / METRICS_FILE).stat().st_size
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, hard))  # room for a part of a line
    try:
        tracker.train(2, METRICS)
        tracker.train(3, METRICS)
        assert (tmp_path / METRICS_FILE).stat().st_size == size
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    tracker.train(4, METRICS)
    tracker.close()
    assert written(tmp_path) == [("train", step) for step in (1, 2, 3, 4)]
    assert capsys.readouterr().out.count("lines are kept in memory until there is room") == 1


def test_a_damaged_line_is_told_and_costs_only_itself(tmp_path, capsys):
    write(tmp_path, [1, 2, 3])
    lines = (tmp_path / METRICS_FILE).read_bytes().splitlines(keepends=True)
    (tmp_path / METRICS_FILE).write_bytes(lines[0] + b"\xff" + lines[1] + lines[2])
    write(tmp_path, [4], start=3)
    assert written(tmp_path) == [("train", 1), ("train", 3), ("train", 4)]
    assert "line 2 is damaged" in capsys.readouterr().out


def test_values_that_json_lacks_are_null(tmp_path):
    tracker = Tracker(config(), tmp_path, 1, 0)
    tracker.train(1, {"loss": float("nan"), "kl": float("inf"), "step_seconds": 3.0})
    tracker.close()
    (line,) = (tmp_path / METRICS_FILE).read_text().splitlines()

    def refuse(constant):
        raise AssertionError(constant)

    record = json.loads(line, parse_constant=refuse)
    assert record == {"phase": "train", "step": 1, "loss": None, "kl": None, "step_seconds": 3.0}


def test_what_was_predicted_stands_beside_what_was_measured_after_the_warm_up(tmp_path, capsys):
    tracker = Tracker(config(console_metrics=[]), tmp_path, 3, 0)
    for step, (seconds, peak) in enumerate([(9.0, 2.0e9), (1.0, 3.0e9), (2.0, 2.5e9)], 1):
        tracker.train(step, {"step_seconds": seconds, "peak_memory_bytes": peak})
    tracker.forecast(3, 2_900_000_000, 1.6)
    tracker.close()
    assert json.loads((tmp_path / METRICS_FILE).read_text().splitlines()[-1]) == {
        "phase": "forecast", "step": 3, "peak_memory_bytes": 3.0e9, "peak_memory_bytes/predicted": 2.9e9,
        "step_seconds": 1.5, "step_seconds/predicted": 1.6,
    }  # fmt: skip
    assert "predicted and measured: memory 2.90 and 3.00 GB, a step 1.6 and 1.5 s" in capsys.readouterr().out
    again = Tracker(config(), tmp_path, 3, 3)  # a run that had nothing left to do
    again.forecast(3, 2_900_000_000, None)
    again.close()
    assert len((tmp_path / METRICS_FILE).read_text().splitlines()) == 4


def test_console_lines_come_every_logging_steps_and_at_the_end_but_the_file_has_all(tmp_path, capsys):
    settings = config(logging_steps=2, console_metrics=["rewards/margins", "learning_rate"])
    write(tmp_path, [1, 2, 3, 4, 5], total=5, settings=settings)
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        f"step {step}/5  rewards/margins 0.25  learning_rate 1.00e-06  left {left}"
        for step, left in ((2, "3:00"), (4, "1:00"), (5, "0:00"))
    ]
    assert written(tmp_path) == [("train", step) for step in (1, 2, 3, 4, 5)]


def test_a_tracker_unknown_or_not_installed_is_refused(monkeypatch):
    check_trackers([])
    check_trackers(["tensorboard"])
    with pytest.raises(ConfigError, match=r"logging.report_to = 'tensorbored': expected one of .*tensorboard.*wandb"):
        check_trackers(["tensorboard", "tensorbored"])
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", lambda: [])
    with pytest.raises(ConfigError, match="'tensorboard': its package is not installed"):
        check_trackers(["tensorboard"])
