"""A CUDA device that is not there: tensors on the CPU that say they are on it, and a host that is watched.

Within `EmulatedCuda` a tensor answers `cuda:0` when it is asked for its device, so the branches for CUDA run, ours and
the libraries'. What is seen:

    waits     calls that make the host wait for the device: `.item()`, `bool(tensor)`, `nonzero` and what is made of it,
              copies that are not asynchronous (from pageable memory, to the host, `torch.tensor(..., device=...)`),
              streams and events that are synchronised while there is still something to do
    misuse    raised: an event that is read before it is complete, page-locked memory that is written while a copy from
              it, or read while a copy to it, is under way, host and device tensors in one operation
    races     what two streams do to the same memory, one of them writing, without one having waited for the other

Nothing runs late: an operation is done at once, on the CPU, and only a book is kept of what is known to be done. Each
stream counts what it was given. A stream, an event and the host know up to which count each stream is done (vector
clocks, as in torch's CUDA sanitizer). The host learns of it by waiting and in no other way.

Where a storage is: the host's are remembered, all others are the device's. Tensors made before count as the device's.
How torch is watched is in `emulated_cuda_modes`.
"""

from __future__ import annotations

import contextlib
import linecache
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch.multiprocessing.reductions import StorageWeakRef

Tensor = torch.Tensor
DEVICE, HOST = torch.device("cuda", 0), torch.device("cpu")


class MisuseError(RuntimeError):
    """What CUDA refuses, or answers with numbers that are not there yet."""


@dataclass(frozen=True)
class Wait:
    """A call that makes the host wait: what, and where, outside of torch, as `folder/file.py: function`."""

    what: str
    where: str
    line: str

    def __str__(self) -> str:
        return f"{self.what} in {self.where}: {self.line}"


class Clock(dict):
    """Up to which count each stream is known to be done."""

    def learn(self, other: dict) -> None:
        for stream, count in other.items():
            self[stream] = max(self.get(stream, 0), count)

    def knows(self, other: dict) -> bool:
        return all(self.get(stream, 0) >= count for stream, count in other.items())


class Stream:
    """A stand-in for `torch.cuda.Stream`."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.given, self.known = 0, Clock()
        _running().streams.append(self)

    @property
    def work(self) -> Clock:
        """What it was given so far, and what that came after."""
        return Clock(self.known | {self: self.given})

    def wait_stream(self, other: Stream) -> None:
        self.known.learn(other.work)

    def wait_event(self, event: Event) -> None:
        self.known.learn(event.after)

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record(self)
        return event

    def query(self) -> bool:
        return _running().known.knows(self.work)

    def synchronize(self) -> None:
        _running().wait("stream.synchronize", self.work)


class Event:
    """A stand-in for `torch.cuda.Event`."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.after, self._recorded = Clock(), 0.0

    def record(self, stream: Stream | None = None) -> None:
        stream = stream or _running().current
        stream.given += 1
        self.after, self._recorded = stream.work, time.perf_counter()

    def wait(self, stream: Stream | None = None) -> None:
        (stream or _running().current).wait_event(self)

    def query(self) -> bool:
        return _running().known.knows(self.after)

    def synchronize(self) -> None:
        _running().wait("event.synchronize", self.after)

    def elapsed_time(self, end: Event) -> float:
        if not (self._recorded and end._recorded and self.query() and end.query()):
            raise MisuseError("both events must be complete before the time between them is read")
        return 1000 * (end._recorded - self._recorded)


@dataclass
class Memory:
    """A storage: where it is, and who has used it since when."""

    alive: StorageWeakRef
    on_host: bool = False
    pinned: bool = False
    written: Clock | None = None  # by the device: which work of which stream
    read: Clock | None = None


def _running() -> EmulatedCuda:
    assert EmulatedCuda.running is not None
    return EmulatedCuda.running


