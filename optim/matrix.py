"""MatrixOptimizer: one step of any rule that needs whole matrices, under any sharding.

A step has these parts, and a rule fills in what happens in each; it never learns how parameters are sharded:

    prepare        on shards   momentum and other elementwise state; returns what must become whole
    precondition   on wholes   once per matrix, at its owner, on stacks [k, m, n] of equal shapes
    measure        on shards   if a rule has it: sums over whole matrices, such as ||W||^2 and <U, W>, for apply
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

from .base import Group, Tensors, local
from .constraints import check_constraint, hyperball_step, norms_and_product
from .exchange import Transfer
from .layout import EngineSettings, ParamLayout, build_layouts, check_matrices, check_same_gradients, create_state
from .limits import limit_matrices
from .measure import Batch, add_up
from .parameters import local_gradient
from .stacks import block_shapes, block_state, cast_like, cat_states, pack_blocks, split_state, unpack_blocks
from .state import OwnerState

__all__ = ["EngineSettings", "Group", "MatrixOptimizer", "ParamsT", "Tensors", "local"]  # what a rule needs

RENAMED = {"every": "update_freq", "wire": "comm_dtype"}
"""Settings of earlier versions, whose old names are answered with the new ones."""


class MatrixOptimizer(OwnerState):
    """Base of the rules that precondition whole matrices.

    Args:
        params: matrices (m, n), stacks of matrices such as experts [E, m, n], and convolutions' kernels
            [O, I, kh, kw], each one matrix [O, I kh kw]; plain tensors, or DTensors of FSDP2, tensor parallelism,
            expert parallelism and combinations of them.  Named parameters give better error messages.
        defaults: the rule's settings.  Every group also has ``split`` (the matrix is that many blocks of equal
            size along the fan-out dimension, each preconditioned alone with its own ``scale``: 3 for a fused QKV; or
            the rows of each block, (q, k, v) for grouped queries), ``head_dim`` (instead: the rows of every block, for
            one per head), ``conv1d`` (weights stored (fan_in, fan_out), as in Hugging Face's ``Conv1D``),
            ``stack`` (True: all but the last two dimensions count matrices; False: the first dimension is the fan-out,
            the others are the fan-in; by default True for three dimensions, so say False for ``nn.Conv1d``).
        process_group: ranks that hold identical plain parameters and gradients (DDP) and share the work.
        dtype: in which matrices are preconditioned; by default bfloat16 on CUDA where the rule allows it (not for
            float64), otherwise the widest dtype of the parameters.
        comm_dtype: in which they travel, by default ``dtype``.  bfloat16 beside float32 halves the bytes; what is sent
            is rounded, and by a single process too, so that the number of ranks changes nothing.
        bucket_bytes: a step allocates at most twice this at once, ``workspace`` of the rule included; more only where
            a single parameter (an expert stack counts whole) exceeds its share.
        share: whether replicas of sharded parameters (HSDP) share the work, each matrix computed in one of them alone,
            which costs bytes between them: ``auto`` counts both (``worth_sharing``), ``always``, ``never``.
        constraint: of groups too. ``hyperball``: every block keeps its Frobenius norm, and lr is the length of a step
            in parts of it; see ``hyperball_step``.

    Raises:
        ValueError: a parameter that is not a matrix, is not divisible by ``split``, or is neither sharded nor
            replicated.
        RuntimeError: in ``step``, before any matrix travels, if a gradient is missing on some ranks only.
    """

    group_settings = {
        "split": int | tuple[int, ...],
        "head_dim": int | None,
        "conv1d": bool,
        "stack": bool | None,
        "step": int,
    }
    all_rows = False  # whether ``apply`` needs ``measure``'s sums over rows of all rows of a block
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
        constraint: str | None = None,
        share: str = "auto",
        **unknown: Any,
    ):
        _check_renamed(unknown)
        if unknown:
            raise TypeError(f"{type(self).__name__} has no setting {', '.join(unknown)}")
        self._layouts: list[ParamLayout] = []
        engine_defaults: Group = {"split": 1, "head_dim": None, "conv1d": False, "stack": None, "step": 0}
        engine_defaults["constraint"] = constraint
        super().__init__(params, engine_defaults | defaults)
        self._layouts = build_layouts(self, process_group, dtype, comm_dtype, bucket_bytes, share)
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

    def measure(self, group: Group, params: Tensors, updates: Tensors, states: list[dict[str, Tensor]]) -> Tensors:
        """On shards, after ``precondition``: what ``apply`` needs summed over whole blocks (matrices; the blocks of
        ``split``, the matrices of a stack each by itself), such as ||W||^2; of every part [rows, ...], of which a rank
        may hold none, either sums [s] or sums over each of its rows [s, rows]; in float32 at least.

        A rule that has it gets parts in ``apply`` too, views of parameters, updates and elementwise state, with sums of
        whole blocks and whole rows, and where the class has ``all_rows`` of every row, the part's own rows first.  The
        price is one small all_reduce a bucket where blocks or rows are cut.
        """
        return norms_and_product(params, updates)

    def apply(
        self,
        group: Group,
        params: Tensors,
        updates: Tensors,
        scales: list[float],
        states: list[dict[str, Tensor]],
        sums: Tensors,
    ) -> None:
        """On shards: W <- (1 - lr * weight_decay) W - lr * scale * update, decay masked if ``cautious``; or the step of
        the ``constraint``.  ``sums`` are those of ``measure``; elementwise state may be changed."""
        if group["constraint"]:
            hyperball_step(group, params, updates, sums)
            return
        lr = float(group["lr"])
        decay = lr * float(group.get("weight_decay", 0.0))
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
            [i for i, ref in enumerate(layout.refs) if ref.param in present and ref.param.grad is not None and ref.held]
            for layout in self._layouts
        ]
        for layout, indices in zip(self._layouts, active, strict=True):
            check_same_gradients(layout, indices)
        self._consolidated = {}
        self.check_first_gradients()
        for group in self.param_groups:
            group["step"] += 1
        sums_up = any(self._measures(group) for group in self.param_groups)
        for layout, indices in zip(self._layouts, active, strict=True):
            on_shards, on_wholes = partial(self._prepare, layout), partial(self._precondition, layout)
            layout.exchange.run(indices, on_shards, on_wholes, partial(self._apply, layout), sums_up)

    def _measures(self, group: Group) -> bool:
        return bool(group["constraint"]) or type(self).measure is not MatrixOptimizer.measure

    def _prepare(self, layout: ParamLayout, indices: list[int]) -> dict[int, Tensor]:
        inputs: dict[int, Tensor] = {}
        for group, members in self._by_group(layout, indices):
            params = [layout.refs[i].param for i in members]
            states = [self._on_shards(param) for param in params]
            grads = [local_gradient(p) for p in params]
            inputs.update(zip(members, self.prepare(group, grads, states), strict=True))
        return inputs

    def _precondition(self, layout: ParamLayout, transfer: Transfer) -> dict[int, Tensor]:
        stacks: dict[tuple[int, int, int], list[tuple[int, int]]] = defaultdict(list)
        for i in transfer.owned:
            ref = layout.refs[i]
            for k, m, n in block_shapes(self.param_groups[ref.group_index], ref.shape):
                stacks[ref.group_index, m, n].append((i, k))
        results: dict[int, Tensor] = {}
        for (group_index, m, n), members in stacks.items():
            group, sizes = self.param_groups[group_index], [k for _, k in members]
            refs = [layout.refs[i] for i, _ in members]
            stack = torch.empty(sum(sizes), m, n, dtype=layout.dtype, device=refs[0].param.device)
            for (i, _), ref, blocks in zip(members, refs, torch.split(stack, sizes), strict=True):
                unpack_blocks(group, blocks, ref.shape, partial(transfer.unpack_into, i))
            if self.squares:
                limit_matrices(stack)
            held = [{k: v for k, v in self.state[ref.param].items() if k not in self._shard_keys} for ref in refs]
            states = [block_state(of, group, ref.shape, m) for of, ref in zip(held, refs, strict=True)]
            state = cat_states(states, sizes)
            pieces = torch.split(self.precondition(group, stack, state), sizes)
            split_state(state, states, sizes)
            for (i, _), ref, blocks in zip(members, refs, pieces, strict=True):
                results[i] = pack_blocks(group, blocks, ref.shape, results.get(i))
        return results

    def _apply(self, layout: ParamLayout, updates: dict[int, Tensor]) -> None:
        batches = []
        for group, members in self._by_group(layout, updates):
            params = [layout.refs[i].param for i in members]
            sizes = [block_shapes(group, param.shape) for param in params]
            scales = [self.scale(group, of[0][1:]) for of in sizes]
            batch = Batch(group, [local(param) for param in params], [], scales, [self._on_shards(p) for p in params])
            batch.updates = cast_like([updates[i] for i in members], params)
            if self._measures(group) or any(len(of) > 1 for of in sizes):
                batch = layout.into_parts(batch, members, self.scale)
            if self._measures(group):
                batch.all_rows = self.all_rows
                batch.sums = self.measure(group, batch.params, batch.updates, batch.states)
                batches.append(batch)
            else:
                self.apply(group, batch.params, batch.updates, batch.scales, batch.states, [])
        add_up(batches, layout.exchange.all_reduce)
        for batch in batches:
            self.apply(batch.group, batch.params, batch.updates, batch.scales, batch.states, batch.sums)

    def _on_shards(self, param: Tensor) -> dict[str, Tensor]:
        return {key: local(value) for key, value in self.state[param].items() if key in self._shard_keys}

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
        check_constraint(group)
        check_matrices(group)

    def settings_changed(self) -> None:
        """A scheduler may have set a momentum where there was none: its state begins at zero."""
        self._shard_keys |= create_state(self, self._layouts)

    def rename_settings(self, group: Group, defaults: Group) -> None:
        for old in RENAMED.keys() & group.keys() - defaults.keys():
            group[RENAMED[old]] = group.pop(old)


def _check_renamed(settings: Mapping[str, Any]) -> None:
    for key, value in settings.items():
        if key in RENAMED:
            raise ValueError(f"{key}={value}: this setting is now called {RENAMED[key]}")
