"""A reference that moves (TR-DPO) is what a plain computation on whole weights gives, at every pair of stages."""

import json

import pytest
import torch
from safetensors.torch import load_file
from tiny import launch, read_metrics, run_jobs, run_overrides, save_model, without_timings

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

LN_2 = 0.6931471805599453
MOVES = 3


def at_stage(stage, *, every_shard=True):
    if stage == 3 and every_shard:
        return ["deepspeed.config={zero_optimization: {stage: 3, stage3_param_persistence_threshold: 0}}"]
    return [f"deepspeed.stage={stage}"]


def cases():
    """{name: (dtype, mixup, overrides)}."""
    found = {}
    for stage in (0, 1, 2, 3):
        for reference in (0, 3):
            mixup = 0.3 if reference == 3 else 1.0 if stage % 2 else 0.3
            extra = [*at_stage(stage), f"reference.stage={reference}"]
            found[f"policy{stage}_reference{reference}"] = ("float32", mixup, extra)
    found["hard_3_3"] = ("float32", 1.0, [*at_stage(3, every_shard=False), "reference.stage=3"])
    found["bf16_2_0"] = ("bfloat16", 0.01, [*at_stage(2), "reference.stage=0"])
    found["bf16_3_3"] = ("bfloat16", 0.01, [*at_stage(3), "reference.stage=3", "reference.offload_param=cpu"])
    found["bf16_hard"] = ("bfloat16", 1.0, [*at_stage(1), "reference.stage=3"])
    return found


CASES = cases()


@pytest.fixture(scope="module")
def moved(tmp_path_factory):
    """(folder, {case: what its run wrote})."""
    folder = tmp_path_factory.mktemp("moves")
    save_model(folder / "start", tied=True)
    jobs = {
        name: {
            "moves": MOVES,
            "overrides": [
                f"model.path={folder / 'start'}", "data.train=unused.jsonl", f"model.dtype={dtype}",
                "reference.sync_steps=1", f"reference.sync_mixup={mixup}", *extra,
            ],
        }
        for name, (dtype, mixup, extra) in CASES.items()
    }  # fmt: skip
    (folder / "jobs.json").write_text(json.dumps(jobs))
    done = launch("tests/distributed/move_references.py", folder)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder, {name: load_file(folder / f"{name}.safetensors") for name in CASES}


def plain_references(start, written, mixup, dtype):
    """The reference after each move, computed on whole weights in fp64, rounded to `dtype`."""
    reference = {name: tensor.to(dtype).double() for name, tensor in start.items()}
    for move in range(MOVES):
        for name in reference:
            reference[name] = mixup * written[f"policy.{move}.{name}"].double() + (1 - mixup) * reference[name]
        yield {name: tensor.to(dtype) for name, tensor in reference.items()}


@pytest.mark.parametrize("name", CASES)
def test_moves_are_those_of_a_plain_computation(moved, name):
    folder, written = moved
    dtype, mixup, _ = CASES[name]
    start = load_file(folder / "start" / "model.safetensors")
    last = start
    for move, expected in enumerate(plain_references(start, written[name], mixup, getattr(torch, dtype))):
        changed = 0
        for weight, value in expected.items():
            ours = written[name][f"reference.{move}.{weight}"]
            if mixup == 1:
                assert torch.equal(ours, value), (move, weight)
            else:  # the roundings of fp64 and of fp32 may fall to either side of a bf16 number
                rtol, atol = (2**-8, 1e-6) if dtype == "bfloat16" else (1e-6, 1e-7)
                torch.testing.assert_close(ours, value, rtol=rtol, atol=atol, msg=f"{move} {weight}")
            changed += int(not torch.equal(ours.float(), last[weight].float()))
        assert changed > len(expected) / 2
        last = expected


@pytest.mark.parametrize("name", ["bf16_2_0", "bf16_3_3"])
def test_small_moves_are_not_lost_in_bf16(moved, name):
    folder, written = moved
    start = load_file(folder / "start" / "model.safetensors")
    *_, expected = plain_references(start, written[name], 0.01, torch.bfloat16)
    exact, rounded = 0.0, 0.0
    for weight, value in expected.items():
        in_bf16 = start[weight].bfloat16()
        for move in range(MOVES):
            in_bf16 = in_bf16.lerp(written[name][f"policy.{move}.{weight}"], 0.01)
        ours = written[name][f"reference.{MOVES - 1}.{weight}"]
        exact += (ours.float() - value.float()).abs().sum().item()
        rounded += (in_bf16.float() - value.float()).abs().sum().item()
    assert exact < 0.01 * rounded


