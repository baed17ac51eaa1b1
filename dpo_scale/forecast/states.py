"""Memory of weights, gradients and optimizer states by formula, as DeepSpeed 0.19 lays them out. Sizes are bytes.

A step has moments that differ in what exists at once. None of them counts activations, nor the gradient of the one
weight that autograd is computing. Activations exist in the moment `backward`, all of them, and in no other:

    rest       between steps, as in an evaluation or a pass of the reference
    gather     the beginning of a forward pass: at stage 3 the first layers' weights come together
    backward   the beginning of the last backward pass, and all that can come up while there are activations
    reduce     its end, when the last gradients are reduced and no activations are left
    step       within the optimizer's step

So a rank needs the largest of `gather`, `backward` plus activations, `reduce` and `step`. Tests compare each with the
live tensors of real engines.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from dpo_scale.forecast.shape import ModelShape, Parameter
from dpo_scale.settings.deepspeed import (
    MAX_LIVE,
    OPTIMIZERS,
    policy_deepspeed_config,
    reference_deepspeed_config,
    with_fitting_buckets,
)
from dpo_scale.settings.tree import Config

Moment = Literal["rest", "gather", "backward", "reduce", "step"]
Parts = dict[str, int]
BYTES = {"float32": 4, "fp32": 4, "bfloat16": 2, "bf16": 2, "float16": 2, "fp16": 2}

WEIGHTS, GATHERED, SECONDARY = "weights", "gathered layers", "weights of the node (hpZ)"
GRADIENTS, ACCUMULATORS, BUCKETS = "gradients", "gradient accumulators", "communication buckets"
MASTERS, STATES, STEP = "fp32 master weights", "optimizer states", "optimizer step"
REFERENCE, REFERENCE_SLICES = "reference", "reference's fp32 slices"


def policy_states(
    config: Config, shape: ModelShape, world_size: int, moment: Moment = "backward", *, device_type: str = "cuda"
) -> Parts:
    """The policy's bytes on the fullest rank's device, part by part.

    Args:
        device_type: what the run computes on. On "cpu" the device and the host are one memory, and gloo reduces
            through a copy.
    """
    return _policy(config, shape, world_size, moment, device_type)[0]


def policy_host_states(config: Config, shape: ModelShape, world_size: int) -> Parts:
    """The policy's bytes in host memory, part by part, for one rank; the same at all moments."""
    return _policy(config, shape, world_size, "rest", "cuda")[1]


def reference_states(
    config: Config, shape: ModelShape, world_size: int, moment: Literal["rest", "pass"] = "rest"
) -> Parts:
    """The bytes on one rank's device of a reference that is a model of its own; of all others nothing.

    The fill of a store is over before there is a policy, so it adds nothing to a step.

    Args:
        shape: the reference's.
        moment: `pass`: while it scores, beside the policy's states at `rest`.
    """
    return _reference(config, shape, world_size, moment)[0]


def reference_host_states(config: Config, shape: ModelShape, world_size: int) -> Parts:
    """The bytes of such a reference in host memory, for one rank."""
    return _reference(config, shape, world_size, "rest")[1]


def states_left_out(config: Config) -> tuple[str, ...]:
    """What of the config the formulas do not cover, by name."""
    zero = config.deepspeed.stated.get("zero_optimization", {})
    left_out = [f"deepspeed.config: zero_optimization.{key}" for key in _UNKNOWN_KEYS if zero.get(key)]
    left_out += [
        f"deepspeed.config: zero_optimization.{key} = false" for key in _EXPECTED_TRUE if zero.get(key) is False
    ]
    for name in ("offload_optimizer", "offload_param"):
        if isinstance(zero.get(name), dict) and set(zero[name]) - {"device", "pin_memory"}:
            left_out.append(f"deepspeed.config: options of zero_optimization.{name}")
    if _optimizer(config) not in _STATES_OF:
        left_out.append(f"train.optim = {config.train.optim}: its states are taken for Adam's")
    return tuple(left_out)