class EmulatedCuda:
    """A context in which this thread's tensors are on a CUDA device, unless they were made on the host.

    Attributes:
        waits: what made the host wait.
        races: what two streams did to one storage.
    """

    running: EmulatedCuda | None = None

    def __init__(self) -> None:
        self.waits: list[Wait] = []
        self.races: list[str] = []
        self.known = Clock()  # the host's
        self._memory: dict[int, Memory] = {}
        self.streams: list[Stream] = []
        self._thread: int | None = None
        self.calls: list[
            bool
        ] = []  # of torch, that Python is in, outermost first: whether what they make is on the host
        self._exit = ExitStack()

    # ---- what the program sees of it --------------------------------------------------------------------------

    @contextmanager
    def on_stream(self, stream: Stream | None) -> Iterator[None]:
        before, self.current = self.current, stream or self.current
        try:
            yield
        finally:
            self.current = before

    def synchronize(self, *_: Any) -> None:
        everything = Clock()
        for stream in self.streams:
            everything.learn(stream.work)
        self.wait("synchronize", everything)

    @property
    def active(self) -> bool:
        return self._thread == threading.get_ident()

    def __enter__(self) -> EmulatedCuda:
        from emulated_cuda_modes import Calls, Operations

        EmulatedCuda.running = self
        self.default = self.current = Stream()
        replaced = {
            "Stream": Stream,
            "Event": Event,
            "stream": self.on_stream,
            "current_stream": lambda *_: self.current,
            "default_stream": lambda *_: self.default,
            "synchronize": self.synchronize,
            "device": nullcontext,
            "get_device_name": lambda *_: "emulated",
            "get_device_capability": lambda *_: (9, 0),
        }
        for name, value in replaced.items():
            self._exit.enter_context(patch.object(torch.cuda, name, value))
        answers = {
            "device": self._device,
            "is_cuda": lambda tensor: self._device(tensor).type == "cuda",
            "is_cpu": lambda tensor: self._device(tensor).type == "cpu",
        }
        for name, answer in answers.items():
            self._exit.enter_context(patch.object(Tensor, name, property(answer)))
        # memory that is given back is not reused here, so there is nothing to record
        self._exit.enter_context(patch.object(Tensor, "record_stream", lambda *_: None))
        self._exit.enter_context(Operations(self))
        calls = self._exit.enter_context(Calls(self))

        def watched(function: Any) -> Any:
            """A mode is off in the calls that it handles; what those call back is Python's again."""

            def again(*arguments: Any, **named: Any) -> Any:
                with nullcontext() if torch._C._len_torch_function_stack() else calls:
                    return function(*arguments, **named)

            return again

        hooks = torch.autograd.graph.saved_tensors_hooks
        set_hooks = hooks.__init__
        self._exit.enter_context(
            patch.object(hooks, "__init__", lambda self, pack, back: set_hooks(self, watched(pack), watched(back)))
        )
        run_backward = watched(torch.autograd._engine_run_backward)
        self._exit.enter_context(patch.object(torch.autograd, "_engine_run_backward", run_backward))
        if find_spec("triton"):
            self._exit.enter_context(self._kernels())
        self._thread = threading.get_ident()
        return self

    def __exit__(self, *_: Any) -> None:
        self._thread = EmulatedCuda.running = None
        self._exit.close()

    def _kernels(self) -> Any:
        """Triton's interpreter, whose kernels count as work of the current stream."""
        from triton.runtime.interpreter import GridExecutor

        launch = GridExecutor.__call__

        def launch_plainly(executor: Any, *arguments: Any, **named: Any) -> Any:
            tensors = [argument for argument in arguments if isinstance(argument, Tensor)]
            assert all(map(self.on_device, tensors)), "a kernel was given memory of the host"
            self.use(tensors, tensors)
            with _plain():
                return launch(executor, *arguments, **named)

        return patch.object(GridExecutor, "__call__", launch_plainly)

    def _device(self, tensor: Tensor) -> torch.device:
        real = torch._C.TensorBase.device.__get__(tensor)
        if real.type != "cpu" or not self.active:
            return real
        return DEVICE if self.on_device(tensor) else HOST

    # ---- memory -----------------------------------------------------------------------------------------------

    def memory(self, tensor: Tensor) -> Memory:
        with _plain():
            storage = tensor.untyped_storage()
            key = storage._cdata
            # the address is not given out again while a weak reference to it is kept
            if key not in self._memory:
                self._memory[key] = Memory(StorageWeakRef(storage), written=Clock(), read=Clock())
                if len(self._memory) % 10_000 == 0:
                    self._memory = {k: m for k, m in self._memory.items() if not m.alive.expired()}
            return self._memory[key]

    def on_device(self, tensor: Tensor) -> bool:
        return not self.memory(tensor).on_host

    def put(self, tensor: Tensor, *, on_host: bool, pinned: bool = False) -> Tensor:
        """Say where a tensor's storage is."""
        memory = self.memory(tensor)
        memory.on_host, memory.pinned = on_host, pinned
        return tensor

    # ---- what is watched --------------------------------------------------------------------------------------

    def wait(self, what: str, work: Clock) -> None:
        """The host waits for work; it is no wait if that is known to be done."""
        if not self.known.knows(work):
            self.waits.append(Wait(what, *caller()))
        self.known.learn(work)

    def wait_for_current(self, what: str) -> None:
        self.current.given += 1
        self.wait(what, self.current.work)

    def use(self, tensors: list[Tensor], written: list[Tensor]) -> None:
        """Work of the current stream that reads and writes these tensors, of either place."""
        stream = self.current
        stream.given += 1
        stream.known.learn(self.known)
        mine = Clock({stream: stream.given})
        for tensor in tensors:
            memory, writes = self.memory(tensor), any(tensor is one for one in written)
            before = Clock(memory.written)
            if writes:
                before.learn(memory.read)
            if not stream.work.knows(before):
                self.races.append(f"{'written' if writes else 'read'} in {caller()[0]}")
            if writes:
                memory.written, memory.read = mine, Clock()
            else:
                memory.read.learn(mine)

    def use_on_host(self, tensor: Tensor, *, writes: bool) -> None:
        """The host touches its memory: it must know that no copy is under way."""
        memory = self.memory(tensor)
        if not self.known.knows(memory.written):
            raise MisuseError(f"memory that a copy to the host is still being written to is used in {caller()[0]}")
        if writes and not self.known.knows(memory.read):
            raise MisuseError(f"page-locked memory is written while it is still being copied from, in {caller()[0]}")

    def copy(self, target: Tensor, source: Tensor, *, non_blocking: bool) -> None:
        """A copy between host and device, which has been done; what it costs the host."""
        host = target if self.memory(target).on_host else source
        if self.memory(host).pinned or host is target:
            self.use([source, target], [target])
        if not self.memory(host).pinned:
            self.wait_for_current("a copy to pageable memory" if host is target else "a copy from pageable memory")
        elif not non_blocking:
            self.wait_for_current("a blocking copy")


@contextmanager
def _plain() -> Iterator[None]:
    with torch._C.DisableTorchFunction(), torch.utils._python_dispatch._disable_current_modes():
        yield


def caller() -> tuple[str, str]:
    """The innermost function outside of torch and of the emulation, and its line."""
    own = (__file__.removesuffix(".py"), str(Path(torch.__file__).parent), contextlib.__file__, threading.__file__)
    frame = sys._getframe()
    while frame.f_back is not None and frame.f_code.co_filename.startswith(own):
        frame = frame.f_back
    path = Path(frame.f_code.co_filename)
    names = ("dpo_scale", "deepspeed", "transformers", "tests")
    start = next((i for i in reversed(range(len(path.parts))) if path.parts[i] in names), len(path.parts) - 1)
    line = linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()
    return f"{'/'.join(path.parts[start:])}: {frame.f_code.co_name}", line
