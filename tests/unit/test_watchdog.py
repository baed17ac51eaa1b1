"""Ranks that say where they are, notice that nothing moves, and who is gone; and the lock on a run folder."""

import json
import os
import subprocess
import sys
import time

import pytest
from tiny import ROOT

from dpo_scale import watchdog
from dpo_scale.errors import ConfigError
from dpo_scale.run_folder import hold_run_dir
from dpo_scale.watchdog import EXIT_HANGING, Watchdog

RANK = """
import sys, time
from pathlib import Path
from dpo_scale.watchdog import Watchdog, beat
folder, rank, beats = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
def stuck_in_step():
    time.sleep(60)
with Watchdog(folder, 1 / 60, rank, 2):
    for step in range(beats):
        beat(f"step {step + 1}")
    stuck_in_step()
"""


def start_rank(folder, rank, beats):
    return subprocess.Popen(
        [sys.executable, "-c", RANK, folder, str(rank), str(beats)],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_ranks_that_do_not_move_end_and_name_the_one_that_is_behind(tmp_path):
    ranks = [start_rank(tmp_path, 0, 7), start_rank(tmp_path, 1, 5)]
    said = [rank.communicate(timeout=20)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [EXIT_HANGING] * 2
    for rank, text in enumerate(said):
        assert f"rank {rank}: no progress for 1 s (train.hang_timeout_minutes) at step {(7, 5)[rank]}" in text
        assert f"the others wait for rank 1 (process {ranks[1].pid} on " in text and "last seen at step 5)" in text
        assert "in stuck_in_step" in (tmp_path / f"logs/rank-{rank}.log").read_text()


def test_beats_keep_a_slow_rank_alive(tmp_path):
    with Watchdog(tmp_path, 1 / 60, 0, 1):
        for _ in range(15):
            time.sleep(0.1)
            watchdog.beat("slow")
        assert json.loads((tmp_path / "logs/rank-0.at").read_text())["where"] == "slow"
    assert not (tmp_path / "logs/rank-0.at").exists()
    assert Watchdog.current is None


def test_a_killed_rank_is_lost_and_one_that_failed_has_its_last_word(tmp_path):
    killed = start_rank(tmp_path, 1, 3)
    while not (tmp_path / "logs/rank-1.log").exists():
        time.sleep(0.01)
    with pytest.raises(RuntimeError), Watchdog(tmp_path, None, 0, 2) as dog:
        assert dog.lost_peers() == []
        killed.kill()
        killed.wait()
        (lost,) = dog.lost_peers()
        assert (lost.rank, lost.process, lost.last_word) == (1, killed.pid, None)
        assert dog.speaks_for([lost]) and f"starts as process {killed.pid}" in dog.last_lines(1)
        raise RuntimeError("of our own")
    assert json.loads((tmp_path / "logs/rank-0.at").read_text())["last_word"] == "RuntimeError: of our own"
    assert "RuntimeError: of our own" in (tmp_path / "logs/rank-0.log").read_text()
    Watchdog.current = None


def test_a_run_folder_has_one_run_at_a_time_and_a_killed_one_leaves_no_lock(tmp_path):
    program = (
        "import sys, time; from pathlib import Path; from dpo_scale.run_folder import hold_run_dir;"
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