# `train.optim` as DeepSpeed spells it -> values that it keeps for each weight
_STATES_OF = {
    **dict.fromkeys(("adamw_torch", "Adam", "AdamW", "Lamb", "NAdam", "RAdam", "Adamax", "MuAdam", "MuAdamW"), 2),
    **dict.fromkeys(("Lion", "Adagrad"), 1),
    **dict.fromkeys(("SGD", "MuSGD", "RMSprop"), 0),  # and one by momentum
}
_UNKNOWN_KEYS = (
    *("mics_shard_size", "zero_quantized_weights", "zero_quantized_gradients", "zero_quantized_nontrainable_weights"),
    *("zenflow", "super_offload", "leaf_module", "stage3_module_granularity_threshold", "round_robin_gradients"),
)
_EXPECTED_TRUE = ("contiguous_gradients", "reduce_scatter", "use_multi_rank_bucket_allreduce")
_ALLREDUCE_ELEMENTS = 500_000_000  # that DeepSpeed sums at once at stage 0
_NORM_BYTES = 8  # norms are computed in fp64, one parameter at a time


@dataclass(frozen=True)
class _Setup:
    """What decides the sizes. Bytes are of one element; sizes of buckets and thresholds are elements.

    Attributes:
        groups: elements of the optimizer's groups: matrices, then norms and biases.
        slices: of one rank, likewise; the fullest rank's.
        largest: trained parameter.
        states: values that the optimizer keeps for each weight.
    """

    config: Config
    shape: ModelShape
    world_size: int
    on_cpu: bool
    stage: int
    weight: int
    accumulate: int
    reduce: int
    master: int
    states: int
    bucket: int
    zero: dict[str, Any]
    groups: tuple[int, ...]
    slices: tuple[int, ...]
    largest: int
    offloads: bool

    @property
    def sliced(self) -> int:
        return sum(self.slices)


def _policy(
    config: Config, shape: ModelShape, world_size: int, moment: Moment, device_type: str
) -> tuple[Parts, Parts]:
    setup = _setup(config, shape, world_size, device_type)
    device: Parts
    host: Parts = {}
    if setup.stage == 0:
        device = _replicated(setup, moment)
    elif setup.stage == 3:
        device, host = _sharded(setup, moment)
    elif _keeps_whole_accumulators(setup):
        device = _whole_accumulators(setup, moment)
    else:
        device, host = _sliced_optimizer(setup, moment)
    return _present(device), _present(host)


def _present(parts: Parts) -> Parts:
    return {name: int(size) for name, size in parts.items() if size}


