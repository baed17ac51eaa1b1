"""The faults, each a function that tries it a number of times and says what was lost.

A try survives if the run then ends like the uninterrupted one: the same metrics line by line, the same weights bit by
bit, nothing left running, all time limits kept.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path

from faults.hooks import (
    BadNumbers,
    DiskFull,
    HangAtStep,
    HoldSaves,
    HoldSteps,
    KillInSave,
    NoticeInEvaluation,
    SlowDisk,
)
from faults.rig import (
    LAUNCHERS,
    RANKS,
    SAVE_STEPS,
    SECONDS_TO_END,
    STEPS,
    Forks,
    Launched,
    assert_same_run,
    finish,
    fresh,
    overrides,
    steps_done,
    uninterrupted,
    wait_for_step,
)
from tiny import ROOT, read_metrics

GRACE_SECONDS = 20  # what `rig.overrides` sets


@dataclass
class Outcome:
    """What became of the tries of one fault."""

    fault: str
    tries: int = 0
    lost: list[str] = field(default_factory=list)
    note: str = ""

    def attempt(self, what: str, action: Callable[[], None]) -> None:
        self.tries += 1
        try:
            action()
        except Exception as error:  # whatever it is, the table has to be told
            self.lost.append(f"{what}: {type(error).__name__}: {error}")


def kills(folder: Path, rng: random.Random, count: int) -> Outcome:
    """SIGKILL of one rank or all at random moments of a run that saves every 2 steps, a few times in each run."""
    outcome = Outcome("SIGKILL of a rank or all while training")
    whole = uninterrupted(folder)
    while outcome.tries < count:
        run_dir = fresh(folder, "killed", rng)
        settings = overrides(folder, f"output_dir={run_dir}")
        for _ in range(min(4, count - outcome.tries)):
            if steps_done(run_dir) == STEPS:
                break
            outcome.attempt(run_dir.name, lambda: _kill_once(folder, run_dir, settings, rng))
        try:
            finish(folder, settings)
            assert_same_run(run_dir, whole)
        except AssertionError as error:
            outcome.lost.append(f"{run_dir.name}: {error}")
        shutil.rmtree(run_dir)
    return outcome


def _kill_once(folder: Path, run_dir: Path, settings: list[str], rng: random.Random) -> None:
    done = steps_done(run_dir)
    safe = done - done % SAVE_STEPS
    # some steps further on, or now and then during the start
    further, at_start = rng.randint(1, 4), rng.random() < 0.15
    forks = Forks(folder, settings, HoldSteps(further + SAVE_STEPS))
    if at_start:
        time.sleep(rng.uniform(0.5, 4))
    else:
        wait_for_step(run_dir, min(done + further, STEPS), forks.running)
        time.sleep(rng.uniform(0, 0.15))
    victims = [rng.randrange(RANKS)] if rng.random() < 0.6 else list(range(RANKS))
    forks.kill(*victims)
    codes = forks.wait()
    assert all(code in (-signal.SIGKILL, 0, 1, 71) for code in codes), f"exit codes {codes}\n{forks.output()[-2000:]}"
    # the line of a step may be there before its checkpoint is, so the checkpoint before must be
    newest = max(
        (int(path.name[5:]) for path in run_dir.glob("checkpoints/step-*") if path.name[5:].isdigit()), default=0
    )
    assert newest >= safe - SAVE_STEPS, f"step {done} was done, but the newest checkpoint is of step {newest}"


def preemptions(folder: Path, rng: random.Random, count: int) -> Outcome:
    """SIGTERM or SIGUSR1 at random moments to the runner, the launcher or a rank, under both launchers."""
    outcome = Outcome("SIGTERM or SIGUSR1 to runner, launcher or rank")
    cases = [
        (launcher, target, number)
        for number in (signal.SIGTERM, signal.SIGUSR1)
        for target in ("launcher", "rank1", "runner", "rank0")
        for launcher in LAUNCHERS
        if not (launcher == "torchrun" and target == "launcher")  # it is its own runner
    ]
    rng.shuffle(cases)
    longest = _try_notices(folder, rng, outcome, [cases[k % len(cases)] for k in range(count)])
    outcome.note = f"longest way out {longest:.1f} s"
    return outcome


def preempted_evaluations(folder: Path, rng: random.Random, count: int) -> Outcome:
    """SIGUSR1 in the middle of an evaluation: it is broken off, and the resumed run does it again."""
    outcome = Outcome("SIGUSR1 to a rank in an evaluation")
    whole = uninterrupted(folder)
    for number, step in ((1, 4), (3, STEPS), (1, 0))[:count]:
        run_dir = fresh(folder, "in-evaluation", rng)

        def in_evaluation() -> None:
            on_start = f"train.eval_on_start={str(step == 0).lower()}"
            settings = overrides(folder, f"output_dir={run_dir}", on_start)
            forks = Forks(folder, settings, NoticeInEvaluation(rng.randrange(RANKS), number))
            assert forks.wait() == [75] * RANKS, forks.output()[-3000:]
            assert json.loads((run_dir / "preempted.json").read_text())["step"] == (step or None)
            assert step not in [line["step"] for line in read_metrics(run_dir, "eval")]
            finish(folder, settings)
            if step:
                assert_same_run(run_dir, whole)

        outcome.attempt(f"of step {step}", in_evaluation)
        shutil.rmtree(run_dir, ignore_errors=True)
    return outcome


def killed_launchers(folder: Path, rng: random.Random, count: int) -> Outcome:
    """SIGKILL of the process that started the ranks: they notice that it is gone, save and leave."""
    outcome = Outcome("SIGKILL of runner or launcher")
    cases = [("deepspeed", "launcher"), ("torchrun", "runner"), ("deepspeed", "runner")]
    kills = [(*cases[k % len(cases)], signal.SIGKILL) for k in range(count)]
    outcome.note = f"longest way out {_try_notices(folder, rng, outcome, kills):.1f} s"
    return outcome


def _try_notices(
    folder: Path, rng: random.Random, outcome: Outcome, notices: Iterable[tuple[str, str, signal.Signals]]
) -> float:
    """Try each (launcher, target, signal) at a random moment; the longest time, in seconds, that a run took to end."""
    whole = uninterrupted(folder)
    longest = 0.0
    for launcher, target, number in notices:
        run_dir = fresh(folder, "preempted", rng)
        settings = overrides(folder, f"output_dir={run_dir}", "train.max_steps=400", "checkpoint.save_steps=399")

        def one() -> None:
            nonlocal longest
            step, told = rng.randint(1, 12), folder / f"{run_dir.name}-told"
            launched = Launched(folder, settings, launcher, faults=[HoldSteps(step + 2), HoldSaves(told)])
            assert wait_for_step(run_dir, step, launched.running), launched.output()[-3000:]
            process = {name: launched.find(name) for name in ("runner", "launcher", "rank0", "rank1")}
            time.sleep(rng.uniform(0, 0.1))
            os.kill(process[target], number)
            if rng.random() < 0.5 and number != signal.SIGKILL:  # and again before it has saved
                time.sleep(rng.uniform(0, 0.2))
                # a launcher may have died of the first one, as a rank must not
                with nullcontext() if target.startswith("rank") else suppress(ProcessLookupError):
                    os.kill(process[target], number)
            told.touch()
            code, seconds = launched.wait()
            longest = max(longest, seconds)
            mark = json.loads((run_dir / "preempted.json").read_text())
            assert (run_dir / f"checkpoints/step-{mark['step']}").is_dir(), mark
            assert steps_done(run_dir) == mark["step"], f"step {steps_done(run_dir)} was done, {mark['step']} saved"
            assert seconds < GRACE_SECONDS, f"{seconds:.1f} s"
            assert code in (75, 1, 0, -number, 256 - number), f"exit code {code}"
            assert code == 75 or not (launcher == "deepspeed" and target.startswith("rank")), f"exit code {code}"
            _end_at(folder, run_dir, mark["step"], whole)

        outcome.attempt(f"{number.name} to {launcher}'s {target}", one)
        shutil.rmtree(run_dir, ignore_errors=True)
    return longest


def _end_at(folder: Path, run_dir: Path, step: int, whole: Path) -> None:
    """Resume a long run to the length of the whole one, if it has not got further, and compare."""
    if step < STEPS:
        finish(folder, overrides(folder, f"output_dir={run_dir}"))
        assert_same_run(run_dir, whole)
        return
    longer = overrides(folder, f"output_dir={run_dir}", f"train.max_steps={step + 2}")
    finish(folder, longer)
    assert steps_done(run_dir) == step + 2


def requeues(folder: Path, rng: random.Random, count: int) -> Outcome:
    """`launch/requeue.sh`: a rank is told to stop, then the script is, then it is started again and finishes."""
    outcome = Outcome("launch/requeue.sh, preempted twice")
    whole = uninterrupted(folder)
    for k in range(count):
        launcher = LAUNCHERS[(k + 1) % 2]

        run_dir = fresh(folder, "requeued", rng)

        def one() -> None:
            _requeue(folder, run_dir, launcher, rng)
            assert_same_run(run_dir, whole)

        outcome.attempt(launcher, one)
        shutil.rmtree(run_dir, ignore_errors=True)
    return outcome


def _requeue(folder: Path, run_dir: Path, launcher: str, rng: random.Random) -> None:
    """One run in three pieces."""
    settings = overrides(folder, f"output_dir={run_dir}", "checkpoint.save_steps=11")
    requeue = ["bash", str(ROOT / "launch/requeue.sh")]
    # three steps in each of the first two pieces, and at most one more after the notice
    script = Launched(folder, settings, launcher, faults=[HoldSteps(3)], through=[*requeue, "3"])
    assert wait_for_step(run_dir, 2, script.running), script.output()[-3000:]
    os.kill(script.find("rank1"), signal.SIGTERM)
    _wait_for(lambda: "try 1: stopped to be resumed" in script.output(), script)
    first = int(re.search(r"stopped after step (\d+) of", script.output())[1])
    assert wait_for_step(run_dir, first + 1, script.running), script.output()[-3000:]
    os.kill(script.process.pid, rng.choice([signal.SIGTERM, signal.SIGUSR1]))
    code, _ = script.wait()
    assert code == 75, f"exit code {code}\n{script.output()[-3000:]}"
    assert "try 2: stopped to be resumed" in script.output()
    second = json.loads((run_dir / "preempted.json").read_text())["step"]
    assert first < second < STEPS and not (run_dir / "stop").exists(), (first, second)
    script = Launched(folder, settings, launcher, through=[*requeue, "1"])
    code, _ = script.wait(120)
    assert code == 0, f"exit code {code}\n{script.output()[-3000:]}"


def _wait_for(condition: Callable[[], bool], launched: Launched) -> None:
    until = time.monotonic() + SECONDS_TO_END
    while not condition():
        assert launched.running() and time.monotonic() < until, launched.output()[-3000:]
        time.sleep(0.02)


def kills_in_saves(folder: Path, rng: random.Random, share: float) -> Outcome:
    """SIGKILL of a rank before each opening, sync, rename and removal of a file within a save.

    Args:
        share: of all boundaries, drawn at random; 1 or more for all.
    """
    outcome = Outcome("SIGKILL at a file boundary of a save")
    whole = uninterrupted(folder)
    run_dir, counted = fresh(folder, "counting", rng), fresh(folder, "boundaries", rng)
    counted.mkdir()
    forks = Forks(folder, overrides(folder, f"output_dir={run_dir}"), KillInSave(None, 0, counted))
    assert forks.wait() == [0] * RANKS, forks.output()
    shutil.rmtree(run_dir)
    numbers = [int((counted / str(rank)).read_text()) for rank in range(RANKS)]
    boundaries = [(rank, event) for rank in range(RANKS) for event in range(1, numbers[rank] + 1)]
    outcome.note = f"{len(boundaries)} boundaries in a save"
    if share < 1:
        boundaries = rng.sample(boundaries, max(1, round(share * len(boundaries))))
    for rank, event in boundaries:
        run_dir = fresh(folder, "in-save", rng)
        settings = overrides(folder, f"output_dir={run_dir}")

        def one() -> None:
            forks = Forks(folder, settings, KillInSave(rank, event, counted))
            codes = forks.wait()
            assert codes[rank] == -signal.SIGKILL, f"exit codes {codes}"
            finish(folder, settings)
            assert_same_run(run_dir, whole)

        outcome.attempt(f"before event {event} of rank {rank}", one)
        shutil.rmtree(run_dir, ignore_errors=True)
    return outcome


def full_disks(folder: Path, rng: random.Random, saves: int) -> Outcome:
    """No room for a file in a save, an export, or a reference store."""
    outcome = Outcome("disk full in a save, an export, a store")
    whole = uninterrupted(folder)
    for _ in range(saves):
        rank, limit = rng.randrange(RANKS), rng.choice([0, 100, 3000, 20_000, 100_000])
        run_dir = fresh(folder, "full", rng)

        def save() -> None:
            forks = Forks(folder, overrides(folder, f"output_dir={run_dir}"), DiskFull(rank, limit, "save"))
            assert forks.wait() == [0] * RANKS, forks.output()[-3000:]
            assert "the checkpoint of step 4 could not be saved" in forks.output(), forks.output()[-3000:]
            assert_same_run(run_dir, whole)

        outcome.attempt(f"save, rank {rank}, {limit} bytes", save)
        shutil.rmtree(run_dir, ignore_errors=True)

    run_dir = fresh(folder, "full", rng)
    settings = overrides(folder, f"output_dir={run_dir}")

    def export() -> None:
        forks = Forks(folder, settings, DiskFull(0, 20_000, "export"))
        assert 2 in forks.wait(), forks.output()[-3000:]
        assert "Traceback" not in forks.output() and "could not be written" in forks.output(), forks.output()[-3000:]
        assert not (run_dir / "model").exists() and not (run_dir / "finished.json").exists()
        finish(folder, settings)
        assert_same_run(run_dir, whole)

    outcome.attempt("export", export)
    shutil.rmtree(run_dir, ignore_errors=True)

    run_dir = fresh(folder, "full", rng)
    stored = overrides(folder, f"output_dir={run_dir}", "reference.mode=store", f"reference.store={run_dir}-store")

    def store() -> None:
        forks = Forks(folder, stored, DiskFull(rng.randrange(RANKS), 600, "store"))
        codes = forks.wait()
        assert 2 in codes, f"exit codes {codes}\n{forks.output()[-3000:]}"
        # the other rank, which no launcher ends here, adds that its connection is broken
        assert "error: " in forks.output() and "cannot be written" in forks.output(), forks.output()[-3000:]
        finish(folder, stored)

    outcome.attempt("store", store)
    shutil.rmtree(run_dir, ignore_errors=True)
    return outcome


def hangs(folder: Path, rng: random.Random, count: int) -> Outcome:
    """A rank that sleeps for ever in a step, or is stopped altogether, under a real launcher or as forks."""
    outcome = Outcome("a rank that hangs")
    for k in range(count):
        rank, run_dir = rng.randrange(RANKS), fresh(folder, "hanging", rng)
        settings = overrides(folder, f"output_dir={run_dir}", "train.hang_timeout_minutes=0.05")

        def sleeps() -> None:
            forks = Forks(folder, settings, HangAtStep(rank, 5))
            codes = forks.wait(60)
            assert set(codes) == {70}, f"exit codes {codes}"
            assert f"the others wait for rank {rank} " in forks.output(), forks.output()[-3000:]
            assert "in train_step" in (run_dir / f"logs/rank-{rank}.log").read_text()

        def stopped() -> None:
            launched = Launched(folder, [*settings, "train.max_steps=4000"], LAUNCHERS[k // 2 % 2])
            assert wait_for_step(run_dir, 3, launched.running), launched.output()[-3000:]
            process = {name: launched.find(name) for name in ("rank0", "rank1")}[f"rank{rank}"]
            os.kill(process, signal.SIGSTOP)
            code, _ = launched.wait(3 + 10 + 35)  # the limit, its resolution, and 30 s that launchers take to kill
            assert code not in (0, 75), f"exit code {code}"
            assert f"the others wait for rank {rank} " in launched.output(), launched.output()[-3000:]

        outcome.attempt(f"rank {rank}", sleeps if k % 2 == 0 else stopped)
        shutil.rmtree(run_dir, ignore_errors=True)
    return outcome


def deaths(folder: Path, rng: random.Random, count: int) -> Outcome:
    """A rank is killed while another sits in what stands for a collective that never returns, with no launcher."""
    outcome = Outcome("a rank killed while its peer is in a collective that never returns")
    longest = 0.0
    for _ in range(count):
        rank, run_dir = rng.randrange(RANKS), fresh(folder, "lost", rng)
        settings = overrides(folder, f"output_dir={run_dir}")

        def dies() -> None:
            nonlocal longest
            forks = Forks(folder, settings, HangAtStep(1 - rank, 5))
            assert wait_for_step(run_dir, 4, forks.running), forks.output()[-3000:]
            time.sleep(rng.uniform(0.5, 2))
            forks.kill(rank)
            started = time.monotonic()
            codes = forks.wait()
            longest = max(longest, time.monotonic() - started)
            assert longest < 6, f"{longest:.1f} s"
            assert codes[rank] == -signal.SIGKILL and codes[1 - rank] == 71, f"exit codes {codes}"
            text = forks.output()
            assert text.count("was killed or crashed") == 1 and f"rank {rank} (process " in text, text[-3000:]
            assert f"rank {rank} starts as process {forks.processes[rank]}" in text, text[-3000:]
            assert json.loads((run_dir / "lost.json").read_text())["ranks"] == [rank]
            finish(folder, settings)
            assert_same_run(run_dir, uninterrupted(folder))
            assert not (run_dir / "lost.json").exists()

        outcome.attempt(f"rank {rank}", dies)
        shutil.rmtree(run_dir, ignore_errors=True)
    outcome.note = f"longest way out {longest:.1f} s"
    return outcome


def requeued_deaths(folder: Path, rng: random.Random, count: int) -> Outcome:
    """A rank is killed under a real launcher that `launch/requeue.sh` started: the run goes on by itself."""
    outcome = Outcome("launch/requeue.sh, a rank killed")
    whole = uninterrupted(folder)
    for k in range(count):
        launcher, run_dir = LAUNCHERS[k % 2], fresh(folder, "requeued-lost", rng)

        def one() -> None:
            settings, killed = overrides(folder, f"output_dir={run_dir}"), folder / f"{run_dir.name}-killed"
            requeue = ["bash", str(ROOT / "launch/requeue.sh"), "2"]
            script = Launched(folder, settings, launcher, faults=[HoldSteps(5, killed)], through=requeue)
            assert wait_for_step(run_dir, 3, script.running), script.output()[-3000:]
            os.kill(script.find("rank1"), signal.SIGKILL)
            killed.touch()
            code, _ = script.wait(120)
            assert code == 0, f"exit code {code}\n{script.output()[-3000:]}"
            assert "try 1: lost a rank" in script.output() and "was killed or crashed" in script.output()
            assert_same_run(run_dir, whole)

        outcome.attempt(launcher, one)
        shutil.rmtree(run_dir, ignore_errors=True)
    return outcome


def slow_saves(folder: Path, rng: random.Random, count: int) -> Outcome:
    """One rank's disk is so slow that a save and the export take longer than the hang timeout; the run goes on."""
    outcome = Outcome("a save and an export slower than the hang timeout")
    for _ in range(count):
        rank, run_dir = rng.randrange(RANKS), fresh(folder, "slow", rng)
        limit = 0.05  # minutes: 3 s
        more = (f"train.hang_timeout_minutes={limit}", f"checkpoint.save_steps={STEPS // 2}")

        def goes_on() -> None:
            forks = Forks(
                folder,
                overrides(folder, f"output_dir={run_dir}", *more),
                SlowDisk(rank, 1.5, run_dir / f"slowest-{rank}"),
            )
            assert forks.wait(150) == [0] * RANKS, forks.output()[-3000:]
            seconds = float((run_dir / f"slowest-{rank}").read_text())
            assert seconds > 60 * limit, f"no save took longer than {seconds:.1f} s"
            assert_same_run(run_dir, uninterrupted(folder))

        outcome.attempt(f"rank {rank}", goes_on)
        shutil.rmtree(run_dir, ignore_errors=True)
    return outcome


