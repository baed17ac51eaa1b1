"""`launch/slurm.sh` as far as it comes without Slurm; `tests/nodes/slurm.sh` runs it under a real one."""

import os
import subprocess

import pytest
from tiny import ROOT

STAND_IN = """#!/usr/bin/env bash
echo "$0 $*" >> "$CALLED"
[[ $0 == */scontrol && $1 == show ]] && echo node-1
exit 0
"""


@pytest.fixture
def submit(tmp_path):
    """Run the script as Slurm would, with tools that only note how they were called; its end, and the calls."""
    binaries = tmp_path / "venv" / "bin"
    binaries.mkdir(parents=True)
    (binaries / "activate").write_text(f"export PATH={binaries}:$PATH\n")
    for name in ("scontrol", "srun"):
        (binaries / name).write_text(STAND_IN)
        (binaries / name).chmod(0o755)
    (tmp_path / "run.yaml").write_text(f"output_dir: {tmp_path}/run\n")

    def submit(**variables):
        done = subprocess.run(
            ["bash", ROOT / "launch/slurm.sh", tmp_path / "run.yaml"], capture_output=True, text=True,
            env={
                "PATH": os.environ["PATH"], "SLURM_SUBMIT_DIR": str(ROOT), "DPO_SCALE_VENV": str(tmp_path / "venv"),
                "SLURM_JOB_NODELIST": "node-1", "SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2",
                "SLURM_CPUS_PER_TASK": "8", "CALLED": str(tmp_path / "called"), **variables,
            },
        )  # fmt: skip
        called = tmp_path / "called"
        return done, called.read_text() if called.exists() else ""

    return submit


@pytest.mark.parametrize(
    ("variables", "ranks"),
    [
        ({"SLURM_GPUS_ON_NODE": "4"}, 4),
        ({"RANKS_PER_NODE": "2"}, 2),
        ({"SLURM_GPUS_ON_NODE": "4", "RANKS_PER_NODE": "2"}, 4),
    ],
)
def test_ranks_a_node_are_its_gpus_or_what_the_variable_says(submit, variables, ranks):
    _, called = submit(**variables)
    assert f"--nnodes=2 --nproc-per-node={ranks} " in called


def test_without_gpus_and_variable_one_error_names_both(submit):
    done, called = submit()
    assert done.returncode == 2 and not called
    (error,) = done.stderr.splitlines()
    assert error.startswith("error: ") and "SLURM_GPUS_ON_NODE" in error and "RANKS_PER_NODE" in error
