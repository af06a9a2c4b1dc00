"""MatrixOptimizer: one step of any rule that needs whole matrices, under any sharding.

A step has three parts, and a rule fills in what happens in each; it never learns how parameters are sharded:

    prepare        on shards   momentum and other elementwise state; returns what must become whole
    precondition   on wholes   once per matrix, at its owner, on stacks [k, m, n] of equal shapes
    apply          on shards   weight decay and the update of the weights

``exchange.py`` moves matrices between the parts.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from .exchange import Exchange
from .plan import Item
from .stacks import as_parameter, block_shape, cat_states, split_state

Group = dict[str, Any]


@dataclass
class Entry:
    """A parameter, the number of its group (``load_state_dict`` replaces the groups themselves) and its name."""

    param: Tensor
    number: int
    name: str


@dataclass
class Unit:
    """Parameters that are laid out alike, the exchange that serves them, and the dtype that they are computed in."""

    entries: list[Entry]
    exchange: Exchange
    dtype: torch.dtype

    def active(self) -> list[int]:
        return [i for i, entry in enumerate(self.entries) if entry.param.grad is not None]


class MatrixOptimizer(torch.optim.Optimizer):
    """Base of the rules that precondition whole matrices.

    Args:
        params: matrices (>= 2-D; leading dimensions are a stack, e.g. experts ``[E, m, n]``), plain tensors or
            DTensors that FSDP2 sharded on dimension 0.  Named parameters give better error messages.
        defaults: the rule's settings.  Every group also has ``split`` (the matrix is that many blocks of equal
            size along the fan-out dimension, each preconditioned alone: 3 for a fused QKV, the number of heads
            for per-head Muon) and ``conv1d`` (weights stored (fan_in, fan_out), as in Hugging Face's ``Conv1D``).
        process_group: ranks that hold identical plain parameters and gradients (DDP) and share the work.
        dtype: in which matrices are preconditioned; by default bfloat16 on CUDA where the rule allows it (not for
            float64), otherwise the widest dtype of the parameters.
        wire: in which they travel, by default ``dtype``.  bfloat16 beside float32 halves the bytes; what is sent is
            rounded, and by a process alone too, so that the number of ranks changes nothing.
        bucket_bytes: a step allocates at most twice this at once, ``workspace`` of the rule included; more only where
            a single parameter (an expert stack counts whole) exceeds its share.

    Raises:
        ValueError: a parameter that is not a matrix, is not divisible by ``split``, or is sharded differently.
        RuntimeError: in ``step``, before any matrix travels, if a gradient is missing on some ranks only.
    """

    half_precision = False  # whether bfloat16 is the better dtype on CUDA

    def __init__(
        self,
        params: Iterable,
        defaults: Group,
        *,
        process_group: dist.ProcessGroup | None = None,
        dtype: torch.dtype | None = None,
        wire: torch.dtype | None = None,
        bucket_bytes: int = 128 * 2**20,
    ):
        self._units: list[Unit] = []
        self._shard_keys: set[str] = set()
        super().__init__(params, {"split": 1, "conv1d": False, "step": 0, **defaults})
        self._units = self._build_units(process_group, dtype, wire, bucket_bytes)
        for unit in self._units:
            for index, entry in enumerate(unit.entries):
                self._create_state(unit, index, entry)

    # What a rule fills in ------------------------------------------------------------------------------------

    def shard_state(self, group: Group, param: Tensor) -> dict[str, Tensor]:
        """Elementwise state, shaped and sharded like ``param``."""
        return {}

    def owner_state(self, group: Group, shape: tuple[int, int, int]) -> dict[str, tuple[int, ...]]:
        """Shapes ``[k, ...]`` of the state kept at the owner of k matrices m x n, ``shape = (k, m, n)``."""
        return {}

    def prepare(self, group: Group, grads: list[Tensor], states: list[dict[str, Tensor]]) -> list[Tensor]:
        """On shards: update elementwise state; return what must become whole.  Must not change ``grads``."""
        return grads

    def precondition(self, group: Group, stack: Tensor, state: dict[str, Tensor]) -> Tensor:
        """On whole matrices ``stack`` [k, m, n] with its owner state [k, ...] (update it in place) -> [k, m, n].

        The stack is contiguous and the rule's own: it may be overwritten, and returned.
        """
        raise NotImplementedError

    def flops(self, group: Group, shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> float:
        """FLOPs of ``precondition`` for one m x n matrix in ``dtype``: what balances the owners."""
        raise NotImplementedError

    def workspace(self, group: Group, shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> float:
        """Bytes that ``precondition`` allocates at once for one m x n matrix in ``dtype``, its result included: what
        bounds the buckets.  Here: three matrices in float32 at least."""
        return 3.0 * shape[0] * shape[1] * torch.promote_types(dtype, torch.float32).itemsize

    def scale(self, group: Group, shape: tuple[int, int]) -> float:
        """Factor on the step of a (fan_out, fan_in) matrix."""
        return 1.0

    def apply(self, group: Group, params: list[Tensor], updates: list[Tensor], scales: list[float]) -> None:
        """On shards: W <- (1 - lr * weight_decay) W - lr * scale * update, decay masked if ``cautious``."""
        decay = group["lr"] * group.get("weight_decay", 0.0)
        if decay and group.get("cautious", False):
            for param, update in zip(params, updates, strict=True):
                param.sub_((update * param).ge_(0).mul_(param), alpha=decay)
        elif decay:
            torch._foreach_mul_(params, 1 - decay)
        for scale in set(scales):
            chosen = [i for i, other in enumerate(scales) if other == scale]
            scaled = [params[i] for i in chosen], [updates[i] for i in chosen]
            torch._foreach_add_(*scaled, alpha=-group["lr"] * scale)

    # The step ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure=None):
        """One update of every parameter that has a gradient.  The engine does not wait for the device; eigh, svd and
        Newton roots of a rule do."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        active = [unit.active() for unit in self._units]
        for unit, indices in zip(self._units, active, strict=True):
            self._check_agreement(unit, indices)
        for group in self.param_groups:
            group["step"] += 1
        for unit, indices in zip(self._units, active, strict=True):
            unit.exchange.run(
                indices,
                lambda items, unit=unit: self._prepare(unit, items),
                lambda owned, fill, unit=unit: self._precondition(unit, owned, fill),
                lambda updates, unit=unit: self._apply(unit, updates),
            )
        return loss

    def _prepare(self, unit: Unit, items: list[int]) -> dict[int, Tensor]:
        inputs = {}
        for group, indices in self._by_group(unit, items):
            states = [
                {k: local(v) for k, v in self.state[unit.entries[i].param].items() if k in self._shard_keys}
                for i in indices
            ]
            grads = [local(unit.entries[i].param.grad) for i in indices]
            inputs.update(zip(indices, self.prepare(group, grads, states), strict=True))
        return inputs

    def _precondition(self, unit: Unit, owned: list[int], fill: Callable[[int, Tensor], None]) -> dict[int, Tensor]:
        stacks = defaultdict(list)
        for index in owned:
            stacks[unit.exchange.plan.items[index].stack].append(index)
        results = {}
        for members in stacks.values():
            entries = [unit.entries[i] for i in members]
            group, shapes = self.param_groups[entries[0].number], [tuple(entry.param.shape) for entry in entries]
            sizes = [block_shape(group, shape)[0] for shape in shapes]
            size = (sum(sizes), *block_shape(group, shapes[0])[1:])
            stack = torch.empty(size, dtype=unit.dtype, device=entries[0].param.device)
            for i, shape, blocks in zip(members, shapes, stack.split(sizes), strict=True):
                fill(i, as_parameter(group, blocks, shape))
            states = [self._owner_state_of(entry.param) for entry in entries]
            state = cat_states(states)
            pieces = self.precondition(group, stack, state).split(sizes)
            split_state(state, states, sizes)
            for i, shape, blocks in zip(members, shapes, pieces, strict=True):
                results[i] = as_parameter(group, blocks, shape)
        return results

    def _apply(self, unit: Unit, updates: dict[int, Tensor]) -> None:
        for group, indices in self._by_group(unit, updates):
            entries = [unit.entries[i] for i in indices]
            params = [local(entry.param) for entry in entries]
            casts = [updates[i].to(p.dtype) for i, p in zip(indices, params, strict=True)]
            scales = [self.scale(group, block_shape(group, entry.param.shape)[1:]) for entry in entries]
            self.apply(group, params, casts, scales)

    def _check_agreement(self, unit: Unit, active: list[int]) -> None:
        if unit.exchange.agree(hash(tuple(active)) >> 2):
            return
        missing = [entry.name for entry in unit.entries if entry.param.grad is None]
        everywhere: list[Any] = [None] * unit.exchange.plan.world_size
        dist.all_gather_object(everywhere, missing, group=unit.exchange.host_group)
        shown = "; ".join(f"rank {rank}: {', '.join(names[:3])}" for rank, names in enumerate(everywhere) if names)
        raise RuntimeError(
            f"gradients are missing on some ranks of the group only ({shown}); every rank must use the same "
            "parameters in a step, or none"
        )

    def _by_group(self, unit: Unit, items: Iterable[int]) -> list[tuple[Group, list[int]]]:
        numbers = defaultdict(list)
        for i in items:
            numbers[unit.entries[i].number].append(i)
        return [(self.param_groups[number], indices) for number, indices in numbers.items()]

    # Construction --------------------------------------------------------------------------------------------

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, which would cast all state to the parameters' dtype; the owner's keeps its own."""
        super().load_state_dict(state_dict)
        saved = [number for group in state_dict["param_groups"] for number in group["params"]]
        params = [param for group in self.param_groups for param in group["params"]]
        for number, param in zip(saved, params, strict=True):
            for key, value in state_dict["state"].get(number, {}).items():
                if key not in self._shard_keys and isinstance(value, Tensor):
                    self.state[param][key] = value.to(param.device, copy=True)

    def __getstate__(self):
        raise TypeError(
            f"{type(self).__name__} belongs to its process group and can be neither copied nor pickled: build another "
            "from the copied parameters, and load this one's state_dict()"
        )

    def add_param_group(self, param_group: Group) -> None:
        """Only during construction: owners are chosen once, over all matrices."""
        if self._units:
            raise RuntimeError("give all parameter groups at construction: the owners of matrices are chosen once")
        super().add_param_group(param_group)

    def _build_units(self, process_group, dtype, wire, bucket_bytes) -> list[Unit]:
        layouts = defaultdict(list)
        for number, group in enumerate(self.param_groups):
            names = group.get("param_names") or [
                f"parameter {i} of group {number}" for i in range(len(group["params"]))
            ]
            for param, name in zip(group["params"], names, strict=True):
                layouts[_layout(group, param, name, process_group)].append(Entry(param, number, name))
        units = []
        for (layout, ranks), entries in layouts.items():
            chosen = dtype or self._usual_dtype(entries)
            items = [self._item(entry, chosen) for entry in entries]
            units.append(Unit(entries, Exchange(items, layout, ranks, wire or chosen, bucket_bytes), chosen))
            units[-1].exchange.warm_up(entries[0].param.device)
        return units

    def _item(self, entry: Entry, dtype: torch.dtype) -> Item:
        group = self.param_groups[entry.number]
        k, m, n = block_shape(group, entry.param.shape)
        joined = sum(math.prod(shape) for shape in self.owner_state(group, (k, m, n)).values())
        workspace = k * (m * n * dtype.itemsize + self.workspace(group, (m, n), dtype))
        workspace += joined * _state_dtype(dtype).itemsize
        workspace = max(workspace, 2 * k * m * n * entry.param.itemsize)  # what prepare returns; what apply makes
        return Item(tuple(entry.param.shape), k * self.flops(group, (m, n), dtype), (entry.number, m, n), workspace)

    def _usual_dtype(self, entries: list[Entry]) -> torch.dtype:
        widest = max((entry.param.dtype for entry in entries), key=lambda d: d.itemsize)
        on_cuda = entries[0].param.device.type == "cuda"
        return torch.bfloat16 if self.half_precision and on_cuda and widest != torch.float64 else widest

    def _create_state(self, unit: Unit, index: int, entry: Entry) -> None:
        """All state exists from the start, so that every rank and every checkpoint knows the same names."""
        group = self.param_groups[entry.number]
        state = self.shard_state(group, entry.param)
        self._shard_keys |= set(state)
        self.state[entry.param].update(state)
        plan = unit.exchange.plan
        if unit.exchange.layout == "alone" or plan.owners[index] == unit.exchange.rank:
            shapes = self.owner_state(group, block_shape(group, entry.param.shape))
            dtype = _state_dtype(unit.dtype)
            for key, shape in shapes.items():
                self.state[entry.param][key] = torch.zeros(shape, dtype=dtype, device=entry.param.device)

    def _owner_state_of(self, param: Tensor) -> dict[str, Tensor]:
        return {k: v for k, v in self.state[param].items() if k not in self._shard_keys}


def _state_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of the owner's state, for matrices that are preconditioned in ``dtype``."""
    return torch.promote_types(dtype, torch.float32)


def _layout(group: Group, param: Tensor, name: str, process_group) -> tuple[str, dist.ProcessGroup | None]:
    if param.ndim < 2:
        raise ValueError(f"{name} has shape {tuple(param.shape)}: a matrix optimizer takes matrices (2-D or more)")
    fan_out = param.shape[-1 if group["conv1d"] else -2]
    if fan_out % group["split"]:
        raise ValueError(f"{name}: split={group['split']} does not divide its fan-out of {fan_out}")
    if not isinstance(param, DTensor):
        shared = process_group is not None and dist.get_world_size(process_group) > 1
        return ("replicated", process_group) if shared else ("alone", None)
    dims = [dim for dim, placement in enumerate(param.placements) if not placement.is_replicate()]
    if len(dims) > 1 or (dims and param.placements[dims[0]] != Shard(0)):
        raise ValueError(f"{name} is placed as {param.placements}: only rows (Shard(0)) over one mesh dimension work")
    if not dims or param.device_mesh.size(dims[0]) == 1:
        return ("alone", None)
    return ("sharded", param.device_mesh.get_group(dims[0]))


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor (a view), or the tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
