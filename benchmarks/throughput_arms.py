"""One measurement of `throughput.py`, in a process of its own: `throughput_arms.py job.json`."""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dpo_scale.data.dataset import load_pairs
from dpo_scale.distributed import ranks
from dpo_scale.distributed.join import join
from dpo_scale.models.builtin import resolve_model_path
from dpo_scale.models.load import load_causal_lm, load_tokenizers, resolve_layout
from dpo_scale.observe.metrics_file import METRICS_FILE, read_metrics
from dpo_scale.reference.modes import fill_for, open_book
from dpo_scale.settings.tree import Config, load_config
from dpo_scale.training.loop import train

# one token each in most vocabularies
WORDS = "the of and to in is that for it was on are as with they at be this from have or by one had not".split()

# random weights of these shapes; no network is needed to make them
SHAPES: dict[str, dict[str, Any]] = {
    "llama-heads": {
        "kind": "llama", "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 512,
    },
    "tiny": {
        "kind": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 2, "vocab_size": 256,
    },
    "smollm2-135m": {
        "kind": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True,
    },
    "llama-3.2-1b": {
        "kind": "llama", "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": True,
    },
    "qwen2.5-3b": {
        "kind": "qwen2", "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36,
        "num_attention_heads": 16, "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True,
    },
}  # fmt: skip
ID_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")
SHOWN = ("mfu", "padding_fraction", "rank_idle")


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    result = {"prepare": prepare, "dpo_scale": run_ours, "trl": run_trl}[job["work"]](job)
    if ranks.is_main():
        Path(job["output"]).write_text(json.dumps(result), encoding="utf-8")


def config_of(job: dict[str, Any], *overrides: str) -> Config:
    on_cpu = job["device"] == "cpu"
    if "ratio" in job["data"]:  # a prompt is as long as its ratio makes it
        overrides = (f"data.max_prompt_length={job['max_length'] - 1}", *overrides)
    return load_config(
        None,
        [
            f"model.path={job['model']}", f"model.dtype={job['dtype']}", f"data.train={job['data']['path']}",
            f"model.gradient_checkpointing={job['gradient_checkpointing']}", f"data.max_length={job['max_length']}",
            f"data.cache_dir={job['folder']}/tokenized", f"reference.store={job['folder']}/store",
            f"deepspeed.stage={1 if on_cpu else 2}", "train.shuffle=false",
            f"train.global_batch_size={job['global_batch_size']}", f"train.max_steps={job['steps'] + 1}",
            f"train.max_tokens_per_micro_batch={job['max_tokens']}",
            f"logging.peak_tflops={job['peak_tflops'] or 'null'}", "checkpoint.save_at_end=false", *overrides,
        ],
    )  # fmt: skip


def prepare(job: dict[str, Any]) -> dict[str, Any]:
    """Make rows (and a model, where a shape is asked for) if they are to be made; fill the store; save both for TRL."""
    folder = Path(job["folder"])
    wanted = job["global_batch_size"] * (job["steps"] + 1)
    if (shape := job["model"].removeprefix("shape:")) != job["model"]:
        job["model"] = str(random_model(folder / "model", shape, job.get("vocabulary")))
    rows = job["data"].get("path") or generated_rows(
        folder / "rows.jsonl", wanted, ratio=job["data"]["ratio"], tokens=job["tokens_per_pair"]
    )
    job["data"]["path"] = rows
    config = config_of(job)
    join(config.deepspeed.timeout_minutes, config.deepspeed.start_timeout_minutes)
    tokenizer = load_tokenizers(config)[0]
    data = load_pairs(config.data, tokenizer, seed=config.train.seed, log=lambda line: None).train
    if len(data) < wanted:
        raise SystemExit(f"{rows}: {len(data)} pairs, but {wanted} are needed; take fewer steps or smaller ones")
    seen = data.select(np.arange(wanted))
    book = open_book(config)
    fill_for(config, book, [seen], tokenizer.pad_token_id, resolve_layout(config))
    if job["compiled"]:  # their values are their own
        config = config_of(job, "model.compile=true")
        fill_for(config, open_book(config), [seen], tokenizer.pad_token_id, resolve_layout(config))
    has_trl = True
    try:
        import trl  # noqa: F401
    except ImportError:
        has_trl = False
    if has_trl:
        from datasets import Dataset

        pairs = [seen[i] for i in range(len(seen))]
        columns = {name: [getattr(p, name).tolist() for p in pairs] for name in ID_COLUMNS}
        sums = book.lookup(seen.pair_keys).sums
        columns |= {"ref_chosen_logps": sums[:, 0].tolist(), "ref_rejected_logps": sums[:, 1].tolist()}
        Dataset.from_dict(columns).save_to_disk(folder / "rows_for_trl")
    return {
        "rows": str(rows), "model": job["model"], "folder": str(folder), "pairs": len(seen), "trl": has_trl,
        "mean_lengths": seen.lengths.mean(axis=0).tolist(),
    }  # fmt: skip


