"""A row shared by 2 or 4 ranks gives the log-probs, gradients and training runs of a whole one."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file
from tiny import ROOT, launch, read_metrics, run_named_jobs, run_overrides, save_model

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


# ---- whole runs ------------------------------------------------------------------------------------------


def shared(size, *overrides):
    return [f"train.sequence_parallel_size={size}", *overrides]


STAGE_3 = "deepspeed.config={zero_optimization: {stage: 3, stage3_param_persistence_threshold: 0}}"
# some pairs have more tokens than a rank may hold: they are shared, the others are not
AUTO = ["train.micro_batch_size=1", "train.max_tokens_per_micro_batch=60"]
SGD = ["train.optim=SGD", "train.learning_rate=3e-2"]  # a wrong scale of gradients shows, as it does not in Adam
LORA, STORED = ["lora.r=4", "lora.alpha=8"], "reference.mode=store"
# run -> (what its numbers must be, further overrides)
ON_2_RANKS = {
    "llama": (None, ["deepspeed.stage=0"]),
    "2, stage 0": ("llama", shared(2, "deepspeed.stage=0")),
    "2, stage 1": ("llama", shared(2, "deepspeed.stage=1", "reference.stage=3", "reference.offload_param=cpu")),
    "2, stage 2": ("llama", shared(2, "deepspeed.stage=2", "deepspeed.offload_optimizer=cpu")),
    "2, stage 3": ("llama", shared(2, STAGE_3, "train.micro_batch_size=1")),
    "2, packed": ("llama", shared(2, "data.layout=packed", "model.gradient_checkpointing=true")),
    "2, all offloaded": (
        "llama", shared(2, "deepspeed.stage=3", "deepspeed.offload_optimizer=cpu", "deepspeed.offload_param=cpu"),
    ),
    "2, log-probs first": ("llama", shared(2, "logprobs.pair_loss=tokens", "logprobs.implementation=naive")),
    "2, stored": ("llama", shared(2, STORED)),
    "1, stored": ("llama", [STORED, "reference.on_missing=error"]),  # what the run before has stored
    "auto": ("llama", shared("auto", *AUTO, "deepspeed.stage=2")),
    "auto, packed": ("llama", shared("auto", *AUTO, STAGE_3, "reference.stage=3", "data.layout=packed")),
    "auto, stored": ("llama", shared("auto", *AUTO, STORED, "reference.on_missing=error")),
    "sgd": (None, [*SGD]),
    "2, sgd": ("sgd", shared(2, *SGD, "deepspeed.stage=1")),
    "auto, sgd": ("sgd", shared("auto", *AUTO, *SGD, STAGE_3)),
    "lora": (None, [*LORA, "reference.mode=adapter"]),
    "2, lora": ("lora", shared(2, *LORA, "reference.mode=adapter", "deepspeed.stage=3")),
    "moving": (None, ["reference.sync_steps=1", "reference.sync_mixup=0.5"]),
    "2, moving": ("moving", shared(2, "reference.sync_steps=1", "reference.sync_mixup=0.5", "reference.stage=3")),
    "aot": (None, ["loss.loss_type=aot", "train.micro_batch_size=4"]),  # all pairs of a step at once
    "2, aot": ("aot", shared(2, "loss.loss_type=aot", "train.micro_batch_size=8")),
    "auto, aot": (
        "aot", shared("auto", "loss.loss_type=aot", "train.micro_batch_size=1", "train.max_tokens_per_micro_batch=250"),
    ),
    "ld": (None, ["loss.ld_alpha=0.4", STORED]),  # tokens' values in the store
    "2, ld": ("ld", shared(2, "loss.ld_alpha=0.4", STORED, "reference.store=anew")),
    "wpo": (None, ["loss.use_weighting=true"]),
    "2, wpo": ("wpo", shared(2, "loss.use_weighting=true")),
}  # fmt: skip
ON_4_RANKS = {
    "4": ("llama", shared(4, "deepspeed.stage=1")),
    "2 of 4": ("llama", shared(2, STAGE_3, "data.layout=packed")),
    "auto of 4": ("llama", shared("auto", *AUTO, "deepspeed.stage=2", "train.max_tokens_per_micro_batch=25")),
    "auto of 4, aot": ("aot", shared("auto", "loss.loss_type=aot", *AUTO, "train.max_tokens_per_micro_batch=120")),
}
ARCHITECTURES = ("qwen3", "gemma2", "gemma3", "gpt_oss")
for architecture in ARCHITECTURES:
    model = "model.path={folder}/" + architecture
    ON_2_RANKS[architecture] = (None, [model, "deepspeed.stage=0"])
    ON_2_RANKS[f"{architecture}, 2"] = (architecture, shared(2, model, "deepspeed.stage=2"))
    ON_4_RANKS[f"{architecture}, 4"] = (architecture, shared(4, model, STAGE_3, "model.gradient_checkpointing=true"))
    if architecture in ("gemma3", "gpt_oss"):  # windows and sinks in groups of several sizes
        ON_4_RANKS[f"{architecture}, auto"] = (architecture, shared("auto", *AUTO, model, "data.layout=packed"))
EXPECTED = {name: base for name, (base, _) in (ON_2_RANKS | ON_4_RANKS).items() if base is not None}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder of all runs."""
    folder = tmp_path_factory.mktemp("runs")
    common = [
        *run_overrides(folder), "train.max_steps=4", "train.eval_on_start=true", "train.weight_decay=0.1",
        "checkpoint.save_at_end=false", f"reference.store={folder / 'store'}",
    ]  # fmt: skip
    for architecture in ARCHITECTURES:
        save_model(folder / architecture, architecture)

    step_2 = {name: str(folder / name / "checkpoints" / "step-2") for name in ("llama", "2, stage 3", "auto", "4")}

    def placed(described):
        return {
            name: [one.format(folder=folder) if "{folder}" in one else one for one in overrides]
            + ["checkpoint.save_steps=2"] * (name in step_2)
            for name, (_, overrides) in described.items()
        }

    resumed_on_2 = {
        "from 1 to 2": {"overrides": shared(2, "deepspeed.stage=0"), "resume": step_2["llama"]},
        "from 2 to auto": {"overrides": shared("auto", *AUTO, STAGE_3), "resume": step_2["2, stage 3"]},
        "from 2 to 1": {"overrides": [STAGE_3, STORED], "resume": step_2["2, stage 3"]},
        "from auto to 2": {"overrides": shared(2, "deepspeed.stage=2", STORED), "resume": step_2["auto"]},
        "from 4 to 2": {"overrides": shared(2, "deepspeed.stage=1"), "resume": step_2["4"]},
    }
    run_named_jobs(folder, common, placed(ON_4_RANKS), ranks=4)
    run_named_jobs(folder, common, placed(ON_2_RANKS) | resumed_on_2)
    return folder


