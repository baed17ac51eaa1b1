"""The training run, top to bottom: data, engines, the loop, the model.

An optimizer step is: every rank lets the reference score its pairs of the step's global batch, then walks through its
micro-batches of them (policy forward, backward), metrics are summed over ranks once, the numbers are checked, the
weights are updated. What decides the next step (order, learning rate) is a pure function of the step's number; what
can't be is in the checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch

from dpo_scale.checkpoint.identity import Identity, check_identity
from dpo_scale.checkpoint.save_load import (
    Checkpoint,
    TrainState,
    checkpoint_path,
    choose_checkpoint,
    load_checkpoint,
    load_weights,
    names_a_checkpoint,
    open_checkpoint,
    remove_leftovers,
    require_whole,
    save_checkpoint,
)
from dpo_scale.data.batching import Schedule
from dpo_scale.data.dataset import PairDataset, load_pairs
from dpo_scale.data.flops import forward_flops
from dpo_scale.data.prefetch import BATCHES_AHEAD, Prefetcher
from dpo_scale.distributed import engine, ranks
from dpo_scale.distributed.random_state import seed_everything
from dpo_scale.errors import CheckpointError, ConfigError, DataError
from dpo_scale.models.export import export_model
from dpo_scale.models.load import (
    check_liger,
    check_logprobs,
    check_vocabulary,
    load_policy,
    load_tokenizers,
    resolve_layout,
)
from dpo_scale.observe.devices import peak_flops
from dpo_scale.observe.metrics import MetricSums
from dpo_scale.observe.metrics_file import METRICS_FILE, read_metrics
from dpo_scale.observe.profiler import StepProfiler
from dpo_scale.observe.timing import StepTimer
from dpo_scale.observe.tracking import Tracker, check_trackers
from dpo_scale.progress import heartbeat
from dpo_scale.reference.columns import ColumnReference
from dpo_scale.reference.modes import make_reference, stored_reference, verify_start
from dpo_scale.reference.moving import MovingReference
from dpo_scale.reference.stored import StoredReference
from dpo_scale.reference.values import ReferenceValues
from dpo_scale.run import preemption
from dpo_scale.run.finished import finished_step, mark_finished, unmark_finished
from dpo_scale.run.folder import agree_on_run_dir
from dpo_scale.run.nonfinite import record_nonfinite_step
from dpo_scale.run.rank_files import this_process
from dpo_scale.run.watchdog import Watchdog, unmark_lost
from dpo_scale.settings.resume import CONFIG_FILE
from dpo_scale.settings.tree import Config
from dpo_scale.training.evaluate import evaluate
from dpo_scale.training.learning_rate import learning_rate
from dpo_scale.training.objective import Objective, choose_objective
from dpo_scale.training.plan import MicroStep, Planner, make_planner, micro_steps_of_run
from dpo_scale.training.run_identity import identity_of


def train(config: Config, resume: str | None = None, profile: range | None = None) -> Path:
    """Train a policy and return the run folder; every rank calls it.

    Args:
        config: a validated config.
        resume: what `--resume` says, see `checkpoint.find_checkpoints`; None starts afresh.
        profile: optimizer steps (from 1) of which a profiler's trace is written into the run folder.

    Raises:
        UserError: for anything that the config, the data, a model folder or a checkpoint gets wrong, before any
            weights are loaded where that can be known.
        TrainingError: if the loss or the gradient is no longer finite.
        Preempted: if the run was told to stop early, and has saved its state.
    """
    ranks.init_distributed(config.deepspeed.timeout_minutes)
    ranks.quiet_libraries()
    engine.check_dtype(config.model.dtype)
    check_logprobs(config)
    check_liger(config)
    seed_everything(config.train.seed)
    check_trackers(config.logging.report_to)
    peak = peak_flops_of(config)
    run_dir, found = agree_on_run_dir(config, resume)
    processes = ranks.gather_objects(this_process())
    with Watchdog(run_dir, config.train.hang_timeout_minutes, ranks.rank(), processes):
        return train_in(run_dir, found, config, resume, profile, peak)


def train_in(
    run_dir: Path,
    found: list[Checkpoint],
    config: Config,
    resume: str | None,
    profile: range | None,
    peak: float | None,
) -> Path:
    """`train` from where the ranks know their folder, and one another.

    Args:
        found: the checkpoints that the run may start from, the best first.
        peak: what one rank's device could do at most, in FLOP/s, if that is known.
    """
    finished = finished_step(run_dir) if resume and not names_a_checkpoint(resume) else None
    if finished is not None and not found:
        ranks.log(f"{run_dir}: this run is finished, at step {finished}; nothing to do")
        return run_dir

    tokenizer, model_config = load_tokenizers(config)
    check_vocabulary(tokenizer, model_config)
    choice = resolve_layout(config)
    data = ranks.main_first(
        lambda: load_pairs(config.data, tokenizer, seed=config.train.seed, log=ranks.log, report_dir=run_dir)
    )
    schedule = make_schedule(config, data.train)
    total_steps = schedule.total_steps(config.train.num_train_epochs, config.train.max_steps)
    stored: StoredReference | ColumnReference | None = None
    if config.loss.needs_reference and config.reference.mode == "columns":
        stored = ColumnReference(config.data, tokenizer, ranks.log)
    identity = identity_of(config, model_config, data.train, stored)
    if finished is not None and finished == total_steps:
        check_identity(found[0].path, found[0].identity, identity, config.checkpoint.allow_changes)
        ranks.log(f"{run_dir}: this run is finished, at step {finished}; nothing to do")
        return run_dir
    started_from = choose_checkpoint(found, identity, config.checkpoint.allow_changes)
    state = started_from.state if started_from else TrainState()
    if started_from and state.step > total_steps:
        raise CheckpointError(f"{started_from.path}: is at step {state.step}, but this run ends at step {total_steps}")
    if profile and not state.step < profile.start <= profile[-1] <= total_steps:
        raise ConfigError(
            f"--profile: steps {profile.start} to {profile[-1]} are not all among those to come, {state.step + 1} to "
            f"{total_steps}"
        )
    if state.best_step is not None and not checkpoint_path(run_dir, state.best_step).exists():
        ranks.log(f"the best checkpoint, of step {state.best_step}, is not in {run_dir}: looking for a new best")
        state.best_step = state.best_metric = None

    if ranks.is_main():
        try:
            unmark_finished(run_dir)
            preemption.unmark_preempted(run_dir)
            unmark_lost(run_dir)
            remove_leftovers(run_dir)
            config.save(run_dir / CONFIG_FILE)
        except OSError as error:
            raise ConfigError(f"output_dir = {config.output_dir!r}: cannot be written: {error.strerror}") from None
    flops = forward_flops(model_config, trust_remote_code=config.model.trust_remote_code)
    planner = make_planner(config, flops, data.train.lengths)
    plans = planner.first_plans(schedule, total_steps)
    ranks.log(f"run folder {run_dir}")
    ranks.log(
        f"{len(data.train)} pairs to train on, {len(data.eval) if data.eval else 0} held out; {total_steps} steps of "
        f"{config.train.global_batch_size} pairs: {planner.describe(plans, data.train)}"
    )
    # before the policy is in memory: filling the store may take the reference's model
    seen = data.train.select(schedule.pairs_of_run(total_steps))
    if config.loss.needs_reference and config.reference.mode == "store":
        datasets = [seen, data.eval] if data.eval else [seen]
        stored = stored_reference(config, datasets, tokenizer.pad_token_id, choice)
    policy = load_policy(config, max(len(plan.micro_steps) for plan in plans), choice)
    reference = make_reference(config, policy, stored, choice)
    moving = reference if isinstance(reference, MovingReference) else None
    if started_from:
        load_checkpoint(policy, started_from, moving)
        ranks.log(f"resumed from {started_from.path} at step {state.step}")
    elif stored is not None:
        verify_start(config, stored, policy, seen, tokenizer.pad_token_id, choice)
    if config.data.layout != planner.layout:  # a model failed its check, before any step was laid out
        planner = make_planner(config, flops, data.train.lengths)
        plans = planner.first_plans(schedule, total_steps)
        ranks.log(f"planned again for layout {planner.layout}: {planner.describe(plans, data.train)}")
        if ranks.is_main():
            config.save(run_dir / CONFIG_FILE)

    loss_of, reason = choose_objective(config, policy)
    ranks.log(f"loss and gradient {reason}")
    run = Run(
        config,
        run_dir,
        policy,
        reference,
        loss_of,
        tokenizer,
        schedule,
        total_steps,
        data.train,
        data.eval,
        identity,
        planner,
        peak,
    )
    tracker = Tracker(config, run_dir, total_steps, state.step) if ranks.is_main() else None
    preemption.allow(config.checkpoint.preempt_grace_seconds, run_dir, looks_for_file=ranks.is_main())
    try:
        with StepProfiler(run_dir / "profile", profile or range(0)) as profiler:
            last_is_saved = run_steps(run, state, tracker, profiler)
    finally:
        if tracker is not None:
            tracker.close()
    heartbeat("the export of the model")
    exported = state
    if config.checkpoint.load_best_model_at_end and state.best_step not in (None, state.step):
        assert state.best_step is not None
        ranks.log(f"best {config.checkpoint.metric_for_best_model} was at step {state.best_step}; taking that model")
        best = open_checkpoint(checkpoint_path(run_dir, state.best_step))
        require_whole(best)
        exported = best.state
        load_weights(policy, best)
    folder = export_model(policy, tokenizer, config, run_dir, results_of(run_dir, exported))
    ranks.log(f"model saved in {folder}")
    if not last_is_saved:
        raise CheckpointError(
            f"{run_dir}: the model is saved, but the checkpoint of the last step could not be, so the run is not "
            "marked as finished; --resume takes it to its end again from the checkpoint before"
        )
    mark_finished(run_dir, state.step, folder)
    return run_dir


@dataclass
class Run:
    """What stays the same from step to step."""

    config: Config
    run_dir: Path
    policy: Any
    reference: Any
    loss_of: Objective
    tokenizer: Any
    schedule: Schedule
    total_steps: int
    train_data: PairDataset
    eval_data: PairDataset | None
    identity: Identity
    planner: Planner
    peak_flops: float | None  # of one rank's device


def run_steps(run: Run, state: TrainState, tracker: Tracker | None, profiler: StepProfiler) -> bool:
    """The loop. Advances `state` to the last step; False if that step's checkpoint was due and could not be saved."""
    if run.config.train.eval_on_start and state.step == 0 and held_out_metrics(run, state, tracker) is None:
        save_and_stop(run, state, tracker, None)
    to_come = micro_steps_of_run(
        run.planner,
        run.schedule,
        run.train_data,
        range(state.step, run.total_steps),
        pad_token_id=run.tokenizer.pad_token_id,
        reference=run.reference,
        config=run.config,
    )
    with Prefetcher(to_come, BATCHES_AHEAD) as batches:
        return step_by_step(run, state, tracker, profiler, batches)


