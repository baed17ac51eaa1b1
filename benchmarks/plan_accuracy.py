"""What a plan predicts beside what a run takes. `python benchmarks/plan_accuracy.py [--quick] [--device cuda]`.

Each row is a short run of its own through a launcher: a random model, pairs of one length, a few optimizer steps.
Predicted is the memory of the fullest rank by `dpo_scale.forecast`. Measured is the highest resident memory of any
rank's process during the steps, above what it had before its policy was loaded; on CUDA the allocator's own peak.

Time is that of a second run, without the settings that keep memory steady, which cost time: the median of its steps but
for the first. It is predicted after a calibration right before that run, so a machine that is busy only now and then
still shows.

Aimed at: memory within 10% on every row and 5% at the median, time within 25% and 15%. A row that misses stays in the
table. Results go to `results/<device>/plan_accuracy.{md,json}`.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from common import accelerator, circumstances, describe_circumstances, markdown_table, processor, write_results
from plan_time import measured_step, predicted_step, time_columns
from throughput_arms import WORDS

from dpo_scale.settings.tree import load_config

PROJECT = Path(__file__).resolve().parent.parent
MIB = 2**20
SHAPES: dict[str, dict[str, Any]] = {
    "wide": {
        "model_type": "llama", "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8,
        "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 8192, "tie_word_embeddings": False,
    },
    "deep": {
        "model_type": "qwen3", "hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 14,
        "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 32000,
        "tie_word_embeddings": True,
    },
}  # fmt: skip
# Held by a process beside tensors once it has a model: what libraries load late, their scratch memory, a heap's gaps.
PROCESS_BYTES = 50 * MIB
MICRO_STEPS = 2
TIMED_STEPS = 4
# glibc keeps freed blocks of less than this, and by default learns to keep larger ones, by the history of the process.
STEADY = {"MALLOC_MMAP_THRESHOLD_": str(MIB), "MALLOC_TRIM_THRESHOLD_": str(MIB)}


@dataclass(frozen=True)
class Row:
    """One run.

    Attributes:
        tokens: of a rank's micro-batch, which is one pair: half of it prompt, a quarter each completion.
        overrides: of the config.
    """

    name: str
    shape: str = "wide"
    ranks: int = 1
    tokens: int = 2048
    overrides: tuple[str, ...] = ()

    def but(self, name: str, *overrides: str, **changes: Any) -> Row:
        return replace(self, name=name, overrides=(*self.overrides, *overrides), **changes)


def grid(quick: bool) -> Iterator[Row]:
    stored = Row("stored", overrides=("deepspeed.stage=1", "reference.mode=store"))
    checkpointed, sharded = "model.gradient_checkpointing=true", ("reference.stage=3", "deepspeed.stage=3")
    yield stored.but("stage 1, stored")
    yield stored.but("LoRA, adapter as reference", "lora.r=16", "reference.mode=adapter")
    if quick:
        return
    yield stored.but("stage 0, live", "deepspeed.stage=0", "reference.mode=live")
    yield stored.but("checkpointed, 8192 tokens", checkpointed, tokens=8192)
    yield stored.but("512 tokens, padded", "data.layout=padded", tokens=512)
    yield stored.but("packed", "data.layout=packed", shape="deep")
    yield stored.but("deep, checkpointed", checkpointed, shape="deep", tokens=4096)
    yield stored.but("2 ranks, stage 0", "deepspeed.stage=0", ranks=2, tokens=1024)
    yield stored.but("2 ranks, stage 1, live", "reference.mode=live", ranks=2, tokens=1024)
    yield stored.but("2 ranks, stage 2, stored", "deepspeed.stage=2", ranks=2, tokens=1024)
    yield stored.but("2 ranks, stage 3, sharded", *sharded, "reference.mode=live", ranks=2, shape="deep", tokens=1024)
    offloaded = ("reference.offload_param=cpu", "reference.mode=live")
    yield stored.but("2 ranks, stage 3, offloaded", *sharded, *offloaded, checkpointed, ranks=2, tokens=4096)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--quick", action="store_true", help="two rows")
    parser.add_argument("--rows", nargs="+", metavar="TEXT", help="only rows whose names have one of these in them")
    parser.add_argument("--output", type=Path, help="folder of the results (default: results/<device>)")
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)  # the process of a rank
    arguments = parser.parse_args(argv)
    if arguments.one:
        return run_rank(json.loads(arguments.one.read_text()))
    machine = circumstances(accelerator() if arguments.device == "cuda" else processor(), "torch", "deepspeed")
    rows = [r for r in grid(arguments.quick) if not arguments.rows or any(text in r.name for text in arguments.rows)]
    done: list[dict[str, Any]] = []
    for row in rows:
        with tempfile.TemporaryDirectory() as folder:
            done.append(compare(row, Path(folder), arguments.device))
        found = done[-1]
        print(
            f"{row.name}: {found['predicted'] / MIB:.0f} MiB, measured {found['measured'] / MIB:.0f}; "
            f"{found['predicted_seconds']:.2f} s, measured {found['measured_seconds']:.2f}",
            flush=True,
        )
        report = {"rows": done, **machine}
        write_results("plan_accuracy", report, table(report), arguments.output, final=len(done) == len(rows))


def compare(row: Row, folder: Path, device: str) -> dict[str, Any]:
    """Run a row; what was predicted, part by part, and what it took."""
    make_inputs(row, folder)
    overrides = overrides_of(row, folder, device)
    parts = predict(row, overrides, device)
    measured = measure(row, folder, overrides, STEADY)
    overrides = [*overrides, f"train.max_steps={TIMED_STEPS}", f"output_dir={folder / 'timed'}"]
    time = predicted_step(load_config(None, overrides), lengths_of(row), row.ranks)
    measure(row, folder, overrides, {})
    return {
        "name": row.name, "shape": row.shape, "ranks": row.ranks, "tokens": row.tokens, "overrides": row.overrides,
        "parts": parts, "predicted": sum(parts.values()), "measured": measured,
        **time_columns(time, measured_step(folder / "timed")),
    }  # fmt: skip


def make_inputs(row: Row, folder: Path) -> None:
    """The row's model with random weights, a tokenizer of one token a word, and pairs of one length."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    words = ["<unk>", "<end>", *WORDS]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", eos_token="<end>", pad_token="<end>"
    ).save_pretrained(folder / "model")
    settings = {"max_position_embeddings": 16384, "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 1}
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**SHAPES[row.shape], **settings)).save_pretrained(
        folder / "model"
    )
    prompt, completion, _ = lengths_of(row)[0].tolist()
    with (folder / "rows.jsonl").open("w", encoding="utf-8") as file:
        for i in range(len(lengths_of(row))):
            text = [" ".join(WORDS[(i + j * k) % len(WORDS)] for j in range(n)) for k, n in sizes(prompt, completion)]
            file.write(json.dumps(dict(zip(("prompt", "chosen", "rejected"), text, strict=True))) + "\n")