def _setup(config: Config, shape: ModelShape, world_size: int, device_type: str) -> _Setup:
    stated = with_fitting_buckets(policy_deepspeed_config(config, 2, device_type), shape.trained)
    weight, zero = BYTES[config.model.dtype], stated["zero_optimization"]
    trained = [p for p in shape.parameters if p.trained]
    by_group = [[p.numel for p in trained if p.matrix is matrix] for matrix in (True, False)]
    by_group = [numels for numels in by_group if numels]
    if zero["stage"] == 3:  # each parameter is cut by itself
        slices = [sum(-(-numel // world_size) for numel in numels) for numels in by_group]
    else:  # all of a group as one, aligned
        slices = [2 * -(-sum(numels) // (2 * world_size)) for numels in by_group]
    return _Setup(
        config,
        shape,
        world_size,
        on_cpu=device_type == "cpu",
        stage=zero["stage"],
        weight=weight,
        accumulate=BYTES[stated.get("data_types", {}).get("grad_accum_dtype") or config.model.dtype],
        reduce=BYTES[stated.get("communication_data_type") or config.model.dtype],
        master=2 if config.deepspeed.bf16_optimizer_states else 4,
        states=states_per_weight(config),
        bucket=int(zero["reduce_bucket_size"]),
        zero=zero,
        groups=tuple(map(sum, by_group)),
        slices=tuple(slices),
        largest=max(p.numel for p in trained),
        offloads=config.deepspeed.offload_optimizer == "cpu",
    )


def _optimizer(config: Config) -> str:
    return OPTIMIZERS[config.train.optim.lower()]


def states_per_weight(config: Config) -> int:
    """Values that the optimizer keeps for each weight."""
    arguments = config.train.optim_args
    extra = (bool(arguments.get(name)) for name in ("momentum", "amsgrad", "centered"))
    base = _STATES_OF.get(_optimizer(config), 2)
    return base + (_optimizer(config) == "RMSprop") + sum(extra)


def _replicated(s: _Setup, moment: Moment) -> Parts:
    """Stage 0: fp32 in a plain optimizer, fp16 with masters."""
    n, half = s.shape.trained, s.weight == 2
    parts = {WEIGHTS: s.weight * s.shape.total, MASTERS: 4 * n if half else 0, STATES: 4 * s.states * n}
    if moment != "rest":
        parts[GRADIENTS] = s.weight * n
    if moment == "reduce":
        summed = min(n, _ALLREDUCE_ELEMENTS)
        parts[BUCKETS] = (s.weight + (s.reduce if s.reduce != s.weight else 0)) * summed
    if moment == "step" and half:
        parts[STEP] = 2 * 4 * n  # gradients in fp32, one by one and then flat
    return parts


def _keeps_whole_accumulators(s: _Setup) -> bool:
    """Whether DeepSpeed takes its BF16_Optimizer."""
    return s.stage == 1 and s.config.model.dtype == "bfloat16" and s.accumulate == 4 and not s.offloads


def _whole_accumulators(s: _Setup, moment: Moment) -> Parts:
    """Stage 1 in bf16 with gradients summed in fp32: every rank keeps the sums of all of them."""
    padded = s.sliced * s.world_size
    parts = {
        WEIGHTS: s.weight * (s.shape.frozen + padded),
        ACCUMULATORS: 4 * padded,
        MASTERS: 4 * s.sliced,
        STATES: 4 * s.states * s.sliced,
    }
    if moment != "rest":
        parts[GRADIENTS] = s.weight * s.shape.trained
    if moment == "reduce":
        # groups are summed whole, together as long as they are few elements; a single one needs no copy
        together = padded <= _ALLREDUCE_ELEMENTS and len(s.groups) > 1
        parts[BUCKETS] = (4 if together else 0) * padded + (s.reduce if s.reduce != 4 else 0) * padded
    return parts


def _sliced_optimizer(s: _Setup, moment: Moment) -> tuple[Parts, Parts]:
    """Stages 1 and 2: each rank updates its slice of the weights."""
    n, sliced = s.shape.trained, s.sliced
    in_fp32 = s.accumulate == 4 != s.weight  # reduced gradients are added to an fp32 slice at once
    whole = s.stage == 1  # gradients stay whole until the last backward pass
    largest_slice = min(s.largest, max(s.slices))
    device = {WEIGHTS: s.weight * (s.shape.frozen + sliced * s.world_size)}
    host: Parts = {}
    owner = host if s.offloads else device
    owner[MASTERS] = s.master * sliced
    owner[STATES] = s.master * s.states * sliced
    if s.offloads:
        host[GRADIENTS] = s.master * sliced
        host[BUCKETS] = s.weight * (sliced + s.largest)  # updated weights, and a gradient, on their way
        device[BUCKETS] = s.weight * s.largest
        if not in_fp32:  # sums of gradients
            host[ACCUMULATORS] = (s.weight if s.master == 4 else 0) * sliced
    if moment == "rest":
        return device, host
    staged = s.accumulate if whole else s.weight
    buffers = staged * s.bucket * (2 if s.zero.get("overlap_comm") else 1)
    # DeepSpeed lets go of offloaded ones of other ranks' slices only after the step
    if whole and (moment != "step" or (in_fp32 and s.offloads and s.world_size > 1)):
        device[GRADIENTS] = s.accumulate * n
    # at stage 1 a rank's slice is first made in the reduction; on the host sums of the gradients' own dtype are enough
    made = moment == "step" or not whole or (moment == "reduce" and in_fp32)
    if made and (in_fp32 or not s.offloads):
        device[ACCUMULATORS] = s.accumulate * sliced
    if moment in ("backward", "reduce") or (whole and moment == "gather"):
        device[BUCKETS] = device.get(BUCKETS, 0) + buffers
    before, last = _reductions(s)
    reduced = {"backward": 0 if whole else before, "reduce": max(before, last) if whole else last}.get(moment, 0)
    if reduced:
        cast = s.reduce if s.reduce != staged else 0
        flat = 0 if whole else staged  # at stage 1 it takes the place of gradients that are in the bucket by then
        added = 4 * largest_slice if in_fp32 and s.reduce != 4 else 0
        alone = s.weight * reduced if reduced > s.bucket and not whole else 0  # a gradient that no bucket holds
        device[BUCKETS] += (flat + cast) * reduced + added + alone
    if moment == "step" and not s.offloads:
        flat = 0 if in_fp32 else s.accumulate * max(s.slices)
        cast = s.master * max(s.slices) if s.master != s.accumulate else 0
        device[STEP] = max(flat + cast, _NORM_BYTES * largest_slice)
    return device, host


def _sharded(s: _Setup, moment: Moment) -> tuple[Parts, Parts]:
    """Stage 3: all is cut, parameter by parameter; weights come together layer by layer."""
    sliced = s.sliced
    device: Parts = {BUCKETS: s.reduce * s.bucket}
    host: Parts = {}
    weights = s.weight * _cut(s.shape.parameters, s.world_size)
    (host if s.config.deepspeed.offload_param == "cpu" else device)[WEIGHTS] = weights
    owner = host if s.offloads else device
    owner[MASTERS] = s.master * sliced
    owner[STATES] = s.master * s.states * sliced
    owner[ACCUMULATORS] = s.accumulate * sliced
    if s.offloads:
        host[GRADIENTS] = s.master * sliced
    if moment == "step":
        if not s.offloads:
            at_once = min(max(s.slices), int(s.zero.get("sub_group_size", 1e9)))
            cast = s.master if s.master != s.accumulate else 0
            largest_slice = -(-s.largest // s.world_size)
            device[STEP] = max((s.accumulate + cast) * at_once, _NORM_BYTES * largest_slice)
        return device, host
    # the shard of a single rank is the weights
    apart = s.world_size > 1 or (s.config.deepspeed.offload_param == "cpu" and not s.on_cpu)
    kept = _persistent(s.shape, s.zero)
    gathers = _Gathers.of(s.shape, s.zero)
    hpz = int(s.zero.get("zero_hpz_partition_size", 1))
    if hpz > 1 and moment != "rest":
        device[SECONDARY] = s.weight * -(-s.shape.total // hpz)
    gathered = {"rest": 0, "gather": gathers.at_first, "backward": gathers.before_backward, "reduce": gathers.at_last}
    device[GATHERED] = s.weight * (gathered[moment] + kept) * apart
    if moment in ("backward", "reduce"):
        before, last = _reductions(s)
        reduced = last if moment == "reduce" else before
        if moment == "backward":
            device[GRADIENTS] = s.weight * s.shape.largest_trained_layer
        if s.reduce != s.weight:
            device[BUCKETS] += s.reduce * reduced
        copy = s.reduce * reduced if s.on_cpu else 0
        summed = s.accumulate * reduced // s.world_size if s.accumulate != s.reduce else 0
        device[BUCKETS] += s.reduce * reduced + max(copy, summed)
    return device, host


def _reductions(s: _Setup) -> tuple[int, int]:
    """Elements of the largest reduction before the end of a backward pass, and of the one at its end."""
    before, filled = 0, 0
    for parameter in reversed(s.shape.parameters):
        if not parameter.trained:
            continue
        if filled and filled + parameter.numel > s.bucket:
            before, filled = max(before, filled), 0
        filled += parameter.numel
    return before, filled


def _cut(parameters: Iterable[Parameter], ways: int) -> int:
    return sum(-(-p.numel // ways) for p in parameters)


def _persistent(shape: ModelShape, zero: dict[str, Any]) -> int:
    """Elements of small parameters, which stay whole on every rank at stage 3."""
    threshold = int(zero.get("stage3_param_persistence_threshold", 1e5))
    return sum(p.numel for p in shape.parameters if p.numel <= threshold)


@dataclass(frozen=True)
class _Gathers:
    """Elements that are whole beside the persistent ones, by when.

    Attributes:
        at_first: at the beginning of a forward pass.
        before_backward: at its end and from there on, while there are activations.
        at_last: at the end of a backward pass.
    """

    at_first: int
    before_backward: int
    at_last: int

    @staticmethod
    def of(shape: ModelShape, zero: dict[str, Any]) -> _Gathers:
        """DeepSpeed gathers what a module needs, and some of what comes next, each time by way of a flat copy.

        It keeps what is used again within `stage3_max_reuse_distance` elements: the last layers of the forward pass.
        """
        threshold = int(zero.get("stage3_param_persistence_threshold", 1e5))
        prefetched = int(zero.get("stage3_prefetch_bucket_size", 5e7))
        reuse, live = int(zero.get("stage3_max_reuse_distance", 1e9)), int(zero.get(MAX_LIVE, 1e9))
        modules = _modules(shape, threshold, live)
        total, largest = sum(modules), max(modules)
        kept = behind = 0
        for size in reversed(modules):
            if 2 * behind >= reuse:
                break
            kept, behind = kept + size, behind + size
        ahead = min(prefetched, live)
        # the flat copy of the layer before may still be in use
        at_first = min(2 * total, 3 * largest + ahead)
        before_backward = total if kept == total else min(2 * total, max(kept, 3 * largest) + ahead)
        return _Gathers(at_first, before_backward, at_last=modules[0])


def _modules(shape: ModelShape, threshold: int, live: int) -> list[int]:
    """Elements that are gathered for each module, in the order of a forward pass: embeddings, layers, the rest.

    Layers of more than `live` elements are gathered in parts; a layer's experts are one of them.
    """
    by_layer: dict[int, int] = {}
    for p in shape.parameters:
        if p.layer is not None:
            by_layer[p.layer] = by_layer.get(p.layer, 0) + p.numel
    sizes: dict[tuple[int, int], int] = {}
    for k, p in enumerate(shape.parameters):
        if p.numel <= threshold:
            continue
        if p.layer is None:
            at = (-1 if not sizes else shape.layers, 0)
        else:
            at = (p.layer, -1 if p.expert or by_layer[p.layer] <= live else k)
        sizes[at] = sizes.get(at, 0) + p.numel
    return [sizes[at] for at in sorted(sizes)] or [0]


def _reference(config: Config, shape: ModelShape, world_size: int, moment: str) -> tuple[Parts, Parts]:
    settings = config.reference
    if settings.mode != "live" or not config.loss.needs_reference:
        return {}, {}
    weight = BYTES[config.model.dtype]
    device: Parts = {}
    host: Parts = {}
    if settings.stage == 0:
        device[REFERENCE] = weight * shape.total
    else:
        zero = reference_deepspeed_config(config, "cuda")["zero_optimization"]
        shards = weight * _cut(shape.parameters, world_size)
        (host if settings.offload_param == "cpu" else device)[REFERENCE] = shards
        # without a backward pass nothing stays whole after a pass, however small
        gathers = _Gathers.of(shape, zero | {"stage3_param_persistence_threshold": 0})
        apart = world_size > 1 or settings.offload_param == "cpu"
        device[GATHERED] = weight * gathers.at_first if moment == "pass" and apart else 0
    if settings.sync_steps is not None and settings.sync_mixup < 1 and weight != 4:
        device[REFERENCE_SLICES] = 4 * _cut(shape.parameters, world_size)
    return _present(device), _present(host)
