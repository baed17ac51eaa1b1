"""Lower the project's own FlexAttention call for a GPU that need not be there: lower_flex_attention.py 9.0

Calls `flex_attention` on tensors of the device "meta", which have shapes and no data, forward and backward. torch
traces it as for CUDA; each graph is then relabelled as CUDA's and goes through Inductor's lowering and code generation,
with a device whose properties are stated here. Nothing is executed. Not as on a GPU: Inductor's passes over whole
graphs are left out, of which a single attention has no need.

Prints a line of json per case: heads, width, window and soft-cap; the attention kernels of each graph that torch made
for the row lengths; the highest power of a length among sizes of buffers. With --compile the kernels also go through
Triton's and NVIDIA's compilers, and the line tells their shared memory and spilled registers in bytes. Without --all
the cases are a few that cover every value, with it every combination (some ten minutes, more with --compile).
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import json
import os
import random
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

os.environ["TRITON_INTERPRET"] = "0"
for _variable in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
    os.environ.setdefault(_variable, tempfile.mkdtemp())
sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

import sympy  # noqa: E402
import torch  # noqa: E402
import torch._dynamo.device_interface  # noqa: E402
import torch._inductor.config  # noqa: E402
import torch._inductor.runtime.hints  # noqa: E402
import torch.nn.attention.flex_attention as torch_flex  # noqa: E402
import torch.utils._pytree as pytree  # noqa: E402
import torch.utils.checkpoint  # noqa: E402
import triton  # noqa: E402
from compile_kernels import NoDriver, spilled_bytes  # noqa: E402
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition  # noqa: E402
from torch import Tensor  # noqa: E402
from torch._dynamo.backends.common import aot_autograd  # noqa: E402
from torch._inductor.codecache import PyCodeCache  # noqa: E402
from torch._inductor.debug import DebugContext  # noqa: E402
from torch._inductor.decomposition import select_decomp_table  # noqa: E402
from torch._inductor.graph import GraphLowering  # noqa: E402
from torch._inductor.runtime import triton_helpers  # noqa: E402
from torch._inductor.virtualized import V  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensor  # noqa: E402
from torch.utils._triton import has_triton  # noqa: E402

from dpo_scale.data.layout import PROMPT  # noqa: E402
from dpo_scale.models.attention import AttentionPlan  # noqa: E402
from dpo_scale.models.attention_backends import attention_function  # noqa: E402
from dpo_scale.models.flex_attention import _compiled, flex_attention  # noqa: E402

CUDA = torch.device("cuda", 0)

HEADS = ((32, 8), (28, 4), (16, 2), (40, 8), (64, 8), (9, 3), (32, 32))
WIDTHS = (64, 128, 256)
WINDOWS = (None, 100)
SOFTCAPS = (None, 30.0)
# many blocks, flex-decoding's lengths, one token, either side of a block; torch makes variables of all but the one
TOKENS = (4000, 34, 1, 127, 128, 129)


@dataclass(frozen=True)
class Case:
    heads: tuple[int, int]
    width: int
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    dtype: str = "bfloat16"


@dataclass
class Graph:
    """What Inductor made of one graph."""

    growth: int  # the highest power of a length among its buffers' sizes: 2 would be scores [H, T, T]
    sources: dict[str, str]  # kernels by name

    @property
    def attention(self) -> list[str]:
        """Names of kernels that are filled-in templates, which attention's are."""
        return [name for name in self.sources if name.startswith("triton_tem_")]


