"""What precision settings do to numbers and bytes on two ranks: sums of gradients, and optimizer states in bf16."""

import json

import pytest
import torch
from safetensors.torch import load_file
from tiny import launch, preference_rows, read_metrics, run_named_jobs, save_model, without_timings, write_rows

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

MATRIX = 64 * 64  # elements, of `reduce_gradients.py`


@pytest.fixture(scope="module")
def sums(tmp_path_factory):
    """{(stage, reduce_dtype, offload): measured}"""
    out = tmp_path_factory.mktemp("sums") / "out.json"
    done = launch("tests/distributed/reduce_gradients.py", out)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return {tuple(record["case"]): record for record in json.loads(out.read_text())}


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_gradients_of_bf16_models_are_summed_over_ranks_exactly_in_fp32_and_rounded_in_bf16(sums, stage):
    assert sums[stage, "float32", "none"]["error"] < 1e-7
    assert sums[stage, "float32", "cpu"]["error"] < 1e-7
    # half a unit in the last place of bf16's 8 bits is 2^-9 to 2^-8; the mean over a matrix is a little less
    assert 2**-11 < sums[stage, "bfloat16", "none"]["error"] < 2**-8
    assert sums[stage, "null", "none"] == {**sums[stage, "bfloat16", "none"], "case": [stage, "null", "none"]}


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_fp32_sums_send_twice_the_bytes(sums, stage):
    passes = 1 if stage == 1 else 2  # stages 2 and 3 sum after every micro-step
    assert sums[stage, "bfloat16", "none"]["bytes"] == passes * MATRIX * 2
    assert sums[stage, "float32", "none"]["bytes"] == passes * MATRIX * 4


LEARNING_RATE = 1e-4


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """(folder of runs by name, what each said): 4 steps whole, and from the checkpoint of step 2 on."""
    folder = tmp_path_factory.mktemp("bf16_states")
    save_model(folder / "start")
    write_rows(folder / "train.jsonl", preference_rows(22))
    common = [
        f"model.path={folder / 'start'}", f"data.train={folder / 'train.jsonl'}", f"data.cache_dir={folder / 'cache'}",
        "train.global_batch_size=8", "train.micro_batch_size=2", f"train.learning_rate={LEARNING_RATE}",
        "train.lr_scheduler_type=constant", "train.max_steps=4", "checkpoint.save_steps=2",
    ]  # fmt: skip
    in_bf16 = {stage: [f"deepspeed.stage={stage}", "deepspeed.bf16_optimizer_states=true"] for stage in (2, 3)}

    def resumed(overrides, run):
        return {"overrides": overrides, "resume": str(folder / run / "checkpoints" / "step-2")}

    on_2 = {
        "default": ["deepspeed.stage=2", "checkpoint.save_at_end=false", "checkpoint.save_steps=null"],
        "reduced": ["deepspeed.stage=2", "train.reduce_dtype=float32", "checkpoint.save_steps=null"],
        "whole2": in_bf16[2],
        "whole3": in_bf16[3],
        "resumed2": resumed(in_bf16[2], "whole2"),
        "resumed3": resumed(in_bf16[3], "whole3"),
        "2_to_3": resumed(in_bf16[3], "whole2"),
        "3_to_2": resumed(in_bf16[2], "whole3"),
        "without": {**resumed(["deepspeed.stage=2"], "whole2"), "refused": True},
    }
    said = run_named_jobs(folder, common, on_2)
    on_1 = {f"one_rank{stage}": resumed(in_bf16[stage], f"whole{stage}") for stage in (2, 3)}
    said |= run_named_jobs(folder, common, on_1, ranks=1)
    return folder, said


def losses(folder, name):
    return {record["step"]: record["loss"] for record in read_metrics(folder / name)}


def test_a_run_sums_gradients_in_what_its_config_says(runs):
    (default, *_), (reduced, *_) = (read_metrics(runs[0] / name) for name in ("default", "reduced"))
    assert default["loss"] == reduced["loss"]
    assert default["grad_norm"] != reduced["grad_norm"] == pytest.approx(default["grad_norm"], rel=1e-3)


@pytest.mark.parametrize("stage", [2, 3])
def test_nothing_in_a_checkpoint_of_bf16_states_is_kept_in_fp32(runs, stage):
    for file in (runs[0] / f"whole{stage}" / "checkpoints" / "step-4").glob("*optim_states.pt"):
        state = torch.load(file, weights_only=False)["optimizer_state_dict"]
        weights = state["single_partition_of_fp32_groups" if stage == 2 else "fp32_flat_groups"]
        optimizer = state["base_optimizer_state" if stage == 2 else "optimizer_state_dict"]["state"]
        moments = [s[name] for s in optimizer.values() for name in ("exp_avg", "exp_avg_sq")]
        assert {tensor.dtype for tensor in (*weights, *moments)} == {torch.bfloat16}


@pytest.mark.parametrize("stage", [2, 3])
def test_a_run_of_bf16_states_resumes_bit_for_bit(runs, stage):
    whole, resumed = (without_timings(read_metrics(runs[0] / f"{name}{stage}")) for name in ("whole", "resumed"))
    assert [record["step"] for record in resumed] == [3, 4] and resumed == whole[2:]


@pytest.mark.parametrize(
    ("cut", "whole"), [("2_to_3", "whole3"), ("3_to_2", "whole2"), ("one_rank2", "whole2"), ("one_rank3", "whole3")]
)
def test_a_checkpoint_of_bf16_states_is_cut_for_other_stages_and_ranks(runs, cut, whole):
    folder, said = runs
    assert "cutting it anew" in said[cut]
    after, before = losses(folder, cut), losses(folder, whole)
    assert after[3] == before[3]  # the weights are the same ones
    assert after[4] == pytest.approx(before[4], abs=2e-3)  # another order of sums, then a step in bf16


def test_a_checkpoint_of_bf16_states_is_refused_without_them(runs):
    assert "deepspeed.bf16_optimizer_states" in runs[1]["without"].splitlines()[-1]


def test_updates_that_the_warning_calls_lost_are_lost(runs):
    folder, said = runs
    above = 512 * LEARNING_RATE
    assert said["whole2"].count("WARNING: deepspeed.bf16_optimizer_states") == 1
    assert f"weights above {above:.1e}" in said["whole2"] and "WARNING" not in said["default"]
    start, without, with_fp32 = (
        load_file(folder / name / "model.safetensors") for name in ("start", "whole2/model", "default/model")
    )
    moved, stuck, moved_in_fp32 = 0, 0, 0
    for name, before in start.items():
        before = before.bfloat16().float()
        large = before.abs() > above
        assert torch.equal(without[name].float()[large], before[large]), name
        stuck += int(large.sum())
        moved += int((without[name].float() != before).sum())
        moved_in_fp32 += int((with_fp32[name].float() != before)[large].sum())
    assert moved > 0 and moved_in_fp32 > stuck / 10  # four steps in fp32 add up to what bf16 can show


def test_ligers_kernels_run_in_layers_that_zero_3_gathers_and_checkpointing_computes_again(tmp_path):
    done = launch("tests/distributed/liger_zero3.py", tmp_path / "out.json")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["calls"] == {"norm": 9, "rope": 4, "swiglu": 4}  # the norms of two layers twice, and the last one
    assert found["losses"][0] == pytest.approx(found["losses"][1], rel=1e-6)
    assert found["gradients"] > 15 and found["worst"] < 1e-5
