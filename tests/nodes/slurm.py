"""A Slurm cluster of two machines out of unpacked packages, and a job that is told of its time limit and goes on.

`bash tests/nodes/slurm.sh` gets the packages and calls this: `slurm.py PACKAGES FOLDER`. It prints a transcript.
"""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from faults.rig import steps_done  # noqa: E402
from nodes.rig import NAMES, Cluster, Machine, why_not  # noqa: E402
from tiny import read_metrics, run_overrides  # noqa: E402
from transformers.utils.logging import disable_progress_bar  # noqa: E402

from dpo_scale.settings.tree import load_config  # noqa: E402

STEPS = 600
STEPS_BEFORE_THE_SIGNAL = 50
SECONDS_TO_RUN = 300
# Nothing that needs the real machine's users, cgroups or keys. %h keeps the daemons' files apart.
SLURM_CONF = """
ClusterName=tests
SlurmctldHost={first}
SlurmUser=root
AuthType=auth/none
CredType=cred/none
PluginDir={plugins}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%h
SlurmdPidFile={folder}/slurmd-%h.pid
SlurmctldPidFile={folder}/slurmctld.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
MpiDefault=none
ReturnToService=2
SlurmdParameters=config_overrides
{nodes}
PartitionName=all Nodes={names} Default=YES MaxTime=INFINITE
"""


def main(packages: Path, folder: Path) -> None:
    if reason := why_not():
        raise SystemExit(f"error: {reason}")
    with Cluster(folder / "machines") as cluster:
        start_slurm(cluster, packages, folder)
        disable_progress_bar()
        settings = load_config(
            None,
            [*run_overrides(folder), "deepspeed.stage=3", f"train.max_steps={STEPS}", "checkpoint.save_steps=100",
             "checkpoint.save_total_limit=2", "logging.console_metrics=[loss]"],
        )  # fmt: skip
        settings.save(folder / "tiny.yaml")
        run_dir = folder / "run"
        run_job(cluster.machines[0], run_dir, folder)


def start_slurm(cluster: Cluster, packages: Path, folder: Path) -> None:
    """The controller on the first machine, a daemon on each, and a wait until both nodes take jobs."""
    libraries = next(packages.glob("usr/lib/*/slurm-wlm"))
    (folder / "state").mkdir()
    (folder / "slurm.conf").write_text(
        SLURM_CONF.format(
            first=NAMES[0], names=",".join(NAMES), folder=folder, plugins=libraries,
            nodes="\n".join(f"NodeName={m.name} NodeAddr={m.address} CPUs=1 State=UNKNOWN" for m in cluster.machines),
        )
    )  # fmt: skip
    (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
    sbin = packages / "usr/sbin"
    for machine in cluster.machines:
        path = f"{packages}/usr/bin:{sbin}:{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin:/sbin"
        machine.variables |= {
            "SLURM_CONF": str(folder / "slurm.conf"),
            "LD_LIBRARY_PATH": f"{libraries}:{libraries.parent}",
            "PATH": path,
            "DPO_SCALE_VENV": sys.prefix,
            "DS_ACCELERATOR": "cpu",
            "RANKS_PER_NODE": "1",
        }
    first = cluster.machines[0]
    first.start(sbin / "slurmctld-wlm", "-D", "-i", log="slurmctld.txt")
    for machine in cluster.machines:
        machine.start(sbin / "slurmd-wlm", "-D", "-N", machine.name, "-d", sbin / "slurmstepd-wlm", log="slurmd.txt")
    wait_until(lambda: ask(first, "sinfo", "-h", "-t", "idle", "-o", "%D") == "2", "two idle nodes")
    show(first, "sinfo", "-N", "-o", "%N %T %c")


def run_job(first: Machine, run_dir: Path, folder: Path) -> None:
    """Submit, send what Slurm sends before the time limit, and wait until the requeued job has finished."""
    config, output = folder / "tiny.yaml", folder / "job.log"
    # without --gpus-per-node, which a line in the file asks for
    script = folder / "slurm.sh"
    script.write_text(re.sub("#SBATCH --gpus-per-node.*\n", "", (ROOT / "launch/slurm.sh").read_text()))
    said = show(
        first, "sbatch", "--nodes=2", "--cpus-per-task=1", "--time=10", f"--output={output}", script, config,
        f"output_dir={run_dir}",
    )  # fmt: skip
    job = said.split()[-1]
    wait_until(lambda: steps_done(run_dir) >= STEPS_BEFORE_THE_SIGNAL, "the job's first steps", output)
    show(first, "scancel", "--batch", "--signal=USR1", job)
    wait_until(lambda: state(first, job) == "PENDING", "the requeue", output)
    show(first, "squeue", "-o", "%i %T %r %S")
    # Slurm holds a requeued job back for two minutes
    wait_until(lambda: state(first, job) != "PENDING", "the second start", output)
    wait_until(lambda: state(first, job) not in ("CONFIGURING", "RUNNING", "COMPLETING"), "the job's end", output)
    print(f"$ scontrol show job {job} | grep -E 'JobState|Restarts|ExitCode'")
    show_lines(ask(first, "scontrol", "show", "job", job), "JobState|Restarts|ExitCode")
    print(f"$ grep -E '^(resumed|stopped|model saved)' {output.name}")
    show_lines(output.read_text(), "^(resumed|stopped|model saved)")
    check(run_dir, output)


def check(run_dir: Path, output: Path) -> None:
    """Every step was done once, some before the signal and some after the requeue, and the run is finished."""
    assert (run_dir / "finished.json").exists(), output.read_text()
    assert [record["step"] for record in read_metrics(run_dir)] == list(range(1, STEPS + 1))
    text = output.read_text()
    stopped = re.search(r"stopped after step (\d+)", text)
    resumed = re.search(r"resumed from .* at step (\d+)", text)
    assert stopped and resumed and stopped[1] == resumed[1], text
    print(f"each of {STEPS} steps was done once, {stopped[1]} of them before the signal")


def state(machine: Machine, job: str) -> str:
    """The job's state; nothing if the controller has forgotten it."""
    return ask(machine, "squeue", "-h", "-t", "all", "-j", job, "-o", "%T")


def ask(machine: Machine, *command: object) -> str:
    """What a command prints, whatever becomes of it."""
    done = machine.start(*command, log="asked.txt")
    done.wait(60)
    return done.output().strip()


def show(machine: Machine, *command: object) -> str:
    """Run a command, with its place in the transcript."""
    print("$", *(Path(part).name if isinstance(part, Path) else part for part in command))
    said = machine.run(*command)
    print(said, end="", flush=True)
    return said


def show_lines(text: str, pattern: str) -> None:
    """What grep would print."""
    print(*(line for line in text.splitlines() if re.search(pattern, line)), sep="\n", flush=True)


def wait_until(happened: Callable[[], object], what: str, output: Path | None = None) -> None:
    until = time.monotonic() + SECONDS_TO_RUN
    while not happened():
        if time.monotonic() > until:
            raise SystemExit(f"error: waited {SECONDS_TO_RUN} s for {what}\n{output.read_text() if output else ''}")
        time.sleep(0.2)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
