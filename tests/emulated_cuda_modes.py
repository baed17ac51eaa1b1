"""How `EmulatedCuda` watches torch, and what DeepSpeed is told of the device.

Torch's function mode sees what Python asks for, its dispatch mode what that is made of.
Copies between host and device, and the device that a tensor is to be made on, are seen by the first alone: below, all
is on the CPU. What reads values is certain to be seen by the second alone: `bool(tensor)` and many functions come down
to `item`. Both watch autograd's backward passes.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from emulated_cuda import DEVICE, HOST, EmulatedCuda, Event, MisuseError, Stream, caller
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten, Tensor = torch.ops.aten, torch.Tensor
# the size of what these return is in their operands' values
SIZED_BY_VALUES = {"nonzero", "masked_select", "unique_dim", "_unique", "_unique2", "unique_consecutive", "bincount"}
ANSWERS_THE_HOST = {"_local_scalar_dense", "equal", "is_nonzero"}
READ_WITHOUT_DISPATCH = (Tensor.tolist, Tensor.numpy, Tensor.__array__)


class Calls(TorchFunctionMode):
    """What Python asks torch for."""

    def __init__(self, cuda: EmulatedCuda) -> None:
        super().__init__()
        self._cuda = cuda
        self._answers = {
            Tensor.is_pinned: lambda t, *_: cuda.memory(t).pinned,
            Tensor.get_device: lambda t: 0 if cuda.on_device(t) else -1,
        }

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        cuda, kwargs = self._cuda, dict(kwargs or {})
        if func in self._answers:
            return self._answers[func](*args)
        if func is Tensor.pin_memory:
            return args[0] if cuda.memory(args[0]).pinned else self._copy_of(args[0], on_host=True, pinned=True)
        if func in (Tensor.to, Tensor.cpu, Tensor.cuda):
            return self._moved(func, args, kwargs)
        if func in READ_WITHOUT_DISPATCH:
            if cuda.on_device(args[0]):
                if func is not Tensor.tolist:
                    raise TypeError("can't convert cuda:0 device type tensor to numpy")
                cuda.use([args[0]], [])
                cuda.wait_for_current("tolist")
            else:
                cuda.use_on_host(args[0], writes=False)
            return func(*args, **kwargs)
        place, pin = kwargs.get("device"), kwargs.pop("pin_memory", False)
        on_device = any(isinstance(leaf, Tensor) and cuda.on_device(leaf) for leaf in tree_leaves((args, kwargs)))
        if place is not None and torch.device(place).type in ("cpu", "cuda"):
            on_device = torch.device(place).type == "cuda"
            kwargs["device"] = HOST
            if func in (torch.tensor, torch.as_tensor, Tensor.new_tensor) and on_device:
                data = args[1] if func is Tensor.new_tensor else args[0]
                if not isinstance(data, Tensor):
                    cuda.wait_for_current(f"{func.__name__}(..., device=...)")
        cuda.calls.append(not on_device)
        try:
            result = func(*args, **kwargs)
        finally:
            cuda.calls.pop()
        if pin:
            cuda.put(result, on_host=True, pinned=True)
        return result

    def _moved(self, func: Any, args: tuple, kwargs: dict) -> Tensor:
        """`to`, `cpu` and `cuda`."""
        cuda, tensor = self._cuda, args[0]
        if func is Tensor.to:
            copy = kwargs.get("copy", False)
            others = args[1:]
            if others and isinstance(others[0], Tensor):
                others = (cuda.on_device(others[0]) and DEVICE or HOST, others[0].dtype, *others[1:])
            if others and isinstance(others[0], str):
                others = (torch.device(others[0]), *others[1:])
            device, dtype, non_blocking, layout = torch._C._nn._parse_to(
                *others, **{name: value for name, value in kwargs.items() if name != "copy"}
            )
        else:
            device, dtype, copy, layout = (HOST if func is Tensor.cpu else DEVICE), None, False, None
            non_blocking = kwargs.get("non_blocking", False)
        if tensor.is_meta or (device is not None and device.type == "meta"):
            return func(*args, **kwargs)
        to_host = not cuda.on_device(tensor) if device is None else device.type == "cpu"
        options = {"dtype": dtype, "copy": copy, **({"memory_format": layout} if layout is not None else {})}
        if to_host != cuda.on_device(tensor):
            cuda.calls.append(to_host)
            try:
                return Tensor.to(tensor, **{k: v for k, v in options.items() if v is not None})
            finally:
                cuda.calls.pop()
        moved = self._copy_of(tensor, on_host=to_host, pinned=to_host and non_blocking)
        cuda.copy(moved, tensor, non_blocking=non_blocking)
        return moved if dtype is None else moved.to(dtype)

    def _copy_of(self, tensor: Tensor, *, on_host: bool, pinned: bool = False) -> Tensor:
        """A copy in the other place. Autograd goes through it as through any other."""
        with torch.utils._python_dispatch._disable_current_modes():
            copy = tensor.clone()
        return self._cuda.put(copy, on_host=on_host, pinned=pinned)


class Operations(TorchDispatchMode):
    """What the calls are made of, down to the last `item`."""

    def __init__(self, cuda: EmulatedCuda) -> None:
        super().__init__()
        self._cuda = cuda

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        cuda, kwargs = self._cuda, kwargs or {}
        name = func.overloadpacket.__name__
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        written = _written(func, args, kwargs)
        if func.namespace != "aten":  # collectives
            there = [tensor for tensor in inputs if cuda.on_device(tensor)]
            cuda.use(there, there)
            return func(*args, **kwargs)
        if name == "lift_fresh":
            # a number made into a tensor for a call on the device, or data that came from Python or NumPy
            return cuda.put(args[0], on_host=cuda.calls[-1] if cuda.calls else True)
        on_device = [cuda.on_device(tensor) for tensor in inputs]
        if any(on_device):
            self._watch(func, name, args, kwargs, inputs, written)
        else:
            for tensor in inputs:
                cuda.use_on_host(tensor, writes=any(tensor is one for one in written))
        result = self._run(func, args, kwargs)
        # made by C++ alone, as zeros for a gradient that is missing are: on the device
        host = not any(on_device) if inputs else bool(cuda.calls) and cuda.calls[-1]
        if host:
            known = {cuda.memory(tensor).alive.cdata for tensor in inputs}
            for leaf in tree_leaves(result):
                if isinstance(leaf, Tensor) and cuda.memory(leaf).alive.cdata not in known:
                    cuda.put(leaf, on_host=True)
        return result

    def _watch(
        self, func: Any, name: str, args: tuple, kwargs: dict, inputs: list[Tensor], written: list[Tensor]
    ) -> None:
        cuda = self._cuda
        if name == "copy_" and cuda.on_device(args[0]) != cuda.on_device(args[1]):
            fill = args[1].dim() == 0 and cuda.on_device(args[0]) and not cuda.memory(args[1]).pinned
            if not (fill and cuda.calls and _is_setitem()):
                cuda.copy(args[0], args[1], non_blocking=kwargs.get("non_blocking", len(args) > 2 and args[2]))
            return
        if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            indices = [index for index in args[1] if index is not None]
            if any(index.dtype in (torch.bool, torch.uint8) for index in indices) and not _is_masked_fill(args):
                cuda.wait_for_current("a mask as index")
            if cuda.on_device(args[0]) and any(index.dim() and not cuda.on_device(index) for index in indices):
                cuda.wait_for_current("an index from pageable memory")
                inputs = [t for t in inputs if cuda.on_device(t)]
        mixed = [t for t in inputs if not cuda.on_device(t) and t.dim() > 0]
        if mixed:
            raise MisuseError(f"{name} of host and device tensors in {caller()[0]}")
        cuda.use([t for t in inputs if cuda.on_device(t)], written)
        waits = name in SIZED_BY_VALUES or name in ANSWERS_THE_HOST
        waits |= name == "repeat_interleave" and kwargs.get("output_size") is None
        waits |= name == "segment_reduce" and not kwargs.get("unsafe", False)
        if waits:
            cuda.wait_for_current("item" if name == "_local_scalar_dense" else name)

    def _run(self, func: Any, args: tuple, kwargs: dict) -> Any:
        if func in (aten.mm.dtype, aten.mm.dtype_out, aten.addmm.dtype, aten.addmm.dtype_out):  # CUDA's alone
            *operands, dtype = args[: 3 if func in (aten.mm.dtype, aten.mm.dtype_out) else 4]
            operands = [operand.to(dtype) for operand in operands]
            made = (torch.mm if len(operands) == 2 else torch.addmm)(*operands)
            return kwargs["out"].copy_(made) if "out" in kwargs else made
        return func(*args, **kwargs)


def _written(func: Any, args: tuple, kwargs: dict) -> list[Tensor]:
    """The inputs that an operator writes to."""
    named = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | kwargs
    writes = [a.name for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    return [leaf for name in writes for leaf in tree_leaves(named.get(name)) if isinstance(leaf, Tensor)]


def _is_masked_fill(args: tuple) -> bool:
    """`index_put_` with one mask and one number is done as `masked_fill_`, which asks for nothing."""
    return len(args) > 2 and args[2].numel() == 1 and len(args[1]) == 1


def _is_setitem() -> bool:
    """`tensor[...] = number` fills on the device; as an operator it looks like a copy from the host."""
    frame = sys._getframe()
    while frame is not None and frame.f_code.co_name != "__torch_function__":
        frame = frame.f_back
    return frame is not None and getattr(frame.f_locals.get("func"), "__name__", "") == "__setitem__"


@contextmanager
def emulated_accelerator(cuda: EmulatedCuda) -> Iterator[None]:
    """DeepSpeed's view of the device: its CPU accelerator, which works like CUDA's for the thread that is watched."""
    from deepspeed.accelerator import get_accelerator

    def tensor_of(dtype: torch.dtype) -> property:
        return property(lambda _: lambda data: torch.tensor(data, dtype=dtype, device="cuda"))

    answers = {
        **dict.fromkeys(("is_synchronized_device", "resolves_data_dependency"), lambda self: False),
        **dict.fromkeys(("handles_memory_backpressure", "use_host_timers"), lambda self: False),
        "device_name": lambda self, index=None: "cuda" if cuda.active else "cpu",
        "current_device_name": lambda self: "cuda:0" if cuda.active else "cpu",
        "on_accelerator": lambda self, tensor: cuda.on_device(tensor),
        "stream": lambda self, stream: cuda.on_stream(stream),
        "current_stream": lambda self, index=None: cuda.current,
        "default_stream": lambda self, index=None: cuda.default,
        "synchronize": lambda self, index=None: cuda.synchronize(),
        "Stream": property(lambda self: Stream),
        "Event": property(lambda self: Event),
        "FloatTensor": tensor_of(torch.float32),
        "ByteTensor": tensor_of(torch.uint8),
    }
    accelerator = get_accelerator()
    before = type(accelerator)
    accelerator.__class__ = type("Emulated", (before,), answers)
    try:
        yield
    finally:
        accelerator.__class__ = before
