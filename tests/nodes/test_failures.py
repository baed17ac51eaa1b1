"""A cable that is pulled and a node that is killed while a run goes on: the other ends soon, and nothing is lost.

Runs are held at a step until that has happened (`faults.hooks.HoldSteps`), so the speed of the machine decides nothing.
"""

import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
from faults.hooks import HoldSteps
from faults.rig import STEPS, assert_same_run, is_alive, wait_for_step
from nodes.rig import NAMES, Cluster, End, Settings, ends_of
from tiny import read_metrics

pytestmark = [pytest.mark.nodes, pytest.mark.slow, pytest.mark.distributed]
HANG_SECONDS = 12
SECONDS_OF_SILENCE = 30  # after which the watchdog misses a machine
SECONDS_TO_NOTICE = 20  # on top of a timeout, or for what has none
SECONDS_TO_END = 120
EXIT_HANGING, EXIT_LOST = 70, 71


@dataclass
class Try:
    """What became of a run of two ranks, one a node, after something befell the second node.

    Attributes:
        ends: of the ranks.
        said: what the first rank printed.
    """

    run_dir: Path
    ends: list[End]
    said: str


@pytest.fixture(scope="module")
def tries(folder):
    """Three runs and what befell them, all at once, since most of their time is waiting."""

    def lose_power(cluster):
        cluster.unplug(NAMES[1])
        cluster.machines[1].kill()

    befalls = {
        "cable": lambda cluster: cluster.unplug(NAMES[1]),
        "kill": lambda cluster: cluster.machines[1].kill(),
        "power": lose_power,
    }
    with ExitStack() as stack:
        started = {}
        for name in befalls:
            settings = Settings(folder, folder / name)
            arguments = settings(f"train.hang_timeout_minutes={HANG_SECONDS / 60}") if name == "cable" else settings()
            cluster = stack.enter_context(Cluster(settings.run_dir / "machines"))
            started[name] = settings.run_dir, cluster, cluster.start_ranks(arguments, faults=[HoldSteps(3)])
        since = {}
        for name, befall in befalls.items():
            run_dir, cluster, ranks = started[name]
            assert wait_for_step(run_dir, 3, ranks[0].running), ranks[0].output()[-3000:]
            befall(cluster)
            since[name] = time.monotonic()
        seconds = SECONDS_OF_SILENCE + SECONDS_TO_NOTICE
        tries = {}
        for name in ("kill", "cable", "power"):  # in the order in which they end
            run_dir, _, ranks = started[name]
            ends = ends_of(ranks, since[name], seconds)
            print(f"{name}: {ends}")
            tries[name] = Try(run_dir, ends, ranks[0].output())
        return tries


def test_a_pulled_cable_ends_both_sides_within_the_hang_timeout(tries):
    cable = tries["cable"]
    for end in cable.ends:
        assert end.code in (EXIT_HANGING, EXIT_LOST) and end.seconds < HANG_SECONDS + SECONDS_TO_NOTICE, cable
    assert not (cable.run_dir / "finished.json").exists()


def test_a_killed_node_is_a_lost_rank_within_seconds(tries):
    """Its connections are reset, which the other rank sees long before its watchdog misses the node."""
    kill = tries["kill"]
    assert kill.ends[0].code == EXIT_LOST and kill.ends[0].seconds < SECONDS_TO_NOTICE, kill
    assert f"on {NAMES[1]}" in kill.said, kill.said[-3000:]
    assert (kill.run_dir / "lost.json").exists()


def test_a_node_that_loses_its_power_is_a_lost_rank_long_before_the_hang_timeout(tries):
    """No connection tells of it: it is missed because it does not renew its file."""
    power = tries["power"]
    assert power.ends[0].code == EXIT_LOST, power
    assert f"on {NAMES[1]}" in power.said, power.said[-3000:]
    assert (power.run_dir / "lost.json").exists()


def test_three_kills_of_a_node_under_max_restarts_change_no_number(whole, settings):
    """The rank that is left ends within seconds; when the node is back, the run goes on from the newest checkpoint."""
    released = settings.run_dir / "released"
    steps_before_kills = (3, 5, 7)  # each attempt does three steps; saved are the even ones
    with Cluster(settings.run_dir / "machines") as cluster:

        def start(machine):
            more = ["--max-restarts=3", "--rdzv-conf=keep_alive_interval=1"]
            return cluster.start_torchrun(
                machine, [*settings(), "--resume", "auto"], *more, faults=[HoldSteps(3, released)]
            )

        first, second = (start(machine) for machine in cluster.machines)
        for number, step in enumerate(steps_before_kills, start=1):
            assert wait_for_step(settings.run_dir, step, first.running), first.output()[-3000:]
            (left,) = first.ranks()
            if number == len(steps_before_kills):
                released.touch()
            cluster.machines[1].kill()
            killed = time.monotonic()
            while is_alive(left):
                assert time.monotonic() < killed + SECONDS_TO_NOTICE, first.output()[-3000:]
                time.sleep(0.05)
            print(f"kill {number} at step {step}: the other rank ended after {time.monotonic() - killed:.1f} s")
            second = start(cluster.boot(NAMES[1]))
        codes = [agent.wait(SECONDS_TO_END) for agent in (first, second)]
        assert codes == [0, 0], first.output()[-3000:]
        for step in (2, 4, 6):
            assert f"resumed from {settings.run_dir}/checkpoints/step-{step}" in first.output()
    assert_same_run(settings.run_dir, whole)


def test_a_run_goes_on_with_the_nodes_that_are_left_where_the_launcher_allows_it(whole, settings):
    """From two ranks to one: the numbers are the same up to the order of sums."""
    released = settings.run_dir / "released"
    with Cluster(settings.run_dir / "machines") as cluster:
        more = ["--nnodes=1:2", "--max-restarts=3", "--rdzv-conf=keep_alive_interval=1,last_call_timeout=6"]
        first, second = (
            cluster.start_torchrun(machine, [*settings(), "--resume", "auto"], *more, faults=[HoldSteps(3, released)])
            for machine in cluster.machines
        )
        assert wait_for_step(settings.run_dir, 3, first.running), first.output()[-3000:]
        released.touch()
        cluster.machines[1].kill()
        assert first.wait(SECONDS_TO_END) == 0, first.output()[-3000:]
        assert f"resumed from {settings.run_dir}/checkpoints/step-2" in first.output()
    ours, theirs = read_metrics(settings.run_dir), read_metrics(whole)
    assert [record["step"] for record in ours] == list(range(1, STEPS + 1))
    for our, their in zip(ours, theirs, strict=True):
        assert our["loss"] == pytest.approx(their["loss"], rel=1e-4), our["step"]
