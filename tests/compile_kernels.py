"""Compile the log-prob kernels for a GPU that need not be there, as real calls would: compile_kernels.py 9.0

Calls the public function on CPU tensors, with a driver that only says which GPU there is, and with launches replaced by
Triton's own `warmup`, which compiles for exactly those arguments. Prints a line of json per compiled kernel: the call,
shared memory, bytes of spilled registers, which matrix and copy instructions there are.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dpo_scale.logprobs import BY_PRODUCTS, triton_kernels  # noqa: E402
from dpo_scale.logprobs.tiles import Head  # noqa: E402
from dpo_scale.logprobs.triton_blocks import default_blocks  # noqa: E402
from dpo_scale.logprobs.triton_logps import triton_token_logps  # noqa: E402

INSTRUCTIONS = r"(?:wgmma\.mma_async|mma\.sync|cp\.async|tcgen05\.mma|cp\.async\.bulk)[\w.]*"


class NoDriver:
    """What Triton asks of a driver in order to compile."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def spilled_bytes(cubin: bytes) -> int:
    """Bytes of a thread's stack, which these kernels use for nothing but registers that did not fit."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run([tool, "--dump-resource-usage", file.name], check=True, capture_output=True, text=True)
    return sum(map(int, re.findall(r"STACK:(\d+)", usage.stdout)))


def main() -> None:
    major, minor = map(int, sys.argv[1].split("."))
    driver.set_active(NoDriver(10 * major + minor))
    call = ""

    def compile_only(kernel, name):
        def launch(*args, **kwargs):
            compiled = kernel.warmup(*args, grid=(1,), **kwargs)
            found = {
                "call": call,
                "kernel": name,
                "shared": compiled.metadata.shared,
                "spilled": spilled_bytes(compiled.asm["cubin"]),
                "ptx": " ".join(sorted(set(re.findall(INSTRUCTIONS, compiled.asm["ptx"])))),
            }
            print(json.dumps(found), flush=True)

        return {"__getitem__": lambda self, grid: launch}

    for name in ("reference", "forward", "combine", "rescale", "gradient"):
        kernel = getattr(triton_kernels, f"{name}_kernel")
        setattr(triton_kernels, f"{name}_kernel", type("CompileOnly", (), compile_only(kernel, name))())

    def run(dtype, hidden_size, trained, bias=False, softcap=None, by_products=(), memory_bytes=2**20):
        hidden, weight, offsets = (
            torch.zeros(*s, dtype=dtype) for s in ((300, hidden_size), (5000, hidden_size), (5000,))
        )
        hidden.requires_grad_(trained[0]), weight.requires_grad_(trained[1])
        if bias:
            offsets.requires_grad_(trained[1])
        logps, _ = triton_token_logps(
            hidden, Head(weight, offsets if bias else None, 1.0, softcap), torch.zeros(300, dtype=torch.int64),
            by_products,
            blocks=default_blocks((major, minor), dtype, hidden_size, softcap is not None), memory_bytes=memory_bytes,
        )  # fmt: skip
        if any(trained):
            logps.sum().backward()

    call = "nothing trained"
    run(torch.bfloat16, 576, (False, False))
    call = "frozen"
    run(torch.bfloat16, 576, (True, False))
    call = "trained"
    run(torch.bfloat16, 576, (True, True), memory_bytes=300 * 2 * 1024)
    call = "soft-capped"
    run(torch.bfloat16, 576, (True, True), bias=True, softcap=30.0, by_products=BY_PRODUCTS)
    call = "odd, nothing trained"
    run(torch.bfloat16, 577, (False, False))
    call = "odd"
    run(torch.bfloat16, 577, (True, True))
    call = "everything, odd"
    run(torch.float16, 577, (True, True), bias=True, softcap=30.0, by_products=BY_PRODUCTS)


if __name__ == "__main__":
    main()
