"""A checkpoint into an engine of another number of ranks or another ZeRO stage, without converting it on the disk.

DeepSpeed cuts fp32 weights and optimizer states into flat tensors, each stage in its own way:

- stage 0: every parameter is one;
- stages 1 and 2: all parameters of a group end to end, cut into one part a rank;
- stage 3: each parameter cut into one part a rank, a rank's parts end to end.

All three are lists of pieces: a stretch of a named parameter that lies at an offset of a flat tensor. So one
description serves for reading any of them and for filling any other. Each rank maps the old ranks' files into memory
and copies the stretches that its own pieces need.

DeepSpeed's own way, universal checkpoints, writes the whole state to the disk once more, unpickles freely, knows only
Adam and does not change the stage.
"""

from __future__ import annotations

import copy
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from dpo_scale.checkpoint.deepspeed_files import load_file
from dpo_scale.distributed import engine, ranks
from dpo_scale.errors import CheckpointError
from dpo_scale.progress import note_activity

_SCALER_KEYS = ("loss_scaler", "dynamic_loss_scale", "overflow")


@dataclass(frozen=True)
class Piece:
    """`length` elements of parameter `name` from element `start` on, at `offset` of flat tensor `flat`."""

    name: str
    start: int
    length: int
    flat: int
    offset: int


@dataclass
class Partition:
    """One rank's part of the fp32 weights and of the optimizer's state.

    Attributes:
        flats: the flat fp32 tensors.
        states: by number of a flat tensor, the optimizer's state: tensors of its length, and single values.
        groups: the optimizer's settings by parameter group.
        scaler: DeepSpeed's loss scale, where the stage has one.
    """

    pieces: list[Piece]
    flats: list[torch.Tensor]
    states: dict[int, dict[str, Any]] = field(default_factory=dict)
    groups: list[dict[str, Any]] = field(default_factory=list)
    scaler: dict[str, Any] = field(default_factory=dict)


def whole_pieces(sizes: Sequence[tuple[str, int]]) -> list[Piece]:
    """Stage 0: each (name, number of elements) is a flat tensor of its own."""
    return [Piece(name, 0, size, flat, 0) for flat, (name, size) in enumerate(sizes)]


def joined_pieces(mappings: Sequence[Sequence[dict[str, tuple[int, int]]]]) -> list[list[Piece]]:
    """Stages 1 and 2: by rank, from all ranks' {name: (offset, length)} by group.

    A parameter that reaches over several ranks' parts lies in them in the order of the ranks.
    """
    done: Counter[str] = Counter()
    pieces_by_rank = []
    for groups in mappings:
        pieces = []
        for flat, group in enumerate(groups):
            for name, (offset, length) in group.items():
                pieces.append(Piece(name, done[name], length, flat, offset))
                done[name] += length
        pieces_by_rank.append(pieces)
    return pieces_by_rank


