"""What the device at hand reaches, measured in at most a minute and kept for later plans.

On a CPU the elementwise parts of a layer take as long as its products, so a peak times an efficiency says little. What
is timed is the run's own: one layer and the head of its model with random weights, on micro-batches as long as its own.
A model of three layers takes two layers longer than a model of one; the rest of that is the head. Two sizes of
micro-batch, up to the run's largest, give what a layer costs at all, and a FLOP. Beside these: products of
large matrices, copies, the optimizer's update; over several ranks, which measure at the same time, their collectives.
"""

from __future__ import annotations

import copy
import hashlib
import json
import multiprocessing
import os
import re
import socket
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dpo_scale.data.batching import MicroBatch, of_groups
from dpo_scale.data.dataset import Pair
from dpo_scale.data.layout import PairBatch, make_batch
from dpo_scale.disk.atomic import write_atomically
from dpo_scale.disk.cache import cache_folder
from dpo_scale.errors import ConfigError
from dpo_scale.forecast.cluster import CONTEXT, CPU_CONTEXT, host_memory
from dpo_scale.forecast.parts import Cluster, Device, Workload
from dpo_scale.forecast.speed import Line, Rates
from dpo_scale.logprobs.pair_loss import PairLoss
from dpo_scale.losses import segment_sums
from dpo_scale.models import lora
from dpo_scale.models.layout_choice import choose_layout, install_attention
from dpo_scale.models.liger import take_kernels
from dpo_scale.models.load import prepare_layers, uses_liger
from dpo_scale.models.scorer import PairScorer
from dpo_scale.settings.tree import Config

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

SECONDS_A_CASE = 2.5  # of repeats, of each of the timed passes
_REPEATS = (3, 20)
_LAYERS = 3  # of the larger of the two models that are timed
_HALVINGS = 9  # of the longest micro-batch, to one that takes no longer
_LEAST_EFFICIENCY = 0.4  # of a layer, as a share of large products, to choose by
_LARGEST_PRODUCT = {"cpu": 1536, "cuda": 8192}
_COPIED = {"cpu": 1 << 26, "cuda": 1 << 30}  # bytes
_SENT = {"cpu": 1 << 24, "cuda": 1 << 28}  # bytes of a collective's whole
_UPDATED = {"cpu": 1 << 24, "cuda": 1 << 27}  # parameters


@dataclass(frozen=True)
class Calibration:
    """What was measured; rates in FLOPs, bytes or parameters a second of one rank while the others do the same.

    Attributes:
        device: its driver's name, or "cpu".
        threads: of a rank, on a CPU.
        memory: of the device, bytes; on a CPU the rank's share of the machine's.
        products: of large matrices.
        bandwidth: read and written by a copy in the device's memory.
        host_link: of a copy from host memory.
        gather: that a rank sends in a large all-gather; 0 for one rank.
        latency: seconds of a small collective.
        rates: of one model's layers, the optimizer's update and the other collectives.
    """

    device: str
    threads: int
    dtype: str
    ranks: int
    memory: int
    products: float
    bandwidth: float
    host_link: float
    gather: float
    latency: float
    rates: Rates

    @property
    def efficiency(self) -> float:
        """Of a layer, as a share of what large products reach."""
        return min(1.0, self.rates.layers_train.flops / self.products)

    def as_device(self) -> Device:
        """The device with what it reaches; what is held beside tensors stays assumed."""
        on_cpu = self.device == "cpu"
        where = f"{self.threads} threads a rank, {self.ranks} ranks" if on_cpu else f"{self.ranks} ranks"
        return Device(
            name=self.device,
            memory=self.memory,
            flops=self.products,
            efficiency=self.efficiency,
            bandwidth=self.bandwidth,
            host_link=self.host_link,
            context=CPU_CONTEXT if on_cpu else CONTEXT,
            source=f"measured here: {where}, {self.dtype}",
            is_measured=True,
        )

    def as_cluster(self) -> Cluster:
        """This machine with as many ranks as were measured."""
        link = self.gather or self.bandwidth
        return Cluster(self.as_device(), self.ranks, 1, link, link, self.latency)


