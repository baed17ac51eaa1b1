"""The most memory that a piece of work holds at once, counted where tensors are allocated.

On CUDA the caching allocator keeps a high-water mark. On a CPU the profiler reports every block that torch's
allocator gives out and takes back, which also covers what autograd saves, in-place buffers, and the code that
`torch.compile` makes; that list is summed up here. The resident memory of a process would be a less steady measure:
freed blocks stay with the process or don't, by size and history. Where the two were compared they agreed to 0.1 MB.
Neither sees scratch memory that a library takes without asking torch.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

# Otherwise the profiler says on stderr each time that it starts and stops.
os.environ.setdefault("KINETO_LOG_LEVEL", "6")


def peak_bytes(work: Callable[[], Any], device: str) -> int:
    """How far the memory in tensors rises, at its highest, above what it is before `work`."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        work()
    results = profiled.profiler.kineto_results
    changes = sorted((e.start_ns(), e.nbytes()) for e in results.events() if e.name() == "[memory]")
    return max(itertools.accumulate((nbytes for _, nbytes in changes), initial=0))


def extra_peak_bytes(work: Callable[[], Any], leaves: Iterable[Tensor], device: str) -> int:
    """`peak_bytes` beyond the gradients of `leaves` that `work` leaves behind; 0 if these alone are the peak."""
    leaves = list(leaves)
    for leaf in leaves:
        leaf.grad = None
    peak = peak_bytes(work, device)
    return max(0, peak - sum(leaf.grad.nbytes for leaf in leaves if leaf.grad is not None))
