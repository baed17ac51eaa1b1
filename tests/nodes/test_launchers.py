"""Runs on two machines under each launcher: they give the numbers of two ranks on one machine, bit for bit."""

import json
import time

import pytest
from faults.hooks import HoldSteps
from faults.rig import assert_same_run, wait_for_step
from nodes.rig import FAKETIME, NAMES, Cluster
from nodes.ssh import start_sshd, why_no_ssh

pytestmark = [pytest.mark.nodes, pytest.mark.slow, pytest.mark.distributed]
SECONDS_TO_END = 120


def test_torchrun_on_two_nodes_gives_the_numbers_of_one(folder, whole, settings):
    """The tokenized data lie in a cache folder that each node has for itself."""
    cache = folder / "cache-of-a-node"
    with Cluster(settings.run_dir / "machines", own=[cache]) as cluster:
        arguments = settings(f"data.cache_dir={cache}")
        agents = [cluster.start_torchrun(machine, arguments) for machine in cluster.machines]
        assert [agent.wait(SECONDS_TO_END) for agent in agents] == [0, 0], agents[0].output()[-3000:]
        assert all(list(machine.own(cache).iterdir()) for machine in cluster.machines)
    assert_same_run(settings.run_dir, whole)


@pytest.fixture
def start_over_pdsh(settings):
    """Starts `deepspeed --hostfile` on the first machine of a cluster."""
    if reason := why_no_ssh():
        pytest.skip(reason)

    def start(cluster, *more, faults=()):
        start_sshd(cluster)
        first = cluster.machines[0]
        hostfile = settings.run_dir / "hostfile"
        hostfile.write_text("".join(f"{name} slots=1\n" for name in NAMES))
        # what pdsh does not carry over: everything but PYTHON* and a few names of libraries
        (first.folder / ".deepspeed_env").write_text("DS_ACCELERATOR=cpu\nOMP_NUM_THREADS=1\nHF_HUB_OFFLINE=1\n")
        return first.start(
            "deepspeed", "--hostfile", hostfile, *cluster.script(faults), *settings(*more), log="deepspeed.txt",
            DS_ACCELERATOR="cpu",
        )  # fmt: skip

    return start


def test_a_hostfile_over_pdsh_and_ssh_gives_the_numbers_of_one_node(whole, settings, start_over_pdsh):
    with Cluster(settings.run_dir / "machines") as cluster:
        run = start_over_pdsh(cluster)
        assert run.wait(SECONDS_TO_END) == 0, run.output()[-3000:]
    for rank, name in enumerate(NAMES):
        assert f" on {name}\n" in (settings.run_dir / "logs" / f"rank-{rank}.log").read_text()
    assert_same_run(settings.run_dir, whole)


def test_a_stop_file_reaches_ranks_whose_pdsh_runner_was_killed(settings, start_over_pdsh):
    """The kill itself reaches nobody: the ranks have launchers of their own, over ssh."""
    with Cluster(settings.run_dir / "machines") as cluster:
        run = start_over_pdsh(cluster, faults=[HoldSteps(3)])
        assert wait_for_step(settings.run_dir, 3, run.running), run.output()[-3000:]
        run.kill()
        assert all(
            cluster.script([HoldSteps(3)])[0] in machine.run("ps", "-eo", "args") for machine in cluster.machines
        )
        (settings.run_dir / "stop").touch()
        # the last to write it is rank 0, after all have saved
        until = time.monotonic() + SECONDS_TO_END
        while not (settings.run_dir / "preempted.json").exists():
            assert time.monotonic() < until, run.output()[-3000:]
            time.sleep(0.05)
    stopped = json.loads((settings.run_dir / "preempted.json").read_text())
    assert stopped["step"] == 4 and "the file" in stopped["reason"]
    assert (settings.run_dir / "checkpoints" / "step-4").exists()


def test_clocks_two_minutes_apart_change_nothing(folder, whole, settings):
    if FAKETIME is None:
        pytest.skip("not installed: libfaketime.so.1 (Debian: libfaketime)")
    with Cluster(settings.run_dir / "machines") as cluster:
        late = {"LD_PRELOAD": str(FAKETIME), "FAKETIME": "+120", "FAKETIME_DONT_FAKE_MONOTONIC": "1"}
        cluster.machines[1].variables.update(late)
        early, late = (int(machine.run("date", "+%s")) for machine in cluster.machines)
        assert 115 < late - early < 125
        # not under torchrun: its agents take one another for dead when their clocks are 15 seconds apart
        ranks = cluster.start_ranks(settings())
        assert [rank.wait(SECONDS_TO_END) for rank in ranks] == [0, 0], ranks[0].output()[-3000:]
    assert_same_run(settings.run_dir, whole)
