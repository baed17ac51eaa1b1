"""What each option of a run changes, on 2 ranks through the real launcher; all runs in one launch.

With plain SGD an update is the clipped gradient times the learning rate, so clipping, the reported norm, weight decay
and the optimizer itself can be read off the weights.
"""

import pytest
import torch
from safetensors.torch import load_file
from tiny import ROOT, preference_rows, read_metrics, run_jobs, run_overrides, write_rows

from dpo_scale.settings.loss import LossSettings
from dpo_scale.settings.metric_names import STEP_METRICS
from dpo_scale.settings.tree import load_config
from dpo_scale.training.learning_rate import learning_rate

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

RATE = 0.01
SGD = ["train.optim=sgd", "train.max_steps=1", f"train.learning_rate={RATE}"]
RUNS = {
    "two epochs": ["train.num_train_epochs=2", "train.eval_steps=2", "train.eval_on_start=true"],
    "drop last": ["train.num_train_epochs=2", "train.drop_last=true", "deepspeed.stage=3"],
    "half an epoch": ["train.num_train_epochs=0.5", "loss.loss_type=[sigmoid, sft]", "logging.report_to=tensorboard"],
    "max steps": ["train.num_train_epochs=2", "train.max_steps=3", "train.warmup_steps=2", "logging.logging_steps=2"],
    "policy only": ["train.max_steps=1", "loss.loss_type=simpo", "train.lr_scheduler_type=cosine"],
    "not clipped": [*SGD, "train.max_grad_norm=0", "deepspeed.stage=3"],
    "clipped": [*SGD, "train.max_grad_norm=0.5", "deepspeed.stage=2"],
    "decayed": [*SGD, "train.max_grad_norm=0", "train.weight_decay=0.5", "deepspeed.stage=1"],
    "momentum": [*SGD, "train.max_steps=2", "train.max_grad_norm=0", "train.optim_args={momentum: 0.9}"],
    **{
        f"RMSprop {stage}": ["train.optim=RMSprop", "train.max_steps=1", f"deepspeed.stage={stage}"] for stage in (1, 3)
    },
    **{
        f"zero{stage}.json": ["train.max_steps=2", f"deepspeed.config={ROOT}/configs/deepspeed/zero{stage}.json"]
        for stage in range(4)
    },
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("options")
    common = run_overrides(folder)
    # 7 pairs on 2 ranks in micro-batches of 2: one rank runs out of them first
    write_rows(folder / "heldout.jsonl", preference_rows(7, seed=2))
    common += ["checkpoint.save_at_end=false"]
    run_jobs(folder, [{"overrides": [*common, *extra, f"output_dir={folder / name}"]} for name, extra in RUNS.items()])
    return folder


def change(folder, name):
    """{parameter: how far training moved it}, in fp64."""
    start, end = load_file(folder / "start" / "model.safetensors"), load_file(folder / name / "model/model.safetensors")
    assert start.keys() == end.keys()
    return {key: end[key].double() - start[key].double() for key in start}


def norm(tensors):
    return torch.cat([tensor.flatten() for tensor in tensors.values()]).norm().item()


def column(folder, name, metric, phase="train"):
    return [record[metric] for record in read_metrics(folder / name, phase)]


def test_every_metric_is_in_every_step(folder):
    settings = {
        "two epochs": LossSettings(),
        "half an epoch": LossSettings(loss_type=["sigmoid", "sft"]),
        "policy only": LossSettings(loss_type="simpo"),
    }
    for name, loss in settings.items():
        for record in read_metrics(folder / name):
            # nobody knows a CPU's peak
            assert set(record) == {"phase", "step", *loss.metric_names, *STEP_METRICS} - {"mfu"}, name
    for record in read_metrics(folder / "two epochs", "eval"):
        assert set(record) == {"phase", "step", "pairs", *LossSettings().metric_names}


def test_the_last_incomplete_batch_of_an_epoch_is_used_or_dropped(folder):
    assert column(folder, "two epochs", "pairs") == [8, 16, 22, 30, 38, 44]
    assert column(folder, "two epochs", "epoch")[2::3] == [1, 2]
    assert column(folder, "drop last", "pairs") == [8, 16, 24, 32]
    assert column(folder, "drop last", "epoch") == [0.5, 1, 1.5, 2]


def test_epochs_may_be_broken_and_max_steps_overrides_them(folder):
    assert column(folder, "half an epoch", "step") == [1, 2]  # half of 3 steps, rounded up
    assert column(folder, "max steps", "step") == [1, 2, 3]


def test_held_out_data_is_measured_when_asked_and_at_the_end(folder):
    assert column(folder, "two epochs", "step", "eval") == [0, 2, 4, 6]
    assert column(folder, "drop last", "step", "eval") == [4]
    assert column(folder, "two epochs", "pairs", "eval") == [7] * 4


def test_the_learning_rate_of_a_step_is_what_the_update_used(folder):
    assert column(folder, "max steps", "learning_rate") == [0, 0.0005, 0.001]
    first, *_ = read_metrics(folder / "max steps")
    assert first["loss"] == read_metrics(folder / "two epochs")[0]["loss"]  # same pairs, no update yet
    moved = norm(change(folder, "max steps"))
    assert 0 < moved < norm(change(folder, "two epochs"))


def test_throughput_and_padding_are_accounted(folder):
    for record in read_metrics(folder / "two epochs"):
        pairs = 6 if record["step"] % 3 == 0 else 8
        assert record["pairs_per_second"] == pytest.approx(pairs / record["step_seconds"])
        assert record["padding_fraction"] == 0, "the layout that this model gets pads nothing"
        assert 1e8 < record["peak_memory_bytes"] < 1e10
    tokens = column(folder, "two epochs", "tokens")
    rates = [r["tokens_per_second"] * r["step_seconds"] for r in read_metrics(folder / "two epochs")]
    assert rates == pytest.approx([b - a for a, b in zip([0, *tokens], tokens, strict=False)])
    assert tokens[5] == 2 * tokens[2]  # every epoch has every pair once


def test_sgd_moves_the_weights_by_the_gradient_whose_norm_is_reported(folder):
    (reported,) = column(folder, "not clipped", "grad_norm")
    assert reported > 0.6
    assert norm(change(folder, "not clipped")) == pytest.approx(RATE * reported, rel=1e-3)


def test_clipping_scales_the_update_but_not_the_reported_norm(folder):
    (reported,) = column(folder, "clipped", "grad_norm")
    assert reported == pytest.approx(column(folder, "not clipped", "grad_norm")[0], rel=1e-5)
    assert norm(change(folder, "clipped")) == pytest.approx(RATE * 0.5, rel=1e-3)


def test_weight_decay_is_on_matrices_only(folder):
    start = load_file(folder / "start" / "model.safetensors")
    plain, decayed = change(folder, "not clipped"), change(folder, "decayed")
    assert {tensor.ndim for tensor in start.values()} == {1, 2}
    for name, tensor in start.items():
        expected = -RATE * 0.5 * tensor.double() if tensor.ndim == 2 else torch.zeros_like(tensor, dtype=torch.double)
        torch.testing.assert_close(decayed[name] - plain[name], expected, atol=2e-6, rtol=1e-4, msg=name)


def test_optim_args_reach_the_optimizer(folder):
    # the second update holds 0.9 of the first one's gradient, so the way is longer than the two gradients'
    norms = column(folder, "momentum", "grad_norm")
    assert norm(change(folder, "momentum")) > RATE * sum(norms) * 1.1


def test_an_optimizer_of_torch_agrees_over_stages(folder):
    ours, theirs = change(folder, "RMSprop 1"), change(folder, "RMSprop 3")
    assert norm(ours) > 0
    difference = {name: ours[name] - theirs[name] for name in ours}
    assert norm(difference) < 1e-3 * norm(ours)


def test_the_deepspeed_jsons_that_come_along_agree(folder):
    base = column(folder, "zero0.json", "loss")
    assert base[0] != base[1]
    for stage in (1, 2, 3):
        assert column(folder, f"zero{stage}.json", "loss") == pytest.approx(base, abs=1e-5)
        saved = (folder / f"zero{stage}.json" / "config.yaml").read_text()
        assert f"  stage: {stage}\n" in saved


def test_tensorboard_gets_every_metric_of_every_step(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (log,) = {path.parent for path in (folder / "half an epoch" / "trackers").rglob("events*") if _has_scalars(path)}
    events = EventAccumulator(str(log)).Reload()
    for phase in ("train", "eval"):
        records = read_metrics(folder / "half an epoch", phase)
        names = set(records[0]) - {"phase", "step"}
        assert names <= {tag.removeprefix(f"{phase}/") for tag in events.Tags()["scalars"]}
        for name in names:
            written = [(event.step, event.value) for event in events.Scalars(f"{phase}/{name}")]
            assert written == [(r["step"], pytest.approx(r[name], rel=1e-6)) for r in records], name


def _has_scalars(path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return bool(EventAccumulator(str(path)).Reload().Tags()["scalars"])


def test_the_saved_config_says_what_was_run(folder):
    config = load_config(folder / "max steps" / "config.yaml")
    assert config.output_dir == str(folder / "max steps")
    rates = [learning_rate(step, 3, config.train) for step in range(3)]
    assert rates == column(folder, "max steps", "learning_rate")