def calibrate(config: Config, model_config: PreTrainedConfig, workload: Workload, ranks: int = 1) -> Calibration:
    """Measure this machine for a run, and store the result. A call from one process; it starts the other ranks.

    Args:
        model_config: of the policy.
        workload: of the run, for the lengths of its micro-batches.
        ranks: that compute at the same time, each on a device of its own or with its share of the cores.
    """
    job = (_settled(config), model_config, _samples(workload), _threads(ranks))
    if ranks == 1:
        found = _measure(*job, rank=0, ranks=1)
    else:
        context, port = multiprocessing.get_context("spawn"), _free_port()
        parent, child = context.Pipe(duplex=False)
        processes = [context.Process(target=_one_of, args=(job, r, ranks, port, child)) for r in range(ranks)]
        for process in processes:
            process.start()
        child.close()
        try:
            found = parent.recv()
        except EOFError:
            raise RuntimeError("calibration ended without a result; what was printed above says why") from None
        finally:
            for process in processes:
                process.join()
    path = _file(found.device, found.threads, found.dtype, ranks, _key(config, model_config, workload))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, [json.dumps(asdict(found), indent=1).encode()])
    return found


def calibrated(
    config: Config, model_config: PreTrainedConfig, workload: Workload, ranks: int = 1
) -> Calibration | None:
    """What `calibrate` stored of this machine, for this number of ranks and these layers; None if there is nothing."""
    path = _file(_device_name(), _threads(ranks), config.model.dtype, ranks, _key(config, model_config, workload))
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        rates = stored["rates"]
        lines: dict[str, Any] = {n: Line(**value) if isinstance(value, dict) else value for n, value in rates.items()}
        return Calibration(**{**stored, "rates": Rates(**lines)})
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(f"{path}: not a calibration ({error}); remove it, and calibrate again") from None


def calibrated_device(
    config: Config, model_config: PreTrainedConfig, workload: Workload, ranks: int = 1
) -> Device | None:
    """The device at hand as it was measured; None if it was not."""
    found = calibrated(config, model_config, workload, ranks)
    return None if found is None else found.as_device()


@dataclass(frozen=True)
class _Sample:
    """A micro-batch to time: lengths [n, 3] of its pairs, forward FLOPs of weights, attention and head, all layers'."""

    lengths: np.ndarray
    flops: tuple[float, float, float]
    layout: Any


