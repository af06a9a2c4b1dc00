"""What owners hold of whole matrices becomes DTensors, and DTensors become what owners hold: for state dicts only.

A tensor of whole shape is cut along its longest side over the mesh dimensions that the parameter is sharded over.
"""

import math
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from .exchange import Exchange
from .layout import ParamLayout

Shapes = dict[str, tuple[int, ...]]
Region = tuple[slice, ...]


def state_dtype(layout: ParamLayout) -> torch.dtype:
    """Of the state of its owners."""
    return torch.promote_types(layout.dtype, torch.float32)


def to_dtensors(
    layout: ParamLayout, shapes: Mapping[int, Shapes], held: Mapping[int, Mapping[str, Tensor]]
) -> dict[int, dict[str, Tensor]]:
    """On all ranks of the group.

    Args:
        shapes: of the state of matrix i, by name, the same on all ranks.
        held: the state of the matrices that this rank owns.
    """
    exchange, found = layout.exchange, {}
    for turn in _turns(exchange, shapes):
        regions = {i: _regions(layout.refs[i].param, exchange, shapes[i]) for i in turn if i is not None}
        mine = turn[exchange.rank]
        outgoing: list[list[Tensor]] = [[] for _ in turn]
        if mine is not None:
            outgoing = [[held[mine][key][of[rank]] for key, of in regions[mine].items()] for rank in range(len(turn))]
        coming = [[] if i is None else [_shape(of[exchange.rank]) for of in regions[i].values()] for i in turn]
        for i, parts in zip(turn, _all_to_all(layout, outgoing, coming), strict=True):
            if i is not None:
                param = layout.refs[i].param
                found[i] = {
                    key: _dtensor(param, part, shape)
                    for (key, shape), part in zip(shapes[i].items(), parts, strict=True)
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
        regions = {i: _regions(layout.refs[i].param, exchange, shapes[i]) for i in turn if i is not None}
        mine = turn[exchange.rank]
        outgoing = [
            [] if i is None else [_part(states[i][key], of[exchange.rank]) for key, of in regions[i].items()]
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


def _regions(param: Tensor, exchange: Exchange, shapes: Shapes) -> dict[str, list[Region]]:
    """By name, what each rank of the group holds of a tensor of that shape."""
    assert isinstance(param, DTensor) and exchange.group is not None
    mesh, dims = param.device_mesh, [dim for dim, p in enumerate(param.placements) if not p.is_replicate()]
    places = []
    for rank in dist.get_process_group_ranks(exchange.group):
        coordinates = (mesh.mesh == rank).nonzero()[0].tolist()
        places.append([(mesh.size(dim), coordinates[dim]) for dim in dims])
    return {key: [_region(shape, place) for place in places] for key, shape in shapes.items()}


def _region(shape: tuple[int, ...], place: list[tuple[int, int]]) -> Region:
    """Of the rank that is (of so many, the n-th) along each mesh dimension, as ``Shard`` cuts: chunk by chunk."""
    start, stop = 0, max(shape)
    for count, nth in place:
        chunk = -(-(stop - start) // count)
        start, stop = min(start + nth * chunk, stop), min(start + (nth + 1) * chunk, stop)
    return tuple(slice(start, stop) if dim == _longest(shape) else slice(0, size) for dim, size in enumerate(shape))


def _longest(shape: tuple[int, ...]) -> int:
    return shape.index(max(shape))


def _shape(region: Region) -> tuple[int, ...]:
    return tuple(part.stop - part.start for part in region)


def _part(value: Tensor, region: Region) -> Tensor:
    return value.to_local() if isinstance(value, DTensor) else value[region]


def _dtensor(param: Tensor, part: Tensor, shape: tuple[int, ...]) -> Tensor:
    assert isinstance(param, DTensor)
    cut = Shard(_longest(shape))
    placements: list[Placement] = [Replicate() if p.is_replicate() else cut for p in param.placements]
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(part, param.device_mesh, placements, shape=torch.Size(shape), stride=stride)
