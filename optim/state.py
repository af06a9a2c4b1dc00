"""The state dict of a matrix optimizer: state that owners hold leaves and enters in the form that torch's tools expect.

    sharded parameters      DTensors on the parameter's mesh: what reads DTensors (torch.distributed.checkpoint and its
                            state_dict functions) can save, join and reshard them
    replicated parameters   whole, where ``consolidate_state_dict`` has brought it together before, as with torch's
                            ZeroRedundancyOptimizer
    one process             as it is

Names and whole shapes are the same in all three.
"""

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .base import Group, Optimizer
from .layout import ParamLayout
from .resharding import Shapes, as_dtensor, own_matrices, state_dtype, to_dtensors, to_owners
from .stacks import owner_shapes

States = dict[Tensor, dict[str, Any]]


class OwnerState(Optimizer):
    """What :class:`MatrixOptimizer` knows of state dicts."""

    _layouts: list[ParamLayout]
    _shard_keys: set[str]  # names of the state that is sharded like its parameter
    _consolidated: States | None = None  # what other ranks' owners hold; None while everything is as it was built

    def shard_state(self, group: Group, param: Tensor) -> dict[str, Tensor]:
        raise NotImplementedError

    def owner_state(self, group: Group, shape: tuple[int, int, int]) -> dict[str, tuple[int, ...]]:
        raise NotImplementedError

    def state_shapes(self, group: Group, param: Tensor) -> Shapes:
        if not param.numel():
            return {}
        on_shards = self.shard_state(group, torch.empty(param.shape, dtype=param.dtype, device="meta"))
        at_owner = owner_shapes(partial(self.owner_state, group), group, param.shape)
        return {key: tuple(value.shape) for key, value in on_shards.items()} | at_owner

    def state_dict(self) -> dict[str, Any]:
        """As torch's.  Where parameters are sharded, all ranks call.

        Raises:
            RuntimeError: parameters are replicated, and the others' state has not been brought to this rank since the
                last step: see :meth:`consolidate_state_dict`.
        """
        handle = self.register_state_dict_post_hook(_with_owner_state, prepend=True)
        try:
            return super().state_dict()
        finally:
            handle.remove()

    def consolidate_state_dict(self, to: int | None = 0) -> None:
        """Bring the state of replicated matrices together on rank ``to`` of the group, or (None) on every rank, for a
        ``state_dict`` there before the next step.  All ranks call, as with torch's ZeroRedundancyOptimizer."""
        consolidated = self._consolidated = {}
        for layout in self._layouts:
            exchange = layout.exchange
            for i, shapes in _owner_shapes(self, layout).items() if exchange.layout == "replicated" else ():
                param, owner = layout.refs[i].param, exchange.plan.owners[i]
                for key, shape in shapes.items():
                    empty = torch.empty(shape, dtype=state_dtype(layout), device=param.device)
                    whole = self.state[param][key] if owner == exchange.rank else empty
                    dist.broadcast(whole, group=exchange.group, group_src=owner)
                    if to in (None, exchange.rank):
                        consolidated.setdefault(param, {})[key] = whole

    def saved_state(self) -> States:
        """Per parameter, its state as in a state dict; of replicated matrices, what this rank holds."""
        states = {p: dict(self.state.get(p, {})) for group in self.param_groups for p in group["params"]}
        for layout in self._layouts:
            shapes, wholes = _owner_shapes(self, layout), _owner_shapes(self, layout, of_stack=True)
            held = {i: self.state[layout.refs[i].param] for i in shapes}
            if layout.exchange.layout == "sharded":
                found = to_dtensors(layout, shapes, wholes, held)
            else:
                cut = [(i, layout.refs[i]) for i in shapes if layout.refs[i].place.between]
                found = {i: {key: as_dtensor(ref, held[i][key], s) for key, s in wholes[i].items()} for i, ref in cut}
            for i, state in found.items():
                states[layout.refs[i].param] |= state
        return states

    def check_state(self, state_dict: dict[str, Any]) -> None:
        """As the base; ranks that share matrices refuse it together."""
        fault = None
        try:
            super().check_state(state_dict)
        except ValueError as error:
            fault = error
        for layout in self._layouts:
            if layout.exchange.layout == "sharded" and not layout.exchange.all_equal(int(fault is None)):
                fault = fault or ValueError(f"the state was refused by another rank's {type(self).__name__}")
        if fault is not None:
            raise fault

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self._loading is None:
            return
        for group in self.param_groups:  # of settings that this one began without
            self._shard_keys.update(*(self.shard_state(group, param) for param in group["params"][:1]))
        numbers = [number for group in self._loading["param_groups"] for number in group["params"]]
        params = [param for group in self.param_groups for param in group["params"]]
        # Not what torch has cast to the parameters' dtype: the owners' state keeps its own.
        self.set_owner_state({p: self._loading["state"].get(n, {}) for n, p in zip(numbers, params, strict=True)})

    def set_owner_state(self, states: States) -> None:
        """Take what this rank owns of ``states``, which are as in a state dict."""
        self._consolidated = {}
        for layout in self._layouts:
            exchange, params = layout.exchange, [ref.param for ref in layout.refs]
            shapes = {i: of for i, of in _owner_shapes(self, layout).items() if params[i] in states}
            found = {i: states[params[i]] for i in shapes if exchange.plan.owners[i] == exchange.rank}
            if exchange.layout == "sharded":
                found = to_owners(layout, shapes, {i: states[params[i]] for i in shapes})
            for i, of in shapes.items():
                live = self.state[params[i]]
                for key in of:
                    live.pop(key, None)
                    if i in found:
                        value = found[i][key]
                        if exchange.layout != "sharded":
                            value = own_matrices(layout.refs[i], value)
                        live[key] = value.to(params[i].device, state_dtype(layout), copy=True)


def _owner_shapes(rule: OwnerState, layout: ParamLayout, of_stack: bool = False) -> dict[int, Shapes]:
    """By the number of a matrix in its layout, of those that have such state; ``of_stack``: of all matrices of a stack,
    not only this rank's."""
    shapes = {}
    for i, ref in enumerate(layout.refs):
        group = rule.param_groups[ref.group_index]
        shapes[i] = owner_shapes(
            partial(rule.owner_state, group), group, tuple(ref.param.shape) if of_stack else ref.shape
        )
    return {i: of for i, of in shapes.items() if of}


def _with_owner_state(rule: Any, state_dict: dict[str, Any]) -> None:
    """A hook of torch's, before the user's: give the state dict what owners hold."""
    states = rule.saved_state()
    for layout in rule._layouts:
        for i, shapes in _owner_shapes(rule, layout).items():
            ref, owner = layout.refs[i], layout.exchange.plan.owners[i]
            state = states.get(ref.param, {})
            if rule._consolidated is None:  # Accelerate asks before the first step
                like = dict(dtype=state_dtype(layout), device=ref.param.device)
                state |= {key: torch.zeros(shape, **like) for key, shape in shapes.items() if key not in state}
            else:
                state |= rule._consolidated.get(ref.param, {})
            if ref.param in states and shapes.keys() - state.keys():
                raise RuntimeError(
                    f"the state of {ref.name} is held by rank {owner} alone: on every rank, call "
                    "consolidate_state_dict() before a state_dict() on rank 0, consolidate_state_dict(to=None) before "
                    "one on every rank"
                )
    for group, packed in zip(rule.param_groups, state_dict["param_groups"], strict=True):
        state_dict["state"] |= {n: states[p] for p, n in zip(group["params"], packed["params"], strict=True)}
