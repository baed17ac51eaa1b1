"""Mixtures of experts and their balancing loss: the same run whatever stage, layout, micro-batch and groups of ranks.

Each variant trains 3 steps of 8 pairs in fp32 through the real launcher, all of them in one launch. Losses, balancing
losses and shares of the experts must agree with the plainest variant of the same architecture within 1e-5.
"""

import pytest
from tiny import preference_rows, read_metrics, run_named_jobs, save_model, write_rows

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

PLAINEST = "stage0"
SMALL_LAYERS = "deepspeed.config={zero_optimization: {stage: 3, stage3_max_live_parameters: 1000}}"
VARIANTS = {
    PLAINEST: ["deepspeed.stage=0", "data.layout=padded", "train.micro_batch_size=1"],
    "stage2": ["deepspeed.stage=2", "data.layout=packed", "train.micro_batch_size=2"],
    "stage3": ["deepspeed.stage=3", "data.layout=shared_prefix", "train.micro_batch_size=2"],
    "checkpointing": ["deepspeed.stage=3", "data.layout=shared_prefix", "model.gradient_checkpointing=true"],
    "log_probs_first": ["deepspeed.stage=1", "data.layout=shared_prefix", "logprobs.pair_loss=tokens"],
    "shared": ["deepspeed.stage=3", "data.layout=shared_prefix", "train.sequence_parallel_size=2"],
    "auto": [
        *("deepspeed.stage=2", "data.layout=packed", "model.gradient_checkpointing=true"),
        *("train.sequence_parallel_size=auto", "train.max_tokens_per_micro_batch=60"),
    ],
    "submodules": ["deepspeed.stage=3", "data.layout=padded", SMALL_LAYERS],  # as of layers too large to gather
}  # fmt: skip
LORA = ["lora.r=4", "reference.mode=adapter", "train.learning_rate=1e-2"]
VARIANTS_OF = {
    "mixtral": {
        **VARIANTS,
        "lora_stage0": [*LORA, *VARIANTS[PLAINEST]],
        "lora_stage3": [*LORA, *VARIANTS["checkpointing"]],
        "no_weight": [*VARIANTS["stage2"], "loss.router_aux_loss_coef=0"],
    },
    "gpt_oss": {**VARIANTS, "lora_stage0": [*LORA, *VARIANTS[PLAINEST]], "lora_stage3": [*LORA, *VARIANTS["stage3"]]},
    "qwen3_moe": {name: VARIANTS[name] for name in (PLAINEST, "stage2", "checkpointing", "shared")},
    "olmoe": {name: VARIANTS[name] for name in (PLAINEST, "stage2", "checkpointing", "auto")},
}
NAMES = [(architecture, name) for architecture, variants in VARIANTS_OF.items() for name in variants]
COMPARED = [(architecture, name) for architecture, name in NAMES if name not in (PLAINEST, "lora_stage0", "no_weight")]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """(folder, what each run printed); run folders are called architecture-variant."""
    folder = tmp_path_factory.mktemp("experts")
    write_rows(folder / "train.jsonl", preference_rows(12))
    write_rows(folder / "heldout.jsonl", preference_rows(3, seed=1))
    for architecture in VARIANTS_OF:
        save_model(folder / architecture, architecture)
    common = [
        "model.dtype=float32", f"data.train={folder / 'train.jsonl'}", f"data.eval={folder / 'heldout.jsonl'}",
        f"data.cache_dir={folder / 'cache'}", "train.max_steps=3", "train.global_batch_size=8",
        "train.learning_rate=1e-3", "checkpoint.save_at_end=false", "loss.router_aux_loss_coef=0.02",
    ]  # fmt: skip
    jobs = {f"{a}-{name}": [f"model.path={folder / a}", *VARIANTS_OF[a][name]] for a, name in NAMES}
    return folder, run_named_jobs(folder, common, jobs)


def differences(folder, architecture, name):
    """{metric: largest difference from the plainest run} over all steps and evaluations."""
    plainest = "lora_stage0" if name.startswith("lora") else PLAINEST
    largest = {}
    for phase in ("train", "eval"):
        ours, base = (read_metrics(folder / f"{architecture}-{each}", phase) for each in (name, plainest))
        assert len(ours) == len(base) == (3 if phase == "train" else 1)
        for found, expected in zip(ours, base, strict=True):
            compared = [m for m in expected if m in ("loss", "rewards/margins", "grad_norm") or m.startswith("router/")]
            for metric in compared:
                kind = metric.partition("/layer_")[0]
                largest[kind] = max(largest.get(kind, 0.0), abs(found[metric] - expected[metric]))
    return largest


@pytest.mark.parametrize(("architecture", "name"), COMPARED)
def test_losses_and_balance_are_those_of_the_plainest_run(runs, architecture, name):
    largest = differences(runs[0], architecture, name)
    assert {"loss", "router/aux_loss", "router/largest_share", "router/entropy"} <= largest.keys()
    print(f"{architecture}, {name}:", {metric: f"{value:.1e}" for metric, value in largest.items()})
    for metric, difference in largest.items():
        assert difference <= 1e-5, (metric, difference)


@pytest.mark.parametrize("architecture", VARIANTS_OF)
def test_the_loss_holds_the_balancing_loss(runs, architecture):
    """At the first step, where the policy is the reference, the rest of it is ln 2; later both move."""
    steps = read_metrics(runs[0] / f"{architecture}-{PLAINEST}")
    assert steps[0]["loss"] == pytest.approx(0.6931471805599453 + 0.02 * steps[0]["router/aux_loss"], abs=1e-6)
    assert len({round(step["router/aux_loss"], 4) for step in steps}) > 1


def test_without_weight_it_is_measured_alone(runs):
    steps, weighted = (read_metrics(runs[0] / f"mixtral-{name}") for name in ("no_weight", "stage2"))
    assert steps[0]["loss"] == pytest.approx(0.6931471805599453, abs=1e-6)
    assert steps[0]["router/aux_loss"] == pytest.approx(weighted[0]["router/aux_loss"], abs=1e-6)
    assert abs(steps[2]["router/aux_loss"] - weighted[2]["router/aux_loss"]) > 1e-5


def test_the_log_says_what_an_adapter_does_not_reach(runs):
    for architecture, name in NAMES:
        assert ("does not reach the experts" in runs[1][f"{architecture}-{name}"]) == name.startswith("lora")
