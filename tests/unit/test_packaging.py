"""The built package and its description: what an installation without this checkout would get."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

PROJECT = Path(__file__).resolve().parents[2]
PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel built from a copy, so that building leaves nothing in the checkout."""
    source = tmp_path_factory.mktemp("source")
    for file in ("pyproject.toml", "setup.cfg", "LICENSE", "README.md"):
        shutil.copy(PROJECT / file, source)
    shutil.copytree(PROJECT / "dpo_scale", source / "dpo_scale", ignore=shutil.ignore_patterns("__pycache__"))
    # A stray folder beside the package must not slip into it.
    (source / "tests").mkdir()
    (source / "tests" / "__init__.py").touch()
    out = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--disable-pip-version-check", "--no-deps"]
        + ["--no-build-isolation", "--wheel-dir", str(out), str(source)],
        check=True,
        capture_output=True,
    )
    (built,) = out.glob("*.whl")
    with zipfile.ZipFile(built) as archive:
        yield archive


def test_wheel_holds_every_module_and_the_builtin_data_and_nothing_else(wheel):
    expected = {
        str(path.relative_to(PROJECT))
        for path in (PROJECT / "dpo_scale").rglob("*")
        if path.suffix == ".py" or path.parent.name == "builtin_data" and path.suffix == ".jsonl"
    }
    assert any(name.startswith("dpo_scale/builtin_data/") for name in expected)
    packed = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert packed == expected


def test_wheel_says_version_licence_and_python(wheel):
    import dpo_scale

    metadata = next(name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    text = wheel.read(metadata).decode()
    assert f"\nVersion: {dpo_scale.__version__}\n" in text
    assert "\nLicense-Expression: Apache-2.0\n" in text
    (allowed,) = re.findall(r"^Requires-Python: (.*)$", text, re.MULTILINE)
    assert [v for v in ("3.9", *PYTHONS, "3.15") if f"{v}.1" in SpecifierSet(allowed)] == list(PYTHONS)
    assert any(name.endswith("licenses/LICENSE") for name in wheel.namelist())


def constraints() -> list[Requirement]:
    lines = (PROJECT / "constraints.txt").read_text().splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def applies(marker: Marker | None, python: str) -> bool:
    return marker is None or marker.evaluate({"python_version": python, "python_full_version": f"{python}.0"})


@pytest.mark.parametrize("python", PYTHONS)
def test_constraints_pin_each_package_to_one_version(python):
    pinned: dict[str, str] = {}
    for requirement in constraints():
        (specifier,) = requirement.specifier
        assert specifier.operator == "==" and "*" not in specifier.version and "+" not in specifier.version
        if applies(requirement.marker, python):
            assert requirement.name not in pinned, f"{requirement.name} has two versions on Python {python}"
            pinned[requirement.name] = specifier.version


@pytest.mark.parametrize("python", PYTHONS)
def test_every_declared_dependency_is_constrained_to_an_allowed_version(wheel, python):
    metadata = next(name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    lines = wheel.read(metadata).decode().splitlines()
    declared = [Requirement(line.removeprefix("Requires-Dist: ")) for line in lines if line.startswith("Requires-Dist")]
    assert len(declared) >= 10
    pinned = {c.name: next(iter(c.specifier)).version for c in constraints() if applies(c.marker, python)}
    for requirement in declared:
        if requirement.name != "dpo-scale":
            assert requirement.name in pinned, f"{requirement.name} is not in constraints.txt for Python {python}"
            assert requirement.specifier.contains(pinned[requirement.name])


@pytest.mark.parametrize("script", ["launch/quickstart.sh", "launch/slurm.sh", "tests/run.sh", ".ci/run"])
def test_shell_scripts_parse(script):
    subprocess.run(["bash", "-n", str(PROJECT / script)], check=True)


def fake_python(path: Path, version: str | None) -> Path:
    """An interpreter that says it has that version; asked for an environment, it exits with its minor version.

    Without a version it is like a version manager's shim for one that is not installed.
    """
    said = f"import sys; sys.version_info = ({', '.join((version or '').split('.'))}, 1, 'final', 0); "
    as_told = f'[ "$1" != -c ] || exec {sys.executable} -c "{said}$2"\nexit {version.split(".")[1]}' if version else ""
    path.write_text(f"#!/bin/sh\n{as_told or 'exit 127'}\n")
    path.chmod(0o755)
    return path


def start_quickstart(folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    result = subprocess.run(
        ["bash", str(PROJECT / "launch" / "quickstart.sh")],
        env={"PATH": "/usr/bin:/bin", "DPO_SCALE_VENV": str(folder / "venv")} | variables,
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert not (folder / "venv").exists()
    return result


@pytest.mark.parametrize("version", [None, "2.7", "3.9", "3.15"])
def test_quickstart_names_what_is_missing_when_there_is_no_usable_python(tmp_path, version):
    fake = fake_python(tmp_path / "python", version)
    result = start_quickstart(tmp_path, PYTHON=str(fake))
    assert result.returncode == 1
    assert result.stderr == f"error: PYTHON={fake} is not Python 3.10 to 3.14 with the venv module\n"


@pytest.mark.parametrize("version", PYTHONS)
def test_quickstart_takes_every_python_that_the_package_allows(tmp_path, version):
    result = start_quickstart(tmp_path, PYTHON=str(fake_python(tmp_path / "python", version)))
    assert result.returncode == int(version.removeprefix("3.")), result.stderr


def test_quickstart_looks_for_a_python_that_will_do(tmp_path):
    for version in PYTHONS:
        fake_python(tmp_path / f"python{version}", version if version != "3.14" else None)
    fake_python(tmp_path / "python3", "3.9")
    fake_python(tmp_path / "python", "3.10")
    result = start_quickstart(tmp_path, PATH=f"{tmp_path}:/usr/bin:/bin")
    assert result.returncode == 13, result.stderr


def test_slurm_script_refuses_a_run_that_could_not_be_resumed():
    config = PROJECT / "configs" / "quickstart.yaml"
    result = subprocess.run(
        ["bash", str(PROJECT / "launch" / "slurm.sh"), str(config), "train.max_steps=1"],
        env={"PATH": "/usr/bin:/bin", "SLURM_SUBMIT_DIR": str(PROJECT)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2
    assert "give output_dir=FOLDER" in result.stderr
