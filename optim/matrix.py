"""MatrixOptimizer: one step of any rule that needs whole matrices, under any sharding.

A step has three parts, and a rule fills in what happens in each; it never learns how parameters are sharded:

    prepare        on shards   momentum and other elementwise state; returns what must become whole
    precondition   on wholes   once per matrix, at its owner, on stacks [k, m, n] of equal shapes
    apply          on shards   weight decay and the update of the weights

``exchange.py`` moves matrices between the parts.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.optimizer import ParamsT

from .base import Group, Tensors, check_count, local, named
from .exchange import Transfer
from .layout import EngineSettings, ParamLayout, build_layouts, check_matrix, create_state
from .stacks import as_parameter, block_shape, cat_states, split_state
from .state import OwnerState

__all__ = ["EngineSettings", "Group", "MatrixOptimizer", "ParamsT", "Tensors", "local"]  # what a rule needs

RENAMED = {"every": "update_freq", "wire": "comm_dtype"}
"""Settings of earlier versions, whose old names are answered with the new ones."""


class MatrixOptimizer(OwnerState):
    """Base of the rules that precondition whole matrices.

    Args:
        params: matrices (m, n), stacks of matrices such as experts [E, m, n], and convolutions' kernels
            [O, I, kh, kw], each one matrix [O, I kh kw]; plain tensors or DTensors that FSDP2 sharded on dimension 0.
            Named parameters give better error messages.
        defaults: the rule's settings.  Every group also has ``split`` (the matrix is that many blocks of equal
            size along the fan-out dimension, each preconditioned alone: 3 for a fused QKV, the number of heads
            for per-head Muon), ``conv1d`` (weights stored (fan_in, fan_out), as in Hugging Face's ``Conv1D``) and
            ``stack`` (True: all but the last two dimensions count matrices; False: the first dimension is the fan-out,
            the others are the fan-in; by default True for three dimensions, so say False for ``nn.Conv1d``).
        process_group: ranks that hold identical plain parameters and gradients (DDP) and share the work.
        dtype: in which matrices are preconditioned; by default bfloat16 on CUDA where the rule allows it (not for
            float64), otherwise the widest dtype of the parameters.
        comm_dtype: in which they travel, by default ``dtype``.  bfloat16 beside float32 halves the bytes; what is sent
            is rounded, and by a single process too, so that the number of ranks changes nothing.
        bucket_bytes: a step allocates at most twice this at once, ``workspace`` of the rule included; more only where
            a single parameter (an expert stack counts whole) exceeds its share.

    Raises:
        ValueError: a parameter that is not a matrix, is not divisible by ``split``, or is sharded differently.
        RuntimeError: in ``step``, before any matrix travels, if a gradient is missing on some ranks only.
    """

    group_settings = {"split": int, "conv1d": bool, "stack": bool | None, "step": int}
    half_precision = False  # whether bfloat16 is the better dtype on CUDA

    def __init__(
        self,
        params: ParamsT,
        defaults: Group,
        *,
        process_group: dist.ProcessGroup | None = None,
        dtype: torch.dtype | None = None,
        comm_dtype: torch.dtype | None = None,
        bucket_bytes: int = 128 * 2**20,
        **unknown: Any,
    ):
        _check_renamed(unknown)
        if unknown:
            raise TypeError(f"{type(self).__name__} has no setting {', '.join(unknown)}")
        self._layouts: list[ParamLayout] = []
        super().__init__(params, {"split": 1, "conv1d": False, "stack": None, "step": 0, **defaults})
        self._layouts = build_layouts(self, process_group, dtype, comm_dtype, bucket_bytes)
        self._shard_keys = create_state(self, self._layouts)

    # What a rule fills in ------------------------------------------------------------------------------------

    def shard_state(self, group: Group, param: Tensor) -> dict[str, Tensor]:
        """Elementwise state, shaped and sharded like ``param``."""
        return {}

    def owner_state(self, group: Group, shape: tuple[int, int, int]) -> dict[str, tuple[int, ...]]:
        """Shapes ``[k, ...]`` of the state kept at the owner of k matrices m x n, ``shape = (k, m, n)``."""
        return {}

    def prepare(self, group: Group, grads: Tensors, states: list[dict[str, Tensor]]) -> Tensors:
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

    def apply(self, group: Group, params: Tensors, updates: Tensors, scales: list[float]) -> None:
        """On shards: W <- (1 - lr * weight_decay) W - lr * scale * update, decay masked if ``cautious``."""
        lr = float(group["lr"])
        decay = lr * group.get("weight_decay", 0.0)
        if decay and group.get("cautious", False):
            for param, update in zip(params, updates, strict=True):
                param.sub_((update * param).ge_(0).mul_(param), alpha=decay)
        elif decay:
            torch._foreach_mul_(params, 1 - decay)
        for scale in set(scales):
            chosen = [i for i, other in enumerate(scales) if other == scale]
            scaled = [params[i] for i in chosen], [updates[i] for i in chosen]
            torch._foreach_add_(*scaled, alpha=-lr * scale)

    # The step ------------------------------------------------------------------------------------------------

    def update_params(self) -> None:
        """The engine does not wait for the device; eigh, svd and Newton roots of a rule do."""
        present = {param for group in self.param_groups for param in group["params"]}  # removed ones are frozen
        active = [
            [i for i, ref in enumerate(layout.refs) if ref.param.grad is not None and ref.param in present]
            for layout in self._layouts
        ]
        for layout, indices in zip(self._layouts, active, strict=True):
            _check_same_gradients(layout, indices)
        self._consolidated = {}
        self.check_first_gradients()
        for group in self.param_groups:
            group["step"] += 1
        for layout, indices in zip(self._layouts, active, strict=True):
            on_shards, on_wholes = partial(self._prepare, layout), partial(self._precondition, layout)
            layout.exchange.run(indices, on_shards, on_wholes, partial(self._apply, layout))

    def _prepare(self, layout: ParamLayout, indices: list[int]) -> dict[int, Tensor]:
        inputs: dict[int, Tensor] = {}
        for group, members in self._by_group(layout, indices):
            params = [layout.refs[i].param for i in members]
            states = [{k: local(v) for k, v in self.state[p].items() if k in self._shard_keys} for p in params]
            grads = [local(p.grad) for p in params if p.grad is not None]
            inputs.update(zip(members, self.prepare(group, grads, states), strict=True))
        return inputs

    def _precondition(self, layout: ParamLayout, transfer: Transfer) -> dict[int, Tensor]:
        stacks: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for i in transfer.owned:
            stacks[layout.exchange.plan.specs[i].stack].append(i)
        results = {}
        for members in stacks.values():
            params = [layout.refs[i].param for i in members]
            group = self.param_groups[layout.refs[members[0]].group_index]
            sizes = [block_shape(group, param.shape)[0] for param in params]
            size = (sum(sizes), *block_shape(group, params[0].shape)[1:])
            stack = torch.empty(size, dtype=layout.dtype, device=params[0].device)
            for i, param, blocks in zip(members, params, torch.split(stack, sizes), strict=True):
                transfer.unpack_into(i, as_parameter(group, blocks, param.shape))
            states = [{k: v for k, v in self.state[p].items() if k not in self._shard_keys} for p in params]
            state = cat_states(states)
            pieces = torch.split(self.precondition(group, stack, state), sizes)
            split_state(state, states, sizes)
            for i, param, blocks in zip(members, params, pieces, strict=True):
                results[i] = as_parameter(group, blocks, param.shape)
        return results

    def _apply(self, layout: ParamLayout, updates: dict[int, Tensor]) -> None:
        for group, members in self._by_group(layout, updates):
            params = [layout.refs[i].param for i in members]
            scales = [self.scale(group, block_shape(group, param.shape)[1:]) for param in params]
            casts = [updates[i].to(param.dtype) for i, param in zip(members, params, strict=True)]
            self.apply(group, [local(param) for param in params], casts, scales)

    def _by_group(self, layout: ParamLayout, indices: Iterable[int]) -> list[tuple[Group, list[int]]]:
        members: dict[int, list[int]] = defaultdict(list)
        for i in indices:
            members[layout.refs[i].group_index].append(i)
        return [(self.param_groups[index], members_of) for index, members_of in members.items()]

    # Groups -------------------------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError(
            f"{type(self).__name__} belongs to its process group and can be neither copied nor pickled: build another "
            "from the copied parameters, and load this one's state_dict()"
        )

    def add_param_group(self, param_group: Group) -> None:
        """Only during construction: owners are chosen once, over all matrices."""
        if self._layouts:
            raise RuntimeError("give all parameter groups at construction: the owners of matrices are chosen once")
        _check_renamed({key: value for key, value in param_group.items() if key not in self.defaults})
        super().add_param_group(param_group)

    def _check_settings(self, group: Group, defaults: Group) -> None:
        super()._check_settings(group, defaults)
        check_count(split=group["split"])
        for param, name in named(group):
            check_matrix(group, param, name)

    def settings_changed(self) -> None:
        """A scheduler may have set a momentum where there was none: its state begins at zero."""
        self._shard_keys |= create_state(self, self._layouts)

    def rename_settings(self, group: Group, defaults: Group) -> None:
        for old in RENAMED.keys() & group.keys() - defaults.keys():
            group[RENAMED[old]] = group.pop(old)


def _check_same_gradients(layout: ParamLayout, active: list[int]) -> None:
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


def _check_renamed(settings: Mapping[str, Any]) -> None:
    for key, value in settings.items():
        if key in RENAMED:
            raise ValueError(f"{key}={value}: this setting is now called {RENAMED[key]}")
