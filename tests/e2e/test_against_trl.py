"""The same runs by TRL's `DPOTrainer` and by dpo_scale: same model, rows, order and settings, 5 steps in fp32.

TRL runs on one process with gradient accumulation, dpo_scale on 2 ranks through the real launcher, at several ZeRO
stages. Two things are not alike by design, and the test says how they are brought together:

- Chat rows. TRL scores the line break that ChatML writes behind the end of turn; dpo_scale ends a completion at its
  end of turn. TRL is given dpo_scale's ids (`run_trl.WithoutLineBreaks`). Plain-text rows need nothing.
- Label smoothing. TRL's `sigmoid` ignores it (dpo_scale's is then cDPO), so that is compared without; `robust`, which
  both define alike, is compared with it.
"""

import json
import math

import pytest
from tiny import launch, preference_rows, read_metrics, save_model, write_rows

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

STEPS, MICRO, ACCUMULATION, MAX_GRAD_NORM = 5, 2, 4, 1.0
CASES = {  # name: (loss, settings of it alone, chat rows?, stage)
    "sigmoid": ("sigmoid", {}, False, 2),
    "sigmoid_chat": ("sigmoid", {}, True, 3),
    "ipo": ("ipo", {}, False, 3),
    "hinge": ("hinge", {}, True, 0),
    "robust": ("robust", {"label_smoothing": 0.1}, True, 2),
}
SHARED = {"beta": 0.2, "learning_rate": 1e-3, "weight_decay": 0.1, "max_grad_norm": MAX_GRAD_NORM, "max_steps": STEPS}
METRICS = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen")


def as_messages(row):
    return {
        "prompt": [{"role": "user", "content": row["prompt"]}],
        "chosen": [{"role": "assistant", "content": row["chosen"]}],
        "rejected": [{"role": "assistant", "content": row["rejected"]}],
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with both programs' runs of all cases: `<case>/` ours, `<case>.json` TRL's."""
    folder = tmp_path_factory.mktemp("trl")
    model = save_model(folder / "model", "llama")
    rows = preference_rows(24)  # 3 steps an epoch
    text = write_rows(folder / "text.jsonl", rows)
    chat = write_rows(folder / "chat.jsonl", [as_messages(row) for row in rows])
    ours, theirs = [], []
    for name, (loss, only, is_chat, stage) in CASES.items():
        section = {"beta": "loss", "label_smoothing": "loss"}
        overrides = [f"{section.get(key, 'train')}.{key}={value}" for key, value in (SHARED | only).items()]
        ours.append({"overrides": [
            *overrides, f"loss.loss_type={loss}", f"model.path={model}", "model.dtype=float32",
            f"data.train={chat if is_chat else text}", f"data.chat_template={'null' if is_chat else 'none'}",
            f"data.cache_dir={folder / 'cache'}", f"train.global_batch_size={MICRO * ACCUMULATION}",
            f"train.micro_batch_size={MICRO}", "train.shuffle=false", f"deepspeed.stage={stage}",
            "checkpoint.save_at_end=false", f"output_dir={folder / name}",
        ]})  # fmt: skip
        settings = {
            "loss_type": [loss], "per_device_train_batch_size": MICRO, "gradient_accumulation_steps": ACCUMULATION,
            "train_sampling_strategy": "sequential", "lr_scheduler_type": "linear", "warmup_steps": 0,
            "logging_steps": 1, "save_strategy": "no", "report_to": "none", "bf16": False, "use_cpu": True,
            "gradient_checkpointing": False, "disable_dropout": True, "disable_tqdm": True, "max_length": 1024,
        }  # fmt: skip
        theirs.append({
            "model": str(model), "rows": [as_messages(row) for row in rows] if is_chat else rows,
            "settings": settings | SHARED | only, "drop_after_end_of_turn": is_chat,
            "output": str(folder / f"{name}.json"),
        })  # fmt: skip
    for script, jobs, arguments in (
        ("tests/distributed/run_many.py", ours, {"ranks": 2}),
        ("tests/e2e/run_trl.py", theirs, {"launcher": "python"}),
    ):
        (folder / "jobs.json").write_text(json.dumps(jobs))
        done = launch(script, folder / "jobs.json", **arguments)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder


@pytest.mark.parametrize("name", CASES)
def test_losses_and_gradient_norms_are_those_of_trl(folder, name):
    ours, theirs = read_metrics(folder / name), json.loads((folder / f"{name}.json").read_text())["log"]
    assert len(ours) == len(theirs) == STEPS
    assert max(step["grad_norm"] for step in ours) > MAX_GRAD_NORM  # clipping is at work
    assert abs(ours[-1]["loss"] - ours[0]["loss"]) > 0.01 * ours[0]["loss"]  # and so is learning
    for our_step, their_step in zip(ours, theirs, strict=True):
        for metric in ("loss", "grad_norm", "learning_rate"):
            assert our_step[metric] == pytest.approx(their_step[metric], rel=1e-4), (our_step["step"], metric)
        for metric in METRICS:
            # rewards are small differences of large sums
            assert our_step[metric] == pytest.approx(their_step[metric], rel=1e-4, abs=1e-4), (our_step["step"], metric)


@pytest.mark.parametrize("name", ["sigmoid", "sigmoid_chat"])
def test_ids_are_those_of_trl(folder, name):
    """Plain text as each tokenizes it itself; chat rows but for the line break behind the end of turn."""
    from dpo_scale.data.dataset import load_pairs
    from dpo_scale.data.tokenize import load_tokenizer
    from dpo_scale.settings.tree import load_config

    config = load_config(folder / name / "config.yaml")
    pairs = load_pairs(config.data, load_tokenizer(config.model.path), seed=0, log=print).train
    ours = [[pair.prompt_ids.tolist(), pair.chosen_ids.tolist(), pair.rejected_ids.tolist()] for pair in pairs]
    assert ours == json.loads((folder / f"{name}.json").read_text())["ids"]


def test_both_start_at_the_losses_of_equal_models(folder):
    """With L = 0 for every pair: ln 2, (1 / 2b)^2, 1."""
    for name, expected in {"sigmoid": math.log(2), "ipo": (0.5 / SHARED["beta"]) ** 2, "hinge": 1.0}.items():
        assert read_metrics(folder / name)[0]["loss"] == pytest.approx(expected, abs=1e-6)
        assert json.loads((folder / f"{name}.json").read_text())["log"][0]["loss"] == pytest.approx(expected, abs=1e-5)
