"""Host time that DeepSpeed's ZeRO-3 hooks cost a pass, by submodules and by layers. `python benchmarks/zero3_hooks.py`.

A Llama of 32 narrow layers (or --layers), on one rank, so that nothing is computed or sent to speak of and what remains
is Python: a plain model, the same at ZeRO-3 with hooks on every submodule, and with hooks on the decoder layers alone
(`dpo_scale.models.zero3`), as training has them. Two passes are timed: a reference's forward, and the policy's forward
and backward with gradient checkpointing. The three take turns; each turn gives a ratio, so that what else the machine
does falls on all of them. On a CPU the clock is the thread's own; on a GPU, where the device waits for the host with
layers this narrow, it is the time until the device is done. Results go to `results/<device>/zero3_hooks.{md,json}`.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import accelerator, circumstances, describe_circumstances, markdown_table, processor, write_results

from dpo_scale.distributed import engine, ranks
from dpo_scale.distributed.join import join
from dpo_scale.models.activations import enable_checkpointing
from dpo_scale.models.zero3 import limit_gathers, make_leaves

PLAIN, SUBMODULES, LAYERS = "plain", "ZeRO-3, every submodule", "ZeRO-3, by layers"
REFERENCE, POLICY = "reference forward", "policy forward + backward, checkpointed"
WARM_UP = 3  # passes: DeepSpeed traces the order of modules in the first two


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=15, help="turns of each of the three")
    parser.add_argument("--output", type=Path, help="folder of the results (default: results/<device>)")
    arguments = parser.parse_args(argv)
    machine = circumstances(
        accelerator() if arguments.device == "cuda" else processor(), "torch", "transformers", "deepspeed"
    )
    os.environ.setdefault("DS_ACCELERATOR", arguments.device)
    torch.set_num_threads(1)
    join(timeout_minutes=5)
    passes = {REFERENCE: reference_passes(arguments.layers), POLICY: policy_passes(arguments.layers)}
    seconds = {name: take_turns(arms, arguments.repeats) for name, arms in passes.items()}
    report = {"layers": arguments.layers, "clock": clock().__name__, "seconds": seconds, **machine}
    write_results("zero3_hooks", report, table(report), arguments.output)


def make_model(layers: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, num_hidden_layers=layers, **shape))
    return model.to(ranks.device(), torch.bfloat16)


def zero3_config(**more: Any) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "steps_per_print": 10**9,
        **more,
    }


def at_stage_3(model: Any, by_layers: bool) -> Any:
    """The backbone, prepared as `dpo_scale.models.load` does it, or as DeepSpeed has it without."""
    if by_layers:
        done, reason = make_leaves(model, 10**9)
        assert done, reason
        if ranks.device().type != "cpu":
            limit_gathers(model, torch.get_device_module(ranks.device()).Event)
    return model.model


def with_linear(run: Callable[[], None], linear: Any) -> Callable[[], None]:
    """DeepSpeed replaces torch's linear function for the whole process; each model keeps the one it was made with."""

    def run_with_it() -> None:
        F.linear = linear
        run()

    return run_with_it


def reference_passes(layers: int) -> dict[str, Callable[[], None]]:
    ids = torch.arange(16, device=ranks.device())[None]

    def forward_of(module: Any) -> Callable[[], None]:
        def run() -> None:
            with torch.no_grad():
                module(input_ids=ids, use_cache=False)

        return with_linear(run, F.linear)

    arms = {PLAIN: forward_of(make_model(layers).model.eval())}
    for name in (SUBMODULES, LAYERS):
        module = at_stage_3(make_model(layers), name == LAYERS)
        arms[name] = forward_of(engine.initialize_reference(module, zero3_config()))
    return arms


def policy_passes(layers: int) -> dict[str, Callable[[], None]]:
    ids = torch.arange(16, device=ranks.device())[None]
    accumulation = 10**6  # an optimizer step is never taken
    config = zero3_config(
        train_batch_size=accumulation,
        gradient_accumulation_steps=accumulation,
        data_types={"grad_accum_dtype": "fp32"},
        optimizer={"type": "AdamW", "params": {"lr": 1e-6, "torch_adam": True}},
        zero_allow_untested_optimizer=True,
    )

    def model() -> Any:
        made = make_model(layers).train()
        enable_checkpointing(made, offload=False)
        return made

    plain = model().model

    def plain_pass() -> None:
        plain.zero_grad()
        plain(input_ids=ids, use_cache=False).last_hidden_state.float().sum().backward()

    def pass_of(policy: Any) -> Callable[[], None]:
        def run() -> None:
            total = policy(input_ids=ids, use_cache=False).last_hidden_state.float().sum()
            engine.backward(policy, total, last_micro_step=False)

        return with_linear(run, F.linear)

    arms = {PLAIN: with_linear(plain_pass, original_linear)}
    for name in (SUBMODULES, LAYERS):
        policy = engine.initialize_policy(at_stage_3(model(), name == LAYERS), config, weight_decay=0.0)
        policy.train()
        arms[name] = pass_of(policy)
    return arms


original_linear = F.linear


def clock() -> Callable[[], float]:
    return time.thread_time if ranks.device().type == "cpu" else time.perf_counter


def take_turns(arms: dict[str, Callable[[], None]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each pass, in the order of the turns."""
    now, on_cuda = clock(), ranks.device().type == "cuda"
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(WARM_UP + repeats):
        for name, run in arms.items():
            if on_cuda:
                torch.cuda.synchronize()
            began = now()
            run()
            if on_cuda:
                torch.cuda.synchronize()
            if turn >= WARM_UP:
                seconds[name].append(now() - began)
    return seconds


def table(report: dict[str, Any]) -> str:
    rows = []
    for name, arms in report["seconds"].items():
        hooks = {arm: [a - b for a, b in zip(seconds, arms[PLAIN], strict=True)] for arm, seconds in arms.items()}
        for arm, seconds in arms.items():
            row = [name, arm, f"{statistics.median(seconds) * 1e3:.1f} ms", f"{_ratio(seconds, arms[PLAIN]):.2f}"]
            row.append("" if arm == PLAIN else f"{statistics.median(hooks[arm]) * 1e3:.1f} ms")
            row.append(f"{_ratio(hooks[arm], hooks[SUBMODULES]):.2f}" if arm == LAYERS else "")
            rows.append(row)
    return "\n".join(
        [
            describe_circumstances(report),
            "",
            f"{report['layers']} layers, one rank; medians of {len(next(iter(arms.values())))} turns, of each turn's "
            f"ratios and differences; clock: {report['clock']}.",
            "",
            *markdown_table(["pass", "", "host time", "to plain", "hooks add", "of every submodule's"], rows),
            "",
        ]
    )


def _ratio(ours: list[float], theirs: list[float]) -> float:
    """The median of the turns' ratios."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


if __name__ == "__main__":
    main()
    os._exit(0)  # DeepSpeed's hooks hold the models; taking them apart would take longer than measuring them