def step_by_step(
    run: Run, state: TrainState, tracker: Tracker | None, profiler: StepProfiler, batches: Iterator[MicroStep]
) -> bool:
    """Train, record, evaluate and save, one step after the other; see `run_steps`."""
    settings, timer = run.config.train, StepTimer(ranks.device(), ranks.world_size())
    moving = run.reference if isinstance(run.reference, MovingReference) else None
    saved = True
    state.evaluation_due &= run.eval_data is not None
    # a run that was told to stop does so before the evaluation of its last step, which the resumed run begins with
    while state.step < run.total_steps or state.evaluation_due:
        if not state.evaluation_due:
            with profiler.step(state.step + 1):
                metrics, told_to_stop = train_step(run, state, batches, timer)
            if moving is not None and state.step % run.config.reference.sync_steps == 0:
                moving.move()
            if tracker is not None:
                tracker.train(state.step, metrics)
            is_last = state.step == run.total_steps
            at_interval = settings.eval_steps is not None and state.step % settings.eval_steps == 0
            state.evaluation_due = run.eval_data is not None and (is_last or at_interval)
            if told_to_stop and not is_last:
                save_and_stop(run, state, tracker, moving)

        improved, best_before = False, (state.best_metric, state.best_step)
        if state.evaluation_due:
            metrics = held_out_metrics(run, state, tracker)
            if metrics is None:
                save_and_stop(run, state, tracker, moving)
            improved = note_best(run.config, state, metrics)
            state.evaluation_due = False
        keep = run.config.checkpoint
        due = keep.save_steps is not None and state.step % keep.save_steps == 0
        if due or improved or (state.step == run.total_steps and keep.save_at_end):
            saved = save(run, state, tracker, moving)
            if improved and not saved:  # the best is what can be loaded again
                state.best_metric, state.best_step = best_before
        else:
            saved = True
    return saved


