"""The time of a step, from the run's own plans and what the cluster reaches. Pure arithmetic.

    step = sum over micro-steps of max(computing, traffic)        at stage 3, where gathers are prefetched
         or sum over micro-steps of (computing + traffic)         elsewhere
         + reference + optimizer + what only a step needs

Computing is that of the rank with the most FLOPs in a micro-step, since each waits there for the others. Letters:
N parameters, T of them trained, P bytes of the weights' dtype, R of the dtype that gradients are summed in, W ranks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from dpo_scale.data.batching import MicroBatch, of_groups
from dpo_scale.data.flops import ForwardFlops
from dpo_scale.data.layout import pair_tokens
from dpo_scale.data.planning import runs_reference
from dpo_scale.forecast.parts import Cluster, Device, StepTime, Workload
from dpo_scale.settings.deepspeed import MAX_BUCKET_ELEMENTS
from dpo_scale.settings.tree import Config

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_SHORT = {"fp32": 4, "bf16": 2, "bfp16": 2, "fp16": 2}  # `communication_data_type` of a DeepSpeed JSON

# Measured on two ranks (design notes on scale): a checkpointed or plain micro-step gathers the weights 1.87 to 1.94
# times, because what the forward pass gathered last the backward pass finds.
GATHERS = 1.9
# Bytes of memory that an optimizer step reads and writes for a parameter: gradient, weight and two moments in fp32
# read, the last three written (28), the norm (4), clipping (8), weights cast and copied (8).
OPTIMIZER_BYTES = 48
# Assumed of a machine's processors: bytes a second of their memory that Adam's step reaches, of 200 to 600 stated.
HOST_BANDWIDTH = 100e9
# Assumed of the disk under output_dir and the store, a machine; a file system over a network may have less.
DISK_BANDWIDTH = 1e9
# Host seconds to issue a layer's kernels, forward and with a checkpointed backward pass; and what ZeRO-3's hooks add.
# Measured (benchmarks/zero3_hooks.py): 12, 87, 43 and 160 ms for 32 layers.
_ISSUE_FORWARD, _ISSUE_TRAIN = 12e-3 / 32, 87e-3 / 32
HOOKS_FORWARD, HOOKS_TRAIN = (43e-3 - 12e-3) / 32, (160e-3 - 87e-3) / 32


class Sizes(Protocol):
    """What of a model's shape its speed depends on (`dpo_scale.forecast.shape.ModelShape`)."""

    @property
    def total(self) -> int: ...
    @property
    def trained(self) -> int: ...
    @property
    def layers(self) -> int: ...
    @property
    def hidden(self) -> int: ...
    @property
    def heads(self) -> int: ...
    @property
    def key_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...


@dataclass(frozen=True)
class Line:
    """Seconds of some work: `base` + FLOPs / `flops`."""

    base: float
    flops: float

    def seconds(self, flops: Any) -> Any:
        return self.base + flops / self.flops


@dataclass(frozen=True)
class Rates:
    """How fast a device computes, and ranks reduce.

    Attributes:
        layers_train: a layer's forward and backward pass, by their FLOPs (three forward passes').
        layers_forward: its forward pass without gradients.
        head_train, head_forward: of the head with its loss, once a micro-step.
        optimizer: seconds for each parameter that a rank updates.
        reduce, exchange: bytes a second that a rank sends in a reduction and in an all-to-all; None: as in a gather.
        issue_forward, issue_train: seconds that the host needs for a layer while the device computes.
    """

    layers_train: Line
    layers_forward: Line
    head_train: Line
    head_forward: Line
    optimizer: float
    reduce: float | None = None
    exchange: float | None = None
    issue_forward: float = 0.0
    issue_train: float = 0.0

    @classmethod
    def assumed(cls, device: Device) -> Rates:
        """Of a device that was not measured: `efficiency` of its peak for all products."""
        line = Line(0.0, device.flops * device.efficiency)
        on_cpu = device.name == "cpu"
        issue = (0.0, 0.0) if on_cpu else (_ISSUE_FORWARD, _ISSUE_TRAIN)
        return cls(line, line, line, line, OPTIMIZER_BYTES / device.bandwidth, None, None, *issue)