def largest_differences(ours, theirs):
    """Of two runs' records, by metric; relative where numbers are above 1."""
    found = {}
    for a, b in zip(ours, theirs, strict=True):
        for metric in ("loss", "rewards/margins", "kl", "grad_norm", "logps/chosen", "logps/rejected"):
            if metric in b:
                found[metric] = max(found.get(metric, 0.0), abs(a[metric] - b[metric]) / max(1.0, abs(b[metric])))
        assert [a.get(name) for name in ("step", "tokens", "pairs")] == [b.get(n) for n in ("step", "tokens", "pairs")]
    return found


@pytest.mark.parametrize("name", EXPECTED)
def test_a_run_with_shared_rows_is_the_run_without(runs, name):
    base = runs / EXPECTED[name]
    assert len({round(step["loss"], 3) for step in read_metrics(base)}) == 4  # the loss moves
    for phase in ("train", "eval"):
        found = largest_differences(read_metrics(runs / name, phase), read_metrics(base, phase))
        print(f"{name}, {phase}:", {metric: f"{value:.1e}" for metric, value in found.items()})
        assert max(found.values()) <= 1e-5, (phase, found)
    weights = load_file(runs / name / "model" / "model.safetensors")
    for key, expected in load_file(base / "model" / "model.safetensors").items():
        torch.testing.assert_close(weights[key], expected, atol=2e-5, rtol=1e-4, msg=key)


@pytest.mark.parametrize("name", [name for name, base in EXPECTED.items() if base == "llama"])
def test_step_0_with_the_policy_as_reference_is_ln_2(runs, name):
    first = read_metrics(runs / name, "eval")[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["rewards/margins"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("name", ["from 1 to 2", "from 2 to 1", "from 2 to auto", "from auto to 2", "from 4 to 2"])
def test_a_run_is_resumed_with_other_groups(runs, name):
    whole = read_metrics(runs / "llama")
    assert [record["step"] for record in read_metrics(runs / name)] == [3, 4]
    assert max(largest_differences(read_metrics(runs / name), whole[2:]).values()) <= 1e-5


def test_some_rows_are_shared_and_some_are_not(runs):
    said = (runs / "log.txt").read_text()
    assert "are shared by 2 ranks" in said and "are shared by 4 ranks" in said and "rows are shared by 4 ranks" in said
