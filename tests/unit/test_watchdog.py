"""Ranks say where they are, notice that nothing moves and who is gone; and the lock on a run folder.

The ranks are plain processes, which no launcher ends. A lock that nobody gives back stands for a collective that never
returns.
"""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from tiny import ROOT

from dpo_scale.errors import ConfigError
from dpo_scale.run.folder import hold_run_dir
from dpo_scale.run.preemption import EXIT_PREEMPTED
from dpo_scale.run.rank_files import End, Position, Process, RankFiles, this_process
from dpo_scale.run.watchdog import EXIT_HANGING, EXIT_LOST, LOST_FILE, Watchdog

RANK = """
import json, os, sys, threading, time
from dataclasses import asdict
from pathlib import Path
from dpo_scale.run import preemption
from dpo_scale.run.cli import run
from dpo_scale.errors import ConfigError
from dpo_scale.progress import heartbeat, note_activity, patience
from dpo_scale.run.rank_files import Process, this_process
from dpo_scale.disk.sealed_folder import SealedFile, damage
from dpo_scale.run.watchdog import Watchdog

folder, rank, machine, timeout = Path(sys.argv[1]), int(os.environ["RANK"]), sys.argv[2], json.loads(sys.argv[3])
print(json.dumps(asdict(this_process(machine))), flush=True)
processes = [Process(**process) for process in json.loads(sys.stdin.readline())]

def collective_that_never_returns():
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()

def wait_for(name):
    while not (folder / name).exists():
        time.sleep(0.02)

def main():
    with Watchdog(
        folder, timeout, rank, processes, poll_seconds=0.1, look_seconds=0.2, silence_seconds=1.2, grace_seconds=0.6
    ):
        (folder / f"entered-{rank}").touch()
        work()

"""


class Ranks:
    """Some ranks, each on the machine of its name and with the body of its `work()`."""

    def __init__(self, folder, machines, works, timeout_seconds=None):
        self.folder, works = folder, works if isinstance(works, list) else [works] * len(machines)
        timeouts = timeout_seconds if isinstance(timeout_seconds, list) else [timeout_seconds] * len(machines)
        self.processes = []
        for rank, (machine, work, seconds) in enumerate(zip(machines, works, timeouts, strict=True)):
            timeout = json.dumps(seconds and seconds / 60)
            body = "\n".join(f"    {line}" for line in work.strip().splitlines())
            self.processes.append(
                subprocess.Popen(
                    [sys.executable, "-c", f"{RANK}\ndef work():\n{body}\n\nrun(main)\n", folder, machine, timeout],
                    env={**os.environ, "PYTHONPATH": str(ROOT), "RANK": str(rank), "WORLD_SIZE": str(len(machines))},
                    stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                )
            )  # fmt: skip
        told = json.dumps([json.loads(process.stdout.readline()) for process in self.processes]) + "\n"
        for process in self.processes:
            process.stdin.write(told)
            process.stdin.flush()
        for rank in range(len(machines)):
            self.wait_for(f"entered-{rank}")

    def wait_for(self, name):
        until = time.monotonic() + 20
        while not (self.folder / name).exists():
            assert time.monotonic() < until, name
            time.sleep(0.01)

    def running(self):
        return [process.poll() is None for process in self.processes]

    def end(self, seconds=10):
        """Exit codes, what the ranks said to the console, and the seconds until the last had ended."""
        started = time.monotonic()
        try:
            said = [process.communicate(timeout=seconds)[1] for process in self.processes]
        finally:
            for process in self.processes:
                process.kill()
        return [process.returncode for process in self.processes], said, time.monotonic() - started


@pytest.fixture
def ranks(tmp_path):
    """`Ranks` in a folder of their own; none is left behind."""
    made = []

    def make(*arguments, **options):
        made.append(Ranks(tmp_path, *arguments, **options))
        return made[-1]

    yield make
    for process in (process for one in made for process in one.processes):
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout, process.stderr):
            stream.close()


STEP_AND_WAIT = "heartbeat('step 3')\ncollective_that_never_returns()"


