"""The fault-injection suite in short: each fault a few times. The whole of it: `python tests/faults/run.py`."""

import random

import pytest
from faults import cases, rig
from faults.damage import damages
from faults.malformed import malformed

pytestmark = pytest.mark.slow
SEED = 7


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the runs are made; the uninterrupted one is made by whichever test is first."""
    return tmp_path_factory.mktemp("faults")


def nothing_lost(outcome):
    assert outcome.tries and not outcome.lost, cases.table([outcome])


@pytest.mark.distributed
def test_kills_lose_no_step_and_change_no_number(folder):
    nothing_lost(cases.kills(folder, random.Random(SEED), 2))


@pytest.mark.distributed
def test_a_notice_to_any_process_ends_in_a_clean_save_without_orphans(folder):
    nothing_lost(cases.preemptions(folder, random.Random(SEED), 1))


@pytest.mark.distributed
def test_an_evaluation_is_broken_off_and_done_again(folder):
    nothing_lost(cases.preempted_evaluations(folder, random.Random(SEED), 1))


@pytest.mark.distributed
def test_ranks_whose_launcher_was_killed_save_and_leave(folder):
    nothing_lost(cases.killed_launchers(folder, random.Random(SEED), 1))


@pytest.mark.distributed
def test_the_requeue_script_takes_a_preempted_run_to_its_end(folder):
    nothing_lost(cases.requeues(folder, random.Random(SEED), 1))


@pytest.mark.distributed
def test_a_kill_inside_a_save_leaves_a_usable_checkpoint(folder):
    nothing_lost(cases.kills_in_saves(folder, random.Random(SEED), 0.01))


@pytest.mark.distributed
def test_a_full_disk_costs_a_warning_or_one_line(folder):
    nothing_lost(cases.full_disks(folder, random.Random(SEED), 0))


@pytest.mark.distributed
def test_a_hanging_rank_is_named_and_the_run_ends(folder):
    nothing_lost(cases.hangs(folder, random.Random(SEED), 1))


@pytest.mark.distributed
def test_a_killed_rank_ends_a_peer_that_no_launcher_ends(folder):
    nothing_lost(cases.deaths(folder, random.Random(SEED), 1))


@pytest.mark.distributed
def test_the_requeue_script_goes_on_after_a_rank_was_killed(folder):
    nothing_lost(cases.requeued_deaths(folder, random.Random(SEED), 1))


@pytest.mark.distributed
def test_a_save_slower_than_the_hang_timeout_ends_nothing(folder):
    nothing_lost(cases.slow_saves(folder, random.Random(SEED), 1))


@pytest.mark.distributed
def test_numbers_that_are_not_finite_are_named_and_left_out(folder):
    nothing_lost(cases.bad_numbers(folder, random.Random(SEED), [(2, "loss")]))


@pytest.mark.distributed
def test_damage_of_any_file_is_noticed(folder):
    nothing_lost(damages(folder, random.Random(SEED), 1))


def test_malformed_inputs_are_taken_or_refused(folder):
    nothing_lost(malformed(folder, SEED, 30))


@pytest.mark.distributed
def test_a_kill_inside_a_save_in_the_background_leaves_a_usable_checkpoint(tmp_path, monkeypatch):
    """The other faults with such saves: `python tests/faults/run.py --async-save`."""
    monkeypatch.setattr(rig, "EXTRA", ["checkpoint.async_save=true"])
    nothing_lost(cases.kills_in_saves(tmp_path, random.Random(SEED), 0.01))
