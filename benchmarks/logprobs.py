"""Log-probs and preference loss from hidden states: ours beside every peer. `python benchmarks/logprobs.py [--quick]`.

One process, the same inputs, arms taking turns: in each round every arm runs once, and the next round starts with
another arm, so that a slow spell of the machine meets all. `logprob_arms.py` says who takes part and how,
`logprob_case.py` what the inputs, the loss on top and the exact values are, `memory.py` how memory is counted.

    forward           log-probs, no gradient asked for: a reference model, evaluation
    forward_backward  log-probs, their sums, DPO loss, gradients of hidden states and head
    frozen_head       the same with a gradient of hidden states alone: LoRA

What is said of each:

    time        median of the rounds, and slowest minus fastest as a share of it
    x naive     time over that of the fastest naive form, or memory over that of the leanest; below 1 is better
    floor       passes * 2NHV FLOPs at the rate of a large matrix product in the same run and dtype, over the time;
                passes: 1 forward, 3 with both gradients, 2 with a frozen head
    memory      highest tensor memory during a run, beyond what was there before and the gradients that it leaves
    error       of log-probs: the largest difference from fp64 over the largest |logit|. Where an arm yields sums only,
                that of a sum over its number of tokens, in brackets. Of gradients: norm of the difference over the
                norm, for 64 sampled tokens (hidden) and up to 64 sampled words (head)

A head or number of tokens that does not fit the device is left out by name, a naive form alone where the others fit.
`torch.compile` of a naive form counts as a peer.
Results go to `results/<device>/logprobs.{md,json}` with a plot for each head (`pip install 'dpo-scale[bench]'`).
"""

from __future__ import annotations

import argparse
import gc
import re
import sys
import time
from pathlib import Path
from typing import Any

import logprob_report
import torch
from common import RESULTS, accelerator, circumstances, cores, matmul_flops_per_second, processor, timed, write_results
from logprob_arms import ARMS, COMPILED, FULL_LOGITS, MODES, OURS, Absent, Arm, Output, make_arm, naive_bytes
from logprob_case import HEADS, Case, Exact, Head, compute_exact, make_case, relative_error
from memory import extra_peak_bytes

PACKAGES = ("torch", "triton", "trl", "liger-kernel", "cut-cross-entropy")
# What a device is asked to do unless told otherwise: heads, tokens, rounds, and seconds after which a case has enough
# rounds (two at least).
DEFAULTS: dict[str, dict[str, Any]] = {
    "cpu": {"shapes": list(HEADS)[:2], "tokens": [512, 2048], "repeats": 5, "case_seconds": 20.0},
    "cuda": {"shapes": list(HEADS), "tokens": [512, 2048, 8192, 32768], "repeats": 20, "case_seconds": 5.0},
}
QUICK = {
    "shapes": list(HEADS)[:1],
    "tokens": [512],
    "repeats": 3,
    "implementations": [name for name in ARMS if name not in COMPILED],
}
MIN_ROUNDS = 2
MATMUL_SECONDS = 1.0
USABLE = 0.8  # of the memory that is free, the rest being others' and fragmented


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=list(DEFAULTS), default=default_device)
    parser.add_argument("--shapes", nargs="+", type=head_of, metavar="HEAD", help=f"{', '.join(HEADS)}, or HxV")
    parser.add_argument("--tokens", nargs="+", type=int)
    parser.add_argument("--implementations", nargs="+", choices=list(ARMS), metavar="NAME", help=", ".join(ARMS))
    parser.add_argument("--modes", nargs="+", choices=list(MODES), default=list(MODES))
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--repeats", type=int, help="rounds at most")
    parser.add_argument("--case-seconds", type=float, help="no further round of a case and mode after so long")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="no further case after so long")
    parser.add_argument(
        "--quick", action="store_true", help="the smallest head, 512 tokens, 3 rounds, nobody who compiles"
    )
    parser.add_argument("--output", type=Path, help="folder of the results (default: results/<device>)")
    parser.add_argument("--readme", type=Path, help="no measuring: put the table of all stored results in this file")
    arguments = parser.parse_args(argv)
    if arguments.readme is not None:
        logprob_report.update_readme(arguments.readme, RESULTS)
        return
    defaults = {"implementations": list(ARMS), **DEFAULTS[arguments.device]}
    for name, value in {**defaults, **(QUICK if arguments.quick else {})}.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, [HEADS[one] for one in value] if name == "shapes" else value)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU here")
    report = measure(arguments)
    folder = write_results("logprobs", report, logprob_report.table(report), arguments.output)
    logprob_report.plot(report, folder)