def test_ranks_that_do_not_move_end_and_name_the_one_that_is_behind(tmp_path, ranks):
    def work(beats):
        return f"for step in range({beats}):\n    heartbeat(f'step {{step + 1}}')\ncollective_that_never_returns()"

    started = ranks(["a", "a"], [work(7), work(5)], timeout_seconds=1)
    codes, said, _ = started.end()
    assert codes == [EXIT_HANGING] * 2
    for rank, text in enumerate(said):
        assert f"rank {rank}: no progress for 1 s (train.hang_timeout_minutes) at step {(7, 5)[rank]}" in text
        behind = started.processes[1].pid
        assert f"the others wait for rank 1 (process {behind} on " in text and "last seen at step 5)" in text
        assert "in collective_that_never_returns" in (tmp_path / f"logs/rank-{rank}.log").read_text()
    assert not (tmp_path / LOST_FILE).exists()


SLOW_SAVE = """
import xxhash
heartbeat("the checkpoint of step 3")
real = os.fsync
os.fsync = lambda descriptor: (time.sleep({seconds}), real(descriptor))
if rank == 0:
    files = {{f"file-{{k}}": SealedFile(folder / f"file-{{k}}") for k in range(6)}}
    written = {{name: file.write(b"x" * 100) and file.seal() for name, file in files.items()}}
    assert damage(folder, written, checksums=True) == []
    (folder / "saved").touch()
wait_for("saved")
"""


def test_a_save_that_takes_long_keeps_all_ranks_alive_that_wait_for_it(tmp_path, ranks):
    # 6 syncs of 0.4 s, of which each is shorter than the limit of 1 s; ranks 2 and 3 learn of it from others
    codes, said, _ = ranks(["a", "b", "c", "a", "b"], SLOW_SAVE.format(seconds=0.4), timeout_seconds=1).end(20)
    assert (codes, said) == ([0] * 5, [""] * 5)


def test_a_save_that_is_stuck_ends_all_ranks(tmp_path, ranks):
    codes, said, _ = ranks(["a", "b", "a"], SLOW_SAVE.format(seconds=60), timeout_seconds=1).end()
    assert codes == [EXIT_HANGING] * 3
    for rank in range(3):
        assert f"rank {rank}: no progress for 1 s" in said[rank] and "the checkpoint of step 3" in said[rank]


def test_what_a_library_does_without_a_word_is_no_hang_but_what_follows_is(ranks):
    work = "with patience('the loading of the policy'):\n    time.sleep(2.5)\n(folder / 'loaded').touch()\n"
    loading = ranks(["a", "b"], [work + STEP_AND_WAIT, "wait_for('loaded')\n" + STEP_AND_WAIT], timeout_seconds=1)
    codes, _, seconds = loading.end()
    assert codes == [EXIT_HANGING] * 2 and seconds > 3


def test_a_killed_rank_ends_its_peers_in_a_collective_on_every_machine(tmp_path, ranks):
    started = ranks(["a", "a", "b", "b"], STEP_AND_WAIT)
    time.sleep(0.5)
    started.processes[1].kill()
    codes, said, seconds = started.end()
    assert codes == [EXIT_LOST, -signal.SIGKILL, EXIT_LOST, EXIT_LOST] and seconds < 3
    name = f"rank 1 (process {started.processes[1].pid} on {os.uname().nodename}, last seen at step 3)"
    assert said[0].startswith(f"{name} was killed or crashed\n  the end of the log of rank 1:\n")
    assert f"rank 1 starts as process {started.processes[1].pid}" in said[0]
    assert said[2] == f"rank 2 ends: {name} was killed or crashed\n" and said[3] == ""
    lost = json.loads((tmp_path / LOST_FILE).read_text())
    assert (lost["ranks"], lost["where"]) == ([1], "step 3")


def test_if_the_rank_that_should_speak_is_stopped_the_next_one_does(ranks):
    started = ranks(["a"] * 3, STEP_AND_WAIT)
    started.processes[0].send_signal(signal.SIGSTOP)
    started.processes[2].kill()
    started.processes[1].wait(5)
    assert started.processes[1].returncode == EXIT_LOST
    assert started.processes[1].stderr.read().startswith("rank 2 (process ")


def test_a_machine_that_falls_silent_ends_the_others(tmp_path, ranks):
    started = ranks(["a", "a", "b", "b"], STEP_AND_WAIT)
    time.sleep(0.6)
    for process in started.processes[2:]:
        process.send_signal(signal.SIGSTOP)
    for process in started.processes[:2]:
        process.wait(10)
        assert process.returncode == EXIT_LOST
    said = "".join(process.stderr.read() for process in started.processes[:2])
    assert said.count("rank 2 (process ") == 1 and said.count("rank 3 (process ") == 1
    assert said.count("last seen at step 3) has not been heard of for long") == 1
    assert json.loads((tmp_path / LOST_FILE).read_text())["ranks"] == [2, 3]


