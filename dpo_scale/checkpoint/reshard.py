"""A checkpoint into an engine of another number of ranks or another ZeRO stage, without converting it on the disk.

DeepSpeed cuts fp32 weights and optimizer states into flat tensors, each stage in its own way: whole parameters at
stage 0; at stages 1 and 2 all parameters of a group end to end, cut into one part a rank; at stage 3 each parameter
cut into one part a rank, and a rank's parts end to end. All three are lists of pieces: a stretch of a named parameter
that lies at an offset of a flat tensor. So one description serves for reading any of them and for filling any other:
each rank takes, of the old ranks' files, which are mapped into memory, the stretches that its own pieces need.

DeepSpeed's own way, universal checkpoints, writes the whole state to the disk once more, unpickles freely, knows Adam
only and does not change the stage.
"""

from __future__ import annotations

import copy
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
class Shard:
    """What one rank keeps of the fp32 weights and of the optimizer's state.

    Attributes:
        flats: the flat fp32 tensors, in the order of the optimizer's states.
        states: of each flat tensor by number, the optimizer's: tensors of its length, and single values.
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
    done: dict[str, int] = {}
    ranks = []
    for groups in mappings:
        pieces = []
        for flat, group in enumerate(groups):
            for name, (offset, length) in group.items():
                pieces.append(Piece(name, done.get(name, 0), length, flat, offset))
                done[name] = done.get(name, 0) + length
        ranks.append(pieces)
    return ranks


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
        saved, model = _saved_shards(path, saved_ranks, saved_stage, policy)
        own = _own_shard(policy)
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


def fill(own: Shard, saved: Sequence[Shard]) -> None:
    """Copy into a rank's flat tensors what its pieces need of other ranks' shards, and make its optimizer states.

    Raises:
        ValueError: if a parameter is not in the shards, or a state can't be cut along with its parameter.
    """
    sources: dict[str, list[tuple[Piece, Shard]]] = {}
    for shard in saved:
        for piece in shard.pieces:
            sources.setdefault(piece.name, []).append((piece, shard))
    own.groups, own.scaler = saved[0].groups, saved[0].scaler
    with torch.no_grad():
        for piece in own.pieces:
            note_activity()
            missing = piece.length
            for source, shard in sources.get(piece.name, []):
                start = max(piece.start, source.start)
                length = min(piece.start + piece.length, source.start + source.length) - start
                if length <= 0:
                    continue
                flat, other = own.flats[piece.flat], shard.flats[source.flat]
                offset, other_offset = piece.offset + start - piece.start, source.offset + start - source.start
                here, there = slice(offset, offset + length), slice(other_offset, other_offset + length)
                flat.view(-1)[here] = other.reshape(-1)[there].to(flat.device)
                state = own.states.setdefault(piece.flat, {})
                for key, value in shard.states.get(source.flat, {}).items():
                    if not (isinstance(value, torch.Tensor) and value.ndim):
                        state[key] = copy.deepcopy(value)
                        continue
                    if value.numel() < other.numel():
                        raise ValueError(f"the optimizer's {key} is not of the shape of its parameters")
                    if key not in state:
                        state[key] = torch.zeros(flat.shape, dtype=value.dtype)
                    state[key].view(-1)[here] = value.reshape(-1)[there]
                missing -= length
            if missing:
                raise ValueError(f"{missing} elements of {piece.name} are missing")


def _saved_shards(path: Path, ranks: int, stage: int, policy: Any) -> tuple[list[Shard], dict[str, Any]]:
    """All ranks' shards of a checkpoint, mapped into memory, and DeepSpeed's file of the model."""
    prefix = "zero_pp_rank_0_" if stage == 3 else ""
    model = load_file(path / f"{prefix}mp_rank_00_model_states.pt", mmap=True)
    if stage == 0:
        names = [name for group in engine.trained_parameters(policy.module) for name, _ in group]
        state, weights = model["optimizer"], [model["module"][name] for name in names]
        pieces = whole_pieces([(name, tensor.numel()) for name, tensor in zip(names, weights, strict=True)])
        return [Shard(pieces, weights, state["state"], state["param_groups"])], model
    states = []
    for rank in range(ranks):
        (file,) = path.glob(f"*zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
        states.append(load_file(file, mmap=True)["optimizer_state_dict"])
    if stage == 3:
        _check_parts(states[0]["partition_count"], ranks)
        pieces_by_rank = [divided_pieces(model["param_shapes"], rank, ranks) for rank in range(ranks)]
        flats, optimizer = "fp32_flat_groups", "optimizer_state_dict"
    else:
        pieces_by_rank = joined_pieces([_mapping(state["param_slice_mappings"]) for state in states])
        flats, optimizer = "single_partition_of_fp32_groups", "base_optimizer_state"
    return [
        Shard(
            pieces,
            list(state[flats]),
            state[optimizer]["state"],
            state[optimizer]["param_groups"],
            {key: state[key] for key in _SCALER_KEYS if key in state},
        )
        for pieces, state in zip(pieces_by_rank, states, strict=True)
    ], model


def _own_shard(policy: Any) -> Shard:
    """This rank's shard of a running engine, its flat tensors being the engine's own."""
    stage, optimizer = policy.zero_optimization_stage(), policy.optimizer
    if stage == 0:
        trained = [pair for group in engine.trained_parameters(policy.module) for pair in group]
        return Shard(whole_pieces([(name, p.numel()) for name, p in trained]), [p.data for _, p in trained])
    if stage == 3:
        _check_parts(optimizer.partition_count, ranks.world_size())
        pieces = divided_pieces(policy._get_zero_param_shapes(), ranks.rank(), ranks.world_size())
        return Shard(pieces, list(optimizer.fp32_partitioned_groups_flat))
    mappings = ranks.gather_objects(_mapping(optimizer._param_slice_mappings))
    # DeepSpeed has one optimizer class for bf16 at stage 1, and another for everything else
    name = "single_partition_of_fp32_groups"
    flats = getattr(optimizer, name if hasattr(optimizer, name) else "fp32_groups_flat_partition")
    return Shard(joined_pieces(mappings)[ranks.rank()], list(flats))


def _check_parts(parts: int, ranks: int) -> None:
    if parts != ranks:
        raise ValueError(f"parameters are cut into {parts} parts, not one for each of {ranks} ranks (mics_shard_size)")


def _mapping(groups: Sequence[dict[str, Any]]) -> list[dict[str, tuple[int, int]]]:
    return [{name: (at.start, at.numel) for name, at in group.items()} for group in groups]


def _hand_over(policy: Any, shard: Shard) -> None:
    """Let DeepSpeed load the filled shard as if it were this rank's part of a checkpoint of this layout."""
    stage, optimizer = policy.zero_optimization_stage(), policy.optimizer
    if stage == 3:
        optimizer.checkpoint_event_prologue()
    state = optimizer.state_dict()
    key = {0: None, 3: "optimizer_state_dict"}.get(stage, "base_optimizer_state")
    base = state if key is None else state[key]
    if len(base["param_groups"]) != len(shard.groups):
        raise ValueError("the optimizer's parameter groups are others")
    base["state"] = shard.states
    base["param_groups"] = [
        {**saved, "params": own["params"]} for saved, own in zip(shard.groups, base["param_groups"], strict=True)
    ]
    if stage == 0:
        optimizer.load_state_dict(state)
        return
    state |= {name: value for name, value in shard.scaler.items() if name in state}
    optimizer.load_state_dict([state] * ranks.world_size(), load_from_fp32_weights=True)
    if stage == 3:
        optimizer.checkpoint_event_epilogue()
    else:
        optimizer.update_lp_params()