def head_of(text: str) -> Head:
    """A head by its name, or by its size as in 576x49152."""
    if text in HEADS:
        return HEADS[text]
    if not (size := re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)):
        raise argparse.ArgumentTypeError(f"{text!r} is neither one of {', '.join(HEADS)} nor a size like 576x49152")
    return Head(text, int(size[1]), int(size[2]))


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    device, dtype = arguments.device, getattr(torch, arguments.dtype)
    if device == "cpu":
        torch.set_num_threads(cores())
    report = {
        **circumstances(accelerator() if device == "cuda" else processor(), *PACKAGES),
        "dtype": arguments.dtype,
        "on_gpu": device == "cuda",
        "rows": [],
        "left_out": [],
    }
    torch._dynamo.config.recompile_limit = 64  # one case is one compilation
    rates = []
    end = time.perf_counter() + 60 * arguments.minutes
    for head in arguments.shapes:
        torch._dynamo.reset()
        rates.append(matmul_flops_per_second(device, dtype, MATMUL_SECONDS))
        for tokens in arguments.tokens:
            needed = case_bytes(head, tokens, dtype)
            reason = None
            if needed > USABLE * free_bytes(device):
                reason = f"needs about {needed / 1e9:.0f} GB"
            elif time.perf_counter() > end:
                reason = f"not begun within {arguments.minutes:g} minutes"
            if reason is not None:
                report["left_out"].append({"head": head.name, "tokens": tokens, "reason": reason})
                continue
            case = make_case(head, tokens, dtype, device)
            exact = compute_exact(case)
            for mode in arguments.modes:
                progress(f"{head.name}, {tokens} tokens, {mode}")
                rows = measure_mode(case, exact, mode, arguments)
                report["rows"] += [{"head": head.name, "tokens": tokens, "mode": mode} | row for row in rows]
            del case, exact
            release()
    report["matmul_flops_per_second"] = max(rates)
    logprob_report.add_ratios(report)
    return report


def measure_mode(case: Case, exact: Exact, mode: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each arm: what was measured, or why it is absent."""
    rows = {name: {"arm": name, **dimensions(case)} for name in arguments.implementations}
    arms: dict[str, Arm] = {}
    for name, row in rows.items():
        try:
            if name in FULL_LOGITS and naive_bytes(case) > USABLE * free_bytes(arguments.device):
                raise Absent(f"does not fit: about {naive_bytes(case) / 1e9:.0f} GB")
            arm = make_arm(name, case, mode)
            # Code is compiled, and on a GPU tuned and given work space, in a first run that counts for nothing.
            if name in COMPILED or arguments.device == "cuda":
                arm.run()
                drop_gradients(arm)
            row |= observe(arm, case, exact, arguments.device)
            arms[name] = arm
        except Absent as reason:
            row["absent"] = str(reason)
        except torch.cuda.OutOfMemoryError:
            row["absent"] = "out of memory"
        except Exception as error:
            if name in OURS:
                raise
            # A peer that fails here is a finding, not an end; its first line says which.
            row["absent"] = f"fails: {type(error).__name__}: {str(error).strip().partition(chr(10))[0][:120]}"
        release()
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    began = time.perf_counter()
    for turn in range(arguments.repeats):
        if turn >= MIN_ROUNDS and time.perf_counter() - began > arguments.case_seconds:
            break
        names = list(arms)
        for name in names[turn % max(1, len(names)) :] + names[: turn % max(1, len(names))]:
            seconds[name].append(timed(arms[name].run, arguments.device == "cuda"))
            drop_gradients(arms[name])
    for name, times in seconds.items():
        rows[name]["seconds"] = times
    return list(rows.values())


def observe(arm: Arm, case: Case, exact: Exact, device: str) -> dict[str, Any]:
    """Memory and errors of one run, which leaves nothing behind."""
    outputs: list[Output] = []
    extra = extra_peak_bytes(lambda: outputs.append(arm.run()), (arm.hidden, arm.weight), device)
    found = {"extra_bytes": extra, **errors(arm, outputs[0], case, exact)}
    drop_gradients(arm)
    return found


def errors(arm: Arm, output: Output, case: Case, exact: Exact) -> dict[str, Any]:
    """How far one run is from fp64."""
    if output.logps is not None:
        difference = (output.logps.double() - exact.logps).abs().max()
    else:
        sums = torch.zeros(2 * case.pairs, dtype=torch.float64, device=case.hidden.device)
        sums.index_add_(0, case.segments, exact.logps)
        difference = (output.sums.double().flatten() - sums).abs().max() * (2 * case.pairs) / case.tokens
    found: dict[str, Any] = {
        "logp_error": difference.item() / exact.logit_size,
        "logp_error_of_sums": output.logps is None,
    }
    if arm.hidden.grad is not None:
        tokens = exact.tokens if arm.order is None else arm.order[exact.tokens]
        found["hidden_grad_error"] = relative_error(arm.hidden.grad[tokens], exact.hidden_grad)
    if arm.weight.grad is not None:
        found["weight_grad_error"] = relative_error(arm.weight.grad[exact.words], exact.weight_grad)
    return found


def dimensions(case: Case) -> dict[str, Any]:
    return {"hidden_size": case.hidden.shape[1], "vocabulary": case.weight.shape[0], "softcap": case.softcap}


def case_bytes(head: Head, tokens: int, dtype: torch.dtype) -> int:
    """About what a case needs without anyone's logits: weight and hidden states, their gradients, in fp32 where a
    peer sums so, and all of these once in fp64, with some tiles, for the exact values."""
    return head.hidden * (head.vocabulary + tokens) * (2 * dtype.itemsize + 4 + 8) + 2**30


def free_bytes(device: str) -> int:
    """Memory that is there to be taken."""
    if device == "cuda":
        release()
        return torch.cuda.mem_get_info()[0]
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/meminfo states no MemAvailable")


def drop_gradients(arm: Arm) -> None:
    arm.hidden.grad = arm.weight.grad = None


def release() -> None:
    """Give back what nothing refers to any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def progress(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