def test_a_machine_is_not_silent_while_one_of_its_ranks_is_heard_nor_while_the_run_moves(tmp_path, ranks):
    moving = "while not (folder / 'end').exists():\n    heartbeat('step')\n    time.sleep(0.05)"
    waiting = "heartbeat('step')\nwait_for('end')"
    started = ranks(["a", "b", "b"], [waiting, waiting, waiting])
    time.sleep(0.6)
    started.processes[1].send_signal(signal.SIGSTOP)  # what the others see of an interpreter that is busy for long
    time.sleep(2.4)
    assert started.running() == [True] * 3
    started.processes[1].send_signal(signal.SIGCONT)
    (tmp_path / "end").touch()
    assert started.end()[0] == [0] * 3
    (tmp_path / "end").unlink()
    started = ranks(["a", "b"], [moving, waiting])
    time.sleep(0.6)
    started.processes[1].send_signal(signal.SIGSTOP)
    time.sleep(2.4)
    assert started.running() == [True] * 2
    started.processes[1].send_signal(signal.SIGCONT)
    (tmp_path / "end").touch()
    assert started.end()[0] == [0] * 2


def test_a_job_that_was_suspended_goes_on(tmp_path, ranks):
    started = ranks(["a", "b"], "heartbeat('step')\nwait_for('end')\nheartbeat('step')", timeout_seconds=2)
    time.sleep(0.5)
    for number, seconds in ((signal.SIGSTOP, 2.5), (signal.SIGCONT, 0.4)):
        for process in started.processes:
            process.send_signal(number)
        time.sleep(seconds)
    (tmp_path / "end").touch()
    assert started.end()[:2] == ([0] * 2, [""] * 2)


def test_a_rank_that_finishes_early_is_not_missed(tmp_path, ranks):
    started = ranks(
        ["a", "a", "b"],
        ["heartbeat('step')", "heartbeat('step')\nwait_for('end')", "heartbeat('step')\nwait_for('end')"],
    )
    started.processes[0].wait(10)
    time.sleep(2)
    assert started.running() == [False, True, True]
    (tmp_path / "end").touch()
    assert started.end()[:2] == ([0] * 3, [""] * 3)
    assert json.loads((tmp_path / "logs/rank-0.at").read_text())["last_word"] == "finished"


def test_an_error_of_one_rank_ends_the_others_with_its_code(ranks):
    failing = (
        "heartbeat('step 4')\ncollective_that_never_returns() if rank else None\nraise ConfigError('no such thing')"
    )
    started = ranks(["a", "a", "b"], failing)
    codes, said, seconds = started.end()
    assert codes == [2] * 3 and seconds < 3
    assert said[0] == "error: no such thing\n" and said[1] == ""
    assert said[2].startswith("rank 2 ends: rank 0 (process ") and said[2].endswith("ConfigError: no such thing\n")


def test_a_broken_connection_is_not_blamed_where_a_rank_was_killed(ranks):
    breaks = "heartbeat('step 4')\nwait_for('killed')\nraise RuntimeError('connection closed by peer')"
    started = ranks(["a", "a", "a"], [breaks, breaks, STEP_AND_WAIT])
    started.processes[2].kill()
    started.processes[2].wait()
    (started.folder / "killed").touch()
    codes, said, _ = started.end()
    assert codes == [EXIT_LOST, EXIT_LOST, -signal.SIGKILL]
    text = "".join(said)
    assert text.count("was killed or crashed") == 1 and "Traceback" not in text


def test_a_connection_that_breaks_because_a_rank_was_found_hanging_is_no_error_of_its_own(ranks):
    breaks = """
heartbeat('step 3')
heartbeat('step 4')
while not processes[1].is_gone():
    time.sleep(0.02)
raise RuntimeError('connection closed by peer')
"""
    codes, said, _ = ranks(["a", "a"], [breaks, STEP_AND_WAIT], timeout_seconds=[None, 1]).end()
    assert codes == [EXIT_HANGING] * 2 and said[0] == ""
    assert "the others wait for rank 1 " in said[1]


def test_a_rank_that_was_told_to_stop_and_had_to_leave_is_no_loss(tmp_path, ranks):
    started = ranks(["a", "a", "b"], "preemption.allow(0.3, folder, looks_for_file=False)\n" + STEP_AND_WAIT)
    time.sleep(0.5)
    started.processes[1].send_signal(signal.SIGTERM)
    codes, said, _ = started.end()
    assert codes == [EXIT_PREEMPTED] * 3
    assert "told to stop (SIGTERM), not done 0.3 s later" in said[1] and "killed" not in "".join(said)
    assert (tmp_path / "preempted.json").exists() and not (tmp_path / LOST_FILE).exists()


