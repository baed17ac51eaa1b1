"""The ranks: which one this process is, where it runs, and what it can ask of the others.

Only this room knows that there is more than one process.
"""

from __future__ import annotations

import datetime
import logging
import os
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from dpo_scale.errors import UserError

Result = TypeVar("Result")


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


def local_world_size() -> int | None:
    """Ranks of this machine; None if the launcher does not tell."""
    told = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE")  # torchrun's and DeepSpeed's
    return int(told) if told else None


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


def new_group(timeout_minutes: float) -> dist.ProcessGroup | None:
    """A group of all ranks for objects in host memory, for a thread that must not mix with other collectives."""
    if world_size() == 1:
        return None
    return dist.new_group(backend="gloo", timeout=datetime.timedelta(minutes=timeout_minutes))


def barrier(group: dist.ProcessGroup | None = None) -> None:
    if world_size() > 1:
        dist.barrier(group)


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """Sum a tensor over all ranks, in place."""
    if world_size() > 1:
        dist.all_reduce(values, op=dist.ReduceOp.SUM)
    return values


def gather_objects(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """Every rank's (small, picklable) value, in rank order, on every rank."""
    if world_size() == 1:
        return [value]
    gathered: list[Any] = [None] * world_size()
    dist.all_gather_object(gathered, value, group)
    return gathered


def gather_rows(values: torch.Tensor, place: int | None = None) -> torch.Tensor:
    """All ranks' rows, stacked in rank order; gradients flow to this rank's own rows only.

    Every rank computes a loss over all rows and each contributes the gradient of its own: summed over ranks that is
    the gradient of one such loss, which is what averaging engines expect of a sum over pairs.

    Args:
        values: [P, ...], the same shape on every rank.
        place: the rank, with the same values, in whose place gradients flow to these; None: this one.

    Returns:
        [world_size * P, ...].
    """
    if world_size() == 1:
        return values
    parts = [torch.empty_like(values) for _ in range(world_size())]
    dist.all_gather(parts, values.detach().contiguous())
    parts[rank() if place is None else place] = values
    return torch.cat(parts)


def from_main(value: Result, group: dist.ProcessGroup | None = None) -> Result:
    """Rank 0's (picklable) value, on every rank."""
    if world_size() == 1:
        return value
    holder: list[Any] = [value if is_main() else None]
    dist.broadcast_object_list(holder, src=0, group=group)
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


def first_then_others(work: Callable[[], Result], *, is_first: bool) -> Result:
    """Run `work` on the ranks that are first, then on the others, which find the caches that those left."""
    if is_first:
        result = work()
        barrier()
        return result
    barrier()
    return work()