def divided_pieces(groups: Sequence[dict[str, torch.Size]], rank: int, world_size: int) -> list[Piece]:
    """Stage 3: of each parameter the rank's equal part, the last one padded; from shapes by group."""
    pieces = []
    for flat, shapes in enumerate(groups):
        offset = 0
        for name, shape in shapes.items():
            size = -(-shape.numel() // world_size)
            start = min(rank * size, shape.numel())
            pieces.append(Piece(name, start, min(size, shape.numel() - start), flat, offset))
            offset += size
    return pieces


def load_resharded(policy: Any, path: Path, saved_ranks: int, saved_stage: int) -> None:
    """Load weights, optimizer state and counters of a checkpoint of any layout. Every rank must call it.

    Args:
        policy: a DeepSpeed engine at any stage, freshly made.
        path: a verified checkpoint of `saved_ranks` ranks at `saved_stage`, of which one is not the engine's.

    Raises:
        CheckpointError: naming what does not fit, and the layout that would.
    """
    if policy.fp16_enabled() and 0 in (saved_stage, policy.zero_optimization_stage()):
        raise CheckpointError(
            f"{path}: saved on {saved_ranks} ranks at stage {saved_stage}: in float16 stage 0 keeps another kind of "
            f"state than the other stages; resume with deepspeed.stage={saved_stage}"
        )
    try:
        saved, model = _saved_partitions(path, saved_ranks, saved_stage, policy)
        own = _own_partition(policy)
        fill(own, saved)
        _hand_over(policy, own)
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(
            f"{path}: cannot be cut for {ranks.world_size()} ranks at stage {policy.zero_optimization_stage()}: "
            f"{error}; resume on {saved_ranks} ranks with deepspeed.stage={saved_stage}"
        ) from None
    buffers = dict(policy.module.named_buffers())
    with torch.no_grad():
        for name in model["buffer_names"]:
            buffers[name].copy_(model["module"][name])
    for name in ("global_steps", "global_samples", "skipped_steps"):
        setattr(policy, name, model[name])


def fill(own: Partition, saved: Sequence[Partition]) -> None:
    """Copy into a rank's flat tensors what its pieces need of other ranks' partitions, and make its optimizer states.

    Raises:
        ValueError: if a parameter is not in the partitions, or a state can't be cut along with its parameter.
    """
    sources: dict[str, list[tuple[Piece, Partition]]] = defaultdict(list)
    for partition in saved:
        for piece in partition.pieces:
            sources[piece.name].append((piece, partition))
    own.groups, own.scaler = saved[0].groups, saved[0].scaler
    with torch.no_grad():
        for piece in own.pieces:
            note_activity()
            missing = piece.length
            for source, partition in sources[piece.name]:
                start = max(piece.start, source.start)
                length = min(piece.start + piece.length, source.start + source.length) - start
                if length > 0:
                    own_offset = piece.offset + start - piece.start
                    offset = source.offset + start - source.start
                    here, there = slice(own_offset, own_offset + length), slice(offset, offset + length)
                    _copy_stretch(own, piece.flat, here, partition, source.flat, there)
                    missing -= length
            if missing:
                raise ValueError(f"{missing} elements of {piece.name} are missing")


def _copy_stretch(own: Partition, own_flat: int, here: slice, saved: Partition, saved_flat: int, there: slice) -> None:
    """Copy a stretch of a flat tensor and of the optimizer's states that belong to it."""
    flat, saved_weights = own.flats[own_flat], saved.flats[saved_flat]
    flat.view(-1)[here] = saved_weights.reshape(-1)[there].to(flat.device)
    state = own.states.setdefault(own_flat, {})
    for key, value in saved.states.get(saved_flat, {}).items():
        if not (isinstance(value, torch.Tensor) and value.ndim):
            state[key] = copy.deepcopy(value)
            continue
        if value.numel() < saved_weights.numel():
            raise ValueError(f"the optimizer's {key} is not of the shape of its parameters")
        if key not in state:
            state[key] = torch.zeros(flat.shape, dtype=value.dtype)
        state[key].view(-1)[here] = value.reshape(-1)[there]


def _saved_partitions(path: Path, saved_ranks: int, stage: int, policy: Any) -> tuple[list[Partition], dict[str, Any]]:
    """All ranks' partitions of a checkpoint, mapped into memory, and DeepSpeed's file of the model."""
    prefix = "zero_pp_rank_0_" if stage == 3 else ""
    model = load_file(path / f"{prefix}mp_rank_00_model_states.pt", mmap=True)
    if stage == 0:
        names = [name for group in engine.trained_parameters(policy.module) for name, _ in group]
        state, weights = model["optimizer"], [model["module"][name] for name in names]
        pieces = whole_pieces([(name, tensor.numel()) for name, tensor in zip(names, weights, strict=True)])
        return [Partition(pieces, weights, state["state"], state["param_groups"])], model
    names = [f"*zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in range(saved_ranks)]
    states = [load_file(file, mmap=True)["optimizer_state_dict"] for name in names for file in path.glob(name)]
    if stage == 3:
        _check_parts(states[0]["partition_count"], saved_ranks)
        pieces_by_rank = [divided_pieces(model["param_shapes"], rank, saved_ranks) for rank in range(saved_ranks)]
        flats, optimizer = "fp32_flat_groups", "optimizer_state_dict"
    else:
        pieces_by_rank = joined_pieces([_mapping(state["param_slice_mappings"]) for state in states])
        flats, optimizer = "single_partition_of_fp32_groups", "base_optimizer_state"
    partitions = []
    for pieces, state in zip(pieces_by_rank, states, strict=True):
        base, scaler = state[optimizer], {key: state[key] for key in _SCALER_KEYS if key in state}
        partitions.append(Partition(pieces, list(state[flats]), base["state"], base["param_groups"], scaler))
    return partitions, model


def _own_partition(policy: Any) -> Partition:
    """This rank's partition of a running engine, whose own flat tensors are in it."""
    stage, optimizer = policy.zero_optimization_stage(), policy.optimizer
    if stage == 0:
        trained = [pair for group in engine.trained_parameters(policy.module) for pair in group]
        return Partition(whole_pieces([(name, p.numel()) for name, p in trained]), [p.data for _, p in trained])
    if stage == 3:
        _check_parts(optimizer.partition_count, ranks.world_size())
        pieces = divided_pieces(policy._get_zero_param_shapes(), ranks.rank(), ranks.world_size())
        return Partition(pieces, list(optimizer.fp32_partitioned_groups_flat))
    mappings = ranks.gather_objects(_mapping(optimizer._param_slice_mappings))
    # DeepSpeed has one optimizer class for bf16 at stage 1, and another for everything else
    name = "single_partition_of_fp32_groups"
    flats = getattr(optimizer, name if hasattr(optimizer, name) else "fp32_groups_flat_partition")
    return Partition(joined_pieces(mappings)[ranks.rank()], list(flats))


def _check_parts(parts: int, world_size: int) -> None:
    if parts != world_size:
        raise ValueError(
            f"parameters are cut into {parts} parts, not one for each of {world_size} ranks (mics_shard_size)"
        )


def _mapping(groups: Sequence[dict[str, Any]]) -> list[dict[str, tuple[int, int]]]:
    return [{name: (at.start, at.numel) for name, at in group.items()} for group in groups]


def _hand_over(policy: Any, partition: Partition) -> None:
    """Let DeepSpeed load the filled partition as if it were this rank's part of a checkpoint of this layout."""
    stage, optimizer = policy.zero_optimization_stage(), policy.optimizer
    if stage == 3:
        optimizer.checkpoint_event_prologue()
    state = optimizer.state_dict()
    base = state if stage == 0 else state["optimizer_state_dict" if stage == 3 else "base_optimizer_state"]
    if len(base["param_groups"]) != len(partition.groups):
        raise ValueError("the optimizer has other parameter groups")
    base["state"] = partition.states
    base["param_groups"] = [
        {**saved, "params": own["params"]} for saved, own in zip(partition.groups, base["param_groups"], strict=True)
    ]
    if stage == 0:
        optimizer.load_state_dict(state)
        return
    state |= {name: value for name, value in partition.scaler.items() if name in state}
    optimizer.load_state_dict([state] * ranks.world_size(), load_from_fp32_weights=True)
    if stage == 3:
        optimizer.checkpoint_event_epilogue()
    else:
        optimizer.update_lp_params()
