"""What the tests of two machines share: a folder with model and data, and the run of one machine to compare with."""

from pathlib import Path

import pytest
from faults.rig import finish
from nodes.rig import Settings, why_not


@pytest.fixture(scope="session", autouse=True)
def _machines_can_be_made():
    if reason := why_not():
        pytest.skip(reason)


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("nodes")


@pytest.fixture
def settings(folder, request):
    """The settings of a run in a folder of the test's own, `settings.run_dir`."""
    return Settings(folder, folder / request.node.name)


@pytest.fixture(scope="session")
def whole(folder) -> Path:
    """The run of two ranks on one machine that nothing happens to."""
    settings = Settings(folder, folder / "whole")
    finish(folder, settings())
    return settings.run_dir