def bad_numbers(folder: Path, rng: random.Random, kinds: Iterable[tuple[int, str]]) -> Outcome:
    """A loss or gradient that is not finite on one rank: named and stopped, or left out, also across a resume.

    Args:
        kinds: (ZeRO stage, "loss" or "gradient").
    """
    outcome = Outcome("a loss or gradient that is not finite")
    for stage, what in kinds:
        rank = rng.randrange(RANKS)
        more = (f"deepspeed.stage={stage}", "train.on_nonfinite=skip", "train.max_steps=8", "train.max_nonfinite=2")
        names = [fresh(folder, name, rng) for name in ("bad", "bad-resumed", "bad-stops")]

        def one() -> None:
            fault = BadNumbers(rank, (3, 6), what)
            whole, resumed, stops = names
            forks = Forks(folder, overrides(folder, f"output_dir={whole}", *more), fault)
            assert forks.wait() == [0] * RANKS, forks.output()[-3000:]
            records = [json.loads(line) for line in (whole / "nonfinite.jsonl").read_text().splitlines()]
            assert [record["step"] for record in records] == [3, 6]
            for record in records:
                assert record["action"] == "skipped" and len(record["ranks"]) == RANKS
                values = [[pair["loss"] for pair in pairs] for pairs in record["ranks"]]
                assert sum(map(len, values)) == 6, record  # steps 3 and 6 are the last of 22 pairs
                for of_rank, losses in enumerate(values):
                    is_bad = what == "loss" and of_rank == rank
                    assert all((loss == "nan") is is_bad for loss in losses), record
                assert all("train.jsonl" in pair["row"] for pairs in record["ranks"] for pair in pairs)
            cut = overrides(folder, f"output_dir={resumed}", *more)
            forks = Forks(folder, [*cut, "train.max_steps=4"], fault)
            assert forks.wait() == [0] * RANKS, forks.output()[-3000:]
            forks = Forks(folder, cut, fault)
            assert forks.wait() == [0] * RANKS, forks.output()[-3000:]
            assert_same_run(resumed, whole)
            assert (resumed / "nonfinite.jsonl").read_text() == (whole / "nonfinite.jsonl").read_text()
            forks = Forks(folder, overrides(folder, f"output_dir={stops}", *more[:1]), fault)
            assert 2 in forks.wait() and "error: step 3: " in forks.output(), forks.output()[-3000:]
            assert "Traceback" not in forks.output()

        outcome.attempt(f"{what} at stage {stage}, rank {rank}", one)
        for run_dir in names:
            shutil.rmtree(run_dir, ignore_errors=True)
    return outcome


def table(outcomes: Iterable[Outcome]) -> str:
    """The report, as a Markdown table with what was lost below it."""
    outcomes = list(outcomes)
    lines = ["| fault | tries | survived | lost | |", "|---|---|---|---|---|"]
    for outcome in outcomes:
        survived = outcome.tries - len(outcome.lost)
        lines.append(f"| {outcome.fault} | {outcome.tries} | {survived} | {len(outcome.lost)} | {outcome.note} |")
    lost = [f"- {outcome.fault}: {text}" for outcome in outcomes for text in outcome.lost]
    return "\n".join([*lines, *([""] if lost else []), *lost])
