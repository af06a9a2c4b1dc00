"""Where a rank's part of a parameter lies in the whole, from its placement on a device mesh.

Mesh dimensions that cut a stack [E, m, n] between its matrices leave these whole: each rank has some, as if they were a
parameter of its own, and nothing of them travels.  Dimensions that cut within matrices say who must exchange them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import Shard, _StridedShard

from .plan import Region

Groups = dict[tuple[int, ...], dist.ProcessGroup]


@dataclass
class Place:
    """Of one parameter.

    The example is that of an expert stack (6, 8, 4) over expert parallelism 3 times FSDP 2, ``[Shard(0), Shard(1)]``.
    """

    shape: tuple[int, ...]  # what this rank's group holds together: (2, 8, 4)
    first: int = 0  # the first of its matrices, in the first dimension: 0, 2 or 4
    between: tuple[int, ...] = ()  # mesh dimensions that cut between matrices: (0,)
    within: tuple[int, ...] = ()  # those that cut matrices, in the order in which they do: (1,)
    layout: str = "single"  # of the exchange: "sharded"
    group: dist.ProcessGroup | None = None  # the ranks that hold these matrices together
    regions: tuple[Region, ...] | None = field(default=None, repr=False)  # by rank; None: rows, as torch.chunk does
    copies: tuple[int, ...] = ()  # by rank, where replicas share the work: which replica it belongs to
    copy_group: dist.ProcessGroup | None = None  # of group, the ranks of this one's replica, if there are several

    @property
    def kind(self) -> tuple[str, dist.ProcessGroup | None, dist.ProcessGroup | None]:
        return self.layout, self.group, self.copy_group


def place_of(
    param: Tensor,
    name: str,
    stacked: bool,
    process_group: dist.ProcessGroup | None,
    groups: Groups,
    share: bool = False,
) -> Place:
    """Where a parameter lies; ``stacked`` if all but its last two dimensions count matrices, ``groups`` by their ranks
    are reused, ``share`` if its replicas share the work.  Raises ValueError for a placement that is no rectangle."""
    shape = tuple(param.shape)
    if not isinstance(param, DTensor):
        shared = process_group is not None and dist.get_world_size(process_group) > 1
        return Place(shape, layout="replicated", group=process_group) if shared else Place(shape)
    dims, mesh = _cutting_dims(param, name), param.device_mesh
    between = [dim for dim in dims if stacked and _dim(param, dim) < param.ndim - 2]
    if any(_dim(param, dim) for dim in between):
        raise ValueError(
            f"{name} is placed as {param.placements}: cut a stack by its first dimension, or by its matrices'"
        )
    within = [dim for dim in dims if dim not in between]
    here = mesh.get_coordinate()
    whole = region_of(shape, _cuts(param, between, here)) if between and here else tuple((0, size) for size in shape)
    place = Place(tuple(stop - start for start, stop in whole), whole[0][0], tuple(between), tuple(within))
    if within:
        place.layout, place.group = "sharded", _group(param, within, groups)
    replicated = replicating_dims(param) if share else []
    if replicated:
        place.layout, place.copy_group = "sharded", place.group
        place.group = _group(param, within + replicated, groups)
        if place.group is not None:
            at = [tuple(at[dim] for dim in replicated) for at in coordinates(param, place.group)]
            place.copies = tuple(sorted(set(at)).index(copy) for copy in at)
    if not (len(within) == 1 and _dim(param, within[0]) == 0 and not between and not replicated) and here:
        place.regions = _regions(param, place)
        rank = dist.get_rank(place.group) if place.group is not None else 0
        if tuple(stop - start for start, stop in place.regions[rank]) != tuple(param.to_local().shape):
            raise ValueError(f"{name} is placed as {param.placements}, which cuts {shape} into other than rectangles")
    return place


def region_of(shape: tuple[int, ...], cuts: Sequence[tuple[int, int, int]]) -> Region:
    """What remains of a shape that is cut along (dimension, into how many, which of them), one after the other, as
    ``torch.chunk`` does."""
    region = [(0, size) for size in shape]
    for dim, count, nth in cuts:
        start, stop = region[dim]
        chunk = -(-(stop - start) // count)
        region[dim] = min(start + nth * chunk, stop), min(start + (nth + 1) * chunk, stop)
    return tuple(region)


def local_region(param: Tensor) -> Region:
    """What this rank holds of a parameter."""
    if not isinstance(param, DTensor):
        return tuple((0, size) for size in param.shape)
    at = param.device_mesh.get_coordinate()
    assert at is not None
    return region_of(tuple(param.shape), _cuts(param, _cutting_dims(param, "the parameter"), at))


def cuts_rows(shape: tuple[int, ...], regions: tuple[Region, ...] | None, conv1d: bool, stacked: bool) -> bool:
    """Whether ranks hold different columns of a block, a row being what makes one output."""
    if regions is None:
        return conv1d
    fan_in = [-2 if conv1d else -1] if stacked or len(shape) == 2 else list(range(1, len(shape)))
    return any(region[dim] != (0, shape[dim]) for region in regions for dim in fan_in)


def replicating_dims(param: Tensor) -> list[int]:
    """Mesh dimensions over which a parameter is the same."""
    if not isinstance(param, DTensor):
        return []
    mesh = param.device_mesh
    return [dim for dim, of in enumerate(param.placements) if of.is_replicate() and mesh.size(dim) > 1]


def coordinates(param: DTensor, group: dist.ProcessGroup) -> list[list[int]]:
    """On the parameter's mesh, of every rank of a group."""
    ranks = dist.get_process_group_ranks(group)
    return [(param.device_mesh.mesh == rank).nonzero()[0].tolist() for rank in ranks]


