"""What the GPU suite needs beside what an image for GPUs has, as wheels that are carried in.

An image is taken to have torch, Triton, transformers, accelerate and safetensors, with what these need. The rest is
below: all of it is under 64 MiB, most of that Arrow and pandas, which `datasets` needs and many images have.
`gpu_suite.sh --list-wheels` prints the list, `WHEELS=folder bash benchmarks/gpu_suite.sh` installs what is missing.
"""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

MAX_BYTES = 64 * 2**20
# module -> what to ask pip for. Arrow has grown by a quarter since version 21, which datasets 4 still takes.
WHEELS = {
    "xxhash": "xxhash", "datasets": "datasets<5", "pyarrow": "pyarrow<22", "pandas": "pandas",
    "dateutil": "python-dateutil", "six": "six", "dill": "dill", "multiprocess": "multiprocess",
    "requests": "requests", "urllib3": "urllib3", "charset_normalizer": "charset-normalizer",
    "deepspeed": "deepspeed", "einops": "einops", "hjson": "hjson", "msgpack": "msgpack", "ninja": "ninja",
    "cpuinfo": "py-cpuinfo", "pydantic": "pydantic", "pydantic_core": "pydantic-core",
    "annotated_types": "annotated-types", "typing_inspection": "typing-inspection",
    "pytest": "pytest", "iniconfig": "iniconfig", "pluggy": "pluggy",
    "trl": "trl", "liger_kernel": "liger-kernel", "cut_cross_entropy": "cut-cross-entropy",
}  # fmt: skip


def missing() -> dict[str, str]:
    """Those modules that are not here, with what to ask pip for."""
    return {module: wheel for module, wheel in WHEELS.items() if find_spec(module) is None}


def file_of(wheel: str, folder: Path) -> Path | None:
    """The file of a package in a folder of wheels, whatever its version."""
    name = re.sub(r"[-_.]+", "_", re.split("[<>=]", wheel)[0]).lower()
    return next((file for file in sorted(folder.glob("*.whl")) if file.name.lower().split("-")[0] == name), None)


def list_wheels(folder: Path | None) -> int:
    """Print what is needed, whether it is here, and the weight of the files in the folder; 2 if that is too much."""
    absent, total = missing(), 0
    print(f"{'package':<20} {'here':<6} wheel")
    for module, wheel in WHEELS.items():
        file = file_of(wheel, folder) if folder else None
        total += file.stat().st_size if file else 0
        weight = f"{file.stat().st_size / 2**20:6.2f} MiB  {file.name}" if file else "not in WHEELS" if folder else ""
        print(f"{wheel:<20} {'no' if module in absent else 'yes':<6} {weight}")
    plain = " ".join(f"'{wheel}'" if "<" in wheel else wheel for wheel in WHEELS.values() if wheel != "deepspeed")
    print("\nfetch with network, for the host's Python and platform, here for 3.12 on x86-64:")
    platform = "--python-version 3.12 --only-binary :all: --platform manylinux_2_28_x86_64"
    print(f"    pip download --no-deps --dest wheels {platform} {plain}")
    print("    DS_BUILD_OPS=0 pip wheel --no-deps --wheel-dir wheels deepspeed   # pure Python; its source needs torch")
    if folder:
        print(f"\n{folder}: {total / 2**20:.1f} MiB of these, of at most {MAX_BYTES / 2**20:.0f}")
        if total > MAX_BYTES:
            print(f"error: {folder}: too heavy to be carried in; leave out what the image has", file=sys.stderr)
            return 2
    return 0


def install(folder: Path, target: Path) -> None:
    """Install what is missing into a folder of its own, for this process and those it starts; the host stays as it is.

    Raises:
        ValueError: if there is no such folder of wheels, or pip refuses one.
    """
    if not folder.is_dir():
        raise ValueError(f"WHEELS={folder}: no such folder")
    absent = missing()
    files = {wheel: file_of(wheel, folder) for wheel in absent.values()}
    for wheel, file in files.items():
        if file is None:
            print(f"note: {wheel} is not in {folder}", file=sys.stderr)
    found = [str(file) for file in files.values() if file is not None]
    if found:
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target", str(target)]
        if subprocess.run([*pip, *found], stdin=subprocess.DEVNULL).returncode != 0:
            raise ValueError(f"WHEELS={folder}: they could not be installed; pip says why above")
    print(f"{len(found)} packages from {folder}, for this run", flush=True)
    # behind what is there already, which so stays what it is
    sys.path.append(str(target))
    os.environ["PYTHONPATH"] = f"{os.environ['PYTHONPATH']}:{target}" if os.environ.get("PYTHONPATH") else str(target)
    importlib.invalidate_caches()
