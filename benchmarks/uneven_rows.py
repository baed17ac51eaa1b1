"""Rows of very different lengths: how much is padding, and how long ranks wait for each other.

    python benchmarks/uneven_rows.py [--model builtin:smollm2-135m-instruct] [--ranks 2] [--output FOLDER]

trains a small random model of the given model's kind (32 wide, 2 layers, its tokenizer) on pairs of 8 to 4,000 tokens,
as many of each order of magnitude, first with a fixed number of pairs a micro-batch in padded rows, then under a
budget of tokens with the layout that `auto` chooses. Reported are the means over all steps but the first (which warms
up) of what `metrics.jsonl` says: padding, idle ranks as measured, time spent waiting, tokens of the data a second.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
WORDS = (
    " the cat sat on a mat while dogs ran far over hills and big red birds sang in tall green trees by water".split()
)
ARMS = {
    "4 pairs a micro-batch, padded": ["train.micro_batch_size=4", "data.layout=padded"],
    "8,192 tokens a micro-batch": ["train.max_tokens_per_micro_batch=8192", "data.layout=auto"],
}
COLUMNS = ("padding_fraction", "rank_idle", "time/communication", "tokens_per_second")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="builtin:smollm2-135m-instruct", help="whose tokenizer and kind are used")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=192)
    parser.add_argument("--batch", type=int, default=64, help="pairs an optimizer step")
    parser.add_argument("--output", type=Path, help="folder for uneven_rows.md and .json")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_small_model(arguments.model, folder / "model")
        write_rows(folder / "rows.jsonl", arguments.pairs)
        measured = {arm: run(folder, overrides, arguments) for arm, overrides in ARMS.items()}
    text = table(measured, arguments)
    print(text)
    if arguments.output:
        arguments.output.mkdir(parents=True, exist_ok=True)
        (arguments.output / "uneven_rows.md").write_text(text, encoding="utf-8")
        (arguments.output / "uneven_rows.json").write_text(json.dumps(measured, indent=2) + "\n", encoding="utf-8")


def save_small_model(model: str, folder: Path) -> None:
    """A random model of 2 narrow layers, of the same kind and with the same tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from dpo_scale.models.builtin import resolve_model_path
    from dpo_scale.models.load import load_model_config

    config = load_model_config(model)
    config.update(
        {
            "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 4, "head_dim": 8, "layer_types": None, "max_position_embeddings": 8192,
        }
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(resolve_model_path(model)).save_pretrained(folder)


def write_rows(path: Path, count: int) -> None:
    """Pairs of log-uniform lengths; a word is about a token."""
    rng, words = np.random.default_rng(0), random.Random(0)
    totals = np.exp(rng.uniform(np.log(8), np.log(4000), size=count))
    lengths = np.maximum(1, totals[:, None] * rng.dirichlet([2, 2, 2], size=count)).astype(int)
    with path.open("w", encoding="utf-8") as file:
        for prompt, chosen, rejected in lengths:
            row = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
            texts = {name: " " + " ".join(words.choices(WORDS, k=int(size))) for name, size in row.items()}
            file.write(json.dumps(texts | {"rejected": " no" + texts["rejected"]}) + "\n")


def run(folder: Path, overrides: list[str], arguments: argparse.Namespace) -> dict[str, Any]:
    """Train one epoch under the real launcher; the means of the metrics and how the run described its plans."""
    output = folder / f"run-{len(list(folder.iterdir()))}"
    command = [
        *(str(Path(sys.executable).parent / "deepspeed"), "--num_accelerators", str(arguments.ranks)),
        *(str(ROOT / "launch" / "train.py"), f"model.path={folder / 'model'}", f"data.train={folder / 'rows.jsonl'}"),
        *(f"data.cache_dir={folder / 'cache'}", "data.max_length=8192", "data.chat_template=none"),
        *("model.dtype=float32", f"train.global_batch_size={arguments.batch}", "checkpoint.save_at_end=false"),
        *("train.learning_rate=1e-5", f"output_dir={output}", *overrides),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stdout[-3000:] + done.stderr[-3000:])
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    said = next(line for line in done.stdout.splitlines() if "micro-steps x" in line)
    return {name: float(np.mean([line[name] for line in lines[1:]])) for name in COLUMNS} | {"said": said}


def table(measured: dict[str, dict[str, Any]], arguments: argparse.Namespace) -> str:
    lines = [
        f"{arguments.pairs} pairs of 8 to 4,000 tokens, {arguments.batch} a step, {arguments.ranks} ranks.",
        "",
        "| what | padding | ranks idle | waiting for others | tokens/s |",
        "|---|---|---|---|---|",
    ]
    for arm, values in measured.items():
        padding, idle, waiting, rate = (values[name] for name in COLUMNS)
        lines.append(f"| {arm} | {padding:.1%} | {idle:.1%} | {waiting:.1%} | {rate:,.0f} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
