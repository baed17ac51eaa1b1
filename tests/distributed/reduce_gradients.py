"""Sum known gradients over two ranks at each ZeRO stage and report how exact the sums are: `reduce_gradients.py OUT`.

The model is one matrix of zeros, y = x W^T, with loss sum(y * t), so each rank's gradient is t^T x, rounded to bf16.
After one step of SGD with learning rate 1 the fp32 weights are minus the gradient that the ranks agreed on. What that
should have been is added up in fp64, of two micro-steps and all ranks.
"""

import json
import sys
from pathlib import Path

import torch
from deepspeed.comm import comm
from deepspeed.utils import safe_get_full_fp32_param

from dpo_scale.distributed import engine, ranks
from dpo_scale.distributed.join import join
from dpo_scale.run.cli import run
from dpo_scale.settings.deepspeed import policy_deepspeed_config
from dpo_scale.settings.tree import load_config

SIZE, TOKENS, MICRO_STEPS = 64, 16, 2
CASES = [
    *((stage, dtype, "none") for stage in (1, 2, 3) for dtype in ("null", "bfloat16", "float32")),
    *((stage, "float32", "cpu") for stage in (1, 2, 3)),
]


class Products(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(SIZE, SIZE, bias=False, dtype=torch.bfloat16)
        torch.nn.init.zeros_(self.linear.weight)

    def forward(self, x, t):
        return (self.linear(x) * t).sum()


def inputs(rank):
    """(x, t) of each micro-step."""
    generator = torch.Generator().manual_seed(rank)
    return [torch.randn(2, TOKENS, SIZE, generator=generator).bfloat16().unbind() for _ in range(MICRO_STEPS)]


def expected_gradient():
    """Mean over the ranks of the sum over micro-steps, fp64, of gradients that autograd rounds to bf16."""
    total = torch.zeros(SIZE, SIZE, dtype=torch.float64)
    for rank in range(ranks.world_size()):
        for x, t in inputs(rank):
            module = Products()
            module(x, t).backward()
            total += module.linear.weight.grad.double()
    return total / ranks.world_size()


def measure(stage, reduce_dtype, offload):
    """Relative error of the gradient and bytes of gradients that one rank put into collectives."""
    config = load_config(
        None,
        [
            *(
                "model.path=none",
                "data.train=none",
                "train.optim=SGD",
                "train.learning_rate=1",
                "train.max_grad_norm=0",
            ),
            *(f"deepspeed.stage={stage}", f"deepspeed.offload_optimizer={offload}"),
            f"train.reduce_dtype={reduce_dtype}",
            "deepspeed.config={zero_optimization: {stage3_param_persistence_threshold: 0}, "
            "zero_force_ds_cpu_optimizer: false}",
        ],
    )
    policy = engine.initialize_policy(Products(), policy_deepspeed_config(config, MICRO_STEPS, "cpu"), 0.0)
    sent = []

    def counted(function):
        def call(*arguments, **named):
            tensors = [value for value in (*arguments, *named.values()) if isinstance(value, torch.Tensor)]
            largest = max(tensors, key=torch.numel)
            if largest.numel() >= SIZE * SIZE:  # not a norm
                sent.append(largest.nbytes)
            return function(*arguments, **named)

        return call

    backend = comm.cdb
    backend.all_reduce, backend.reduce_scatter_tensor = (
        counted(backend.all_reduce),
        counted(backend.reduce_scatter_tensor),
    )
    try:
        for number, (x, t) in enumerate(inputs(ranks.rank())):
            engine.backward(policy, policy(x, t), last_micro_step=number == MICRO_STEPS - 1)
    finally:
        del backend.all_reduce, backend.reduce_scatter_tensor  # the class's own again
    engine.optimizer_step(policy, 1.0, 0.0)
    gradient, expected = -safe_get_full_fp32_param(policy.module.linear.weight).double(), expected_gradient()
    engine.release(policy)
    return {"error": ((gradient - expected).norm() / expected.norm()).item(), "bytes": sum(sent)}


def main():
    join(5)
    measured = [{"case": case, **measure(*case)} for case in CASES]
    if ranks.is_main():
        out = next(argument for argument in sys.argv[1:] if argument.endswith(".json"))
        Path(out).write_text(json.dumps(measured))


if __name__ == "__main__":
    run(main)
