"""Pieces of flat tensors, against parameters cut by hand: any layout into any other keeps every value."""

from types import SimpleNamespace

import pytest
import torch

from dpo_scale.checkpoint.reshard import Partition, divided_pieces, fill, joined_pieces, load_resharded, whole_pieces
from dpo_scale.errors import CheckpointError

# matrices in one group, vectors in another; sizes that no number of ranks below divides
SHAPES = [{"a": torch.Size([3, 5]), "b": torch.Size([7, 2])}, {"c": torch.Size([5]), "d": torch.Size([1])}]
SIZES = {name: shape.numel() for group in SHAPES for name, shape in group.items()}
VALUES = {name: torch.arange(size) + 100.0 * i for i, (name, size) in enumerate(SIZES.items(), 1)}


def joined(ranks):
    """What stages 1 and 2 keep: a group's parameters end to end, padded, cut in equal parts."""
    flats, mappings = [[] for _ in range(ranks)], [[] for _ in range(ranks)]
    for group in SHAPES:
        whole = torch.cat([VALUES[name] for name in group])
        part = -(-len(whole) // ranks)
        padded = torch.cat([whole, torch.zeros(part * ranks - len(whole))])
        for rank in range(ranks):
            flats[rank].append(padded[rank * part : (rank + 1) * part])
            mapping, start = {}, 0
            for name in group:
                first, last = max(start, rank * part), min(start + SIZES[name], (rank + 1) * part)
                if first < last:
                    mapping[name] = (first - rank * part, last - first)
                start += SIZES[name]
            mappings[rank].append(mapping)
    return list(zip(joined_pieces(mappings), flats, strict=True))


def divided(ranks):
    """What stage 3 keeps: each parameter padded and cut in equal parts."""
    result = []
    for rank in range(ranks):
        flats = []
        for group in SHAPES:
            parts = []
            for name in group:
                part = -(-SIZES[name] // ranks)
                padded = torch.cat([VALUES[name], torch.zeros(part * ranks - SIZES[name])])
                parts.append(padded[rank * part : (rank + 1) * part])
            flats.append(torch.cat(parts))
        result.append((divided_pieces(SHAPES, rank, ranks), flats))
    return result


def whole(ranks):
    return [(whole_pieces(list(SIZES.items())), list(VALUES.values()))] * ranks


def with_states(layout):
    """Partitions whose optimizer keeps the weights negated, and a step count."""
    return [
        Partition(
            pieces,
            [flat.clone() for flat in flats],
            {i: {"exp_avg": -flat, "step": torch.tensor(5.0)} for i, flat in enumerate(flats)},
            [{"lr": 1.0}],
        )
        for pieces, flats in layout
    ]


LAYOUTS = [whole(1), joined(1), joined(2), joined(3), divided(1), divided(2), divided(4)]


@pytest.mark.parametrize("saved", LAYOUTS)
@pytest.mark.parametrize("wanted", LAYOUTS)
def test_any_layout_is_filled_from_any_other(saved, wanted):
    for pieces, flats in wanted:
        own = Partition(pieces, [torch.zeros_like(flat) for flat in flats])
        fill(own, with_states(saved))
        for number, expected in enumerate(flats):
            assert torch.equal(own.flats[number], expected)
            if any(piece.length for piece in pieces if piece.flat == number):
                assert torch.equal(own.states[number]["exp_avg"], -expected)
                assert own.states[number]["step"] == 5.0
        assert own.groups == [{"lr": 1.0}]


def test_what_is_missing_or_cannot_be_cut_is_named():
    pieces, flats = divided(1)[0]
    with pytest.raises(ValueError, match="7 elements of b are missing"):
        fill(Partition(pieces, [torch.zeros_like(flat) for flat in flats]), with_states(divided(2)[:1]) + [
            Partition([p for p in divided(2)[1][0] if p.name != "b"], divided(2)[1][1])
        ])  # fmt: skip
    partitions = with_states(divided(1))
    partitions[0].states[0]["factors"] = torch.zeros(3)
    with pytest.raises(ValueError, match="factors is not of the shape"):
        fill(Partition(pieces, [torch.zeros_like(flat) for flat in flats]), partitions)


@pytest.mark.parametrize(("saved", "wanted"), [(0, 2), (3, 0)])
def test_float16_at_stage_0_and_another_stage_do_not_mix(tmp_path, saved, wanted):
    policy = SimpleNamespace(fp16_enabled=lambda: True, zero_optimization_stage=lambda: wanted)
    with pytest.raises(CheckpointError, match=f"float16 stage 0 .* resume with deepspeed.stage={saved}"):
        load_resharded(policy, tmp_path, 2, saved)
