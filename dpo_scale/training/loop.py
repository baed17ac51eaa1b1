"""The training run, top to bottom: set up, step by step, export.

An optimizer step is: every rank gets the reference's values of its pairs of the step's global batch, walks through its
micro-batches of them (policy forward, backward), metrics are summed over ranks once, the numbers are checked, the
weights are updated. What decides the next step (order, learning rate) is a pure function of the step's number; what
can't be is in the checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from torch import Tensor

from dpo_scale.checkpoint.load import TrainState, checkpoint_path, load_weights, open_checkpoint, require_whole
from dpo_scale.data.planning import StepPlan
from dpo_scale.data.prefetch import BATCHES_AHEAD, Prefetcher
from dpo_scale.distributed import engine, ranks
from dpo_scale.distributed.random_state import seed_everything
from dpo_scale.errors import CheckpointError, UserError
from dpo_scale.models.export import export_model
from dpo_scale.models.router import share_metrics
from dpo_scale.observe.metrics import MetricSums
from dpo_scale.observe.metrics_file import METRICS_FILE, read_metrics
from dpo_scale.observe.profiler import StepProfiler
from dpo_scale.observe.timing import StepTimer
from dpo_scale.observe.tracking import check_trackers
from dpo_scale.progress import heartbeat
from dpo_scale.run import preemption
from dpo_scale.run.finished import mark_finished
from dpo_scale.run.folder import agree_on_run_dir, removed_if_refused
from dpo_scale.run.nonfinite import record_nonfinite_step
from dpo_scale.run.rank_files import this_process
from dpo_scale.run.watchdog import Watchdog
from dpo_scale.settings.tree import Config
from dpo_scale.training.evaluate import evaluate
from dpo_scale.training.learning_rate import learning_rate
from dpo_scale.training.plan import MicroStep, micro_steps_of_run
from dpo_scale.training.prepare import start
from dpo_scale.training.setup import Best, Run, set_up


def train(config: Config, resume: str | None = None, profile: range | None = None) -> Path:
    """Train a policy and return the run folder; every rank calls it.

    Args:
        config: a validated config.
        resume: what `--resume` says, see `find_checkpoints`; None starts afresh.
        profile: optimizer steps (from 1) of which a profiler's trace is written into the run folder.

    Raises:
        UserError: for anything that the config, the data, a model folder or a checkpoint gets wrong, before any
            weights are loaded where that can be known. A new run leaves no folder then.
        TrainingError: if the loss or the gradient is no longer finite.
        Preempted: if the run was told to stop early, and has saved its state.
    """
    start(config)
    seed_everything(config.train.seed)
    check_trackers(config.logging.report_to)
    run_dir, found = agree_on_run_dir(config, resume)
    processes = ranks.gather_objects(this_process())
    with Watchdog(run_dir, config.train.hang_timeout_minutes, ranks.rank(), processes):
        with removed_if_refused(run_dir):
            run = set_up(config, run_dir, resume, found, profile)
        if run is None:  # it is finished
            return run_dir
        preemption.allow(config.checkpoint.preempt_grace_seconds, run_dir, looks_for_file=ranks.is_main())
        try:
            last_is_saved = train_steps(run, profile)
        except UserError:
            settle_save(run)
            raise
        finally:
            if run.tracker is not None:
                run.tracker.close()
        finish(run, last_is_saved)
    return run_dir


def train_steps(run: Run, profile: range | None) -> bool:
    """The loop. False if the checkpoint of the last step was due and could not be saved."""
    state, timer = run.state, StepTimer(ranks.device(), ranks.world_size())
    state.evaluation_due &= run.eval_data is not None
    if run.config.train.eval_on_start and state.step == 0:
        held_out_metrics(run)
    with (
        StepProfiler(run.run_dir / "profile", profile or range(0)) as profiler,
        Prefetcher(micro_steps_to_come(run), BATCHES_AHEAD) as batches,
    ):
        # a run that was told to stop does so before the evaluation of its last step, which the resumed run begins with
        while state.step < run.course.total_steps or state.evaluation_due:
            if not state.evaluation_due:
                with profiler.step(state.step + 1):
                    metrics, told_to_stop = train_step(run, batches, timer)
                after_step(run, metrics, told_to_stop)
            beaten = compare_with_best(run, held_out_metrics(run)) if state.evaluation_due else None
            save_if_due(run, beaten)
    if run.tracker is not None and run.forecast is not None:
        predicted = run.forecast
        step_seconds = None if predicted.time is None else predicted.time.step
        run.tracker.forecast(state.step, predicted.peak_memory_bytes, step_seconds)
    return settle_save(run) or run.saving_step != state.step


def micro_steps_to_come(run: Run) -> Iterator[MicroStep]:
    """This rank's micro-steps from the next step on."""
    steps = range(run.state.step, run.course.total_steps)
    pad_token_id, pair_order = run.prepared.pad_token_id, run.course.pair_order
    return micro_steps_of_run(run.planner, pair_order, run.train_data, steps, pad_token_id, run.reference)