def lengths_of(row: Row) -> Any:
    """[N, 3] tokens of prompt, chosen and rejected of the row's pairs, as many as two steps take."""
    prompts = 2 if {"data.layout=padded", "data.layout=packed"} & set(row.overrides) else 1
    of_pair = [row.tokens // 2 // prompts, row.tokens // 4, row.tokens // 4]
    return np.array([of_pair] * (2 * MICRO_STEPS * row.ranks))


def sizes(prompt: int, completion: int) -> list[tuple[int, int]]:
    """(a seed of the words, how many) of prompt, chosen and rejected; each completion gets an end of turn."""
    return [(1, prompt), (3, completion - 1), (5, completion - 1)]


def overrides_of(row: Row, folder: Path, device: str) -> list[str]:
    return [
        f"model.path={folder / 'model'}", f"model.dtype={'float32' if device == 'cpu' else 'bfloat16'}",
        f"data.train={folder / 'rows.jsonl'}", "data.max_length=16384", "data.max_prompt_length=16383",
        f"data.cache_dir={folder / 'tokenized'}", f"reference.store={folder / 'store'}", "reference.verify=0",
        f"reference.max_tokens_per_micro_batch={row.tokens}", f"train.global_batch_size={MICRO_STEPS * row.ranks}",
        "train.max_steps=2", "checkpoint.save_at_end=false", "logging.progress_bar=false",
        f"output_dir={folder / 'run'}", *row.overrides,
    ]  # fmt: skip


def predict(row: Row, overrides: list[str], device: str) -> dict[str, int]:
    """Part -> bytes, at the fullest moment of a step."""
    from dpo_scale.forecast.activations import ActivationModel, rows_of
    from dpo_scale.forecast.shape import shape_of, shape_of_reference
    from dpo_scale.forecast.states import policy_states, reference_states
    from dpo_scale.models.load import load_model_config

    config = load_config(None, overrides)
    model_config = load_model_config(config.model.path)
    layout = config.data.layout if config.data.layout != "auto" else "shared_prefix"
    rows, model = rows_of(layout, lengths_of(row)[:1]), ActivationModel(config, model_config, device)
    shape, world = shape_of(config, model_config), row.ranks
    of_reference = shape_of_reference(config, model_config)

    def states(moment: Any) -> dict[str, int]:
        reference = reference_states(config, of_reference, world)
        return {**policy_states(config, shape, world, moment, device_type=device), **reference}

    moments = [
        {**states("backward"), **model.micro_step(rows)}, states("gather"), states("reduce"), states("step"),
        {**states("rest"), **reference_states(config, of_reference, world, "pass"), **model.reference_pass(rows)},
    ]  # fmt: skip
    beside = {"process": PROCESS_BYTES} if device == "cpu" else {}
    return {**max(moments, key=lambda parts: sum(parts.values())), **beside}


def measure(row: Row, folder: Path, overrides: list[str], environment: dict[str, str]) -> int:
    """The most that any rank took above what it had before its policy."""
    job = folder / "job.json"
    job.write_text(json.dumps({"overrides": overrides, "folder": str(folder)}))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={row.ranks}", f"--master_port={port}"]
    done = subprocess.run(
        [*launcher, __file__, "--one", str(job)], cwd=PROJECT, text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": str(PROJECT),
             **environment},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{row.name}: the run failed\n{done.stdout[-4000:]}")
    return max(json.loads(file.read_text()) for file in folder.glob("peak-*.json"))


def run_rank(job: dict[str, Any]) -> None:
    """One rank's process: a whole run, its memory read before the policy is loaded and after the last step."""
    from dpo_scale.distributed import ranks
    from dpo_scale.training import loop, setup

    build, train_steps = setup.build, loop.train_steps
    before = 0

    def noting_build(*given: Any) -> Any:
        nonlocal before
        before = resident("VmRSS")
        return build(*given)

    def noting_steps(*given: Any) -> Any:
        if ranks.device().type == "cpu":
            Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew: loading is over, and a store's fill
        found = train_steps(*given)
        peak = resident("VmHWM") - before if ranks.device().type == "cpu" else ranks.peak_memory_bytes()
        Path(job["folder"], f"peak-{ranks.rank()}.json").write_text(json.dumps(peak))
        return found

    setup.build, loop.train_steps = noting_build, noting_steps
    loop.train(load_config(None, job["overrides"]))


def resident(name: str) -> int:
    """Bytes of this process: VmRSS, what it has; VmHWM, the most that it had."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    raise AssertionError(name)


def table(report: dict[str, Any]) -> str:
    errors = [row["predicted"] / row["measured"] - 1 for row in report["rows"]]
    of_time = [row["time_error"] for row in report["rows"]]
    lines = [
        "# Predicted and measured", "",
        f"{describe_circumstances(report)} Made by `python benchmarks/plan_accuracy.py`.", "",
        f"Memory of the fullest rank, MiB: largest error {max(map(abs, errors)):.1%}, at the median "
        f"{statistics.median(map(abs, errors)):.1%}; aimed at 10% and 5%. Time of a step: {max(map(abs, of_time)):.1%} "
        f"and {statistics.median(map(abs, of_time)):.1%}; aimed at 25% and 15%.", "",
    ]  # fmt: skip
    head = ("run", "model", "ranks", "tokens a rank", "memory", "measured", "error", "a step", "measured", "error")
    cells = [
        (
            row["name"], row["shape"], str(row["ranks"]), str(row["tokens"]), f"{row['predicted'] / MIB:,.0f}",
            f"{row['measured'] / MIB:,.0f}", f"{error:+.1%}", f"{row['predicted_seconds']:.2f} s",
            f"{row['measured_seconds']:.2f} s", f"{row['time_error']:+.1%}",
        )
        for row, error in zip(report["rows"], errors, strict=True)
    ]  # fmt: skip
    return "\n".join([*lines, *markdown_table(head, cells)]) + "\n"


if __name__ == "__main__":
    main()