def time_of(
    config: Config,
    cluster: Cluster,
    workload: Workload,
    sizes: Sizes,
    *,
    reference: Sizes | None = None,
    rates: Rates | None = None,
) -> StepTime:
    """The mean step of `workload.plans` and what a run needs beside its steps.

    Args:
        sizes: of the policy, adapters included.
        reference: of a reference that is a model of its own; None: the policy's.
        rates: as measured (`dpo_scale.forecast.calibrate`); None: assumed by the cluster's device.
    """
    return _Estimate(
        config, cluster, workload, sizes, reference or sizes, rates or Rates.assumed(cluster.device)
    ).time()


def ring_seconds(cluster: Cluster, size: float) -> float:
    """Seconds of an all-gather or a reduce-scatter of `size` bytes over all ranks, without its latency.

    Each device takes in all but its own part over its link within the machine, each machine all but its own part over
    the adapters of all its devices, because NCCL lays as many rings as there are adapters; the slower of the two
    counts: max((W - 1) / W size / within, (n - 1) / n size / (devices of a machine x between)), n machines. An
    all-reduce is two of them.
    """
    ranks, nodes = cluster.world_size, cluster.nodes
    within = size * (ranks - 1) / ranks / cluster.within if cluster.per_node > 1 else 0.0
    between = size * (nodes - 1) / nodes / (cluster.per_node * cluster.between)
    return max(within, between)


def exchange_seconds(cluster: Cluster, size: float, ranks: int) -> float:
    """Seconds of an all-to-all in which each of `ranks` neighbours holds `size` bytes, without its latency.

    1/ranks of them stay where they are; what goes to other machines takes the device's own adapter.
    """
    inside = min(ranks, cluster.per_node)
    return size * max((inside - 1) / ranks / cluster.within, (ranks - inside) / ranks / cluster.between)


def stage3_traffic(
    cluster: Cluster, *, parameters: int, trained: int, weight_bytes: int, reduce_bytes: int, group: int = 0
) -> tuple[float, float]:
    """Seconds of a micro-step's gathers and of its reductions at stage 3, latencies apart.

    1.9 x P N gathered and R T reduced, whatever W is; half of the gathers stays within `group` neighbours where weights
    have a second partition there (hpZ: the backward pass's).
    """
    gathered = GATHERS * weight_bytes * parameters
    gathers = ring_seconds(cluster, gathered)
    if group > 1:
        gathers = (gathers + ring_seconds(_neighbours(cluster, group), gathered)) / 2
    return gathers, ring_seconds(cluster, reduce_bytes * trained)


