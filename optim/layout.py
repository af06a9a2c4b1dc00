"""How a matrix optimizer is built: parameters that are laid out alike share an exchange, and all state exists from the
start."""

import logging
import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypedDict

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from .base import Group, check_choice, check_count, named
from .exchange import Exchange
from .measure import Batch, Part
from .plan import MatrixSpec, worth_sharing
from .regions import Groups, Place, cuts_rows, place_of, replicating_dims
from .stacks import block_parts, block_shapes, matrix_shape, owner_shapes, split_sizes

Kind = tuple[str, dist.ProcessGroup | None, dist.ProcessGroup | None]
"""A layout of :class:`Exchange`, the ranks that it spans, and those of one copy where it spans several."""
SHARE = ("auto", "always", "never")
FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
log = logging.getLogger(__name__)


class EngineSettings(TypedDict, total=False):
    """Settings that :class:`MatrixOptimizer` takes from every rule."""

    process_group: dist.ProcessGroup | None
    dtype: torch.dtype | None
    comm_dtype: torch.dtype | None
    bucket_bytes: int
    constraint: str | None
    share: str


class MatrixRule(Protocol):
    """What a rule says of itself before the first step, as :class:`MatrixOptimizer` documents it."""

    half_precision: bool
    param_groups: list[Group]
    state: defaultdict[Tensor, Any]

    def shard_state(self, group: Group, param: Tensor) -> dict[str, Tensor]: ...
    def owner_state(self, group: Group, shape: tuple[int, int, int]) -> dict[str, tuple[int, ...]]: ...
    def flops(self, group: Group, shape: tuple[int, int], dtype: torch.dtype) -> float: ...
    def workspace(self, group: Group, shape: tuple[int, int], dtype: torch.dtype) -> float: ...


@dataclass
class ParamRef:
    """A parameter, the index of its group (``load_state_dict`` replaces the groups themselves), its name, and where it
    lies."""

    param: Tensor
    group_index: int
    name: str
    place: Place

    @property
    def shape(self) -> tuple[int, ...]:
        """Of what becomes whole: the parameter's, or that of those matrices of a stack which are this rank's."""
        return self.place.shape

    @property
    def held(self) -> bool:
        """Not so where this rank has none of a stack's matrices."""
        return all(self.shape)


@dataclass
class ParamLayout:
    """Parameters that are laid out alike, the exchange that serves them, and the dtype that they are computed in."""

    refs: list[ParamRef]
    exchange: Exchange
    dtype: torch.dtype

    def into_parts(self, batch: Batch, members: list[int], scale: Callable[[Group, tuple[int, int]], float]) -> Batch:
        """The batch of the parameters ``members`` with an entry for every block, in order."""
        parted = Batch(batch.group, [], [], [], [])
        entries = zip(members, batch.params, batch.updates, batch.states, strict=True)
        for i, param, update, state in entries:
            shape, regions = self.refs[i].shape, self.exchange.plan.specs[i].regions
            offset = (0,) * len(shape)
            if self.exchange.layout == "sharded":
                offset = tuple(start for start, _ in self.exchange.plan.region(i, self.exchange.rank))
            whole = matrix_shape(batch.group, shape)
            fan_out, fan_in = (whole[-1], whole[-2]) if batch.group["conv1d"] else (whole[-2], whole[-1])
            sizes = split_sizes(batch.group, fan_out) * math.prod(whole[:-2])
            cut = self.exchange.layout == "sharded" and bool(self.refs[i].place.within)
            rows_cut = cut and cuts_rows(shape, regions, batch.group["conv1d"], len(whole) > 2)
            of_state = {key: block_parts(batch.group, value, shape, offset) for key, value in state.items()}
            of_update = block_parts(batch.group, update, shape, offset)
            for j, (first, part) in enumerate(block_parts(batch.group, param, shape, offset)):
                parted.params.append(part)
                parted.updates.append(of_update[j][1])
                parted.scales.append(scale(batch.group, (sizes[j], fan_in)))
                parted.states.append({key: views[j][1] for key, views in of_state.items()})
                parted.parts.append(Part(first, len(part), sizes[j], cut, rows_cut))
        return parted


