"""What owners hold of whole matrices becomes DTensors, and DTensors become what owners hold: for state dicts only.

A tensor of whole shape is cut along its longest side over the mesh dimensions that cut the parameter's matrices; and
along its first over those that cut a stack between its matrices, as the stack is.
"""

import math
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from .exchange import Exchange
from .layout import ParamLayout, ParamRef
from .regions import coordinates, region_of

Shapes = dict[str, tuple[int, ...]]
Slices = tuple[slice, ...]


def state_dtype(layout: ParamLayout) -> torch.dtype:
    """Of the state of its owners."""
    return torch.promote_types(layout.dtype, torch.float32)


def to_dtensors(
    layout: ParamLayout,
    shapes: Mapping[int, Shapes],
    wholes: Mapping[int, Shapes],
    held: Mapping[int, Mapping[str, Tensor]],
) -> dict[int, dict[str, Tensor]]:
    """On all ranks of the group.

    Args:
        shapes: of the state of matrix i, by name, the same on all ranks.
        wholes: the same, of all matrices of a stack that other groups have some of.
        held: the state of the matrices that this rank owns.
    """
    exchange, found = layout.exchange, {}
    for turn in _turns(exchange, shapes):
        regions = {i: _regions(layout.refs[i], exchange, shapes[i]) for i in turn if i is not None}
        mine = turn[exchange.rank]
        outgoing: list[list[Tensor]] = [[] for _ in turn]
        if mine is not None:
            outgoing = [[held[mine][key][of[rank]] for key, of in regions[mine].items()] for rank in range(len(turn))]
        coming = [[] if i is None else [_shape(of[exchange.rank]) for of in regions[i].values()] for i in turn]
        for i, parts in zip(turn, _all_to_all(layout, outgoing, coming), strict=True):
            if i is not None:
                found[i] = {
                    key: as_dtensor(layout.refs[i], part, whole)
                    for (key, whole), part in zip(wholes[i].items(), parts, strict=True)
                }
    return found


def to_owners(
    layout: ParamLayout, shapes: Mapping[int, Shapes], states: Mapping[int, Mapping[str, Tensor]]
) -> dict[int, dict[str, Tensor]]:
    """The reverse, on all ranks of the group: the state of the matrices that this rank owns.

    Args:
        states: of every matrix in ``shapes``, DTensors as above, or whole tensors that all ranks have.
    """
    exchange, found = layout.exchange, {}
    for turn in _turns(exchange, shapes):
        regions = {i: _regions(layout.refs[i], exchange, shapes[i]) for i in turn if i is not None}
        mine = turn[exchange.rank]
        outgoing = [
            []
            if i is None
            else [_part(layout.refs[i], states[i][key], of, exchange.rank) for key, of in regions[i].items()]
            for i in turn
        ]
        coming: list[list[tuple[int, ...]]] = [[] for _ in turn]
        if mine is not None:
            coming = [[_shape(of[rank]) for of in regions[mine].values()] for rank in range(len(turn))]
        received = _all_to_all(layout, outgoing, coming)
        if mine is not None:
            device = layout.refs[mine].param.device
            found[mine] = {
                key: torch.empty(s, dtype=state_dtype(layout), device=device) for key, s in shapes[mine].items()
            }
            for rank, parts in enumerate(received):
                for (key, whole), part in zip(found[mine].items(), parts, strict=True):
                    whole[regions[mine][key][rank]] = part
    return found


def _turns(exchange: Exchange, indices: Mapping[int, Shapes]) -> list[list[int | None]]:
    """Matrices by turns, at most one of each owner in a turn, so that little memory is needed at once; e.g.
    [[0, 1], [2, None]] where rank 0 owns 0 and 2, rank 1 owns 1."""
    owned: list[list[int | None]] = [[] for _ in range(exchange.plan.world_size)]
    for i in indices:
        owned[exchange.plan.owners[i]].append(i)
    return [[of[turn] if turn < len(of) else None for of in owned] for turn in range(max(map(len, owned)))]


