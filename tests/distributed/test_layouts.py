"""The same run in every layout: losses, gradients' norms, held-out metrics and weights, on 2 ranks, in fp32.

7 pairs a step over 22 pairs: the fourth step has one pair, so one rank runs a filler.
"""

import pytest
import torch
from safetensors.torch import load_file
from tiny import preference_rows, read_metrics, run_jobs, save_model, write_rows

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

STAGE_3 = "deepspeed.config={zero_optimization: {stage: 3, stage3_param_persistence_threshold: 0}}"
LORA = ["lora.r=4", "reference.mode=adapter"]
FAMILIES = {  # runs that must agree, each with its first
    "whole": {
        "padded2": ["data.layout=padded", "deepspeed.stage=2"],
        "packed2": ["data.layout=packed", "deepspeed.stage=2"],
        "shared2": ["data.layout=shared_prefix", "deepspeed.stage=2"],
        "padded3": ["data.layout=padded", STAGE_3],
        "packed3": ["data.layout=packed", STAGE_3, "model.gradient_checkpointing=true"],
        "shared3": ["data.layout=shared_prefix", STAGE_3, "reference.stage=3"],
        "shared0": ["data.layout=shared_prefix", "deepspeed.stage=0", "train.micro_batch_size=4"],
        "checkpointed2": ["data.layout=shared_prefix", "deepspeed.stage=2", "model.gradient_checkpointing=true"],
        "checkpointed3": ["data.layout=auto", STAGE_3, "model.gradient_checkpointing=true"],
        "compiled2": ["data.layout=shared_prefix", "deepspeed.stage=2", "model.compile=true"],
        "compiled3": ["data.layout=shared_prefix", STAGE_3, "model.compile=true", "reference.stage=3"],
        "filled_padded": ["data.layout=padded", "deepspeed.stage=2", "reference.mode=store"],
        # finds what another layout stored
        "served_shared": ["deepspeed.stage=2", "reference.mode=store", "reference.on_missing=error"],
    },
    "adapter": {
        "adapter_padded": ["data.layout=padded", "deepspeed.stage=2", *LORA],
        "adapter_shared": ["data.layout=shared_prefix", "deepspeed.stage=2", *LORA],
        "adapter_shared3": ["data.layout=shared_prefix", STAGE_3, *LORA, "model.gradient_checkpointing=true"],
        "adapter_compiled": [
            "data.layout=packed", "deepspeed.stage=2", *LORA, "model.compile=true", "model.gradient_checkpointing=true",
        ],
        "adapter_compiled3": [
            "data.layout=packed", STAGE_3, *LORA, "model.compile=true", "model.gradient_checkpointing=true",
        ],
    },
    "gpt_oss": {  # experts that are parameters of the layer
        "experts_padded": ["data.layout=padded", "deepspeed.stage=2"],
        "experts_padded3": ["data.layout=padded", STAGE_3],
        "experts_packed3": ["data.layout=packed", STAGE_3, "model.gradient_checkpointing=true"],
    },
    "gemma2": {
        "gemma_padded": ["data.layout=padded", "deepspeed.stage=2"],
        "gemma_shared": ["deepspeed.stage=2"],
        "gemma_packed3": ["data.layout=packed", STAGE_3],
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """{variant: run folder}."""
    folder = tmp_path_factory.mktemp("layouts")
    models = {family: family if family in ("gemma2", "gpt_oss") else "llama" for family in FAMILIES}
    for architecture in set(models.values()):
        save_model(folder / architecture, architecture)
    write_rows(folder / "train.jsonl", preference_rows(22))
    write_rows(folder / "heldout.jsonl", preference_rows(5, seed=1))
    common = [
        "model.dtype=float32", f"data.train={folder / 'train.jsonl'}", f"data.eval={folder / 'heldout.jsonl'}",
        f"data.cache_dir={folder / 'cache'}", f"reference.store={folder / 'store'}", "train.max_steps=4",
        "train.global_batch_size=7", "train.micro_batch_size=2", "train.learning_rate=1e-3",
        "checkpoint.save_at_end=false",
    ]  # fmt: skip
    jobs = [
        {
            "overrides": [
                *common, f"model.path={folder / models[family]}", *extra, f"output_dir={folder / name}",
            ]
        }
        for family, variants in FAMILIES.items()
        for name, extra in variants.items()
    ]  # fmt: skip
    run_jobs(folder, jobs)
    return {name: folder / name for variants in FAMILIES.values() for name in variants}


@pytest.mark.parametrize("family", FAMILIES)
def test_metrics_agree_in_every_layout(runs, family):
    first, *others = FAMILIES[family]
    base = read_metrics(runs[first])
    assert len({round(step["loss"], 3) for step in base}) == 4  # the loss moves, so agreement says something
    for name in others:
        for ours, theirs in zip(read_metrics(runs[name]), base, strict=True):
            for metric in ("loss", "rewards/margins", "logps/chosen", "logps/rejected", "grad_norm"):
                assert ours[metric] == pytest.approx(theirs[metric], abs=1e-5, rel=1e-5), (name, ours["step"], metric)
            assert ours["tokens"] == theirs["tokens"]
        held_out = [read_metrics(runs[run], "eval")[-1]["loss"] for run in (name, first)]
        assert held_out[0] == pytest.approx(held_out[1], abs=1e-5), name


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_agree_in_every_layout(runs, family):
    first, *others = FAMILIES[family]
    (base,) = (load_file(file) for file in (runs[first] / "model").glob("model.safetensors"))
    for name in others:
        weights = load_file(runs[name] / "model" / "model.safetensors")
        for key in base:
            torch.testing.assert_close(weights[key], base[key], atol=2e-5, rtol=1e-4, msg=f"{name}: {key}")


def test_only_padded_rows_have_padding(runs):
    for name, run in runs.items():
        padding = [step["padding_fraction"] for step in read_metrics(run)]
        if "padded" in name:
            assert min(padding) > 0, name
        else:
            assert padding[:3] == [0, 0, 0], name
            # the filler repeats the one pair of the step
            assert padding[3] == 0.5, name


def test_the_config_of_a_run_says_what_auto_came_to(runs):
    assert "layout: shared_prefix" in (runs["gemma_shared"] / "config.yaml").read_text()
    assert "dpo_scale" not in (runs["gemma_shared"] / "model" / "config.json").read_text()