def build_layouts(
    rule: MatrixRule,
    process_group: dist.ProcessGroup | None,
    dtype: torch.dtype | None,
    comm_dtype: torch.dtype | None,
    bucket_bytes: int,
    share: str,
) -> list[ParamLayout]:
    """The arguments are those of :class:`MatrixOptimizer`; so is the ValueError."""
    check_choice(SHARE, share=share)
    _check_settings(process_group, bucket_bytes, dtype=dtype, comm_dtype=comm_dtype)
    # Of freed memory glibc keeps twice the largest block (below 32 MiB) that was ever freed, and gives the kernel the
    # rest, whose pages it would have to clear again for the buffers of every step. This block is never touched.
    torch.empty(31 * 2**20, dtype=torch.uint8, device="cpu")
    refs, groups = [], Groups()
    for index, group in enumerate(rule.param_groups):
        names = group.get("param_names") or [f"parameter {i} of group {index}" for i in range(len(group["params"]))]
        for param, name in zip(group["params"], names, strict=True):
            if not param.numel():
                continue  # an empty matrix has nothing to update
            stacked = len(matrix_shape(group, param.shape)) > 2
            refs.append(ParamRef(param, index, name, place_of(param, name, stacked, process_group, groups)))
    for ref in _sharing(rule, refs, dtype, comm_dtype) if share == "auto" else refs if share == "always" else ():
        stacked = len(matrix_shape(rule.param_groups[ref.group_index], ref.param.shape)) > 2
        ref.place = place_of(ref.param, ref.name, stacked, process_group, groups, True)
    layouts = []
    for (kind, ranks, copy_ranks, _), alike in _by(refs, lambda ref: (*ref.place.kind, ref.param.device)).items():
        compute_dtype = dtype or _default_dtype(rule, alike)
        specs = [_spec(rule, ref, compute_dtype) for ref in alike]
        exchange = Exchange(specs, kind, ranks, comm_dtype or compute_dtype, bucket_bytes, copy_ranks)
        exchange.warm_up(alike[0].param.device)
        layouts.append(ParamLayout(alike, exchange, compute_dtype))
    return layouts


def _check_settings(process_group: Any, bucket_bytes: Any, **dtypes: Any) -> None:
    """Raises ValueError for what would fail in a later step, or move no weight: integers round every factor to 0."""
    for name, value in dtypes.items():
        if value is not None and value not in FLOATS:
            raise ValueError(f"{name}={value}: give torch.bfloat16, float16, float32 or float64, or None")
    if type(bucket_bytes) not in (int, float) or not 1 <= bucket_bytes < math.inf:
        raise ValueError(f"bucket_bytes={bucket_bytes}: give a number of at least 1")
    if process_group is not None and not isinstance(process_group, dist.ProcessGroup):
        raise ValueError(f"process_group={process_group}: give a torch.distributed.ProcessGroup, or None")


def _sharing(
    rule: MatrixRule, refs: list[ParamRef], dtype: torch.dtype | None, comm_dtype: torch.dtype | None
) -> list[ParamRef]:
    """Of parameters that have replicas, those whose replicas had better share the work."""
    shared = []
    replicated = [ref for ref in refs if ref.held and replicating_dims(ref.param)]
    for (_, ranks, _, copies), alike in _by(replicated, lambda ref: (*ref.place.kind, _copies(ref.param))).items():
        compute_dtype = dtype or _default_dtype(rule, alike)
        specs = [_spec(rule, ref, compute_dtype) for ref in alike]
        world_size = dist.get_world_size(ranks) if ranks is not None else 1
        chosen = worth_sharing(specs, world_size, copies, (comm_dtype or compute_dtype).itemsize)
        log.info("%d matrices in %d replicas, which %s the work", len(alike), copies, "share" if chosen else "repeat")
        shared += alike if chosen else []
    return shared


def _copies(param: Tensor) -> int:
    assert isinstance(param, DTensor)
    return math.prod(param.device_mesh.size(dim) for dim in replicating_dims(param))


def _by(refs: list[ParamRef], key: Callable[[ParamRef], Any]) -> dict[Any, list[ParamRef]]:
    found: dict[Any, list[ParamRef]] = defaultdict(list)
    for ref in refs:
        found[key(ref)].append(ref)
    return found


