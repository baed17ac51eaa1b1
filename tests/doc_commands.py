"""The commands of README and docs, and where each is executed or why it is not."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted(page for folder in (".", "benchmarks", "docs", "tests") for page in (ROOT / folder).glob("*.md"))

# What a command begins with, by what becomes of it. The first that fits counts.
HERE = "tests/e2e/test_documented_commands.py"  # on a tiny model and a tiny file of pairs
FATES = {
    # executed
    r"python launch/train.py.* --(help|print-config)": "tests/unit/test_docs.py",
    r"mkdocs build": "tests/unit/test_docs.py",
    r"bash benchmarks/gpu_suite.sh.* --dry-run": "tests/unit/test_gpu_suite.py",
    r"python benchmarks/(planning|logprobs).py": "tests/unit/test_benchmarks.py, on small cases",
    r"python benchmarks/store.py": HERE + ", on fewer pairs",
    r"(deepspeed|torchrun|python) (?!--hostfile|--nnodes).*launch/(train|precompute|evaluate).py": HERE,
    r"bash launch/requeue.sh": HERE,
    r"python launch/store.py": HERE,
    r"python launch/plan.py": "tests/unit/test_plan_command.py, on a tiny model",
    r"python docs/site/walk.py": HERE,
    r"touch runs/mine/stop": "tests/faults/test_short.py",
    r"python tests/faults/run.py": "tests/faults/test_short.py, a short form",
    # not executed by a test
    r"deepspeed --hostfile|torchrun --nnodes|sbatch |bash tests/nodes/slurm.sh": "needs a cluster",
    r"(WHEELS=wheels )?bash benchmarks/gpu_suite.sh": "needs a GPU",
    r"bash launch/quickstart.sh": "downloads an environment and a model, and takes minutes",
    r"bash tests/run.sh": "the test command itself",
    r"pip install|source .venv": "changes the environment that it is given in",
    r"python benchmarks/(throughput|precompute).py": "takes an hour, and TRL",
    r"python benchmarks/(uneven_rows|saves).py": "takes minutes",
    r"python tests/compare_runs.py": "takes minutes",
}


def commands(text: str) -> list[str]:
    """The lines of a page's bash blocks, without comments."""
    blocks = re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [" ".join(stripped.split()) for line in lines if (stripped := re.sub(r"(^|\s)#.*", "", line).strip())]


COMMANDS = sorted({command for page in PAGES for command in commands(page.read_text())})


def fate(command: str) -> str | None:
    """The test that executes a command, or why none does; None if nothing is known of it."""
    return next((fate for start, fate in FATES.items() if re.match(start, command)), None)
