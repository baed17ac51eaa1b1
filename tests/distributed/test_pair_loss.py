"""Training with the fused pair loss against training by way of log-probs, on 2 ranks: same numbers, same model.

Steps of 7 pairs in micro-batches of 2 leave one rank a smaller micro-batch, with micro-batches of 1 a filler; lengths
differ much, so ranks score different numbers of tokens.
"""

import pytest
import torch
from safetensors.torch import load_file
from tiny import read_metrics, run_jobs, run_overrides, save_model, without_timings

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

EVERY_SHARD = "deepspeed.config={zero_optimization: {stage: 3, stage3_param_persistence_threshold: 0}}"
VARIANTS = {
    "stage0": ["deepspeed.stage=0"],
    "stage1": ["deepspeed.stage=1"],
    "stage2_filler": ["deepspeed.stage=2", "train.micro_batch_size=1"],
    "stage3_checkpointing": [EVERY_SHARD, "model.gradient_checkpointing=true"],
    "tied_stage2": ["deepspeed.stage=2", "model.path={folder}/tied"],
    "tied_stage3": [EVERY_SHARD, "model.path={folder}/tied"],
    "softcap": ["deepspeed.stage=1", "model.path={folder}/gemma2"],
    "sigmoid_sft": ["deepspeed.stage=1", "loss.loss_type=[sigmoid, sft]", "loss.loss_weights=[1.0, 0.2]"],
    "ld_alpha": ["deepspeed.stage=1", "loss.ld_alpha=0.3"],
    "lora_adapter_reference": ["deepspeed.stage=2", "lora.r=4", "reference.mode=adapter", "train.micro_batch_size=1"],
    "stored_reference": ["deepspeed.stage=1", "reference.mode=store", "reference.store={folder}/store"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The run folders `<variant>-fused` and `<variant>-tokens`."""
    folder = tmp_path_factory.mktemp("pair_loss")
    common = run_overrides(folder)
    save_model(folder / "tied", "llama", tied=True)
    save_model(folder / "gemma2", "gemma2")
    # a large epsilon: Adam's steps then depend on the gradient's size, and not on the rounding of one near 0
    common += [
        "train.global_batch_size=7", "train.max_steps=3", "checkpoint.save_at_end=false", "train.adam_epsilon=1e-3",
    ]  # fmt: skip
    jobs = [
        {
            "overrides": [
                *common, *(text.replace("{folder}", str(folder)) for text in extra),
                f"logprobs.pair_loss={how}", f"output_dir={folder / name}-{how}",
            ]
        }
        for name, extra in VARIANTS.items()
        for how in ("tokens", "fused")
    ]  # fmt: skip
    run_jobs(folder, jobs)
    return folder


@pytest.mark.parametrize("name", VARIANTS)
def test_fused_steps_and_model_are_those_of_the_token_path(folder, name):
    fused, tokens = (without_timings(read_metrics(folder / f"{name}-{how}")) for how in ("fused", "tokens"))
    assert len(fused) == 3 and len({round(step["loss"], 4) for step in tokens}) == 3
    for ours, theirs in zip(fused, tokens, strict=True):
        assert ours.keys() == theirs.keys()
        for metric in theirs.keys() - {"phase"}:
            assert ours[metric] == pytest.approx(theirs[metric], rel=1e-5, abs=1e-5), (ours["step"], metric)
    ours, theirs = (load_file(folder / f"{name}-{how}" / "model" / "model.safetensors") for how in ("fused", "tokens"))
    assert ours.keys() == theirs.keys()
    for key in theirs:
        torch.testing.assert_close(
            ours[key], theirs[key], atol=1e-6, rtol=1e-5, msg=lambda text, key=key: f"{key}: {text}"
        )
