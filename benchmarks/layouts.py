"""Whether rows of many sequences give separate sequences' log-probs and gradients, on the device and in its precision.

`python benchmarks/layouts.py [--device cuda] [--quick]`. The tests show this in fp32 on a CPU
(tests/unit/test_layout_equality.py); here every attention back end runs forward and backward with its own kernels, in
bf16, on rows of 34 to 16,000 tokens in the layout `shared_prefix`: two layers with Llama-3's heads (32 for queries, 8
for keys), and a model of Gemma-3's kind whose layers have two windows. The yardstick is the same model with its own
attention, one sequence a row, in fp32. What bf16 changes there already, is measured beside it: a back end agrees if it
is not much further away.

    log-probs   mean difference per token
    gradients   norm of the difference over the norm, all weights together
    graphs      what torch.compile has made so far in this process, code for a new shape included

The exit code is 1 if a back end disagrees or fails. Results go to `results/<device>/layouts.{md,json}`.
"""

from __future__ import annotations

import argparse
import gc
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from attention import row_of, why_absent
from common import accelerator, circumstances, describe_circumstances, markdown_table, processor, write_results
from torch import Tensor

from dpo_scale.data.dataset import Pair
from dpo_scale.data.layout import PairBatch, make_batch
from dpo_scale.models.attention_backends import BACKENDS, use_attention
from dpo_scale.models.scorer import PairScorer

LENGTHS = [34, 127, 128, 129, 4000, 16000]
QUICK_LENGTHS = [34, 129]
PAIR_TOKENS, VOCABULARY = 850, 1024
# A mask that is off by a token moves log-probs by tenths and gradients by as much as they are.
TIMES_PADDING, LOGP_SLACK, GRADIENT_SLACK = 2.0, 1e-2, 1e-2


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--backends", nargs="+", choices=list(BACKENDS), metavar="NAME")
    parser.add_argument("--lengths", nargs="+", type=int, help="tokens of a row")
    parser.add_argument("--quick", action="store_true", help=f"rows of {QUICK_LENGTHS} tokens")
    parser.add_argument("--output", type=Path, help="folder of the results (default: results/<device>)")
    arguments = parser.parse_args(argv)
    device = arguments.device
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU here")
    lengths = arguments.lengths or (QUICK_LENGTHS if arguments.quick else LENGTHS)
    if min(lengths) < 3:
        parser.error(f"--lengths {min(lengths)}: a pair has 3 tokens at least")
    report = circumstances(accelerator() if device == "cuda" else processor(), "torch", "transformers", "triton")
    report["rows"] = []
    for kind in MODELS:
        plain = make_model(kind, torch.float32, device)
        for tokens in lengths:
            batch = row_of(tokens, PAIR_TOKENS, VOCABULARY)
            separate = make_batch("padded", pairs_in(tokens), np.ones(batch.num_pairs, dtype=np.float32), 0)
            truth = scored(plain, separate.to(device))
            in_bf16 = make_model(kind, torch.bfloat16, device)
            by_padding = apart(scored(in_bf16, separate.to(device)), truth)
            for backend in arguments.backends or BACKENDS:
                row: dict[str, Any] = {"model": kind, "tokens": tokens, "backend": backend}
                row |= {"padded_logps": by_padding[0], "padded_gradients": by_padding[1]}
                report["rows"].append(row)
                if (reason := why_absent(backend, device)) is not None:
                    row["absent"] = reason
                    continue
                use_attention(in_bf16, backend)
                try:
                    row["logps"], row["gradients"] = apart(scored(in_bf16, batch.to(device)), truth)
                    row["agrees"] = agrees(row)
                except Exception as error:  # the others are still to be looked at
                    row["failed"] = f"{type(error).__name__}: {error}"[:500]
                row["graphs"] = torch._dynamo.utils.counters["stats"]["unique_graphs"]
            del in_bf16
            release()
            write_results("layouts", report, table(report), arguments.output, final=False)
    write_results("layouts", report, table(report), arguments.output)
    return int(any("failed" in row or row.get("agrees") is False for row in report["rows"]))