def save(run: Run, state: TrainState, tracker: Tracker | None, moving: MovingReference | None) -> bool:
    """Save a checkpoint; whether it could be saved."""
    heartbeat(f"the checkpoint of step {state.step}")
    if tracker is not None:
        tracker.sync()
    limit = run.config.checkpoint.save_total_limit
    return save_checkpoint(run.policy, state, run.identity, run.run_dir, keep=limit, moving=moving) is not None


def save_and_stop(run: Run, state: TrainState, tracker: Tracker | None, moving: MovingReference | None) -> NoReturn:
    """Save a checkpoint for `--resume auto` and leave the loop, all ranks after the same step.

    Raises:
        Preempted: always.
    """
    reasons = ranks.gather_objects(preemption.reason_to_stop(run.config.train.max_hours))
    reason = "; ".join(f"{reason} on rank {rank}" for rank, reason in enumerate(reasons) if reason is not None)
    # before the first step there is nothing that a fresh start would not make again
    saved = state.step > 0 and save(run, state, tracker, moving)
    if ranks.is_main():
        preemption.mark_preempted(run.run_dir, state.step if saved else None, reason)
    ranks.barrier()
    outcome = "saved" if saved else "nothing to save" if state.step == 0 else "which could not be saved"
    raise preemption.Preempted(
        f"stopped after step {state.step} of {run.total_steps}, {outcome} ({reason}); --resume auto goes on"
    )