@pytest.mark.parametrize("name", [name for name in CASES if CASES[name][0] == "float32"])
def test_the_moved_reference_is_the_one_that_scores(moved, name):
    from transformers import AutoModelForCausalLM

    folder, written = moved
    model = AutoModelForCausalLM.from_pretrained(folder / "start")
    *_, expected = plain_references(
        load_file(folder / "start" / "model.safetensors"), written[name], CASES[name][1], torch.float32
    )
    model.load_state_dict(expected, strict=False)  # the tied head is the embedding
    ids = written[name]["ids"]
    with torch.no_grad():
        logps = model(ids).logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).flatten()
    torch.testing.assert_close(written[name]["logps"], logps, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_its_state_restores_it_at_another_stage(moved, name):
    written = moved[1][name]
    for weight in load_file(moved[0] / "start" / "model.safetensors"):
        assert torch.equal(written[f"restored.{weight}"], written[f"reference.{MOVES - 1}.{weight}"]), weight
        # what is kept beyond the model's precision came back too
        assert torch.equal(written[f"restored_next.{weight}"], written[f"next.{weight}"]), weight


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(folder of the runs, the message of the refused one)."""
    folder = tmp_path_factory.mktemp("trained")
    common = [*run_overrides(folder), "train.max_steps=5", "checkpoint.save_at_end=false"]
    moving = ["reference.sync_steps=2"]
    soft = [*moving, "reference.sync_mixup=0.6", "checkpoint.save_total_limit=null"]
    jobs = {
        "still": ["deepspeed.stage=2"],
        "hard": [*moving, "train.eval_steps=1", "deepspeed.stage=2", "reference.stage=3"],
        "soft2": [*soft, "deepspeed.stage=2", "checkpoint.save_steps=3"],
        "soft2_resumed": [*soft, "deepspeed.stage=2"],
        "soft3_bf16": [*soft, *at_stage(3), "reference.stage=3", "model.dtype=bfloat16", "checkpoint.save_steps=3"],
        "soft3_bf16_resumed": [*soft, *at_stage(3), "reference.stage=3", "model.dtype=bfloat16"],
        "refused": [*moving, "deepspeed.stage=2", f"reference.model={folder / 'other'}"],
    }
    save_model(folder / "other", tied=True)  # no head of its own
    listed = [
        {
            "overrides": [*common, *extra, f"output_dir={folder / name}"],
            "resume": f"{folder / name.removesuffix('_resumed')}/checkpoints/step-3" if "resumed" in name else None,
            "refused": name == "refused",
        }
        for name, extra in jobs.items()
    ]
    return folder, run_jobs(folder, listed)[-1]


def test_a_replaced_reference_is_the_policy(trained):
    folder, _ = trained
    hard, still = (read_metrics(folder / run) for run in ("hard", "still"))
    for step in (0, 2, 4):  # the steps right after the start and after a move
        assert hard[step]["loss"] == pytest.approx(LN_2, abs=1e-6)
        assert hard[step]["rewards/margins"] == pytest.approx(0, abs=1e-6)
    for step in (1, 3):
        assert abs(hard[step]["loss"] - LN_2) > 1e-3
    assert [record["loss"] for record in hard[:2]] == [record["loss"] for record in still[:2]]
    # held-out rewards are measured against the reference of the moment
    evaluated = {record["step"]: record["loss"] for record in read_metrics(folder / "hard", "eval")}
    assert evaluated[2] == evaluated[4] == pytest.approx(LN_2, abs=1e-6)
    assert abs(evaluated[3] - LN_2) > 1e-3


@pytest.mark.parametrize("run", ["soft2", "soft3_bf16"])
def test_a_resumed_run_keeps_the_moved_reference(trained, run):
    folder, _ = trained
    for phase in ("train", "eval"):
        straight, again = (without_timings(read_metrics(folder / name, phase)) for name in (run, f"{run}_resumed"))
        assert [record for record in straight if record["step"] > 3] == again
    weights = [load_file(folder / name / "model" / "model.safetensors") for name in (run, f"{run}_resumed")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_another_architecture_is_refused(trained):
    assert "reference.sync_steps" in trained[1] and "architecture" in trained[1]
