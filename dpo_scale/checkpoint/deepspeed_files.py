"""How DeepSpeed's part of a checkpoint gets to the disk and back: hashed, synced, and without running code.

DeepSpeed writes and reads through a "checkpoint engine". Its own engines write in place without syncing. They raise on
the one rank whose disk is full while the others wait in a barrier, and they unpickle whatever they find. Ours notes an
error and lets DeepSpeed go on to its barriers, so that the ranks can agree on it afterwards. It reads with torch's
restricted unpickler, which makes tensors, containers and the few plain classes named here, and nothing else.
"""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import IO, Any, cast

import torch
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointEngine
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

from dpo_scale.disk.sealed_folder import SealedFile
from dpo_scale.distributed import ranks
from dpo_scale.errors import CheckpointError
from dpo_scale.progress import note_activity

_READ_BYTES = 1 << 26  # at a time
# what DeepSpeed's state dicts hold beside tensors and containers: records of numbers; loading them runs no code
_PLAIN_CLASSES = [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]


class DeepspeedFiles(CheckpointEngine):
    """Writes and reads DeepSpeed's files of one checkpoint.

    Attributes:
        written: manifest entries of the files that this rank wrote, by name.
        error: the first error of the file system, or None.
    """

    def __init__(self) -> None:
        super().__init__()
        self.written: dict[str, dict[str, Any]] = {}
        self.error: OSError | None = None

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        try:
            Path(path).mkdir(parents=True, exist_ok=exist_ok)
        except OSError as error:
            self.error = self.error or error

    def create(self, info: Any) -> None:
        pass

    def save(self, state_dict: Any, path: str) -> None:
        if self.error is not None:  # the save has failed: leave a disk alone that may be full
            return
        file = SealedFile(Path(path))
        torch.save(state_dict, cast("IO[bytes]", file))  # of a file it only needs `write`
        try:
            self.written[Path(path).name] = file.seal()
        except OSError as error:
            self.error = error

    def load(self, path: str, map_location: Any = None) -> Any:
        return load_file(Path(path), map_location)

    def commit(self, info: Any) -> bool:
        return True


class HeldFiles(DeepspeedFiles):
    """Files that are written later, in another thread, where `hold` says so: until then they are copies in memory."""

    def __init__(self, *, hold: bool) -> None:
        super().__init__()
        self._hold = hold
        self._held: list[tuple[Any, str]] = []

    def save(self, state_dict: Any, path: str) -> None:
        if self._hold:
            self._held.append((_copied_to_host(state_dict), path))
        else:
            super().save(state_dict, path)

    def finish_copies(self) -> None:
        """Wait until the device has copied everything."""
        if ranks.device().type != "cpu":
            torch.get_device_module(ranks.device()).synchronize()

    def write(self) -> None:
        """Write what is held; one file's copies are let go before the next is written."""
        self._held.reverse()
        while self._held:
            super().save(*self._held.pop())


def _copied_to_host(value: Any) -> Any:
    """A deep copy whose tensors are in host memory, page-locked where they come from a device."""
    if isinstance(value, torch.Tensor):
        value = value.detach()
        if value.device.type == "cpu":
            return value.clone()
        return torch.empty_like(value, device="cpu", pin_memory=True).copy_(value, non_blocking=True)
    if isinstance(value, dict):
        copied = copy.copy(value)  # an OrderedDict stays one
        copied.update({key: _copied_to_host(item) for key, item in value.items()})
        return copied
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(_copied_to_host, value))
    if isinstance(value, list | tuple):
        return type(value)(map(_copied_to_host, value))
    return copy.deepcopy(value)


def own_file(kind: str, rank: int | None = None) -> str:
    """The name of a rank's file, by default this rank's, of a kind that DeepSpeed does not save."""
    return f"{kind}-rank-{ranks.rank() if rank is None else rank}.pt"


def load_file(path: Path, map_location: Any = "cpu", *, mmap: bool = False) -> Any:
    """What `DeepspeedFiles.save` wrote.

    Args:
        mmap: map it into memory, so that only the parts of its tensors that are used are read. Not for what is kept.

    Raises:
        CheckpointError: if the file holds anything but tensors, containers and plain records.
    """
    try:
        with torch.serialization.safe_globals(_PLAIN_CLASSES):
            if mmap:
                return torch.load(path, map_location=map_location, weights_only=True, mmap=True)
            with _NotedFile(path) as file:
                return torch.load(file, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{path}: refused: it holds more than tensors and plain values: {reason[:200]}") from None


class _NotedFile(io.FileIO):
    """A file that notes activity as it is read: one tensor of a large model takes minutes."""

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        done = 0
        while done < view.nbytes and (count := super().readinto(view[done : done + _READ_BYTES])):
            done += count
            note_activity()
        return done
