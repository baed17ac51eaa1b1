"""The host waits once in a training step, apart from what DeepSpeed adds: every call that waits is found and named.

Steps run on an emulated CUDA device (`emulated_cuda`), through real engines, on two ranks.
"""

import json

import pytest
import torch
from tiny import launch, run_overrides

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.is_available(), reason="emulates a device where there is none"),
]

RUNS = {
    "stage 0": ["deepspeed.stage=0", "loss.ld_alpha=0.5"],
    "stage 1, bf16": ["deepspeed.stage=1", "model.dtype=bfloat16"],  # Triton's pair loss
    "stage 2, stored reference": ["reference.mode=store", "logprobs.pair_loss=tokens", "data.layout=packed"],
    "stage 2, fp16": ["model.dtype=float16", "logprobs.implementation=triton", "model.gradient_checkpointing=true"],
    "stage 2, padded rows": ["data.layout=padded", "logprobs.implementation=naive", "loss.use_weighting=true"],
    "stage 2, adapter as reference": ["lora.r=2", "reference.mode=adapter"],
    "stage 2, AOT": ["loss.loss_type=aot", "logprobs.implementation=chunked"],
    "stage 3": [
        "deepspeed.stage=3", "model.gradient_checkpointing=true", "model.gradient_checkpointing_offload=true",
        "reference.stage=3", "reference.sync_steps=1", "reference.sync_mixup=0.5",
    ],
}  # fmt: skip
# The one wait: everything that the step has given the device is done when it returns.
METRICS_ARE_READ = ("tolist", "dpo_scale/observe/metrics.py: read")
# At stage 0 the norm decides whether the weights may change, and DeepSpeed has none to ask.
NORM_IS_READ = ("item", "dpo_scale/distributed/engine.py: optimizer_step")
# At stage 3, before a layer: until the layer two before it is done, so that the device always has one to work on.
GATHERS_ARE_BOUNDED = ("event.synchronize", "dpo_scale/models/zero3.py: wait")
# What DeepSpeed 0.19.8 adds in the optimizer step, and at stage 3 in passes.
OF_NORMS = {
    ("item", "deepspeed/runtime/utils.py: is_invalid_grad_norm"),
    ("tensor(..., device=...)", "deepspeed/runtime/utils.py: mask_nan_or_inf_with_val_inplace"),
}
OF_DEEPSPEED = {
    "stage 0": {("tensor(..., device=...)", "deepspeed/runtime/utils.py: clip_grad_norm_")},
    "stage 1, bf16": OF_NORMS | {("item", "deepspeed/runtime/utils.py: clip_tensors_by_global_norm")},
    "stage 2, stored reference": OF_NORMS,
    "stage 2, fp16": OF_NORMS | {("item", "deepspeed/runtime/zero/stage_1_and_2.py: has_overflow")},
    "stage 2, padded rows": OF_NORMS,
    "stage 2, adapter as reference": OF_NORMS,
    "stage 2, AOT": OF_NORMS,
    "stage 3": {
        ("item", "deepspeed/runtime/utils.py: is_invalid_grad_norm"),
        ("tensor(..., device=...)", "deepspeed/runtime/zero/stage3.py: get_grad_norm_direct"),
        # once a micro-step
        ("stream.synchronize", "deepspeed/runtime/zero/stage3.py: independent_gradient_partition_epilogue"),
        # gathers that are under way are bounded
        ("event.synchronize", "deepspeed/runtime/zero/partitioned_param_coordinator.py: _fetch_sub_module_impl"),
        # when small weights, which stay whole, are gathered after they have changed
        ("synchronize", "deepspeed/runtime/zero/partition_parameters.py: _allgather_params_coalesced"),
    },
}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What made the host wait in a step of each run, in order."""
    folder = tmp_path_factory.mktemp("waits")
    # real kernels for CUDA do not run on the emulated device
    common = [*run_overrides(folder), "model.attn_implementation=sdpa", "model.liger=false"]
    common.append(f"reference.store={folder / 'store'}")
    jobs = {name: [*common, *more, f"output_dir={folder / name}"] for name, more in RUNS.items()}
    (folder / "jobs.json").write_text(json.dumps(jobs))
    done = launch("tests/distributed/step_waits.py", folder / "jobs.json")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads((folder / "jobs.json.found").read_text())


@pytest.mark.parametrize("name", RUNS)
def test_the_host_waits_once_and_where_deepspeed_makes_it(found, name):
    waits = found[name]["waits"]
    print(*("; ".join(wait) for wait in waits), sep="\n")
    places = [(what, where) for what, where, _ in waits]
    ours = [place for place in places if not place[1].startswith("deepspeed/")]
    once = [place for place in ours if place != GATHERS_ARE_BOUNDED]
    assert once == ([NORM_IS_READ] if name == "stage 0" else []) + [METRICS_ARE_READ]
    assert (GATHERS_ARE_BOUNDED in ours) == (name == "stage 3")
    assert places[-1] == METRICS_ARE_READ
    assert {place for place in places if place not in ours} == OF_DEEPSPEED[name]


@pytest.mark.parametrize("name", RUNS)
def test_no_stream_uses_memory_that_another_may_still_write(found, name):
    assert found[name]["races"] == []