def _cutting_dims(param: DTensor, name: str) -> list[int]:
    """Mesh dimensions that cut the parameter, in the order in which they do: what FSDP2 has cut after tensor
    parallelism, further to the right on the mesh, is ``_StridedShard``."""
    first: list[int] = []
    then: list[int] = []
    for dim, placement in enumerate(param.placements):
        if isinstance(placement, _StridedShard):
            then.insert(0, dim)
        elif isinstance(placement, Shard):
            first.append(dim)
        elif not placement.is_replicate():
            raise ValueError(f"{name} is placed as {param.placements}: give parameters that are sharded or replicated")
    return [dim for dim in first + then if param.device_mesh.size(dim) > 1]


def _dim(param: DTensor, mesh_dim: int) -> int:
    """The dimension of the parameter that a mesh dimension cuts."""
    placement = param.placements[mesh_dim]
    assert isinstance(placement, Shard | _StridedShard)
    return placement.dim


def _cuts(param: DTensor, dims: Sequence[int], at: Sequence[int]) -> list[tuple[int, int, int]]:
    return [(_dim(param, dim), param.device_mesh.size(dim), at[dim]) for dim in dims]


def _regions(param: DTensor, place: Place) -> tuple[Region, ...]:
    if place.group is None:
        return (tuple((0, size) for size in place.shape),)
    return tuple(region_of(place.shape, _cuts(param, place.within, at)) for at in coordinates(param, place.group))


def _group(param: DTensor, dims: Sequence[int], groups: Groups) -> dist.ProcessGroup | None:
    """The ranks that differ from this one in these mesh dimensions only."""
    mesh = param.device_mesh
    if len(dims) == 1:
        return mesh.get_group(dims[0])
    at = mesh.get_coordinate()
    if at is None:
        return None
    index = tuple(slice(None) if dim in dims else nth for dim, nth in enumerate(at))
    ranks = tuple(sorted(mesh.mesh[index].flatten().tolist()))
    if ranks not in groups:
        groups[ranks] = dist.new_group(list(ranks), use_local_synchronization=True)
    return groups[ranks]