def test_a_process_is_told_apart_from_another_one_with_its_number():
    here = this_process()
    assert not here.is_gone()
    assert replace(here, started=here.started - 1).is_gone()
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    other = replace(here, number=child.pid, started=int(Path(f"/proc/{child.pid}/stat").read_text().split()[21]))
    assert not other.is_gone()
    child.kill()
    while os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT) is None:
        pass
    assert other.is_gone()  # dead, though nobody has waited for it
    child.communicate()
    assert other.is_gone()


def test_what_another_launch_or_two_writers_at_once_have_left_is_passed_over(tmp_path):
    now, before = (Process("host", "a", 7, started) for started in (200, 100))
    reader, writer = (RankFiles(tmp_path, rank, [now, now]) for rank in range(2))
    writer.make()
    assert reader.read(1) is None
    assert writer.write(Position(1, before, beats=3)) and reader.read(1) is None
    position = Position(1, now, looks=2, beats=4, where="step 1", last_word="wörd")
    assert writer.write(position) and reader.read(1) == position
    (tmp_path / "logs/rank-1.at").write_text("{torn")
    assert reader.read(1) is None
    kinds = [(1, before, 1, "old"), (1, now, 1, "new"), (0, now, 1, "own"), (1, now, EXIT_LOST, "lost")]
    ends = [End(rank, process, code, "a", text) for rank, process, code, text in kinds]
    for end in ends[:2]:
        writer.add_end(end)
    with open(tmp_path / "logs/ends", "a") as file:
        file.write("{torn\n")
    assert reader.new_ends() == [ends[1]]
    with open(tmp_path / "logs/ends", "a") as file:
        file.write(json.dumps(asdict(ends[3]))[:20])  # half of a line: not yet
    assert reader.new_ends() == []
    with open(tmp_path / "logs/ends", "a") as file:
        file.write(json.dumps(asdict(ends[3]))[20:] + "\n")
    writer.add_end(ends[2])
    assert reader.new_ends() == [ends[3]]


def test_a_disk_that_is_full_later_still_takes_a_position(tmp_path):
    program = (
        "import resource, sys; from pathlib import Path; from dpo_scale.run.rank_files import *;"
        "files = RankFiles(Path(sys.argv[1]), 0, [this_process()]); files.make();"
        "position = Position(0, this_process()); assert files.write(position);"
        "room = (Path(sys.argv[1]) / 'logs/rank-0.at').stat().st_size;"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (room, room));"
        "assert files.write(Position(0, this_process(), 1000, 1000, 1000, 'x' * 100, 'y' * 200));"
        "assert files.read(0).beats == 1000"
    )
    subprocess.run([sys.executable, "-c", program, tmp_path], env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True)


def test_every_rank_is_watched_from_another_machine_and_few_are_read(tmp_path):
    processes = [Process("host", f"machine {rank // 8}", rank, 1) for rank in range(1024)]
    dogs = [Watchdog(tmp_path, 20.0, rank, processes) for rank in range(1024)]
    assert {len(dog._watched) for dog in dogs} == {10} and {len(dog._mates) for dog in dogs} == {7}
    watched = {processes[r].machine for dog in dogs for r in dog._watched if r // 8 != dog._rank // 8}
    assert len(watched) == 128
    # news of one rank reaches all within 10 looks
    informed = {0}
    for _ in range(10):
        informed |= {dog._rank for dog in dogs if informed & set(dog._watched)}
    assert len(informed) == 1024


def test_a_run_folder_has_one_run_at_a_time_and_a_killed_one_leaves_no_lock(tmp_path):
    program = (
        "import sys, time; from pathlib import Path; from dpo_scale.run.folder import hold_run_dir;"
        "hold_run_dir(Path(sys.argv[1]), 0); print('held', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", program, tmp_path], env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE
    )
    assert holder.stdout.readline() == b"held\n"
    with pytest.raises(ConfigError, match=f"a run is going on in it .process {holder.pid} on "):
        hold_run_dir(tmp_path, 0.3)
    holder.kill()
    holder.wait()
    hold_run_dir(tmp_path, 0.0)
    hold_run_dir(tmp_path, 0.0)  # its own
