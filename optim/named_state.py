"""State by parameter name, as a checkpoint holds it that each rank writes its part of: for the trainer.

The names are those under which ``get_optimizer_state_dict`` and DCP put the same state: ``state.<parameter>.<key>``.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from .base import COUNTERS, Group, Optimizer, named
from .combined import Combined
from .matrix import MatrixOptimizer


def named_tensors(optimizer: Combined) -> dict[str, Tensor]:
    """What this rank holds of the state: shards as DTensors; of replicated matrices' owner state, its own alone.

    Live tensors, but for the DTensors that owner state is cut into.  Where parameters are sharded, all ranks call.
    """
    optimizer.settle()
    tensors = {}
    for member in optimizer.members.values():
        states = member.saved_state() if isinstance(member, MatrixOptimizer) else member.state
        for parameter, name in _named(member):
            for key, value in states.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    tensors[f"state.{name}.{key}"] = value
    return tensors


def replicated_tensors(optimizer: Combined) -> dict[str, Tensor]:
    """What of the state lies as its parameter does, and is therefore the same on all replicas: not what owners hold."""
    found = {}
    for member in optimizer.members.values():
        for parameter, name in _named(member):
            for key, value in member.state.get(parameter, {}).items():
                like = isinstance(value, Tensor) and value.shape == parameter.shape
                if like and (not isinstance(member, MatrixOptimizer) or key in member._shard_keys):
                    found[f"state.{name}.{key}"] = value
    return found


def named_numbers(optimizer: Combined) -> dict[str, float]:
    """ "<member>/<group or parameter>/<key>" -> what is no tensor: counters and settings, but for the lr, which the
    schedule sets."""
    optimizer.settle()
    numbers = {}
    for role, member in optimizer.members.items():
        for number, group in enumerate(member.param_groups):
            for key, value in group.items():
                if key not in ("lr", "initial_lr") and _is_number(value):
                    numbers[f"{role}/{number}/{key}"] = value
        for parameter, name in _named(member):
            for key, value in member.state.get(parameter, {}).items():
                if _is_number(value):
                    numbers[f"{role}/{name}/{key}"] = value
    return numbers


def named_groups(optimizer: Combined) -> list[Group]:
    """The groups as ``get_optimizer_state_dict`` has them, with names for parameters."""
    optimizer.settle()
    return [{**group, "params": list(group["param_names"])} for group in optimizer.param_groups]


def load_named(optimizer: Combined, tensors: Mapping[str, Tensor], numbers: Mapping[str, float]) -> None:
    """The reverse: tensors as :func:`named_tensors` gives them, filled in place or not.  On all ranks.

    State that an optimizer creates in its first step must exist: see :func:`init_state`.
    """
    held: dict[str, dict[str, Tensor]] = {}
    names = {name for member in optimizer.members.values() for _, name in _named(member)}
    for full, tensor in tensors.items():
        name, _, key = full.removeprefix("state.").rpartition(".")
        if name not in names:  # row_mean_square.64, of blocks of unequal sizes
            name, _, more = name.rpartition(".")
            key = f"{more}.{key}"
        held.setdefault(name, {})[key] = tensor
    for role, member in optimizer.members.items():
        for parameter, name in _named(member):
            state, prefix = member.state.get(parameter, {}), f"{role}/{name}/"
            for key, tensor in held.get(name, {}).items():
                if key in state and state[key] is not tensor and type(state[key]) is type(tensor):
                    state[key].copy_(tensor)
            state |= {key.removeprefix(prefix): value for key, value in numbers.items() if key.startswith(prefix)}
        for number, group in enumerate(member.param_groups):
            for key in group:
                if key in COUNTERS or key not in member.defaults:  # settings are the config's and the schedule's
                    group[key] = numbers.get(f"{role}/{number}/{key}", group[key])
        if isinstance(member, MatrixOptimizer) and held:
            member.set_owner_state({parameter: held.get(name, {}) for parameter, name in _named(member)})
        if isinstance(member, Optimizer):
            member.check_groups()


def init_state(optimizer: Combined, names: Iterable[str]) -> None:
    """Create the state that torch's optimizers create in their first step, where ``names`` (as in
    :func:`named_tensors`) has it, and drop it where ``names`` has none.

    This takes a step with zero gradients and lr 0, so load the weights, state and numbers afterwards.
    """
    wanted = {name.removeprefix("state.").rpartition(".")[0] for name in names}
    for member in optimizer.members.values():
        if isinstance(member, MatrixOptimizer):
            continue  # all of its state exists from the start, and a step would communicate
        if any(name in wanted and not member.state.get(parameter) for parameter, name in _named(member)):
            _step_with_zero_gradients(member)
        for parameter, name in _named(member):
            if name not in wanted:
                member.state.pop(parameter, None)


def _named(member: torch.optim.Optimizer) -> Iterator[tuple[Tensor, str]]:
    for group in member.param_groups:
        yield from named(group)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _step_with_zero_gradients(optimizer: torch.optim.Optimizer) -> None:
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
