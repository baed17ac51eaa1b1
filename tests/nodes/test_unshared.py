"""Folders that the nodes were thought to share and do not: one error before any work, never a loss at the end.

The error names the host that does not see the folder, and the folder. Without a launcher each rank's exit code is seen.
"""

import pytest
from faults.rig import SAVE_STEPS
from nodes.rig import NAMES, Cluster

pytestmark = [pytest.mark.nodes, pytest.mark.slow, pytest.mark.distributed]
SECONDS_TO_END = 120
TRAINED = "metrics.jsonl"


def refusal(cluster, ranks):
    """What the ranks' consoles say, if all ranks refused the run as a user's mistake."""
    codes = [rank.wait(SECONDS_TO_END) for rank in ranks]
    said = "".join(rank.output() for rank in ranks)
    assert codes == [2, 2], f"{codes}\n{said[-3000:]}"
    assert said.count("error: ") == 1 and "Traceback" not in said, said
    return said


@pytest.mark.xfail(strict=True, reason="exit code 0 and finished.json today, and no checkpoint that can be resumed")
def test_an_output_dir_that_is_not_shared_is_refused_at_the_start(settings, tmp_path):
    with Cluster(tmp_path, own=[settings.run_dir]) as cluster:
        ranks = cluster.start_ranks(settings())
        said = refusal(cluster, ranks)
        assert NAMES[1] in said and f"output_dir = '{settings.run_dir}'" in said
        for machine in cluster.machines:
            assert not (machine.own(settings.run_dir) / "finished.json").exists()
            assert not (machine.own(settings.run_dir) / TRAINED).exists()


@pytest.mark.xfail(strict=True, reason="computes the whole reference, then misses rows in the store today")
def test_a_store_that_is_not_shared_is_refused_before_it_is_filled(folder, settings, tmp_path):
    store = folder / "store-of-a-node"
    with Cluster(tmp_path, own=[store]) as cluster:
        ranks = cluster.start_ranks(settings("reference.mode=store", f"reference.store={store}"))
        said = refusal(cluster, ranks)
        assert NAMES[1] in said and f"reference.store = '{store}'" in said
        assert not [path for machine in cluster.machines for path in machine.own(store).rglob("*.rows")]
