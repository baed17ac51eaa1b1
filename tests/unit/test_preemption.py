"""Notices that a process should end: what it does before, while and after there is something to save."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from faults.rig import is_alive
from tiny import ROOT

from dpo_scale.run.preemption import EXIT_PREEMPTED

START = """
import os, sys, threading, time
from pathlib import Path
from dpo_scale.run import preemption
from dpo_scale.run.cli import run
folder = Path(sys.argv[1])

def ready():
    (folder / "ready").touch()
"""


def start(tmp_path, program, *, through=()):
    """Run a program that calls `ready()`, and wait until it does."""
    (tmp_path / "program.py").write_text(START + program)
    process = subprocess.Popen(
        [*through, sys.executable, tmp_path / "program.py", tmp_path],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    until = time.monotonic() + 60
    while not (tmp_path / "ready").exists():
        assert process.poll() is None and time.monotonic() < until, process.stderr.read()
        time.sleep(0.01)
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_before_there_is_anything_to_save_the_process_ends_at_once(tmp_path, number):
    process = start(tmp_path, "run(lambda: ready() or time.sleep(60))")
    process.send_signal(number)
    _, said = process.communicate(timeout=30)
    assert process.returncode == EXIT_PREEMPTED
    assert said == f"stopped ({number.name}) before there was anything to save\n"


def test_with_a_grace_time_the_notice_is_there_to_be_asked_for_and_later_ones_change_nothing(tmp_path):
    process = start(
        tmp_path,
        """
def work():
    preemption.allow(30.0, folder, looks_for_file=True)
    assert preemption.reason_to_stop(None) is None
    ready()
    while preemption.reason_to_stop(None) is None:
        time.sleep(0.01)
    (folder / "noted").touch()
    while not (folder / "sent").exists():
        time.sleep(0.01)
    print(preemption.reason_to_stop(None))
    raise preemption.Preempted("stopped after step 3")
run(work)
""",
    )
    process.send_signal(signal.SIGUSR1)
    while not (tmp_path / "noted").exists():
        time.sleep(0.01)
    for _ in range(3):
        process.send_signal(signal.SIGTERM)
    (tmp_path / "sent").touch()
    out, said = process.communicate(timeout=30)
    assert (process.returncode, out, said) == (EXIT_PREEMPTED, "SIGUSR1\nstopped after step 3\n", "")


def test_when_the_grace_time_is_over_the_process_ends_wherever_it_hangs(tmp_path):
    # a lock that nobody will release, taken in C, as a collective would be
    process = start(
        tmp_path,
        """
def work():
    preemption.allow(0.5, folder, looks_for_file=False)
    lock = threading.Lock()
    lock.acquire()
    ready()
    lock.acquire()
run(work)
""",
    )
    started = time.monotonic()
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=30)
    assert process.returncode == EXIT_PREEMPTED and time.monotonic() - started >= 0.5
    assert "told to stop (SIGTERM), not done 0.5 s later" in said
    mark = json.loads((tmp_path / "preempted.json").read_text())
    assert mark["step"] is None and mark["reason"] == "SIGTERM"


def test_a_file_stops_the_run_too_and_is_removed_with_the_mark(tmp_path):
    process = start(
        tmp_path,
        """
def work():
    preemption.allow(30.0, folder, looks_for_file=True)
    ready()
    while (reason := preemption.reason_to_stop(None)) is None:
        time.sleep(0.01)
    preemption.mark_preempted(folder, 7, reason)
run(work)
""",
    )
    (tmp_path / "stop").touch()
    process.communicate(timeout=30)
    assert json.loads((tmp_path / "preempted.json").read_text())["step"] == 7
    assert not (tmp_path / "stop").exists()


def test_the_clock_counts_from_the_start_of_the_process(tmp_path):
    process = start(
        tmp_path,
        """
def work():
    preemption.allow(30.0, folder, looks_for_file=False)
    ready()
    assert preemption.reason_to_stop(1.0) is None
    while (reason := preemption.reason_to_stop(1.5 / 3600)) is None:
        time.sleep(0.01)
    print(reason)
run(work)
""",
    )
    out, said = process.communicate(timeout=30)
    assert out == "train.max_hours = 0.000416667\n", said


def test_a_worker_that_is_ended_does_not_end_its_parent(tmp_path):
    process = start(
        tmp_path,
        """
import multiprocessing, signal
def work():
    context = multiprocessing.get_context("fork")
    at_work = context.Event()
    worker = context.Process(target=lambda: at_work.set() or time.sleep(60))
    worker.start()
    ready()
    at_work.wait()
    worker.terminate()
    worker.join()
    assert worker.exitcode == -signal.SIGTERM, worker.exitcode
    assert not preemption.wait_for_notice(1)
run(work)
""",
    )
    _, said = process.communicate(timeout=30)
    assert process.returncode == 0, said


def test_a_rank_whose_launcher_is_killed_is_no_orphan(tmp_path):
    """The launcher is a script of that name that starts the rank and waits."""
    launcher = tmp_path / "torchrun"
    launcher.write_text("import subprocess, sys\nsubprocess.run([sys.executable, *sys.argv[1:]])")
    program = "(folder / 'pid').write_text(str(os.getpid()))\nrun(lambda: ready() or time.sleep(60))"
    (tmp_path / "program.py").write_text(START + program)
    process = subprocess.Popen(
        [sys.executable, launcher, tmp_path / "program.py", tmp_path], env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    while not (tmp_path / "ready").exists():
        time.sleep(0.01)
    rank = int((tmp_path / "pid").read_text())
    process.kill()
    process.wait()
    until = time.monotonic() + 30  # half of what it would sleep
    while is_alive(rank):
        assert time.monotonic() < until, "the rank is still there"
        time.sleep(0.02)
