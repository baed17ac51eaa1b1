"""A row shared by 2 or 4 ranks gives the log-probs, gradients and training runs of a whole one."""

import json

import pytest
from tiny import ROOT, launch

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    file = tmp_path_factory.mktemp("split") / "found.json"
    done = launch("tests/distributed/split_rows.py", file, ranks=4, first_on_path=ROOT / "tests")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads(file.read_text())


def test_log_probs_and_gradients_are_those_of_whole_rows(split):
    assert len(split) == 26
    for case, of_sizes in split.items():
        for size, (logps, gradients) in of_sizes.items():
            assert logps <= 1e-4, (case, size)  # of sums of up to 29 tokens
            assert gradients <= 1e-5, (case, size)
