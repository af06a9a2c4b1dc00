"""Which parameter goes to which optimizer, and one container that steps them all.

Every parameter has exactly one role:

    matrix     weights of linear layers inside the network (2-D or more)
    embedding  tables looked up by index (``nn.Embedding``), also when tied to the head
    head       the output projection
    scalar     everything 1-D: norms, biases
"""

import difflib
import importlib
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .base import COUNTERS, Optimizer
from .by_name import BY_NAME, split_by_name, typed_by_name
from .matrix import RENAMED, MatrixOptimizer
from .settings import settings_of, typed

ROLES = ("matrix", "embedding", "head", "scalar")
HF_CONV1D = ("transformers.pytorch_utils", "Conv1D")


def assign_roles(model: nn.Module, head: str = "lm_head") -> dict[str, str]:
    """Role of every parameter by name.  ``head`` names the module of the output projection.

    A shared tensor appears once, under the first name that ``named_parameters`` gives it.
    """
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    roles = {}
    for name, parameter in model.named_parameters():
        if id(parameter) in tables:
            roles[name] = "embedding"
        elif parameter.ndim < 2:
            roles[name] = "scalar"
        elif head in name.split("."):
            roles[name] = "head"
        else:
            roles[name] = "matrix"
    return roles


def resolve_target(settings: Mapping[str, Any], where: str) -> tuple[type, dict[str, Any]]:
    """The class that ``settings["_target_"]`` names, and its keyword arguments.

    Raises:
        ValueError: one line naming ``where`` and what is wrong: no such class, or no such setting of it.
    """
    target = settings.get("_target_")
    if not isinstance(target, str) or "." not in target:
        raise ValueError(f"{where}._target_={target}: name an optimizer class, such as torch.optim.AdamW")
    module, _, name = target.rpartition(".")
    try:
        optimizer = getattr(importlib.import_module(module), name)
    except Exception as error:  # whatever the module's own code raises
        raise ValueError(f"{where}._target_={target}: no such class ({error}); such as torch.optim.AdamW") from None
    if not isinstance(optimizer, type) or not issubclass(optimizer, torch.optim.Optimizer):
        raise ValueError(f"{where}._target_={target}: not an optimizer class; such as torch.optim.AdamW")
    kwargs = {key: value for key, value in settings.items() if key != "_target_"}
    accepted = settings_of(optimizer)
    for key, value in kwargs.items():
        if key == BY_NAME:
            kwargs[key] = typed_by_name(value, accepted, where)
            continue
        if RENAMED.get(key) in accepted and key not in accepted:
            raise ValueError(f"{where}.{key}={value}: this setting is now called {RENAMED[key]}")
        if key not in accepted:
            close = difflib.get_close_matches(key, accepted, 1)
            hint = f"did you mean {close[0]}?" if close else f"it has {', '.join(accepted)}"
            raise ValueError(f"{where}.{key}={value}: {target} has no such setting; {hint}")
        try:
            kwargs[key] = typed(value, accepted[key])
        except ValueError as error:
            raise ValueError(f"{where}.{key}={value}: {error}") from None
    return optimizer, kwargs


def build(
    model: nn.Module,
    config: Mapping[str, Any],
    process_group: dist.ProcessGroup | None = None,
    head: str = "lm_head",
) -> "Optimizers":
    """One optimizer per role from ``config[role] = {"_target_": class path, **settings}``.

    Args:
        model: plain, DDP-replicated or FSDP2-sharded, with its final parameters.
        process_group: ranks that hold identical plain parameters (DDP); ``None`` otherwise.
        head: see :func:`assign_roles`.

    Raises:
        ValueError: a role that the model needs is missing, or a setting is wrong.
    """
    roles = assign_roles(model, head)
    named: dict[str, list[tuple[str, Tensor]]] = {role: [] for role in ROLES}
    for name, parameter in model.named_parameters():
        named[roles[name]].append((name, parameter))
    members = {}
    for role, parameters in named.items():
        if not parameters:
            continue
        if not config.get(role):
            raise ValueError(f"optim.{role} is missing, but the model has {len(parameters)} such parameters")
        optimizer, kwargs = resolve_target(config[role], f"optim.{role}")
        groups: list[Any] = [{"params": parameters}]
        if issubclass(optimizer, MatrixOptimizer):
            kwargs["process_group"] = process_group
            groups = _group_by_layout(model, parameters)
        groups = split_by_name(groups, kwargs.pop(BY_NAME, {}))
        try:
            members[role] = optimizer(groups, **kwargs)
        except (TypeError, ValueError) as error:
            raise ValueError(f"optim.{role}: {error}") from None
    return Optimizers(members, roles)


def _group_by_layout(model: nn.Module, parameters: list[tuple[str, Tensor]]) -> list[Any]:
    """Groups for the weights that are stored otherwise than (fan_out, fan_in) or [E, m, n], which only their modules
    know: Hugging Face's Conv1D and torch's convolutions."""
    settings: dict[Any, tuple[tuple[str, bool], ...]] = {}
    for module in model.modules():
        if any((cls.__module__, cls.__name__) == HF_CONV1D for cls in type(module).__mro__):
            settings[module.weight] = (("conv1d", True),)
        elif isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            settings[module.weight] = (("stack", False),)
        elif isinstance(module, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d):
            settings[module.weight] = (("stack", False), ("conv1d", True))
    kinds: dict[tuple[tuple[str, bool], ...], list[tuple[str, Tensor]]] = {}
    for name, parameter in parameters:
        kinds.setdefault(settings.get(parameter, ()), []).append((name, parameter))
    return [{"params": members, **dict(kind)} for kind, members in kinds.items()]