def _neighbours(cluster: Cluster, ranks: int) -> Cluster:
    """So many neighbouring ranks as a cluster of their own."""
    per_node = min(ranks, cluster.per_node)
    share = ranks / cluster.world_size
    return replace(cluster, per_node=per_node, nodes=-(-ranks // per_node), latency=cluster.latency * share)


class _Estimate:
    def __init__(
        self, config: Config, cluster: Cluster, workload: Workload, sizes: Sizes, reference: Sizes, rates: Rates
    ) -> None:
        self.config, self.cluster, self.workload, self.rates = config, cluster, workload, rates
        self.sizes, self.reference, self.planner = sizes, reference, workload.planner
        stated = config.deepspeed.stated
        self.zero: dict[str, Any] = stated.get("zero_optimization", {})
        self.stage = config.deepspeed.stage
        self.weight_bytes = BYTES[config.model.dtype]
        named = config.train.reduce_dtype or config.model.dtype
        self.reduce_bytes = _SHORT.get(str(stated.get("communication_data_type")), BYTES[named])
        self.on_cpu = cluster.device.name == "cpu"
        self.passes = 4.0 if config.model.gradient_checkpointing else 3.0
        # gloo's collectives are waited for; NCCL's run beside the computation where DeepSpeed asks for it
        self.overlaps = not self.on_cpu and bool(self.zero.get("overlap_comm", self.stage == 3))
        # reductions of several processes of one machine go through its processor, so a rate of their own
        self.reducing = cluster if rates.reduce is None else replace(cluster, within=rates.reduce)
        self.exchanging = cluster if rates.exchange is None else replace(cluster, within=rates.exchange)

    def time(self) -> StepTime:
        parts: dict[str, float] = {}
        hidden = 0.0
        plans = self.workload.plans
        for plan in plans:
            of_plan, hidden_of_plan = self.step(plan.micro_steps, plan.reference_passes)
            for name, seconds in of_plan.items():
                parts[name] = parts.get(name, 0.0) + seconds / len(plans)
            hidden += hidden_of_plan / len(plans)
        kept = {name: seconds for name, seconds in parts.items() if seconds > 0}
        return StepTime(kept, self.once(), hidden, self.left_out())

    def step(
        self, micro_steps: list[list[MicroBatch]], reference_passes: list[list[MicroBatch]]
    ) -> tuple[dict[str, float], float]:
        """Seconds of a step by part, and what of its traffic is hidden."""
        kinds = np.array([self.train_seconds(of_ranks) for of_ranks in micro_steps])  # [k, W, 3]
        busy = kinds.sum(axis=2)
        together = self.stage in (2, 3) or self.planner.groups.largest > 1
        slowest = busy.max(axis=1) if together else np.full(len(busy), busy.sum(axis=0).max() / len(busy))
        layers, attention, head = kinds.mean(axis=1).sum(axis=0)
        parts = {"layers": layers, "attention": attention, "head": head}
        parts["waiting for the slowest rank"] = max(0.0, float(slowest.sum() - busy.mean(axis=1).sum()))
        if self.stage == 3 and self.on_cpu:
            parts["ZeRO's hooks"] = HOOKS_TRAIN * self.sizes.layers * len(micro_steps)
        parts["sharing rows"] = sum(self.sharing_seconds(of_ranks) for of_ranks in micro_steps)
        gathers, reductions = self.traffic()
        visible = self.visible(slowest, gathers + reductions)
        share = visible / (gathers + reductions) if gathers + reductions else 0.0
        parts["gathering weights"], parts["reducing gradients"] = gathers * share, reductions * share
        hidden = (gathers + reductions) * len(micro_steps) - visible
        issue = (self.rates.issue_train + (HOOKS_TRAIN if self.stage == 3 else 0.0)) * self.sizes.layers
        if not self.on_cpu:
            taken = np.maximum(slowest, gathers + reductions)
            parts["host issues kernels"] = float(np.maximum(0.0, issue - taken).sum())
        parts["adding gradients up"] = self.accumulation_seconds() * len(micro_steps)
        parts["offloaded copies"] = self.copied_seconds(micro_steps)
        parts["reference"], hidden_of_reference = self.reference_seconds(reference_passes)
        once_a_step = self.step_traffic()
        parts["reducing gradients"] += once_a_step[0]
        parts["gathering weights"] += once_a_step[1]
        parts["optimizer"] = self.optimizer_seconds()
        return parts, hidden + hidden_of_reference

    def train_seconds(self, of_ranks: list[MicroBatch]) -> np.ndarray:
        """Each rank's forward and backward pass, seconds [W, 3]: layers' weights, attention, head."""
        of_rows = of_groups(of_ranks)
        groups = np.array([row.group_size for row in of_rows])
        flops = self.planner.flops_of(of_rows) / groups[:, None]
        again = self.passes - 3.0  # checkpointing computes the layers once more, the head not
        weights = (2.0 if self.config.lora.enabled else 3.0) + again
        line, head = self.rates.layers_train, self.rates.head_train
        seconds = np.stack(
            [
                self.sizes.layers * line.base * self.passes / 3 + weights * flops[:, 0] / line.flops,
                self.passes * flops[:, 1] / line.flops,
                head.seconds((2.0 if self.config.lora.enabled else 3.0) * flops[:, 2]),
            ],
            axis=1,
        )
        return np.repeat(seconds, groups, axis=0)

    def forward_seconds(self, of_ranks: list[MicroBatch], sizes: Sizes) -> np.ndarray:
        """Each rank's forward pass without gradients, seconds [W]."""
        of_rows = of_groups(of_ranks)
        groups = np.array([row.group_size for row in of_rows])
        flops = self.planner.flops_of(of_rows) / groups[:, None] * (sizes.total / self.sizes.total)
        layers = (
            sizes.layers * self.rates.layers_forward.base + flops[:, :2].sum(axis=1) / self.rates.layers_forward.flops
        )
        return np.repeat(layers + self.rates.head_forward.seconds(flops[:, 2]), groups)

    def traffic(self) -> tuple[float, float]:
        """A micro-step's gathers and reductions, latencies included.

        Stage 3: `stage3_traffic`. Stage 2: DeepSpeed reduces in every micro-step, and does so by all-reduces of whole
        buckets (`use_multi_rank_bucket_allreduce`): 2 R T. Stages 0 and 1 reduce once a step (`step_traffic`).
        """
        if self.cluster.world_size == 1:
            return 0.0, 0.0
        reductions = self.buckets() * self.reducing.latency
        if self.stage == 3:
            group = int(self.zero.get("zero_hpz_partition_size", 1))
            gathers, reduced = stage3_traffic(
                self.cluster,
                parameters=self.sizes.total,
                trained=self.sizes.trained,
                weight_bytes=self.weight_bytes,
                reduce_bytes=self.reduce_bytes,
                group=group,
            )
            if self.rates.reduce is not None:
                reduced = ring_seconds(self.reducing, self.reduce_bytes * self.sizes.trained)
            latency = self.cluster.latency
            if group > 1:
                latency = (latency + _neighbours(self.cluster, group).latency) / 2
            gathers += GATHERS * (self.sizes.layers + 2) * latency
            if self.config.deepspeed.offload_param == "cpu":
                own = self.weight_bytes * self.sizes.total / self.cluster.world_size
                gathers += GATHERS * own / self.cluster.device.host_link
            return gathers, reduced + reductions
        if self.stage == 2:
            return 0.0, 2 * ring_seconds(self.reducing, self.reduce_bytes * self.sizes.trained) + reductions
        return 0.0, 0.0

    def step_traffic(self) -> tuple[float, float]:
        """What a step reduces and gathers once: stages 0 and 1 all-reduce 2 R T; 1 and 2 gather P T of new weights."""
        if self.cluster.world_size == 1:
            return 0.0, 0.0
        reduced = gathered = 0.0
        if self.stage in (0, 1):
            reduced = 2 * ring_seconds(self.reducing, self.reduce_bytes * self.sizes.trained)
            reduced += self.buckets() * self.cluster.latency
        if self.stage in (1, 2):
            gathered = ring_seconds(self.cluster, self.weight_bytes * self.sizes.trained)
            gathered += self.buckets() * self.cluster.latency
        return reduced, gathered

    def buckets(self) -> int:
        size = int(self.zero.get("reduce_bucket_size", MAX_BUCKET_ELEMENTS))
        return max(1, -(-self.sizes.trained // max(1, size)))

    def visible(self, computing: np.ndarray, traffic: float) -> float:
        """Seconds of a step's traffic that computing does not hide: what is longer than each micro-step, or all."""
        if not self.overlaps:
            return traffic * len(computing)
        return float(np.maximum(0.0, traffic - computing).sum())

    def accumulation_seconds(self) -> float:
        """A micro-step's gradients go through memory: into a bucket, out of it, and onto the sum in fp32.

        4 R T bytes, and R + 8 for each one that the rank keeps.
        """
        kept = self.sizes.trained / (self.cluster.world_size if self.stage in (2, 3) else 1)
        moved = 4 * self.reduce_bytes * self.sizes.trained * (self.stage in (2, 3)) + (self.reduce_bytes + 8) * kept
        return moved / self.cluster.device.bandwidth

    def copied_seconds(self, micro_steps: list[list[MicroBatch]]) -> float:
        """Copies between device and host that are waited for, a step.

        An offloaded optimizer takes each micro-step's R T / W gradients and gives P T / W weights back. Offloaded
        layer inputs go there and back in every micro-step: 2 P layers x hidden size x tokens.
        """
        link, ranks = self.cluster.device.host_link, self.cluster.world_size
        seconds = 0.0
        if self.config.deepspeed.offload_optimizer == "cpu":
            own = self.sizes.trained / ranks
            seconds += (len(micro_steps) * self.reduce_bytes + self.weight_bytes) * own / link
        if self.config.model.gradient_checkpointing_offload:
            tokens = sum(self.tokens(of_ranks) for of_ranks in micro_steps)
            seconds += 2 * self.weight_bytes * self.sizes.layers * self.sizes.hidden * tokens / link
        return seconds

    def tokens(self, of_ranks: list[MicroBatch]) -> float:
        """Most tokens of a rank in a micro-step, by the weights' FLOPs."""
        of_rows = of_groups(of_ranks)
        groups = np.array([row.group_size for row in of_rows])
        return float((self.planner.flops_of(of_rows)[:, 0] / groups).max() / self.planner.flops.per_token)

    def sharing_seconds(self, of_ranks: list[MicroBatch]) -> float:
        """All-to-alls of the rows that ranks share in a micro-step: the longest of the groups'.

        In a pass over a layer a rank sends P (2 query width + 2 key width) bytes for each of its tokens, in two
        exchanges: forward, backward, and once more with checkpointing. None is hidden.
        """
        longest = 0.0
        width = 2 * self.sizes.head_dim * (self.sizes.heads + self.sizes.key_heads)
        passes = (self.passes - 1.0) * self.sizes.layers
        for row in of_groups(of_ranks):
            if row.group_size > 1:
                tokens = self.planner.flops_of([row])[0, 0] / self.planner.flops.per_token / row.group_size
                seconds = exchange_seconds(self.exchanging, self.weight_bytes * width * tokens, row.group_size)
                seconds += 2 * _neighbours(self.cluster, row.group_size).latency
                longest = max(longest, passes * seconds)
        return longest

    def reference_seconds(self, passes: list[list[MicroBatch]]) -> tuple[float, float]:
        """A reference that runs in the step, and what of its gathers is hidden.

        Sharded, each pass gathers P N; a whole copy makes nobody wait before the last pass.
        """
        if not passes:
            return 0.0, 0.0
        adapter = self.config.reference.mode == "adapter"
        sizes = self.sizes if adapter else self.reference
        sharded = self.stage == 3 if adapter else self.config.reference.stage == 3
        busy = np.array([self.forward_seconds(of_ranks, sizes) for of_ranks in passes])
        if not sharded:
            return float(busy.sum(axis=0).max()), 0.0
        slowest = busy.max(axis=1)
        gathers = self.gather_of_pass(sizes, self.config.deepspeed if adapter else self.config.reference)
        hooks = HOOKS_FORWARD * sizes.layers * len(passes) if self.on_cpu else 0.0
        visible = float(np.maximum(0.0, gathers - slowest).sum()) if not self.on_cpu else gathers * len(passes)
        return float(slowest.sum()) + hooks + visible, gathers * len(passes) - visible

    def gather_of_pass(self, sizes: Sizes, settings: Any) -> float:
        """All weights of a sharded model, once."""
        if self.cluster.world_size == 1 and settings.offload_param != "cpu":
            return 0.0
        size = self.weight_bytes * sizes.total
        seconds = ring_seconds(self.cluster, size) + (sizes.layers + 2) * self.cluster.latency
        if settings.offload_param == "cpu":
            seconds += size / self.cluster.world_size / self.cluster.device.host_link
        return seconds

    def optimizer_seconds(self) -> float:
        """Norm, clipping and update of the parameters that a rank keeps states of: all at stage 0, else T / W."""
        own = self.sizes.trained / (1 if self.stage == 0 else self.cluster.world_size)
        if self.config.deepspeed.offload_optimizer == "cpu" and not self.on_cpu:
            return OPTIMIZER_BYTES * own * self.cluster.per_node / HOST_BANDWIDTH
        return own * self.rates.optimizer * (0.5 if self.config.deepspeed.bf16_optimizer_states else 1.0)

    def once(self) -> dict[str, float]:
        """Seconds over the run beside its steps."""
        found = {
            "filling the reference store, if it is empty": self.fill_seconds(),
            "evaluations": self.evaluations() * self.evaluation_seconds(),
            "saves": self.save_seconds(),
        }
        return {name: seconds for name, seconds in found.items() if seconds > 0}

    def fill_seconds(self) -> float:
        """A forward pass over each pair of the run, once, in micro-batches of the reference's budget."""
        reference = self.config.reference
        if reference.mode != "store" or not self.config.loss.needs_reference:
            return 0.0
        pairs = self.workload.pair_order.pairs_of_run(self.workload.steps)
        lengths, ranks = self.planner.lengths[pairs], self.cluster.world_size
        flops: ForwardFlops = self.planner.flops
        total = float(flops.of_pairs(lengths, self.planner.layout).sum())
        tokens = float(pair_tokens(lengths, self.planner.layout).sum())
        held_out = self.workload.held_out_tokens * ranks
        total *= (1 + held_out / tokens) * self.reference.total / self.sizes.total
        passes = np.ceil((tokens + held_out) / ranks / reference.max_tokens_per_micro_batch)
        computing = total / ranks / self.rates.layers_forward.flops
        computing += passes * self.reference.layers * self.rates.layers_forward.base
        gathers = passes * self.gather_of_pass(self.reference, reference) if reference.stage == 3 else 0.0
        return float(computing + gathers if self.on_cpu else max(computing, gathers))

    def evaluations(self) -> int:
        if not self.workload.held_out:
            return 0
        every, steps = self.config.train.eval_steps, self.workload.steps
        between = 0 if every is None else (steps - 1) // every
        return between + 1 + self.config.train.eval_on_start

    def evaluation_seconds(self) -> float:
        """A forward pass over the held-out pairs: FLOPs and tokens a micro-batch as in the plans."""
        rows = [row for plan in self.workload.plans for step in plan.micro_steps for row in of_groups(step)]
        of_rows = self.planner.flops_of(rows)
        tokens = of_rows[:, 0].sum() / self.planner.flops.per_token
        flops = float(of_rows.sum() / tokens) * self.workload.held_out_tokens
        sizes = np.array([row.group_size for row in rows])
        mean = float((of_rows[:, 0] / sizes).mean() / self.planner.flops.per_token)
        passes = float(np.ceil(self.workload.held_out_tokens / mean))
        seconds = flops / self.rates.layers_forward.flops + passes * self.sizes.layers * self.rates.layers_forward.base
        models = 1.0 + runs_reference(self.config) * self.reference.total / self.sizes.total
        gathers = passes * self.gather_of_pass(self.sizes, self.config.deepspeed) if self.stage == 3 else 0.0
        return models * (seconds + gathers if self.on_cpu else max(seconds, gathers))

    def save_seconds(self) -> float:
        """Checkpoints (weights, and 12 bytes of fp32 copy and moments a parameter trained) and the model, on the disk.

        In the background only the copy to the host is waited for.
        """
        keep, steps = self.config.checkpoint, self.workload.steps
        count = 0 if keep.save_steps is None else (steps - 1) // keep.save_steps
        count += keep.save_at_end
        weights = self.weight_bytes * (self.sizes.trained if self.config.lora.enabled else self.sizes.total)
        size = 12 * self.sizes.trained + weights
        rate = self.cluster.nodes * DISK_BANDWIDTH
        if keep.async_save:
            rate = self.cluster.world_size * self.cluster.device.host_link
        return count * size / rate + self.weight_bytes * self.sizes.total / DISK_BANDWIDTH

    def left_out(self) -> tuple[str, ...]:
        """What of the config is in none of the figures, by name."""
        config = self.config
        found = {
            "start: imports, loading weights, compiling kernels": True,
            "model.compile: layers count as not compiled": config.model.compile,
            "reference.sync_steps: moving the reference": config.reference.sync_steps is not None,
            "mics_shard_size": "mics_shard_size" in self.zero,
            "zero_quantized_weights": bool(self.zero.get("zero_quantized_weights")),
            "zero_quantized_gradients": bool(self.zero.get("zero_quantized_gradients")),
            "offloads to nvme": any(
                isinstance(self.zero.get(name), dict) and self.zero[name].get("device") == "nvme"
                for name in ("offload_optimizer", "offload_param")
            ),
            f"train.optim = {config.train.optim}: counted as Adam": "adam" not in config.train.optim.lower(),
        }
        return tuple(name for name, is_left_out in found.items() if is_left_out)
