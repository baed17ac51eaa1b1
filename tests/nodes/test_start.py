"""Nodes that can't reach one another at the start: all ends in time, and the error says where and what to set."""

import time
from contextlib import ExitStack

import pytest
from nodes.rig import NAMES, Cluster, Settings, ends_of

pytestmark = [pytest.mark.nodes, pytest.mark.slow, pytest.mark.distributed]
START_SECONDS = 8  # deepspeed.timeout_minutes, which bounds the start; torch's store may use it up twice
SECONDS_OF_IMPORTS = 20


@pytest.fixture(scope="module")
def starts(folder):
    """How the ranks ended, and what they said, with a host name of their own only and without a cable; both at once."""
    with ExitStack() as stack:
        started = {}
        for name in ("loopback", "cable"):
            run_dir = folder / f"start-{name}"
            cluster = stack.enter_context(Cluster(run_dir / "machines", loopback_names=name == "loopback"))
            if name == "cable":
                cluster.unplug(NAMES[1])
            settings = Settings(folder, run_dir)(f"deepspeed.timeout_minutes={START_SECONDS / 60}")
            started[name] = time.monotonic(), cluster.start_ranks(settings)
        starts = {}
        for name in ("cable", "loopback"):  # in the order in which they end
            since, ranks = started[name]
            ends = ends_of(ranks, since, 2 * START_SECONDS + SECONDS_OF_IMPORTS)
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


@pytest.mark.xfail(strict=True, reason="a traceback of gloo on one node, and the other waits, today")
def test_a_host_name_that_means_the_machine_itself_ends_both_sides_with_what_to_set(starts):
    """Debian's hosts file: gloo listens on the address of the host's own name, where no other machine finds it."""
    for name, error in zip(NAMES, errors_of(starts["loopback"]), strict=True):
        assert name in error and "127.0.1.1" in error and "GLOO_SOCKET_IFNAME" in error


@pytest.mark.xfail(strict=True, reason="tracebacks of torch's store today")
def test_a_node_without_a_network_ends_both_sides_with_what_to_look_at(starts):
    for name, error in zip(NAMES, errors_of(starts["cable"]), strict=True):
        assert name in error and "MASTER_ADDR" in error and NAMES[0] in error