def generated_rows(path: Path, count: int, *, ratio: float, tokens: int) -> str:
    """Rows of about `tokens` tokens a pair, lengths log-normal (sigma 0.4), prompt `ratio` times a completion."""
    rng = np.random.default_rng(0)
    completion = tokens / (ratio + 2)

    def text(mean: float) -> str:
        # the mean of a log-normal is exp(mu + sigma^2 / 2)
        return " ".join(rng.choice(WORDS, max(1, round(rng.lognormal(np.log(mean) - 0.08, 0.4)))))

    with open(path, "w", encoding="utf-8") as file:
        for _ in range(count):
            row = {"prompt": text(ratio * completion), "chosen": text(completion), "rejected": "no " + text(completion)}
            file.write(json.dumps(row) + "\n")
    return str(path)


def random_model(folder: Path, shape: str, vocabulary: int | None = None, layers: int | None = None) -> Path:
    """A model of one of `SHAPES` with random weights, and a tokenizer whose words are those of generated rows.

    Args:
        vocabulary, layers: how many, instead of the shape's.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast, Qwen2Config

    words = ["<unk>", "<end>", "no", *WORDS]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", eos_token="<end>", pad_token="<end>"
    ).save_pretrained(folder)
    settings = dict(SHAPES[shape])
    config_class = {"llama": LlamaConfig, "qwen2": Qwen2Config}[str(settings.pop("kind"))]
    settings |= {"vocab_size": vocabulary} if vocabulary else {}
    settings |= {"num_hidden_layers": layers} if layers else {}
    config = config_class(**settings, max_position_embeddings=8192, eos_token_id=1, pad_token_id=1, bos_token_id=None)
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):  # billions of random numbers
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    return folder


def run_ours(job: dict[str, Any]) -> dict[str, Any]:
    """A whole run of the trainer; its own record says how long the steps took."""
    stored = job["reference"] == "store"
    run_dir = train(
        config_of(
            job,
            f"data.layout={job['layout']}",
            f"model.compile={job['compile']}",
            f"reference.mode={job['reference']}",
            *(["reference.on_missing=error"] if stored else []),
            "logging.progress_bar=false",
            f"output_dir={job['place']}/run",
        )
    )
    steps = [record for record in read_metrics(run_dir / METRICS_FILE) if record["phase"] == "train"]
    counted = steps[1:]
    assert len(counted) == job["steps"]
    seconds = sum(step["step_seconds"] for step in counted)
    shown = [name for name in counted[-1] if name.startswith("time/") or name in SHOWN]
    return {
        "pairs_per_second": (steps[-1]["pairs"] - steps[0]["pairs"]) / seconds,
        "tokens_per_second": (steps[-1]["tokens"] - steps[0]["tokens"]) / seconds,
        "peak_memory_bytes": max(step["peak_memory_bytes"] for step in steps),
        "losses": [step["loss"] for step in steps],
        "extra": {name: float(np.mean([step[name] for step in counted])) for name in shown},
    }


def run_trl(job: dict[str, Any]) -> dict[str, Any]:
    """A `DPOTrainer` on the same token ids in the same order."""
    from datasets import load_from_disk
    from transformers import AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    torch.manual_seed(0)
    on_cpu = job["device"] == "cpu"
    precomputed, mixed = job["reference"] == "store", job["kind"] == "mixed"

    class Prepared(DPOTrainer):
        def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
            return dataset  # tokenized already

        def _precompute_ref_logps(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
            return dataset  # the columns are there

    class Ends(TrainerCallback):
        def __init__(self) -> None:
            self.times: list[float] = []
            self.peak = 0

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            if not on_cpu:
                torch.cuda.synchronize()
            self.times.append(time.perf_counter())
            self.peak = peak_memory(on_cpu)

    rows = load_from_disk(f"{job['folder']}/rows_for_trl")
    if not precomputed:
        rows = rows.remove_columns(["ref_chosen_logps", "ref_rejected_logps"])
    micro_batch = job["micro_batch_size"]
    settings = DPOConfig(
        output_dir=f"{job['place']}/trl",
        max_steps=job["steps"] + 1,
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=job["global_batch_size"] // (micro_batch * job["ranks"]),
        gradient_checkpointing=job["gradient_checkpointing"],
        precompute_ref_log_probs=precomputed,
        max_length=job["max_length"],
        train_sampling_strategy="sequential",
        bf16=mixed,  # with weights in bf16 autocast only costs
        fp16=False,
        torch_compile=job["kind"] == "compiled",
        use_cpu=on_cpu,
        ddp_backend="gloo" if on_cpu and job["ranks"] > 1 else None,
        learning_rate=1e-6,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
    )
    ends = Ends()
    trainer = Prepared(
        load_causal_lm(job["model"], dtype="float32" if mixed else job["dtype"]),
        args=settings,
        train_dataset=rows,
        processing_class=AutoTokenizer.from_pretrained(resolve_model_path(job["model"])),
        callbacks=[ends],
    )
    trainer.train()
    seconds = ends.times[-1] - ends.times[0]
    lengths = np.array([[len(row[name]) for name in ID_COLUMNS] for row in rows])
    first, last = job["global_batch_size"], job["global_batch_size"] * (job["steps"] + 1)
    return {
        "pairs_per_second": len(lengths[first:last]) / seconds,
        "tokens_per_second": int(lengths[first:last].sum()) / seconds,
        "peak_memory_bytes": ends.peak,
        "losses": [record["loss"] for record in trainer.state.log_history if "loss" in record],
    }


def peak_memory(on_cpu: bool) -> int:
    if on_cpu:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return torch.cuda.max_memory_allocated()


if __name__ == "__main__":
    main()