def train_step(
    run: Run, state: TrainState, batches: Iterator[MicroStep], timer: StepTimer
) -> tuple[dict[str, float], bool]:
    """One optimizer step on the next global batch of `batches`; advances `state`.

    Returns:
        The step's metrics, and whether any rank was told that the run should stop.
    """
    timer.start()
    settings, loss_settings = run.config.train, run.config.loss
    values, sums = ReferenceValues(run.reference, loss_settings), MetricSums()
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    is_last = False
    while not is_last:
        heartbeat(f"step {state.step + 1}, micro-step {len(seen) + 1}")
        with timer.phase("data"):
            micro = next(batches)
            batch = micro.batch.to(ranks.device())
        plan, is_last = micro.plan, micro.is_last
        with timer.phase("reference"):
            for k, scored in enumerate(micro.reference_passes):  # all of the step's, before the policy's first
                heartbeat(f"step {state.step + 1}, reference pass {k + 1}")
                values.score(scored.to(ranks.device()))
            batch = values.attach(batch)
        with timer.phase("forward"):
            total, losses, metrics = run.loss_of(
                run.policy, batch, loss_settings, plan.mean_chosen_tokens, micro.pairs_of_ranks
            )
            sums.add({"loss": losses, **metrics}, batch.weights)
            seen.append((batch.row_ids, losses.detach()))
        with timer.phase("backward"):
            scale = engine.loss_scale_for_mean(len(plan.pairs))
            engine.backward(run.policy, total * scale, last_micro_step=is_last)
    with timer.phase("communication"):
        wants_to_stop = preemption.reason_to_stop(settings.max_hours) is not None
        reduced = sums.reduce(ranks.peak_memory_bytes(), timer.busy_seconds, wants_to_stop)
    heartbeat(f"step {state.step + 1}, optimizer")
    with timer.phase("optimizer"):
        rate = learning_rate(state.step, run.total_steps, settings)
        norm, overflowed = engine.optimizer_step(run.policy, rate, settings.max_grad_norm)
    # The one time that the host waits for the device, so that neither loss nor norm costs a wait of its own. All that
    # the timer has marked is then done as well.
    means, (peaks, busy, stops), (grad_norm,) = reduced.read(norm)
    if not math.isfinite(means["loss"]) or not (math.isfinite(grad_norm) or overflowed):
        record_nonfinite_step(
            settings, run.run_dir, run.train_data, state.step + 1, seen, grad_norm, state.nonfinite_steps
        )
        state.nonfinite_steps += 1

    times = timer.shares()
    state.step += 1
    state.pairs += len(plan.pairs)
    state.tokens += plan.tokens
    seconds = times["step_seconds"]
    used = {} if run.peak_flops is None else {"mfu": plan.useful_flops / seconds / run.peak_flops / len(busy)}
    return {
        **means,
        "grad_norm": grad_norm,
        "learning_rate": rate,
        "epoch": state.step / run.schedule.steps_per_epoch,
        "tokens": state.tokens,
        "pairs": state.pairs,
        "tokens_per_second": plan.tokens / seconds,
        "pairs_per_second": len(plan.pairs) / seconds,
        **used,
        "padding_fraction": plan.padding_fraction,
        "rank_idle": float(1.0 - busy.mean() / busy.max()) if busy.any() else 0.0,
        "peak_memory_bytes": peaks.max(),
        **times,
    }, bool(stops.any())


