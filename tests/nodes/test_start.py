"""Nodes that can't reach one another at the start: all ends in time, and the error says where and what to set."""

import time
from contextlib import ExitStack

import pytest
from nodes.rig import NAMES, Cluster, Settings, ends_of

pytestmark = [pytest.mark.nodes, pytest.mark.slow, pytest.mark.distributed]
START_SECONDS = 8  # deepspeed.start_timeout_minutes; torch's store may use it up twice
SECONDS_TO_GIVE_UP = 2 * START_SECONDS + 25  # with the imports
SECONDS_OF_A_RUN = 60


@pytest.fixture(scope="module")
def starts(folder):
    """How the ranks ended, and what they said, all started at once.

    On `loopback` each host's name means 127.0.1.1, as on a fresh Debian. On `wrong` gloo is told a network that leads
    to no other machine. On `cable` the second machine's cable is out.
    """
    with ExitStack() as stack:
        started = {}
        for name in ("loopback", "wrong", "cable"):
            run_dir = folder / f"start-{name}"
            cluster = stack.enter_context(Cluster(run_dir / "machines", loopback_names=name == "loopback"))
            if name == "cable":
                cluster.unplug(NAMES[1])
            if name == "wrong":
                for machine in cluster.machines:
                    machine.variables["GLOO_SOCKET_IFNAME"] = "lo"
            settings = Settings(folder, run_dir)(f"deepspeed.start_timeout_minutes={START_SECONDS / 60}")
            started[name] = time.monotonic(), cluster.start_ranks(settings)
        starts = {}
        for name, (since, ranks) in started.items():
            ends = ends_of(ranks, since, SECONDS_OF_A_RUN if name == "loopback" else SECONDS_TO_GIVE_UP)
            print(f"{name}: {ends}")
            starts[name] = ends, [rank.output() for rank in ranks]
        return starts


def errors_of(start):
    """The one error of each rank; all must have ended, with a code of their own."""
    ends, said = start
    assert all(end.code not in (None, 0) for end in ends), ends
    assert "Traceback" not in "".join(said), said
    errors = [[line for line in text.splitlines() if line.startswith("error: ")] for text in said]
    assert [len(lines) for lines in errors] == [1, 1], errors
    return [error for (error,) in errors]


def test_a_host_name_that_means_the_machine_itself_is_no_obstacle(starts):
    """Gloo would listen on the address of the host's own name, where no other machine finds it."""
    ends, said = starts["loopback"]
    assert [end.code for end in ends] == [0, 0], said
    for name, text in zip(NAMES, said, strict=True):
        assert f"{name}: this host's name means 127.0.1.1; gloo takes the network eth0" in text


def test_a_network_that_leads_nowhere_ends_both_sides_with_what_to_set(starts):
    for name, error in zip(NAMES, errors_of(starts["wrong"]), strict=True):
        assert error.startswith(f"error: {name}: ") and "GLOO_SOCKET_IFNAME=lo" in error


def test_a_node_without_a_network_ends_both_sides_with_what_to_look_at(starts):
    for name, error in zip(NAMES, errors_of(starts["cable"]), strict=True):
        assert name in error and "MASTER_ADDR" in error and NAMES[0] in error