class PretendedGpu:
    """A CUDA device of a compute capability, as far as lowering and compiling ask for one."""

    def __init__(self, capability: str) -> None:
        major, minor = map(int, capability.split("."))
        self.capability = major, minor
        self.properties = SimpleNamespace(
            name="pretended", major=major, minor=minor, multi_processor_count=108, warp_size=32, gcnArchName="",
            regs_per_multiprocessor=65536, max_threads_per_multi_processor=2048, max_threads_per_block=1024,
            total_memory=80 * 2**30, L2_cache_size=40 * 2**20, shared_memory_per_block=48 * 1024,
            shared_memory_per_block_optin=SHARED_MEMORY[capability], shared_memory_per_multiprocessor=228 * 1024,
        )  # fmt: skip
        self.graphs: list[Graph] = []

    @contextlib.contextmanager
    def there(self) -> Iterator[None]:
        """Lowering and compiling as on a host with such a device. Not while tracing, which talks to real devices."""
        major, minor = self.capability
        triton.runtime.driver.set_active(NoDriver(10 * major + minor))
        hints = torch._inductor.runtime.hints.DeviceProperties
        shared = {
            "multi_processor_count": self.properties.multi_processor_count,
            "regs_per_multiprocessor": self.properties.regs_per_multiprocessor,
            "max_threads_per_multi_processor": 2048,
            "max_threads_per_block": 1024,
            "warp_size": 32,
        }
        device = hints(type="cuda", index=0, cc=10 * major + minor, major=major, **shared)
        interface = torch._dynamo.device_interface.CudaInterface
        replaced: list[tuple[Any, str, Any]] = [
            (torch.cuda, "is_available", lambda: True),
            (torch.cuda, "_lazy_init", lambda: None),
            (torch.cuda, "current_device", lambda: 0),
            (torch.cuda, "device_count", lambda: 1),
            (torch.cuda, "get_device_properties", lambda *_: self.properties),
            (torch.cuda, "get_device_capability", lambda *_: self.capability),
            (torch.version, "cuda", "12.8"),
            (hints, "create", classmethod(lambda cls, _: device)),
            (interface, "get_compute_capability", staticmethod(lambda *_: 10 * major + minor)),
            (interface.Worker, "get_device_properties", staticmethod(lambda *_: self.properties)),
            (triton_helpers, "set_driver_to_gpu", lambda: None),
        ]
        with contextlib.ExitStack() as stack:
            for owner, name, value in replaced:
                stack.enter_context(mock.patch.object(owner, name, value))
            has_triton.cache_clear()  # it may have been asked before the device was there
            yield

    @contextlib.contextmanager
    def compiles(self) -> Iterator[None]:
        """`torch.compile` lowers for this device, notes what it made in `graphs`, and runs graphs without kernels."""
        backend = aot_autograd(
            fw_compiler=self._lower,
            bw_compiler=self._lower,
            decompositions=select_decomp_table(),
            partition_fn=min_cut_rematerialization_partition,
        )
        with (
            mock.patch.object(torch, "compile", functools.partial(torch.compile, backend=backend)),
            torch._inductor.config.patch(compile_threads=1),
            mock.patch.object(torch_flex, "_validate_device", lambda *_: None),
        ):
            _compiled.cache_clear()
            torch._dynamo.reset()
            yield

    def _lower(self, module: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        fake_mode = torch._guards.detect_fake_mode(inputs)
        with _relabelled(module, inputs), self.there():
            lowering = GraphLowering(module, example_inputs=inputs, shape_env=fake_mode.shape_env)
            with V.set_graph_handler(lowering), V.set_fake_mode(fake_mode), V.set_debug_handler(DebugContext()):
                lowering.run(*inputs)
                sizes = [sympy.sympify(b.get_numel()) for b in lowering.buffers if b.maybe_get_size()]
                code = str(lowering.codegen()[0].value)
        sources = dict(re.findall(r"async_compile\.triton\('(\w+)', '''(.*?)''', device_str='cuda'\)", code, re.DOTALL))
        growth = max(sympy.degree(size, length) for size in sizes for length in size.free_symbols or [sympy.Dummy()])
        self.graphs.append(Graph(int(growth), sources))
        for graph in (m for m in module.modules() if isinstance(m, torch.fx.GraphModule)):
            for node in graph.graph.nodes:
                node.target = STAND_INS.get(node.target, node.target)
            graph.recompile()
        return make_boxed_func(module.forward)

    def compile(self, name: str, source: str) -> tuple[int, int]:
        """Bytes of shared memory of a block and of spilled registers of a thread, of one of Inductor's kernels."""
        binaries = []
        compiler = triton.compile

        def recorded(*args: Any, **kwargs: Any) -> Any:
            binaries.append(compiler(*args, **kwargs))
            return binaries[-1]

        with self.there(), mock.patch.object(triton, "compile", recorded):
            kernel = getattr(PyCodeCache.load(source), name)
            for config in kernel.configs:
                kernel._precompile_config(config)
        return max(b.metadata.shared for b in binaries), max(spilled_bytes(b.asm["cubin"]) for b in binaries)


@contextlib.contextmanager
def _relabelled(module: torch.fx.GraphModule, inputs: list[Any]) -> Iterator[None]:
    """The graph's tensors say that they are CUDA's."""
    graphs = [m for m in module.modules() if isinstance(m, torch.fx.GraphModule)]
    nodes = [node for graph in graphs for node in graph.graph.nodes]
    tensors = {id(t): t for t in pytree.tree_leaves([inputs, [n.meta.get("val") for n in nodes]])}
    fakes = [t for t in tensors.values() if isinstance(t, FakeTensor)]
    makers = [n for n in nodes if "device" in n.kwargs]
    assert all(t.fake_device.type == "meta" for t in fakes)
    for label in (CUDA, torch.device("meta")):
        for fake in fakes:
            fake.fake_device = label
        for node in makers:
            node.kwargs = {**node.kwargs, "device": label}
        if label == CUDA:
            yield


def _shapes_forward(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, ...]:
    statistics = query.new_empty(query.shape[:3], dtype=torch.float32)
    return torch.empty_like(query), statistics, statistics.clone()


def _shapes_backward(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Any, ...]:
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), ()


