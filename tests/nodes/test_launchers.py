"""Runs on two machines that go well: they give the numbers of two ranks on one machine, bit for bit."""

import pytest
from faults.rig import assert_same_run
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


def test_a_hostfile_over_pdsh_and_ssh_gives_the_numbers_of_one_node(folder, whole, settings):
    if reason := why_no_ssh():
        pytest.skip(reason)
    with Cluster(settings.run_dir / "machines") as cluster:
        start_sshd(cluster)
        first = cluster.machines[0]
        hostfile = settings.run_dir / "hostfile"
        hostfile.write_text("".join(f"{name} slots=1\n" for name in NAMES))
        # what pdsh does not carry over: everything but PYTHON* and a few names of libraries
        (first.folder / ".deepspeed_env").write_text("DS_ACCELERATOR=cpu\nOMP_NUM_THREADS=1\nHF_HUB_OFFLINE=1\n")
        run = first.start(
            "deepspeed", "--hostfile", hostfile, *cluster.script([]), *settings(), log="deepspeed.txt",
            DS_ACCELERATOR="cpu",
        )  # fmt: skip
        assert run.wait(SECONDS_TO_END) == 0, run.output()[-3000:]
        hosts = [(settings.run_dir / "logs" / f"rank-{rank}.log").read_text() for rank in range(2)]
    assert [name in text for name, text in zip(NAMES, hosts, strict=True)] == [True, True]
    assert_same_run(settings.run_dir, whole)


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