def create_state(rule: MatrixRule, layouts: list[ParamLayout]) -> set[str]:
    """Create all state that is missing, so that every rank and every checkpoint knows the same names; returns those of
    the state that is sharded like its parameter."""
    shard_keys: set[str] = set()
    for layout in layouts:
        for ref, owner in zip(layout.refs, layout.exchange.plan.owners, strict=True):
            group, state = rule.param_groups[ref.group_index], rule.state[ref.param]
            on_shards = rule.shard_state(group, ref.param)
            state.update({k: v for k, v in on_shards.items() if k not in state})
            shard_keys |= set(on_shards)
            if owner == layout.exchange.rank:
                shapes = owner_shapes(partial(rule.owner_state, group), group, ref.shape)
                dtype = _state_dtype(layout.dtype)
                new = {k: s for k, s in shapes.items() if k not in state}
                state.update({k: torch.zeros(s, dtype=dtype, device=ref.param.device) for k, s in new.items()})
    return shard_keys


def check_matrices(group: Group) -> None:
    """Raises ValueError for a parameter that is not made of matrices, or not of the blocks that the group says."""
    split, head_dim = group["split"], group["head_dim"]
    for rows in split or (0,) if isinstance(split, tuple) else (split,):
        check_count(split=rows)
    check_count(head_dim=1 if head_dim is None else head_dim)
    if head_dim is not None and split != 1:
        raise ValueError(f"split={split}, head_dim={head_dim}: give one of them")
    for param, name in named(group):
        if param.ndim < 2:
            raise ValueError(f"{name} has shape {tuple(param.shape)}: a matrix optimizer takes matrices (2-D or more)")
        fan_out = matrix_shape(group, param.shape)[-1 if group["conv1d"] else -2]
        if isinstance(split, tuple) and sum(split) != fan_out:
            raise ValueError(f"{name}: split={split} adds up to {sum(split)}, but its fan-out is {fan_out}")
        for key, count in {"split": split, "head_dim": head_dim or 1}.items():
            if isinstance(count, int) and fan_out % count:
                raise ValueError(f"{name}: {key}={count} does not divide its fan-out of {fan_out}")


def check_same_gradients(layout: ParamLayout, active: list[int]) -> None:
    """Raises RuntimeError, on all ranks, where the parameters ``active`` are not those of every rank."""
    if layout.exchange.all_equal(hash(tuple(active)) >> 2):
        return
    missing = [ref.name for ref in layout.refs if ref.param.grad is None]
    everywhere: list[Any] = [None] * layout.exchange.plan.world_size
    dist.all_gather_object(everywhere, missing, group=layout.exchange.host_group)
    shown = "; ".join(f"rank {rank}: {', '.join(names[:3])}" for rank, names in enumerate(everywhere) if names)
    raise RuntimeError(
        f"gradients are missing on some ranks of the group only ({shown}); every rank must use the same "
        "parameters in a step, or none"
    )


def _default_dtype(rule: MatrixRule, refs: list[ParamRef]) -> torch.dtype:
    widest = max((ref.param.dtype for ref in refs), key=lambda dtype: dtype.itemsize)
    on_cuda = refs[0].param.device.type == "cuda"
    return torch.bfloat16 if rule.half_precision and on_cuda and widest != torch.float64 else widest


def _spec(rule: MatrixRule, ref: ParamRef, dtype: torch.dtype) -> MatrixSpec:
    group = rule.param_groups[ref.group_index]
    shape, sizes = ref.shape, block_shapes(group, ref.shape)
    joined_state = sum(map(math.prod, owner_shapes(partial(rule.owner_state, group), group, shape).values()))
    workspace = joined_state * float(_state_dtype(dtype).itemsize)
    workspace += sum(k * (m * n * dtype.itemsize + rule.workspace(group, (m, n), dtype)) for k, m, n in sizes)
    if len(sizes) > 1:  # the matrix beside its blocks
        workspace += math.prod(shape) * dtype.itemsize
    workspace = max(workspace, 2 * math.prod(shape) * ref.param.itemsize)  # what prepare returns; what apply makes
    flops = sum(k * rule.flops(group, (m, n), dtype) for k, m, n in sizes)
    stack = tuple(size for _, m, n in sizes for size in (m, n))
    regions = ref.place.regions if ref.place.layout == "sharded" else None
    return MatrixSpec(shape, flops, (ref.group_index, *stack), workspace, regions, ref.place.copies)


def _state_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of the owner's state, for matrices that are preconditioned in ``dtype``."""
    return torch.promote_types(dtype, torch.float32)