# what runs in place of the kernels: torch's own stand-ins for the device "meta" take minutes for a soft-cap's gradient
STAND_INS = {
    torch.ops.higher_order.flex_attention: _shapes_forward,
    torch.ops.higher_order.flex_attention_backward: _shapes_backward,
}


class Layer(torch.nn.Module):
    """As much of a decoder layer as attention is called from."""

    is_causal = True

    def __init__(self, case: Case, attention: Callable[..., Any] = flex_attention) -> None:
        super().__init__()
        self.case, self.attention = case, attention
        self.sinks = torch.nn.Parameter(torch.empty(case.heads[0], device="meta")) if case.sinks else None

    def forward(self, query: Tensor, key: Tensor, value: Tensor, plan: AttentionPlan) -> Tensor:
        output, _ = self.attention(
            self,
            query,
            key,
            value,
            None,
            scaling=self.case.width**-0.5,
            sliding_window=self.case.window,
            softcap=self.case.softcap,
            s_aux=self.sinks,
            attention_plan=plan,
        )
        return output


def heads_of(case: Case, tokens: int, frozen_keys: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Query and key as rotary embeddings make them, a value that is a view of its projection."""
    queries, keys = case.heads
    kind = {"dtype": getattr(torch, case.dtype), "device": "meta"}
    query = torch.empty(1, queries, tokens, case.width, requires_grad=True, **kind)
    key = torch.empty(1, keys, tokens, case.width, requires_grad=not frozen_keys, **kind)
    value = torch.empty(1, tokens, keys * case.width, requires_grad=True, **kind)
    return query, key, value.view(1, tokens, keys, case.width).transpose(1, 2)


def plan_of(tokens: int) -> AttentionPlan:
    """One document, which is all that shapes tell."""
    ids = torch.full((1, tokens), PROMPT, device="meta")
    return AttentionPlan(torch.arange(tokens, device="meta")[None], ids, ids, ((tokens, 0),))


def attend(case: Case, tokens: int, gradients: bool = True) -> None:
    """One call as a layer of a model makes it, with its backward pass if gradients are asked for."""
    with torch.set_grad_enabled(gradients):
        output = Layer(case)(*heads_of(case, tokens), plan_of(tokens))
    assert output.shape == (1, tokens, case.heads[0], case.width)
    if gradients:
        output.sum().backward()


SHARED_MEMORY = {"8.0": 163 * 1024, "9.0": 227 * 1024, "10.0": 227 * 1024}  # bytes that a block may have


def quick_cases() -> list[Case]:
    """Every head count, width, window and soft-cap at least once; models of today where there is one."""
    return [
        Case((32, 8), 128),  # Llama-3-8B, Mistral, Qwen3-8B
        Case((64, 8), 64, window=100, sinks=True),  # gpt-oss
        Case((32, 32), 256, window=100, softcap=30.0),  # as wide as Gemma-2's
        Case((9, 3), 64, dtype="float32"),  # SmolLM2-135M
        Case((28, 4), 128, window=100),  # Qwen2.5-7B
        Case((16, 2), 128, softcap=30.0),  # Qwen2.5-3B
        Case((40, 8), 128),  # Qwen2.5-14B
    ]


def all_cases() -> list[Case]:
    product = [Case(*values) for values in itertools.product(HEADS, WIDTHS, WINDOWS, SOFTCAPS)]
    return product + [Case((64, 8), 64, window=window, sinks=True) for window in WINDOWS]


def lower_cases(gpu: PretendedGpu, cases: list[Case], compiles: bool) -> Iterator[dict[str, Any]]:
    """A line per case. What is compiled are the kernels of training on long rows, TOKENS' first."""
    for case in cases:
        began = time.monotonic()
        gpu.graphs.clear()
        with gpu.compiles():
            attend(case, TOKENS[0])
            of_training = {name: graph.sources[name] for graph in gpu.graphs for name in graph.attention}
            for tokens in TOKENS:
                attend(case, tokens)
                attend(case, tokens, gradients=False)
        line = asdict(case) | {
            "graphs": len(gpu.graphs),
            "kernels": [graph.attention for graph in gpu.graphs],
            "growth": max(graph.growth for graph in gpu.graphs),
        }
        if compiles:
            found = {name: gpu.compile(name, source) for name, source in of_training.items()}
            line["shared"] = {name: shared for name, (shared, _) in found.items()}
            line["spilled"] = {name: spilled for name, (_, spilled) in found.items()}
        yield line | {"seconds": round(time.monotonic() - began, 1)}


def random_rows(gpu: PretendedGpu, count: int) -> dict[str, int]:
    """Forms by compiled function after a run of rows of random lengths through layers with and without a window.

    Training with checkpoints and without, a first layer whose keys are frozen (LoRA), evaluation, and layers that are
    compiled themselves. Half of it in a thread of its own, where autograd computes checkpoints again on CUDA.
    """
    draw = random.Random(0)
    attention = attention_function("flex")
    layers = [Layer(Case((32, 8), 128, window=window), attention) for window in WINDOWS]
    # first those that are as long as something else is wide
    lengths = [128, 8, 32, 1, 2, *(draw.choice((draw.randint(1, 300), draw.randint(1, 16384))) for _ in range(count))]

    def checkpointed(layer: Layer, *inputs: Any) -> Tensor:
        return torch.utils.checkpoint.checkpoint(layer, *inputs, use_reentrant=False)

    def train(layer: Callable[..., Tensor], tokens: int) -> None:
        for frozen in (False, True):
            layer(*heads_of(layers[0].case, tokens, frozen), plan_of(tokens)).sum().backward()

    with gpu.compiles(), ThreadPoolExecutor(1) as autograd:
        for tokens in lengths:
            for layer in layers:
                train(functools.partial(checkpointed, layer), tokens)
                autograd.submit(train, layer, tokens).result()
                attend(layer.case, tokens, gradients=False)
        for layer in layers:
            train(torch.compile(layer), lengths[-1])
        functions = [_compiled(w, None, 128**-0.5, gradients) for w in WINDOWS for gradients in (True, False)]
    codes = [function._torchdynamo_orig_callable.__code__ for function in functions]
    return {code.co_name: len(torch._dynamo.eval_frame._debug_get_cache_entry_list(code)) for code in codes}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("capability", choices=SHARED_MEMORY)
    parser.add_argument("--cases", type=int, help="only so many of the quick ones")
    parser.add_argument("--all", action="store_true", help="every combination")
    parser.add_argument("--compile", action="store_true", help="through Triton's and NVIDIA's compilers too")
    parser.add_argument("--rows", type=int, help="instead: count forms over so many random rows")
    options = parser.parse_args()
    torch.set_num_threads(1)
    gpu = PretendedGpu(options.capability)
    if options.rows:
        print(json.dumps(random_rows(gpu, options.rows)))
        return
    for line in lower_cases(gpu, all_cases() if options.all else quick_cases()[: options.cases], options.compile):
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
