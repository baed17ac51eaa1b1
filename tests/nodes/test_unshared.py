"""Folders that the nodes were thought to share and do not: one error before any work, never a loss at the end.

The error names the host that does not see the folder, and the folder. Without a launcher each rank's exit code is seen.
"""

import pytest
from nodes.rig import NAMES, Cluster

pytestmark = [pytest.mark.nodes, pytest.mark.slow, pytest.mark.distributed]
SECONDS_TO_END = 120
TRAINED = "metrics.jsonl"


def refusal(cluster, ranks):
    """The one error that the ranks' consoles have, if all ranks refused the run as a user's mistake."""
    codes = [rank.wait(SECONDS_TO_END) for rank in ranks]
    said = "".join(rank.output() for rank in ranks)
    assert codes == [2, 2] and "Traceback" not in said, f"{codes}\n{said[-3000:]}"
    errors = {line for line in said.splitlines() if line.startswith("error: ")}
    assert len(errors) == 1, errors
    return errors.pop()


def test_an_output_dir_that_is_not_shared_is_refused_at_the_start(settings, tmp_path):
    with Cluster(tmp_path, own=[settings.run_dir]) as cluster:
        ranks = cluster.start_ranks(settings())
        said = refusal(cluster, ranks)
        assert NAMES[1] in said and f"output_dir = '{settings.run_dir}'" in said
        for machine in cluster.machines:
            assert not (machine.own(settings.run_dir) / "finished.json").exists()
            assert not (machine.own(settings.run_dir) / TRAINED).exists()


def test_a_store_in_a_cache_that_is_not_shared_is_refused_before_it_is_filled(folder, settings, tmp_path):
    """Tokenized data may be each node's own, but a rank reads what others have put into the store."""
    cache = folder / "cache-with-store"
    with Cluster(tmp_path, own=[cache]) as cluster:
        for machine in cluster.machines:
            machine.variables["DPO_SCALE_CACHE"] = str(cache)
        ranks = cluster.start_ranks(settings("reference.mode=store"))
        said = refusal(cluster, ranks)
        assert NAMES[1] in said and "reference.store" in said and str(cache) in said
        assert "computed" not in ranks[0].output()