def train_step(run: Run, batches: Iterator[MicroStep], timer: StepTimer) -> tuple[dict[str, float], bool]:
    """One optimizer step on the next global batch of `batches`; advances the run's state.

    Returns:
        The step's metrics, and whether any rank was told that the run should stop.
    """
    timer.start()
    settings, state = run.config.train, run.state
    plan, sums, seen = accumulate_gradients(run, batches, timer)
    with timer.phase("communication"):
        wants_to_stop = preemption.reason_to_stop(settings.max_hours) is not None
        reduced = sums.reduce(ranks.peak_memory_bytes(), timer.busy_seconds, wants_to_stop)
    heartbeat(f"step {state.step + 1}, optimizer")
    with timer.phase("optimizer"):
        rate = learning_rate(state.step, run.course.total_steps, settings)
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
        **share_metrics(means, run.policy.module.router),
        "grad_norm": grad_norm,
        "learning_rate": rate,
        "epoch": state.step / run.course.pair_order.steps_per_epoch,
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


def accumulate_gradients(
    run: Run, batches: Iterator[MicroStep], timer: StepTimer
) -> tuple[StepPlan, MetricSums, list[tuple[Tensor, Tensor]]]:
    """Forward and backward passes of a step's micro-batches.

    Returns:
        The step's plan, this rank's sums of its metrics, and row ids [P] and losses [P] of micro-steps that it counts.
    """
    step, loss_settings, sums = run.state.step + 1, run.config.loss, MetricSums()
    seen: list[tuple[Tensor, Tensor]] = []
    number, is_last = 0, False
    while not is_last:
        number += 1
        heartbeat(f"step {step}, micro-step {number}")
        with timer.phase("data"):
            micro = next(batches)
            batch = micro.batch.to(ranks.device())
        plan, is_last = micro.plan, micro.is_last
        with timer.phase("reference"):
            batch = run.reference.attach(batch, micro.reference_passes)
        with timer.phase("forward"):
            total, losses, metrics = run.objective(
                run.policy, batch, loss_settings, plan.mean_chosen_tokens, micro.pairs_of_ranks
            )
            sums.add({"loss": losses, **metrics}, batch.counted)
            if batch.leads:
                seen.append((batch.row_ids, losses.detach()))
        with timer.phase("backward"):
            scale = engine.loss_scale_for_mean(len(plan.pairs))
            engine.backward(run.policy, total * scale, last_micro_step=is_last)
    return plan, sums, seen


def after_step(run: Run, metrics: dict[str, float], told_to_stop: bool) -> None:
    """Let the reference follow, record the step, and find out what is due after it."""
    state, settings = run.state, run.config.train
    run.reference.after_step(state.step)
    if run.tracker is not None:
        run.tracker.train(state.step, metrics)
    is_last = state.step == run.course.total_steps
    at_interval = settings.eval_steps is not None and state.step % settings.eval_steps == 0
    state.evaluation_due = run.eval_data is not None and (is_last or at_interval)
    if told_to_stop and not is_last:
        save_and_stop(run)


def held_out_metrics(run: Run) -> dict[str, float]:
    """Evaluate the held-out pairs and record the result.

    Raises:
        Preempted: if any rank was told that the run should stop; the evaluation is then still due.
    """
    state = run.state
    heartbeat(f"evaluation after step {state.step}")
    assert run.eval_data is not None
    metrics = evaluate(
        run.policy,
        run.reference,
        run.eval_data,
        run.config,
        run.prepared.pad_token_id,
        should_stop=lambda: preemption.reason_to_stop(run.config.train.max_hours) is not None,
    )
    if metrics is None:
        save_and_stop(run)
    if run.tracker is not None:
        run.tracker.evaluation(state.step, metrics)
    state.evaluation_due = False
    return metrics


