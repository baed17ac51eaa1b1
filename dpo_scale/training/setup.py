"""From a config to a run that can take its next step: prepare, choose where to start, build."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from dpo_scale.checkpoint.compatibility import Identity, check_identity
from dpo_scale.checkpoint.load import (
    Checkpoint,
    TrainState,
    checkpoint_path,
    choose_checkpoint,
    load_checkpoint,
    names_a_checkpoint,
)
from dpo_scale.checkpoint.save import Saver, remove_leftovers
from dpo_scale.data.batching import PairOrder
from dpo_scale.data.dataset import PairDataset
from dpo_scale.data.flops import forward_flops
from dpo_scale.data.planning import Planner, make_planner
from dpo_scale.distributed import ranks
from dpo_scale.errors import CheckpointError, ConfigError, DataError
from dpo_scale.forecast.check import check_memory
from dpo_scale.forecast.forecast import Forecast
from dpo_scale.models.load import load_policy
from dpo_scale.models.scorer import Policy
from dpo_scale.observe.devices import peak_flops
from dpo_scale.observe.tracking import Tracker
from dpo_scale.reference.columns import ColumnReference
from dpo_scale.reference.modes import make_reference, stored_reference, verify_start
from dpo_scale.reference.protocol import KnownReference, Reference
from dpo_scale.run import preemption
from dpo_scale.run.finished import finished_step, unmark_finished
from dpo_scale.run.folder import writing_into
from dpo_scale.run.watchdog import unmark_lost
from dpo_scale.settings.resume import CONFIG_FILE
from dpo_scale.settings.tree import Config
from dpo_scale.training.identity import identity_of
from dpo_scale.training.objective import Objective, choose_objective
from dpo_scale.training.prepare import Prepared, prepare


@dataclass(frozen=True)
class Course:
    """What a run does from its first step to its last.

    Attributes:
        columns: the reference, where the data's own columns are.
    """

    pair_order: PairOrder
    total_steps: int
    identity: Identity
    columns: ColumnReference | None


class Best(NamedTuple):
    """The best held-out metric so far, and the step that it was measured after."""

    metric: float | None
    step: int | None


@dataclass
class Run:
    """A run between two steps. Rank 0 alone has a `forecast`, if there is one, and a `tracker`.

    Attributes:
        saving_step: of the checkpoint that was begun last.
        beaten_best: what was best before it, if it is of a new best and not known to be on the disk.
    """

    config: Config
    run_dir: Path
    prepared: Prepared
    course: Course
    state: TrainState
    planner: Planner
    policy: Policy
    reference: Reference
    objective: Objective
    saver: Saver
    forecast: Forecast | None = None
    peak_flops: float | None = None  # of one rank's device, a second
    tracker: Tracker | None = None
    saving_step: int | None = None
    beaten_best: Best | None = None

    @property
    def train_data(self) -> PairDataset:
        return self.prepared.data.train

    @property
    def eval_data(self) -> PairDataset | None:
        return self.prepared.data.eval


def set_up(
    config: Config, run_dir: Path, resume: str | None, found: list[Checkpoint], profile: range | None
) -> Run | None:
    """Everything that comes before the next step; None if the run is finished. Every rank calls it.

    Args:
        resume, found: what `--resume` says, and the checkpoints that it may mean, the best first.

    Raises:
        UserError: for anything that the config, the data, a model folder or a checkpoint gets wrong, before any
            weights are loaded where that can be known.
    """
    peak = peak_flops_of(config)
    finished = finished_step(run_dir) if resume and not names_a_checkpoint(resume) else None
    if finished is not None and not found:
        _say_finished(run_dir, finished)
        return None
    prepared = prepare(config, report_dir=run_dir)
    course = course_of(config, prepared)
    allowed = config.checkpoint.allow_changes
    if finished is not None and finished == course.total_steps:
        check_identity(found[0].path, found[0].identity, course.identity, allowed)
        _say_finished(run_dir, finished)
        return None
    checkpoint = choose_checkpoint(found, course.identity, allowed)
    state = _state_at(checkpoint, run_dir, course.total_steps)
    if profile and not state.step < profile.start <= profile[-1] <= course.total_steps:
        raise ConfigError(
            f"--profile: steps {profile.start} to {profile[-1]} are not all among those to come, {state.step + 1} to "
            f"{course.total_steps}"
        )
    if ranks.is_main():
        with writing_into(run_dir):  # what was said of the attempt before
            preemption.unmark_preempted(run_dir)
            unmark_lost(run_dir)
    run = build(config, run_dir, prepared, course, checkpoint, state)
    run.peak_flops = peak
    if ranks.is_main():
        with writing_into(run_dir):
            unmark_finished(run_dir)
            remove_leftovers(run_dir)
            config.save(run_dir / CONFIG_FILE)
        run.tracker = Tracker(config, run_dir, course.total_steps, state.step)
    return run


def _say_finished(run_dir: Path, step: int) -> None:
    ranks.log(f"{run_dir}: this run is finished, at step {step}; nothing to do")


def peak_flops_of(config: Config) -> float | None:
    """What one rank's device could do at most in a second, for `mfu`; None if nobody knows.

    Raises:
        ConfigError: if the console is to show a utilisation that can't be computed.
    """
    named = config.logging.peak_tflops
    peak = peak_flops(ranks.device_name()) if named is None else named * 1e12
    if peak is None:
        missing = f"no peak is known of the device {ranks.device_name()!r}; logging.peak_tflops says it"
        if "mfu" in config.logging.console_metrics:
            raise ConfigError(f"logging.console_metrics = 'mfu': {missing}")
        ranks.log(f"mfu is left out of the metrics: {missing}")
    return peak


def course_of(config: Config, prepared: Prepared) -> Course:
    """Which pairs each step sees, how many steps there are, and what the run's checkpoints will be of.

    Raises:
        DataError: if there are too few pairs for one step, or the reference's columns lack a value.
        ModelError: if weights that identify the run can't be fingerprinted.
    """
    settings, pairs = config.train, prepared.data.train
    if settings.drop_last and len(pairs) < settings.global_batch_size:
        raise DataError(
            f"train.drop_last: {len(pairs)} training pairs are fewer than train.global_batch_size = "
            f"{settings.global_batch_size}, so every step would be dropped"
        )
    pair_order = PairOrder(len(pairs), settings.global_batch_size, settings.seed, settings.shuffle, settings.drop_last)
    columns = None
    if config.loss.needs_reference and config.reference.mode == "columns":
        columns = ColumnReference(config.data, prepared.tokenizer, ranks.log)
    identity = identity_of(config, prepared.model_config, pairs, columns)
    return Course(pair_order, pair_order.total_steps(settings.num_train_epochs, settings.max_steps), identity, columns)


def _state_at(checkpoint: Checkpoint | None, run_dir: Path, total_steps: int) -> TrainState:
    """How far the run is when it starts."""
    if checkpoint is None:
        return TrainState()
    state = checkpoint.state
    if state.step > total_steps:
        raise CheckpointError(f"{checkpoint.path}: is at step {state.step}, but this run ends at step {total_steps}")
    if state.best_step is not None and not checkpoint_path(run_dir, state.best_step).exists():
        ranks.log(f"the best checkpoint, of step {state.best_step}, is not in {run_dir}: looking for a new best")
        state.best_step = state.best_metric = None
    return state


def build(
    config: Config, run_dir: Path, prepared: Prepared, course: Course, checkpoint: Checkpoint | None, state: TrainState
) -> Run:
    """Plan the steps, fill the store if that is the reference, and load the models."""
    data, layout, total_steps = prepared.data, prepared.layout, course.total_steps
    flops = forward_flops(prepared.model_config, trust_remote_code=config.model.trust_remote_code)
    planner = make_planner(config, layout.option.layout, layout.groups, flops, data.train.lengths)
    plans = planner.first_plans(course.pair_order, total_steps)
    ranks.log(f"run folder {run_dir}")
    ranks.log(
        f"{len(data.train)} pairs to train on, {len(data.eval) if data.eval else 0} held out; {total_steps} steps of "
        f"{config.train.global_batch_size} pairs: {planner.describe(plans, data.train)}"
    )
    forecast = check_memory(config, prepared.model_config, data, planner, course.pair_order, total_steps, plans)
    seen = data.train.select(course.pair_order.pairs_of_run(total_steps))
    known: KnownReference | None = course.columns
    if config.loss.needs_reference and config.reference.mode == "store":
        # before the policy is in memory: filling the store may take the reference's model
        datasets = [seen, data.eval] if data.eval else [seen]
        known = stored_reference(config, datasets, prepared.pad_token_id, layout)
    policy = load_policy(config, max(len(plan.micro_steps) for plan in plans), layout)
    reference = make_reference(config, policy, known, layout)
    if checkpoint is not None:
        load_checkpoint(policy, checkpoint, reference)
        ranks.log(f"resumed from {checkpoint.path} at step {state.step}")
    elif known is not None:
        verify_start(config, known, policy, seen, prepared.pad_token_id, layout)
    if layout.option.layout != planner.layout:  # a model failed its check, before any step was laid out
        planner = make_planner(config, layout.option.layout, layout.groups, flops, data.train.lengths)
        plans = planner.first_plans(course.pair_order, total_steps)
        ranks.log(f"planned again for layout {planner.layout}: {planner.describe(plans, data.train)}")
    objective, reason = choose_objective(config, policy)
    ranks.log(f"loss and gradient {reason}")
    keep = config.checkpoint
    saver = Saver(
        run_dir,
        course.identity,
        keep=keep.save_total_limit,
        in_background=keep.async_save,
        timeout_minutes=config.deepspeed.timeout_minutes,
    )
    return Run(config, run_dir, prepared, course, state, planner, policy, reference, objective, saver, forecast)
