"""Folders that the nodes were thought to share and do not: one error before any work, never a loss at the end.

The error names the host that does not see the folder, and the folder. Without a launcher each rank's exit code is seen.
"""

from contextlib import ExitStack

import pytest
from nodes.rig import NAMES, Cluster, Settings

pytestmark = [pytest.mark.nodes, pytest.mark.slow, pytest.mark.distributed]
SECONDS_TO_END = 120
TRAINED = "metrics.jsonl"


@pytest.fixture(scope="module")
def refused(folder):
    """{what is not shared: (its folder, the run's folder, the machines, what the ranks said)}, both tried at once."""
    output, cache = folder / "unshared-output", folder / "unshared-cache"
    runs = {"output_dir": (output, output, []), "store": (cache, folder / "unshared-store", ["reference.mode=store"])}
    with ExitStack() as stack:
        started = {}
        for name, (own, run_dir, more) in runs.items():
            cluster = stack.enter_context(Cluster(folder / f"machines-{name}", own=[own]))
            for machine in cluster.machines:
                machine.variables["DPO_SCALE_CACHE"] = str(cache)
            started[name] = cluster.machines, cluster.start_ranks(Settings(folder, run_dir)(*more))
        refused = {}
        for name, (machines, ranks) in started.items():
            codes = [rank.wait(SECONDS_TO_END) for rank in ranks]
            said = [rank.output() for rank in ranks]
            assert codes == [2, 2] and "Traceback" not in "".join(said), f"{codes}\n{said}"
            refused[name] = *runs[name][:2], machines, said
        return refused


def the_error(said):
    """The one error that the ranks' consoles have."""
    errors = {line for text in said for line in text.splitlines() if line.startswith("error: ")}
    assert len(errors) == 1, errors
    return errors.pop()


def test_an_output_dir_that_is_not_shared_is_refused_at_the_start(refused):
    own, run_dir, machines, said = refused["output_dir"]
    error = the_error(said)
    assert NAMES[1] in error and f"output_dir = '{run_dir}'" in error
    for machine in machines:
        assert not (machine.own(own) / "finished.json").exists()
        assert not (machine.own(own) / TRAINED).exists()


def test_a_store_in_a_cache_that_is_not_shared_is_refused_before_it_is_filled(refused):
    """Tokenized data may be each node's own, but a rank reads what others have put into the store."""
    own, run_dir, _, said = refused["store"]
    error = the_error(said)
    assert NAMES[1] in error and "reference.store" in error and str(own) in error
    assert "computed" not in said[0]
    assert not run_dir.exists()
