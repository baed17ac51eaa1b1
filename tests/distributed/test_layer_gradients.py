"""ZeRO-3 by whole layers gives plain torch's gradients where leaf modules might not: see `layer_gradients.py`."""

import json

import pytest
from tiny import ROOT, launch

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    file = tmp_path_factory.mktemp("gradients") / "measured.json"
    done = launch("tests/distributed/layer_gradients.py", file, launcher="python", first_on_path=ROOT / "tests")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads(file.read_text())


def test_gradients_are_those_of_plain_torch(measured):
    assert len(measured) == 8
    for arm, found in measured.items():
        assert found["leaves"] == 4, arm
        assert found["worst"] <= (1e-4 if "compiled" in arm else 1e-6), arm


def test_compiled_layers_stay_whole_and_are_compiled_once_for_all_layers_and_lengths(measured):
    for arm, found in measured.items():
        assert found["breaks"] == 0, arm
        # one row or several, with and without a gradient; where some layers are frozen, those apart
        assert found["graphs"] <= (0 if "compiled" not in arm else 8 if "frozen" in arm else 4), arm
    assert measured["compiled"]["graphs"] > 0