class Optimizers:
    """The optimizers of all roles, stepped as one.

    Args:
        members: role -> optimizer.
        roles: parameter name -> role.

    Raises:
        AssertionError: if a parameter would be stepped twice.
    """

    def __init__(self, members: dict[str, torch.optim.Optimizer], roles: dict[str, str]):
        self.members, self.roles = members, roles
        seen = [id(p) for member in members.values() for group in member.param_groups for p in group["params"]]
        assert len(seen) == len(set(seen)) == len(roles), "every parameter has exactly one role and one optimizer"
        self.base_lr = {role: [group["lr"] for group in member.param_groups] for role, member in members.items()}

    def step(self) -> None:
        for member in self.members.values():
            member.step()

    def zero_grad(self) -> None:
        for member in self.members.values():
            member.zero_grad(set_to_none=True)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Meanwhile the weights are those to evaluate and to save: of a schedule-free method, the average."""
        modal: list[Any] = [m for m in self.members.values() if hasattr(m, "train") and hasattr(m, "eval")]
        try:
            for member in modal:
                member.eval()
            yield
        finally:
            for member in modal:
                member.train()

    def set_lr(self, multiplier: float | Mapping[str, float]) -> dict[str, float]:
        """Set every lr to ``multiplier``, or its role's, times its configured value; returns role -> lr in force."""
        for role, member in self.members.items():
            factor = multiplier[role] if isinstance(multiplier, Mapping) else multiplier
            for group, lr in zip(member.param_groups, self.base_lr[role], strict=True):
                group["lr"] = lr * factor
        return {role: member.param_groups[0]["lr"] for role, member in self.members.items()}

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """What this rank holds of the state, by parameter name, so that it loads under any other sharding.

        Returns:
            ``tensors``: "<role>/<parameter>/<key>" -> the live tensor: shards as DTensors, and the state of whole
            matrices on its owner alone.  ``numbers``: the same or "<role>/<group>/<key>" -> int or float (counters;
            not the lr, which the schedule sets).
        """
        tensors, numbers = {}, {}
        for role, member in self.members.items():
            for number, group in enumerate(member.param_groups):
                for key, value in group.items():
                    if key not in ("lr", "initial_lr") and _is_number(value):
                        numbers[f"{role}/{number}/{key}"] = value
                for parameter, name in zip(group["params"], group["param_names"], strict=True):
                    for key, value in member.state.get(parameter, {}).items():
                        if isinstance(value, Tensor):
                            tensors[f"{role}/{name}/{key}"] = value
                        elif _is_number(value):
                            numbers[f"{role}/{name}/{key}"] = value
        return {"tensors": tensors, "numbers": numbers}

    def load_state_dict(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Copy ``tensors`` into the live ones (those that are these very tensors are left) and set ``numbers``.

        State that an optimizer creates in its first step must exist: see :meth:`init_state`.
        """
        live = self.state_dict()["tensors"]
        for name, value in state["tensors"].items():
            if name in live and live[name] is not value:
                live[name].copy_(value)
        for role, member in self.members.items():
            for number, group in enumerate(member.param_groups):
                for key in group:
                    if key in COUNTERS or key not in member.defaults:  # settings are the config's and the schedule's
                        group[key] = state["numbers"].get(f"{role}/{number}/{key}", group[key])
                for parameter, name in zip(group["params"], group["param_names"], strict=True):
                    prefix = f"{role}/{name}/"
                    for full, value in state["numbers"].items():
                        if full.startswith(prefix):
                            member.state[parameter][full.removeprefix(prefix)] = value
            if isinstance(member, Optimizer):
                member.check_groups()

    def init_state(self, names: Iterable[str]) -> None:
        """Create the state that torch's optimizers create in their first step, where ``names`` (as in
        :meth:`state_dict`) has it, and drop it where ``names`` has none.

        This takes a step with zero gradients and lr 0, so load the weights, state and numbers afterwards.
        """
        names = set(names)
        for role, member in self.members.items():
            if isinstance(member, MatrixOptimizer):
                continue  # all of its state exists from the start, and a step would communicate
            held = {name for name in self.state_dict()["tensors"] if name.startswith(f"{role}/")}
            if any(name.startswith(f"{role}/") for name in names - held):
                _step_with_zero_gradients(member)
            for group in member.param_groups:
                for parameter, name in zip(group["params"], group["param_names"], strict=True):
                    if not any(f"{role}/{name}/{key}" in names for key in member.state.get(parameter, {})):
                        member.state.pop(parameter, None)

    def table(self) -> list[dict[str, Any]]:
        """A row per role: role, tensors, parameters (elements), optimizer, lr."""
        rows = []
        for role, member in self.members.items():
            tensors = [p for group in member.param_groups for p in group["params"]]
            row = dict(role=role, tensors=len(tensors), parameters=sum(p.numel() for p in tensors))
            rows.append(row | dict(optimizer=class_path(type(member)), lr=self.base_lr[role][0]))
        return rows


def class_path(cls: type) -> str:
    """The shortest path under which ``cls`` can be imported: torch.optim.AdamW, not torch.optim.adamw.AdamW."""
    parts = cls.__module__.split(".")
    modules = [".".join(parts[:end]) for end in range(1, len(parts))]
    found = [module for module in modules if getattr(sys.modules.get(module), cls.__name__, None) is cls]
    return f"{[*found, cls.__module__][0]}.{cls.__name__}"


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