def _samples(workload: Workload) -> list[_Sample]:
    """The largest micro-batch of the plans, then a half of it, a quarter and so on; of its last pair the tokens."""
    planner = workload.planner
    rows = [row for plan in workload.plans for step in plan.micro_steps for row in of_groups(step)]
    costs = planner.flops_of(rows).sum(axis=1) / np.array([row.group_size for row in rows])
    lengths = planner.lengths[rows[int(costs.argmax())].indices]
    found = []
    for _ in range(_HALVINGS):
        of_sample = replace(planner, lengths=lengths)
        flops = of_sample.flops_of([MicroBatch.of(np.arange(len(lengths)))])[0]
        found.append(_Sample(lengths, tuple(flops.tolist()), planner.layout))
        lengths = lengths[::2] if len(lengths) > 1 else np.maximum(1, lengths // 2)
    return found


def _two_of(samples: list[_Sample], layers: int, flops: float) -> list[_Sample]:
    """The largest sample of which the timed layers and the head take no longer than a case may, and a quarter of it."""

    def seconds(sample: _Sample) -> float:
        of_layers = (sample.flops[0] + sample.flops[1]) * _LAYERS / layers
        return 3 * (of_layers + sample.flops[2]) / (_LEAST_EFFICIENCY * flops)

    first = next((k for k, s in enumerate(samples) if seconds(s) * _REPEATS[0] <= SECONDS_A_CASE), len(samples) - 3)
    return [samples[first], samples[first + 2]] if first + 2 < len(samples) else [samples[-3], samples[-1]]


def _settled(config: Config) -> Config:
    """The config for one rank with whole rows and without checkpointing, whose second forward pass is calculated."""
    settled = copy.deepcopy(config)
    settled.train.sequence_parallel_size = 1
    settled.model.gradient_checkpointing = settled.model.gradient_checkpointing_offload = False
    return settled


def _threads(ranks: int) -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    named = os.environ.get("OMP_NUM_THREADS", "")
    return int(named) if named.isdigit() and int(named) > 0 else max(1, cores // ranks)


def _device_name() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def _file(device: str, threads: int, dtype: str, ranks: int, key: str) -> Path:
    name = re.sub("[^a-z0-9]+", "-", f"{device} {threads} threads {dtype} {ranks} ranks {key}".lower()).strip("-")
    return cache_folder() / "calibration" / f"{name}.json"


def _key(config: Config, model_config: PreTrainedConfig, workload: Workload) -> str:
    """What decides how long a layer takes: its shape, how it runs, and about how long rows are."""
    shape = {k: v for k, v in model_config.to_dict().items() if k not in _NOT_OF_A_LAYER}
    longest = int(np.log2(_samples(workload)[0].lengths.sum()))
    how = [config.model.compile, config.model.liger, config.model.attn_implementation, config.lora.enabled]
    text = json.dumps([shape, longest, how, workload.planner.layout, config.logprobs.pair_loss], default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


_NOT_OF_A_LAYER = (
    "_name_or_path",
    "transformers_version",
    "num_hidden_layers",
    "layer_types",
    "dtype",
    "architectures",
)


def _one_of(job: tuple[Any, ...], rank: int, ranks: int, port: int, pipe: Any) -> None:
    """A rank of several, in a process of its own."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), LOCAL_WORLD_SIZE=str(ranks))
    from dpo_scale.distributed.join import join

    join(timeout_minutes=5)
    # newer torch has other names for two collectives, which older ones do not know
    warnings.filterwarnings("ignore", category=FutureWarning, message=".*_tensor. is deprecated")
    found = _measure(*job, rank=rank, ranks=ranks)
    if rank == 0:
        pipe.send(found)
    pipe.close()


def _measure(
    config: Config, model_config: Any, samples: list[_Sample], threads: int, *, rank: int, ranks: int
) -> Calibration:
    import torch

    kind = "cuda" if torch.cuda.is_available() else "cpu"
    before = torch.get_num_threads()
    if kind == "cuda":
        torch.cuda.set_device(rank)
    else:
        torch.set_num_threads(threads)
    try:
        timer = _Timer(kind, ranks)
        products = _products(timer, getattr(torch, config.model.dtype))
        gather, reduce, exchange, latency = _collectives(timer)
        updates = _updates(timer)
        return Calibration(
            device=_device_name(),
            threads=threads,
            dtype=config.model.dtype,
            ranks=ranks,
            memory=torch.cuda.mem_get_info()[1] if kind == "cuda" else host_memory() // ranks,
            products=products,
            bandwidth=2 * _copied(timer, kind),
            host_link=_copied(timer, "cpu"),
            gather=gather,
            latency=latency,
            rates=_rates(timer, config, model_config, samples, products, updates, reduce, exchange),
        )
    finally:
        torch.set_num_threads(before)


class _Timer:
    """Times work on a device, on all ranks at once."""

    def __init__(self, kind: str, ranks: int) -> None:
        self.kind, self.ranks = kind, ranks

    def seconds(self, work: Callable[[], Any]) -> float:
        """The quickest of some repeats, since what else the machine does only adds; the slowest rank's, of several."""
        return self.seconds_of_each(work)[0]

    def seconds_of_each(self, *works: Callable[[], Any]) -> list[float]:
        """The same of several that take turns, after one that does not count."""
        first = self._most(sum(self._once(work) for work in works) / len(works))
        repeats = int(np.clip(SECONDS_A_CASE / max(first, 1e-6), *_REPEATS))
        turns = [[self._once(work) for work in works] for _ in range(repeats)]
        return [self._most(min(of_work)) for of_work in zip(*turns, strict=True)]

    def _once(self, work: Callable[[], Any]) -> float:
        import torch

        if self.ranks > 1:
            torch.distributed.barrier()
        if self.kind == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        work()
        if self.kind == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    def _most(self, value: float) -> float:
        """The largest of the ranks' values."""
        import torch

        if self.ranks == 1:
            return value
        tensor = torch.tensor([value], dtype=torch.float64, device=self.kind)
        torch.distributed.all_reduce(tensor, torch.distributed.ReduceOp.MAX)
        return float(tensor.item())


def _products(timer: _Timer, dtype: Any) -> float:
    """FLOPs a second of a product of large square matrices."""
    import torch

    size = _LARGEST_PRODUCT[timer.kind]
    left, right = (torch.randn(size, size, device=timer.kind).to(dtype) for _ in range(2))
    return 2 * size**3 / timer.seconds(lambda: torch.mm(left, right))


def _copied(timer: _Timer, source: str) -> float:
    """Bytes a second of a copy to the device, out of page-locked memory where that is the host's."""
    import torch

    size = _COPIED[timer.kind]
    pinned = timer.kind == "cuda" and source == "cpu"
    origin = torch.ones(size, dtype=torch.uint8, device=source, pin_memory=pinned)
    target = torch.empty(size, dtype=torch.uint8, device=timer.kind)
    return size / timer.seconds(lambda: target.copy_(origin, non_blocking=True))


def _updates(timer: _Timer) -> float:
    """Parameters a second of norm, clipping, Adam's update and the copy of the new weights."""
    import torch

    weights = torch.nn.Parameter(torch.randn(_UPDATED[timer.kind], device=timer.kind))
    weights.grad, used = torch.randn_like(weights), torch.empty_like(weights)
    optimizer = torch.optim.AdamW([weights], lr=1e-6, fused=True)

    def update() -> None:
        assert weights.grad is not None
        norm = torch.linalg.vector_norm(weights.grad)
        weights.grad.mul_(1.0 / (norm + 1.0))
        optimizer.step()
        used.copy_(weights.detach())

    return weights.numel() / timer.seconds(update)


def _collectives(timer: _Timer) -> tuple[float, float, float, float]:
    """Bytes a second that a rank sends in an all-gather, a reduce-scatter, an all-to-all; seconds of a small one."""
    import torch
    import torch.distributed as dist

    if timer.ranks == 1:
        return 0.0, 0.0, 0.0, 0.0
    own = _SENT[timer.kind] // 4 // timer.ranks
    part, whole, other = (torch.ones(n, device=timer.kind) for n in (own, own * timer.ranks, own * timer.ranks))
    sent = 4 * own * (timer.ranks - 1)
    small = timer.seconds(lambda: dist.all_gather_into_tensor(whole[: timer.ranks], part[:1]))
    works: tuple[Callable[[], Any], ...] = (
        lambda: dist.all_gather_into_tensor(whole, part),
        lambda: dist.reduce_scatter_tensor(part, whole),
        lambda: dist.all_to_all_single(other, whole),
    )
    gather, reduce, exchange = (sent / max(1e-9, timer.seconds(work) - small) for work in works)
    return gather, reduce, exchange, small


def _rates(
    timer: _Timer,
    config: Config,
    model_config: Any,
    samples: list[_Sample],
    products: float,
    updates: float,
    reduce: float,
    exchange: float,
) -> Rates:
    """Lines through both samples' times of a layer and of the head: forward and backward, and forward alone."""
    layers = model_config.get_text_config().num_hidden_layers
    of_layer: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    of_head: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    models = [_Model(config, model_config, number) for number in (1, _LAYERS)]
    for sample in _two_of(samples, layers, products):
        weights, attention, head = sample.flops
        batch = _batch(sample, model_config)
        for train in (True, False):
            one, more = timer.seconds_of_each(*(partial(model.run, batch, train=train) for model in models))
            layer = max(more - one, 0.05 * more) / (_LAYERS - 1)
            w, a = (_weight_passes(config), 3.0) if train else (1.0, 1.0)
            of_layer[train].append(((w * weights + a * attention) / layers, layer))
            of_head[train].append((w * head, max(one - layer, 0.01 * one)))
    return Rates(
        _line(of_layer[True]), _line(of_layer[False]), _line(of_head[True]), _line(of_head[False]),
        optimizer=1.0 / updates, reduce=reduce or None, exchange=exchange or None,
    )  # fmt: skip


def _weight_passes(config: Config) -> float:
    return 2.0 if config.lora.enabled else 3.0


def _line(points: list[tuple[float, float]]) -> Line:
    """Through two points (FLOPs, seconds); through the origin and the larger where noise would make it fall or dip."""
    (x0, y0), (x1, y1) = sorted(points)
    slope = (y1 - y0) / (x1 - x0) if x1 > x0 else 0.0
    if slope <= 0 or y1 - slope * x1 < 0:
        return Line(0.0, x1 / y1)
    return Line(y1 - slope * x1, 1.0 / slope)


class _Model:
    """So many of a model's layers and its head, with random weights, run as training runs them."""

    def __init__(self, config: Config, model_config: Any, layers: int) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        shape = copy.deepcopy(model_config)
        text = shape.get_text_config()
        text.num_hidden_layers = layers
        if getattr(text, "layer_types", None):
            text.layer_types = text.layer_types[:layers]
        choice = choose_layout(config, [shape])
        kind = "cuda" if torch.cuda.is_available() else "cpu"
        with torch.device(kind):
            model = AutoModelForCausalLM.from_config(
                shape, dtype=getattr(torch, config.model.dtype), trust_remote_code=config.model.trust_remote_code
            )
        if uses_liger(config)[0]:
            take_kernels(model, check=False)
        install_attention(model, choice.option)
        if config.lora.enabled:
            model = lora.add_adapter(model, config.lora, config.train.seed)
        prepare_layers(model, config, {"zero_optimization": {"stage": 0}}, "calibrated model")
        self.scorer = PairScorer(model, config.logprobs.implementation, choice.option.layout, choice.groups).to(kind)
        self.fused = config.logprobs.pair_loss != "tokens" and config.loss.is_pairwise and not config.lora.enabled

    def run(self, batch: PairBatch, *, train: bool) -> None:
        """A forward pass; with `train` also the loss, its backward pass, and gradients that are forgotten."""
        import torch
        from torch.nn.functional import logsigmoid

        def loss_of_sums(sums: torch.Tensor) -> torch.Tensor:
            return -logsigmoid(0.1 * (sums[:, 0] - sums[:, 1]))

        if not train:
            with torch.no_grad():
                self.scorer.eval()(**batch.scorer_inputs)
            return
        self.scorer.train()
        if self.fused:
            pair_loss = PairLoss(batch.score_segments, batch.scored_tokens, loss_of_sums)
            total, _ = self.scorer(**batch.scorer_inputs, pair_loss=pair_loss)
        else:
            logps = self.scorer(**batch.scorer_inputs)
            total = loss_of_sums(segment_sums(logps, batch.score_segments, batch.num_pairs)).sum()
        total.backward()
        self.scorer.zero_grad()


def _batch(sample: _Sample, model_config: Any) -> PairBatch:
    import torch

    draw, vocabulary = np.random.default_rng(0), model_config.get_text_config().vocab_size

    def ids(count: int) -> np.ndarray:
        return draw.integers(0, vocabulary, count, dtype=np.int32)

    pairs = [
        Pair(ids(prompt), ids(chosen), ids(rejected), b"", i)
        for i, (prompt, chosen, rejected) in enumerate(sample.lengths.tolist())
    ]
    batch = make_batch(sample.layout, pairs, np.ones(len(pairs)), 0)
    return batch.to(torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