def _all_to_all(
    layout: ParamLayout, outgoing: Sequence[Sequence[Tensor]], coming: Sequence[Sequence[tuple[int, ...]]]
) -> list[list[Tensor]]:
    """What goes to every rank of the group, and the shapes of what comes from each -> what has come."""
    device, dtype = layout.refs[0].param.device, state_dtype(layout)
    empty = torch.empty(0, dtype=dtype, device=device)
    sent = [torch.cat([empty, *(part.to(dtype).reshape(-1) for part in parts)]) for parts in outgoing]
    sizes = [sum(map(math.prod, shapes)) for shapes in coming]
    received = torch.empty(sum(sizes), dtype=dtype, device=device)
    splits = [part.numel() for part in sent]
    dist.all_to_all_single(received, torch.cat(sent), sizes, splits, group=layout.exchange.group)
    found = []
    for flat, shapes in zip(torch.split(received, sizes), coming, strict=True):
        pieces = torch.split(flat, [math.prod(shape) for shape in shapes])
        found.append([piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)])
    return found


def _regions(ref: ParamRef, exchange: Exchange, shapes: Shapes) -> dict[str, list[Slices]]:
    """By name, what each rank of the group holds of a tensor of that shape."""
    assert isinstance(ref.param, DTensor) and exchange.group is not None
    found: dict[str, list[Slices]] = {key: [] for key in shapes}
    for at in coordinates(ref.param, exchange.group):
        for key, shape in shapes.items():
            side = _longest(ref, shape)
            cuts = [(side, ref.param.device_mesh.size(dim), at[dim]) for dim in sorted(ref.place.within)]
            found[key].append(tuple(slice(*bounds) for bounds in region_of(shape, cuts if side >= 0 else [])))
    return found


def _longest(ref: ParamRef, shape: tuple[int, ...]) -> int:
    """The dimension to cut, -1 for none: the first of a stack may be cut already."""
    first = 1 if ref.place.between else 0
    return first + shape[first:].index(max(shape[first:])) if shape[first:] else -1


def _shape(region: Slices) -> tuple[int, ...]:
    return tuple(part.stop - part.start for part in region)


def _part(ref: ParamRef, value: Tensor, regions: list[Slices], rank: int) -> Tensor:
    if isinstance(value, DTensor):
        return value.to_local()
    return own_matrices(ref, value)[regions[rank]]


def own_matrices(ref: ParamRef, value: Tensor) -> Tensor:
    """Of the state of a whole stack, in a tensor or as :func:`as_dtensor` makes it, that of this rank's matrices."""
    if not ref.place.between:
        return value.full_tensor() if isinstance(value, DTensor) else value
    if isinstance(value, DTensor):
        return value.to_local()
    blocks = len(value) // len(ref.param)  # of one matrix
    return value[ref.place.first * blocks : (ref.place.first + ref.shape[0]) * blocks]


def as_dtensor(ref: ParamRef, part: Tensor, shape: tuple[int, ...]) -> Tensor:
    """From what this rank has of a tensor of that shape.

    Raises:
        RuntimeError: it cannot be one, because ranks hold unequal numbers of split matrices.
    """
    assert isinstance(ref.param, DTensor)
    mesh, place = ref.param.device_mesh, ref.place
    ranks = math.prod(mesh.size(dim) for dim in place.between)
    if shape[0] != len(ref.param) and len(ref.param) % ranks:
        raise RuntimeError(
            f"{ref.name}: the state of {len(ref.param)} matrices that are split further cannot be saved from {ranks} "
            "ranks, which do not divide them"
        )
    side = _longest(ref, shape)
    cut: Placement = Shard(side) if side >= 0 else Replicate()
    placements: list[Placement] = [
        Shard(0) if dim in place.between else cut if dim in place.within else Replicate() for dim in range(mesh.ndim)
    ]
    stride = torch.empty(shape, device="meta").stride()
    if part.storage_offset():  # torch's stager, which async_save uses, would take the DTensor for a tensor with memory
        part = part.clone()
    return DTensor.from_local(part, mesh, placements, shape=torch.Size(shape), stride=stride)
