"""LoRA through the real launcher: the reference in the policy's own layers, at every stage, resumed, exported.

Every run trains 5 steps of 8 pairs in fp32 on 2 ranks. All of them are made in one launch.
"""

import pytest
import torch
from safetensors.torch import load_file
from tiny import read_metrics, run_jobs, run_overrides, without_timings

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

STAGES = (0, 1, 2, 3)
LN_2 = 0.6931471805599453
# without it a model this small stays whole on each rank at stage 3
SHARDS = "deepspeed.config={zero_optimization: {stage: 3, stage3_param_persistence_threshold: 0}}"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(folder of the runs, messages of the refused ones by name)."""
    folder = tmp_path_factory.mktemp("lora")
    common = [
        *run_overrides(folder), "train.max_steps=5", "train.learning_rate=1e-2", "checkpoint.save_at_end=false",
        "train.weight_decay=0.1",
    ]  # fmt: skip
    new = ["lora.r=4", "lora.alpha=8"]
    adapter = ["reference.mode=adapter"]
    saving = ["checkpoint.save_steps=3", "checkpoint.save_total_limit=null"]
    jobs, refused = {}, {}
    for stage in STAGES:
        at_stage = [f"deepspeed.stage={stage}"] if stage < 3 else [SHARDS]
        jobs[f"live{stage}"] = [*new, *at_stage]
        jobs[f"adapter{stage}"] = [*new, *adapter, *at_stage, *saving]
        jobs[f"resumed{stage}"] = [*new, *adapter, *at_stage, "lora.merge=false"]
    jobs["checkpointing"] = [*new, *adapter, SHARDS, "model.gradient_checkpointing=true"]
    jobs["persistent"] = [*new, *adapter, "deepspeed.stage=3"]
    jobs["dropout"] = [*new, *adapter, SHARDS, *saving, "lora.dropout=0.2"]
    jobs["resumed_dropout"] = [*new, *adapter, SHARDS, "lora.dropout=0.2"]
    stored = ["reference.mode=store", f"reference.store={folder / 'store'}"]
    jobs["stored"] = [*new, *stored, "deepspeed.stage=1"]
    start = [f"lora.adapter={folder / 'resumed2' / 'model'}"]
    jobs["second_live"] = [*start, "deepspeed.stage=1"]
    jobs["second_stored"] = [*start, *stored, "deepspeed.stage=1"]
    jobs["second_adapter"] = [*start, *adapter, SHARDS]
    jobs["second_against_base"] = [*start, *adapter, "reference.adapter=none", "deepspeed.stage=2"]
    jobs["second_against_live_base"] = [*start, f"reference.model={folder / 'start'}", "deepspeed.stage=2"]
    refused["no_such_layer"] = ["lora.r=4", "lora.target_modules=[wrong_proj]"]
    refused["head"] = ["lora.r=4", "lora.target_modules=[lm_head]"]
    refused["no_adapter"] = [f"lora.adapter={folder / 'start'}"]
    refused["other_rank"] = ["lora.r=2", *adapter, "deepspeed.stage=2"]
    resumes = {f"resumed{stage}": f"adapter{stage}" for stage in STAGES}
    resumes |= {"resumed_dropout": "dropout", "other_rank": "adapter2"}
    run_list = [
        {
            "overrides": [*common, *extra, f"output_dir={folder / name}"],
            "resume": f"{folder / resumes[name]}/checkpoints/step-3" if name in resumes else None,
            "refused": name in refused,
        }
        for name, extra in (jobs | refused).items()
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DPO_SCALE_CACHE", str(folder / "cache"))
        messages = run_jobs(folder, run_list)
    return folder, dict(zip(refused, messages[len(jobs) :], strict=True))


def losses(folder, run):
    return [record["loss"] for record in read_metrics(folder / run)]


def logits(model):
    with torch.no_grad():
        return model(torch.arange(40)[None]).logits


def whole(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder)


def test_the_adapter_off_is_the_live_reference(made):
    folder, _ = made
    for stage in STAGES:
        live, off = losses(folder, f"live{stage}"), losses(folder, f"adapter{stage}")
        assert off[0] == pytest.approx(LN_2, abs=1e-6)
        assert abs(off[-1] - LN_2) > 0.01  # it learns, so agreement says something
        assert off == pytest.approx(live, abs=1e-6), stage
        ours, theirs = (load_file(folder / f"{run}{stage}/model/model.safetensors") for run in ("live", "adapter"))
        assert ours.keys() == theirs.keys()
        for name in ours:
            torch.testing.assert_close(ours[name], theirs[name], atol=1e-6, rtol=1e-6, msg=f"{stage}: {name}")


def test_stored_values_are_the_live_reference(made):
    folder, _ = made
    assert losses(folder, "stored") == pytest.approx(losses(folder, "live1"), abs=1e-6)
    # the start's adapter is part of what the values belong to
    assert losses(folder, "second_stored") == pytest.approx(losses(folder, "second_live"), abs=1e-6)


def test_stages_and_gradient_checkpointing_agree(made):
    folder, _ = made
    for run in ("adapter1", "adapter2", "adapter3", "checkpointing", "persistent"):
        assert losses(folder, run) == pytest.approx(losses(folder, "adapter0"), abs=1e-5), run


@pytest.mark.parametrize("stage", STAGES)
def test_a_resumed_run_is_bit_identical(made, stage):
    folder, _ = made
    for phase in ("train", "eval"):
        straight = without_timings(read_metrics(folder / f"adapter{stage}", phase))
        again = without_timings(read_metrics(folder / f"resumed{stage}", phase))
        assert [record for record in straight if record["step"] > 3] == again
        assert again


def test_a_resumed_run_with_dropout_is_bit_identical(made):
    folder, _ = made
    straight, again = (without_timings(read_metrics(folder / run)) for run in ("dropout", "resumed_dropout"))
    assert straight[3:] == again
    assert losses(folder, "dropout") != losses(folder, "adapter3")
    weights = [load_file(folder / run / "model" / "model.safetensors") for run in ("dropout", "resumed_dropout")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.parametrize("stage", STAGES)
def test_the_merged_model_is_the_base_with_the_adapter(made, stage):
    from peft import PeftModel

    folder, _ = made
    base = whole(folder / "start")
    before = logits(base)
    merged = logits(whole(folder / f"adapter{stage}" / "model"))
    alone = folder / f"resumed{stage}" / "model"
    assert not list(alone.glob("model*.safetensors"))
    assert (alone / "tokenizer.json").exists()
    worn = logits(PeftModel.from_pretrained(base, alone))
    assert (merged - before).abs().max() > 0.01
    torch.testing.assert_close(merged, worn, atol=1e-5, rtol=1e-5)


def test_only_the_adapter_is_trained_and_saved(made):
    folder, _ = made
    base = load_file(folder / "start" / "model.safetensors")
    merged = load_file(folder / "adapter2" / "model" / "model.safetensors")
    changed = {name for name in base if not torch.equal(base[name], merged[name])}
    assert changed == {name for name in base if "_proj" in name}
    for stage in STAGES:
        states = sorted((folder / f"adapter{stage}" / "checkpoints" / "step-3").glob("*model_states.pt"))
        assert states
        for file in states:
            saved = torch.load(file, map_location="cpu", weights_only=False)["module"]
            assert saved and all("lora_" in name for name in saved), file


def test_an_existing_adapter_is_start_and_reference(made):
    folder, _ = made
    live, frozen = losses(folder, "second_live"), losses(folder, "second_adapter")
    assert frozen[0] == pytest.approx(LN_2, abs=1e-6)
    assert abs(frozen[-1] - LN_2) > 0.01
    assert frozen == pytest.approx(live, abs=1e-5)


def test_an_existing_adapter_against_the_base(made):
    folder, _ = made
    off, live = losses(folder, "second_against_base"), losses(folder, "second_against_live_base")
    assert abs(off[0] - LN_2) > 0.01
    assert off == pytest.approx(live, abs=1e-6)


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("no_such_layer", ["lora.target_modules", "wrong_proj"]),
        ("head", ["lora.target_modules", "lm_head", "frozen"]),
        ("no_adapter", ["start", "adapter_config.json"]),
        ("other_rank", ["lora.r was 4, is 2"]),
    ],
)
def test_what_cannot_be_is_refused(made, name, parts):
    _, messages = made
    assert all(part in messages[name] for part in parts), messages[name]