def compare_with_best(run: Run, metrics: dict[str, float]) -> Best | None:
    """Remember these held-out metrics if they are the best so far, and say what they beat; else None.

    What is not finite is never best.
    """
    settings, state = run.config.checkpoint, run.state
    if settings.metric_for_best_model is None:
        return None
    settle_save(run)
    value, best = metrics[settings.metric_for_best_model], state.best_metric
    if not math.isfinite(value):
        return None
    if best is not None and (value <= best if settings.greater_is_better else value >= best):
        return None
    beaten = Best(state.best_metric, state.best_step)
    state.best_metric, state.best_step = value, state.step
    return beaten


def save_if_due(run: Run, beaten: Best | None) -> None:
    """Save a checkpoint at the interval, at the end and of a new best."""
    state, keep = run.state, run.config.checkpoint
    at_interval = keep.save_steps is not None and state.step % keep.save_steps == 0
    at_end = keep.save_at_end and state.step == run.course.total_steps
    if at_interval or at_end or beaten is not None:
        begin_save(run, beaten)


def begin_save(run: Run, beaten: Best | None = None) -> None:
    """Save a checkpoint; with `checkpoint.async_save` it is on the disk later (`settle_save`)."""
    settle_save(run)
    heartbeat(f"the checkpoint of step {run.state.step}")
    if run.tracker is not None:
        run.tracker.sync()
    run.saver.start(run.policy, run.state, run.reference)
    run.saving_step, run.beaten_best = run.state.step, beaten
    if not run.config.checkpoint.async_save:
        settle_save(run)


def settle_save(run: Run) -> bool:
    """Wait for the save that was begun last; whether it is on the disk. A best that could not be saved is none."""
    saved = run.saver.wait()
    if run.beaten_best is not None and not saved:  # the best is what can be loaded again
        run.state.best_metric, run.state.best_step = run.beaten_best
    run.beaten_best = None
    return saved


def save_and_stop(run: Run) -> NoReturn:
    """Save a checkpoint for `--resume auto` and leave the loop, all ranks after the same step.

    Raises:
        Preempted: always.
    """
    step = run.state.step
    reasons = ranks.gather_objects(preemption.reason_to_stop(run.config.train.max_hours))
    reason = "; ".join(f"{reason} on rank {rank}" for rank, reason in enumerate(reasons) if reason is not None)
    # before the first step there is nothing that a fresh start would not make again
    if step > 0:
        begin_save(run)
    saved = step > 0 and settle_save(run)
    if ranks.is_main():
        preemption.mark_preempted(run.run_dir, step if saved else None, reason)
    ranks.barrier()
    outcome = "saved" if saved else "nothing to save" if step == 0 else "which could not be saved"
    raise preemption.Preempted(
        f"stopped after step {step} of {run.course.total_steps}, {outcome} ({reason}); --resume auto goes on"
    )


def finish(run: Run, last_is_saved: bool) -> None:
    """Export the last model, or the best, and mark the run as finished.

    Raises:
        CheckpointError: if the best checkpoint is damaged; or if the last could not be saved, with the model exported.
        TrainingError: if the model can't be written.
    """
    heartbeat("the export of the model")
    config, run_dir, exported = run.config, run.run_dir, run.state
    if config.checkpoint.load_best_model_at_end and exported.best_step not in (None, exported.step):
        assert exported.best_step is not None
        ranks.log(f"best {config.checkpoint.metric_for_best_model} was at step {exported.best_step}; taking that model")
        best = open_checkpoint(checkpoint_path(run_dir, exported.best_step))
        require_whole(best)
        exported = best.state
        load_weights(run.policy, best)
    folder = export_model(run.policy, run.prepared.tokenizer, config, run_dir, results_of(run_dir, exported))
    ranks.log(f"model saved in {folder}")
    if not last_is_saved:
        raise CheckpointError(
            f"{run_dir}: the model is saved, but the checkpoint of the last step could not be, so the run is not "
            "marked as finished; --resume takes it to its end again from the checkpoint before"
        )
    mark_finished(run_dir, run.state.step, folder)


def results_of(run_dir: Path, exported: TrainState) -> dict[str, Any]:
    """For the model card: the held-out metrics at the start and at the exported step, where they were measured.

    They are read from the run's record, which also knows what was measured before the run was resumed.
    """
    results: dict[str, Any] = {"steps": exported.step, "pairs": exported.pairs}
    if ranks.is_main():
        evaluations = {r["step"]: r for r in read_metrics(run_dir / METRICS_FILE) if r["phase"] == "eval"}
        results |= {"before": evaluations.get(0), "after": evaluations.get(exported.step)}
    return results
