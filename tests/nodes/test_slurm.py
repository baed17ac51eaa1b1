"""`launch/slurm.sh` under a real Slurm; only on request, since a requeued job waits two minutes in the queue."""

import os
import subprocess

import pytest
from tiny import ROOT

pytestmark = [pytest.mark.nodes, pytest.mark.slow, pytest.mark.distributed, pytest.mark.timeout(900)]


@pytest.mark.skipif("DPO_SCALE_TEST_SLURM" not in os.environ, reason="takes four minutes: set DPO_SCALE_TEST_SLURM=1")
def test_a_job_that_reaches_its_limit_is_requeued_and_finishes():
    done = subprocess.run(["bash", ROOT / "tests/nodes/slurm.sh"], capture_output=True, text=True)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
