"""Peak memory of one training step, by log-prob implementation. `python benchmarks/step_memory.py`.

A model of Qwen2.5-0.5B's shape (24 layers, hidden size 896, vocabulary 151,936, head tied to the embedding) with
random weights does one forward pass, sigmoid DPO loss and backward pass, without an optimizer, in a process of its own
for each implementation. Counted is what comes on top of weights and inputs: the highest tensor memory (see
`memory.py`) and, on a CPU, the highest resident memory of the process. The layers' activations and the gradients that
are there at that moment are in both, the same for all. Results go to `results/<device>/step_memory.{md,json}`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from common import accelerator, circumstances, describe_circumstances, markdown_table, processor, write_results
from logprob_arms import describe
from logprob_case import loss_of_sums
from memory import peak_bytes

from dpo_scale.logprobs import IMPLEMENTATIONS
from dpo_scale.models.scorer import PairScorer

SHAPE = {
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
}
PROMPT_TOKENS = 64


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--implementations", nargs="+", choices=list(IMPLEMENTATIONS))
    parser.add_argument("--pairs", type=int, default=1)
    parser.add_argument("--completion-tokens", type=int, default=512)
    parser.add_argument("--layers", type=int, default=SHAPE["num_hidden_layers"])
    parser.add_argument("--output", type=Path, help="folder of the results (default: results/<device>)")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)  # the process that takes the step
    arguments = parser.parse_args(argv)
    on_cuda = arguments.device == "cuda"
    names = arguments.implementations or [n for n in IMPLEMENTATIONS if on_cuda or not n.startswith("triton")]
    if arguments.one:
        print(json.dumps(take_step(names[0], arguments)))
        return
    machine = circumstances(accelerator() if on_cuda else processor(), "torch", "transformers")
    steps = []
    for name in names:
        command = [sys.executable, __file__, "--one", "--device", arguments.device, "--implementations", name]
        command += ["--pairs", str(arguments.pairs), "--completion-tokens", str(arguments.completion_tokens)]
        command += ["--layers", str(arguments.layers)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        steps.append({"implementation": name, **json.loads(done.stdout.splitlines()[-1])})
    report = {
        "pairs": arguments.pairs,
        "completion_tokens": arguments.completion_tokens,
        "layers": arguments.layers,
        "steps": steps,
        **machine,
    }
    write_results("step_memory", report, table(report), arguments.output)


def take_step(implementation: str, arguments: argparse.Namespace) -> dict[str, Any]:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    device, length = arguments.device, arguments.completion_tokens
    with torch.device(device):
        torch.set_default_dtype(torch.bfloat16)
        model = Qwen2ForCausalLM(Qwen2Config(**{**SHAPE, "num_hidden_layers": arguments.layers}))
        torch.set_default_dtype(torch.float32)
        scorer = PairScorer(model, implementation)
        ids = torch.randint(SHAPE["vocab_size"], (2 * arguments.pairs, PROMPT_TOKENS + length))
        # Hidden state t predicts token t + 1.
        positions = torch.arange(ids.numel()).view(ids.shape)[:, PROMPT_TOKENS - 1 : -1].flatten()
    targets = ids[:, PROMPT_TOKENS:].flatten()
    losses = []

    def step() -> None:
        sums = scorer(ids, positions, targets).view(arguments.pairs, 2, length).sum(2)
        loss = loss_of_sums(sums).mean()
        loss.backward()
        losses.append(loss.item())

    before = reset_resident_peak() if device == "cpu" else 0
    found: dict[str, Any] = {"tensor_bytes": peak_bytes(step, device)}
    if device == "cpu":
        found["resident_bytes"] = status_bytes("VmHWM") - before
    gradients = sum(p.grad.nbytes for p in scorer.parameters() if p.grad is not None)
    weights = sum(p.nbytes for p in scorer.parameters())
    return {**found, "gradient_bytes": gradients, "weight_bytes": weights, "loss": losses[0]}


def reset_resident_peak() -> int:
    """Forget the highest resident memory so far; returns what is resident now."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return status_bytes("VmRSS")


def status_bytes(name: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status states no {name}")


def table(report: dict[str, Any]) -> str:
    steps = report["steps"]
    tokens = 2 * report["pairs"] * report["completion_tokens"]
    rows = [
        (
            describe(step["implementation"]),
            f"{step['tensor_bytes'] / 1e6:,.0f} MB",
            f"{step['resident_bytes'] / 1e6:,.0f} MB" if "resident_bytes" in step else "",
            f"{step['loss']:.5f}",
        )
        for step in steps
    ]
    lines = [
        "# Peak memory of one training step",
        "",
        f"Qwen2.5-0.5B's shape with {report['layers']} layers, bfloat16, {report['pairs']} pair(s), {tokens:,} scored "
        f"tokens; {steps[0]['weight_bytes'] / 1e6:,.0f} MB of weights, {steps[0]['gradient_bytes'] / 1e6:,.0f} MB of "
        f"gradients. {describe_circumstances(report)} Made by `python benchmarks/step_memory.py`.",
        "",
        *markdown_table(("implementation", "tensors", "resident", "loss"), rows),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