def llama_heads() -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=32,
        num_key_value_heads=8, head_dim=64, max_position_embeddings=4096,
    )  # fmt: skip


def two_windows() -> Any:
    from transformers import Gemma3TextConfig

    return Gemma3TextConfig(
        vocab_size=VOCABULARY, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=8,
        num_key_value_heads=4, head_dim=64, sliding_window=100, layer_types=["sliding_attention", "full_attention"],
        max_position_embeddings=4096,
    )  # fmt: skip


MODELS = {"Llama-3's heads": llama_heads, "two windows": two_windows}


def make_model(kind: str, dtype: torch.dtype, device: str) -> Any:
    """The same weights each time, rounded to bf16; wide: attention far from uniform, so that a wrong mask shows."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(MODELS[kind](), attn_implementation="sdpa").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(4)
            parameter.copy_(parameter.bfloat16())
    # parameters only: what rotary embeddings are made of stays in fp32, as DeepSpeed leaves it
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model.to(device)


def pairs_in(tokens: int) -> list[Pair]:
    """The pairs of `row_of`'s row, by themselves."""
    batch = row_of(tokens, PAIR_TOKENS, VOCABULARY)
    ids, pairs = batch.input_ids[0].numpy(), []
    document, branch = batch.document_ids[0].numpy(), batch.branch_ids[0].numpy()
    for number in np.unique(document):
        parts = [ids[(document == number) & (branch == part)] for part in (0, 1, 2)]
        pairs.append(Pair(*parts, b"", len(pairs)))
    return pairs


def scored(model: Any, batch: PairBatch) -> tuple[Tensor, Tensor]:
    """Log-probs [S], and the gradient of a weighted sum of them, all weights in one vector, in fp32."""
    model.zero_grad(set_to_none=True)
    logps = PairScorer(model)(**batch.scorer_inputs)
    weights = torch.randn(len(logps), generator=torch.Generator().manual_seed(3)).to(logps.device)
    (logps * weights).sum().backward()
    gradients = [p.grad.float().flatten() for p in model.parameters() if p.grad is not None]
    return logps.detach().float(), torch.cat(gradients)


def apart(found: tuple[Tensor, Tensor], truth: tuple[Tensor, Tensor]) -> tuple[float, float]:
    """How far log-probs and gradients are from the true ones."""
    logps = (found[0] - truth[0]).abs().mean().item()
    return logps, ((found[1] - truth[1]).norm() / truth[1].norm()).item()


def agrees(row: dict[str, Any]) -> bool:
    return (
        row["logps"] <= TIMES_PADDING * row["padded_logps"] + LOGP_SLACK
        and row["gradients"] <= TIMES_PADDING * row["padded_gradients"] + GRADIENT_SLACK
    )


def release() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def table(report: dict[str, Any]) -> str:
    head = ("model", "tokens", "back end", "log-probs", "of padded rows", "gradients", "of padded rows", "graphs", "")
    rows = []
    for row in report["rows"]:
        if "logps" not in row:
            why = f"absent: {row['absent']}" if "absent" in row else f"FAILED: {row['failed'].splitlines()[0][:100]}"
            rows.append((row["model"], f"{row['tokens']:,}", row["backend"], why, *[""] * 5))
            continue
        rows.append(
            (row["model"], f"{row['tokens']:,}", row["backend"], f"{row['logps']:.1e}", f"{row['padded_logps']:.1e}")
            + (f"{row['gradients']:.1e}", f"{row['padded_gradients']:.1e}", str(row["graphs"]))
            + ("" if row["agrees"] else "DISAGREES",)
        )
    lines = ["# Layouts in bf16", "", describe_circumstances(report)]
    lines += ["Made by `python benchmarks/layouts.py`, whose text says what is compared.", ""]
    return "\n".join([*lines, *markdown_table(head, rows)]) + "\n"


if __name__ == "__main__":
    sys.exit(main())
