"""The ranks: which one this process is, where it runs, and what it can ask of the others.

Only this room knows that there is more than one process.
"""

from __future__ import annotations

import datetime
import logging
import os
import socket
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from dpo_scale.errors import UserError

Result = TypeVar("Result")


def init_distributed(timeout_minutes: float) -> None:
    """Join the process group; `deepspeed`, `torchrun` and plain `python` (one rank) all end up here.

    Args:
        timeout_minutes: a collective that one rank waits in for longer raises on that rank, which ends the run.
    """
    if "RANK" not in os.environ:  # plain python: without these DeepSpeed would look for MPI
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            os.environ.setdefault("MASTER_PORT", str(probe.getsockname()[1]))
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    use_expandable_segments(get_accelerator().device_name())
    if get_accelerator().device_name() == "cpu":
        # gloo alone is right and starts at once; the shared-memory op would be compiled first (about 20 s)
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    get_accelerator().set_device(local_rank())
    deepspeed.init_distributed(
        dist_backend=get_accelerator().communication_backend_name(),
        timeout=datetime.timedelta(minutes=timeout_minutes),
        verbose=False,
    )


# What torch 2.11 to 2.13 read the settings of CUDA's allocator from, the first that is set, when CUDA starts.
ALLOCATOR_VARIABLES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF", "PYTORCH_ALLOC_CONF")


def use_expandable_segments(device_name: str) -> None:
    """Let CUDA's allocator grow its segments, unless one of its variables is set. Before anything is on the device.

    Micro-batches of ever other lengths and the gathers of ZeRO-3 otherwise leave memory in pieces that nothing fits.
    """
    is_nvidia = device_name == "cuda" and torch.version.hip is None  # torch 2.11 ignores it on ROCm
    if is_nvidia and not any(name in os.environ for name in ALLOCATOR_VARIABLES):
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"


def quiet_libraries() -> None:
    """Leave only warnings and errors of the libraries on the console, and those of rank 0 alone."""
    level = logging.WARNING if rank() == 0 else logging.ERROR
    for name in ("DeepSpeed", "transformers", "datasets", "torch.distributed", "accelerate"):
        logging.getLogger(name).setLevel(level)
    from datasets.utils.logging import disable_progress_bar as disable_datasets_bars
    from transformers.utils.logging import disable_progress_bar as disable_transformers_bars

    disable_datasets_bars()
    disable_transformers_bars()
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed.*")
    warnings.filterwarnings("ignore", message=".*barrier\\(\\).*using the device under current context.*")


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    return rank() == 0


def log(message: str) -> None:
    """A line on rank 0's console; progress bars are kept whole."""
    if is_main():
        from tqdm import tqdm

        tqdm.write(message)


def device() -> torch.device:
    from deepspeed.accelerator import get_accelerator

    return torch.device(get_accelerator().current_device_name())


def device_name() -> str:
    """The accelerator's name as its maker writes it, or "cpu"."""
    place = device()
    return torch.cuda.get_device_name(place) if place.type == "cuda" else place.type


def peak_memory_bytes() -> int:
    """Largest memory held so far by this rank: the accelerator's allocator, or the process on a CPU."""
    from deepspeed.accelerator import get_accelerator

    if get_accelerator().device_name() != "cpu":
        return int(get_accelerator().max_memory_allocated())
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts KiB


def barrier() -> None:
    if world_size() > 1:
        dist.barrier()


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """Sum a tensor over all ranks, in place."""
    if world_size() > 1:
        dist.all_reduce(values, op=dist.ReduceOp.SUM)
    return values


def gather_objects(value: Any) -> list[Any]:
    """Every rank's (small, picklable) value, in rank order, on every rank."""
    if world_size() == 1:
        return [value]
    gathered: list[Any] = [None] * world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def gather_rows(values: torch.Tensor) -> torch.Tensor:
    """All ranks' rows, stacked in rank order; gradients flow to this rank's own rows only.

    Every rank computes a loss over all rows and each contributes the gradient of its own: summed over ranks that is
    the gradient of one such loss, which is what averaging engines expect of a sum over pairs.

    Args:
        values: [P, ...], the same shape on every rank.

    Returns:
        [world_size * P, ...].
    """
    if world_size() == 1:
        return values
    parts = [torch.empty_like(values) for _ in range(world_size())]
    dist.all_gather(parts, values.detach().contiguous())
    parts[rank()] = values
    return torch.cat(parts)


def from_main(value: Result) -> Result:
    """Rank 0's (picklable) value, on every rank."""
    if world_size() == 1:
        return value
    holder: list[Any] = [value if is_main() else None]
    dist.broadcast_object_list(holder, src=0)
    return holder[0]


def on_main(work: Callable[[], Result]) -> Result:
    """What `work` gives on rank 0, on every rank; a `UserError` that it raises there is raised on every rank too."""
    result, error = None, None
    if is_main():
        try:
            result = work()
        except UserError as raised:
            error = raised
    result, error = from_main((result, error))
    if error is not None:
        raise error
    return result  # type: ignore[return-value]


def main_first(work: Callable[[], Result]) -> Result:
    """Run `work` on each node's first rank, then on its others, which find the caches it left."""
    if local_rank() == 0:
        result = work()
        barrier()
        return result
    barrier()
    return work()
