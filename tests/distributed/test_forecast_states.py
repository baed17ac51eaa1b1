"""Formulas for weights, gradients and optimizer states beside the live tensors of real engines: `live_states.py`."""

import json

import pytest
from tiny import launch, save_tokenizer

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


def make_jobs(folder):
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig

    shared = dict(
        vocab_size=512, hidden_size=256, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=4,
        max_position_embeddings=64,
    )  # fmt: skip
    configs = {
        "dense": LlamaConfig(**shared, intermediate_size=768, tie_word_embeddings=False),
        "tied": LlamaConfig(**shared, intermediate_size=768, tie_word_embeddings=True),
        "experts": MixtralConfig(**shared, intermediate_size=256, num_local_experts=4),
    }
    for name, config in configs.items():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder / name)
        save_tokenizer(folder / name)

    def job(model, dtype, stage, *more):
        common = ["data.layout=padded", "logprobs.implementation=naive", "reference.mode=store"]
        return [f"model.path={folder / model}", f"model.dtype={dtype}", f"deepspeed.stage={stage}", *common, *more]

    def zero(**settings):
        said = ", ".join(f"{name}: {value}" for name, value in settings.items())
        return f"deepspeed.config={{zero_optimization: {{{said}}}}}"

    fp32, bf16, live = "float32", "bfloat16", "reference.mode=live"
    off, weights_off = "deepspeed.offload_optimizer=cpu", "deepspeed.offload_param=cpu"
    small = zero(stage3_param_persistence_threshold=1000)  # as if the model were large
    small_buckets = {"stage3_prefetch_bucket_size": 100_000, "stage3_max_reuse_distance": 1_000_000}
    small_buckets |= {"stage3_param_persistence_threshold": 1000, "reduce_bucket_size": 400_000}
    return {
        "0 fp32": job("dense", fp32, 0),
        "1 fp32": job("dense", fp32, 1),
        "1 bf16": job("tied", bf16, 1),
        "1 bf16 offloaded": job("dense", bf16, 1, off),
        "2 fp32 sgd": job("tied", fp32, 2, "train.optim=SGD", "train.optim_args={momentum: 0.9}"),
        "2 bf16, moving reference": job("dense", bf16, 2, live, "reference.sync_steps=1", "reference.sync_mixup=0.5"),
        "2 bf16 summed in bf16": job("dense", bf16, 2, "deepspeed.config={data_types: {grad_accum_dtype: bf16}}"),
        "2 bf16 states": job("dense", bf16, 2, "deepspeed.bf16_optimizer_states=true"),
        "2 bf16 small buckets": job("dense", bf16, 2, zero(reduce_bucket_size=400_000), "train.reduce_dtype=float32"),
        "2 bf16 offloaded": job("dense", bf16, 2, off),
        "2 bf16 adapter": job("dense", bf16, 2, "lora.r=64"),
        "3 fp32": job("dense", fp32, 3, small),
        "3 bf16, whole reference": job("dense", bf16, 3, small, live),
        "3 bf16 tied, small weights whole": job("tied", bf16, 3),
        "3 bf16 states": job("dense", bf16, 3, small, "deepspeed.bf16_optimizer_states=true"),
        "3 bf16 small buckets": job("dense", bf16, 3, zero(**small_buckets)),
        "3 bf16 offloaded": job("dense", bf16, 3, small, off, weights_off),
        "3 bf16 adapter, sharded reference": job("dense", bf16, 3, small, "lora.r=64", live, "reference.stage=3"),
        "3 bf16 experts, offloaded reference": job(
            "experts", bf16, 3, small, live, "reference.stage=3", "reference.offload_param=cpu"
        ),
    }


ALONE = ("1 bf16 offloaded", "2 bf16, moving reference", "3 bf16 tied, small weights whole")


@pytest.fixture(scope="module", params=[1, 2])
def found(tmp_path_factory, request):
    folder = tmp_path_factory.mktemp("states")
    jobs = make_jobs(folder)
    if request.param == 1:
        jobs = {name: jobs[name] for name in ALONE}
    (folder / "jobs.json").write_text(json.dumps(jobs))
    done = launch("tests/distributed/live_states.py", folder, ranks=request.param)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = json.loads((folder / "found.json").read_text())
    assert list(found) == list(jobs)
    return found


def test_formulas_are_what_live_tensors_hold(found):
    off = []
    for job, moments in found.items():
        for moment, (measured, parts) in moments.items():
            formula = sum(parts.values())
            # now and then gloo's thread still holds what it has reduced: never more than all gradients
            reduced = [size for name, size in parts.items() if name.startswith("gradient accumulators")]
            held = sum(reduced) if moment == "pass" else 0
            if not 0.98 * formula <= measured <= 1.02 * (formula + held):
                off.append(f"{job}, {moment}: measured {measured:,}, by formula {formula:,}: {parts}")
    assert not off, "\n".join(off)