def held_out_metrics(run: Run, state: TrainState, tracker: Tracker | None) -> dict[str, float] | None:
    """Evaluate the held-out pairs and record the result; None if any rank was told that the run should stop."""
    heartbeat(f"evaluation after step {state.step}")
    assert run.eval_data is not None
    metrics = evaluate(
        run.policy,
        run.reference,
        run.eval_data,
        run.config,
        run.tokenizer.pad_token_id,
        should_stop=lambda: preemption.reason_to_stop(run.config.train.max_hours) is not None,
    )
    if tracker is not None and metrics is not None:
        tracker.evaluation(state.step, metrics)
    return metrics


def note_best(config: Config, state: TrainState, metrics: dict[str, float]) -> bool:
    """Whether these held-out metrics are the best so far; remembers them if so. What is not finite is never best."""
    settings = config.checkpoint
    if settings.metric_for_best_model is None:
        return False
    value, best = metrics[settings.metric_for_best_model], state.best_metric
    if not math.isfinite(value):
        return False
    if best is not None and (value <= best if settings.greater_is_better else value >= best):
        return False
    state.best_metric, state.best_step = value, state.step
    return True


def results_of(run_dir: Path, exported: TrainState) -> dict[str, Any]:
    """For the model card: the held-out metrics at the start and at the exported step, where they were measured.

    They are read from the run's record, which also knows what was measured before the run was resumed.
    """
    results: dict[str, Any] = {"steps": exported.step, "pairs": exported.pairs}
    if ranks.is_main():
        evaluations = {r["step"]: r for r in read_metrics(run_dir / METRICS_FILE) if r["phase"] == "eval"}
        results |= {"before": evaluations.get(0), "after": evaluations.get(exported.step)}
    return results


def peak_flops_of(config: Config) -> float | None:
    """What one rank's device could do at most, for `mfu`; None if nobody knows.

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


def make_schedule(config: Config, data: PairDataset) -> Schedule:
    """The order of pairs over the run."""
    settings = config.train
    if settings.drop_last and len(data) < settings.global_batch_size:
        raise DataError(
            f"train.drop_last: {len(data)} training pairs are fewer than train.global_batch_size = "
            f"{settings.global_batch_size}, so every step would be dropped"
        )
    return Schedule(len(data), settings.global_batch_size, settings.seed, settings.shuffle, settings.drop_last)
