"""Several optimizers as one ``torch.optim.Optimizer``, for schedulers, scalers, trainers and torch's state tools."""

import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .base import Group, Optimizer, check_rule, named, rule_of
from .guarded import step_unless, unscale
from .matrix import MatrixOptimizer
from .parameters import check_apart


class Combined(torch.optim.Optimizer):
    """One optimizer per dict, each for its own parameters, stepped as one.

    torch.amp.GradScaler's ``step`` takes it as it takes torch's fused optimizers: no host waits for the device.

        Combined([
            dict(optimizer=Muon, params=matrices, lr=0.02),
            dict(optimizer=torch.optim.AdamW, params=others, lr=3e-4, betas=(0.9, 0.95)),
        ])

    Args:
        params: dicts of ``optimizer``, a class (or a function that builds one), its ``params`` (tensors, named tensors
            or groups), its settings, and optionally a ``name``, which its groups get too.

    Raises:
        ValueError: no class is given, a parameter has two optimizers, or what a class says of its settings.
    """

    _step_supports_amp_scaling = True  # GradScaler asks for that, and then gives the next, and grad_scale
    found_inf: Tensor | None = None  # where it is not 0, the step changes nothing; the same on all ranks

    def __init__(self, params: Iterable[Mapping[str, Any]]):
        self.members: dict[str, torch.optim.Optimizer] = {}
        self._started = False
        self._unsettled: list[Callable[[], None]] = []  # what the host still has to ask about the last step
        super().__init__([dict(group) for group in params], {})

    def add_param_group(self, param_group: Group) -> None:
        """One optimizer more."""
        settings = dict(param_group)
        cls, params = settings.pop("optimizer", None), settings.pop("params")
        if not callable(cls):
            raise ValueError(f"optimizer={cls}: give every group of parameters a class, such as torch.optim.AdamW")
        name = settings.pop("name", getattr(cls, "__name__", "optimizer"))
        name = name if name not in self.members else f"{name} {len(self.members)}"
        try:
            member = cls(params, **settings)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{name}: {error}") from None
        if not isinstance(member, torch.optim.Optimizer):
            raise ValueError(
                f"{name}: {class_path(type(member))} is not an optimizer; give one, such as torch.optim.AdamW"
            )
        mine = {id(param) for group in self.param_groups for param in group["params"]}
        for number, group in enumerate(member.param_groups):
            group.setdefault("name", f"{name} {number}" if number else name)
            for param, label in named(group):
                if id(param) in mine:
                    raise ValueError(f"{label} has two optimizers: give each parameter one")
        self.members[name] = member
        self._link()
        check_apart(pair for group in self.param_groups for pair in named(group))

    def _link(self) -> None:
        """The groups are those of the members themselves, so that a scheduler's change reaches them."""
        self.param_groups = [group for member in self.members.values() for group in member.param_groups]
        for member in self.members.values():
            for group in member.param_groups:
                group.setdefault("rule", rule_of(member))

    @property
    def state(self) -> defaultdict[Tensor, Any]:
        """The members' state, by parameter; empty before the first step, as that of an optimizer that has none yet."""
        merged: defaultdict[Tensor, Any] = defaultdict(dict)
        for member in self.members.values() if self._has_started() else ():
            merged.update(member.state)
        return merged

    @state.setter
    def state(self, value: defaultdict[Tensor, Any]) -> None:
        """It is the members'."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of every member; returns what ``closure`` returns, which is called once."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not self._has_started() and self._is_blank():
            self._create_state()
        else:
            self.settle()
            for member in self.members.values():
                self._step(member)
        self._started = True
        return loss

    def _step(self, member: Any) -> None:
        scale = getattr(self, "grad_scale", None)
        if self.found_inf is None:
            member.step()
        elif getattr(member, "_step_supports_amp_scaling", False):  # torch's fused ones
            member.grad_scale, member.found_inf = scale, self.found_inf
            try:
                member.step()
            finally:
                del member.grad_scale, member.found_inf
        else:
            unscale(member, scale)
            self._unsettled.append(step_unless(self.found_inf, member))

    def settle(self) -> None:
        """Before groups and state are read otherwise than by ``state_dict``: counters on the host become those of the
        device, which may have taken the last step back."""
        while self._unsettled:
            self._unsettled.pop()()

    def _has_started(self) -> bool:
        """Members may be stepped, and given state, one by one."""
        return self._started or any(m.state for m in self.members.values() if not isinstance(m, Optimizer))

    def _is_blank(self) -> bool:
        """Whether lr and gradients are 0: the step by which torch.distributed.checkpoint lets state come into being."""
        grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        return not any(group["lr"] for group in self.param_groups) and not any(grad.any() for grad in grads)

    def _create_state(self) -> None:
        """Step those members alone whose state begins in a step, and have them count from 0 again."""
        for member in self.members.values():
            if not isinstance(member, Optimizer):
                member.step()
                for state in member.state.values():
                    if isinstance(state.get("step"), Tensor):
                        state["step"].zero_()

    def consolidate_state_dict(self, to: int | None = 0) -> None:
        """See :meth:`MatrixOptimizer.consolidate_state_dict`."""
        for member in self.members.values():
            if isinstance(member, MatrixOptimizer):
                member.consolidate_state_dict(to)

    def state_dict(self) -> dict[str, Any]:
        """As torch's, parameters and groups in the members' order.  Where parameters are sharded, all ranks call."""
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        self.settle()
        merged: dict[str, Any] = {"state": {}, "param_groups": []}
        first = 0
        for member in self.members.values():
            part = member.state_dict()
            merged["state"] |= {first + number: state for number, state in part["state"].items()}
            for group in part["param_groups"]:
                merged["param_groups"].append(group | {"params": [first + number for number in group["params"]]})
            first += sum(len(group["params"]) for group in part["param_groups"])
        for after in self._optimizer_state_dict_post_hooks.values():
            merged = after(self, merged) or merged
        return merged

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Raises ValueError for the state of another optimizer; nothing is changed then."""
        self.settle()
        state_dict = dict(state_dict)
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = before(self, state_dict) or state_dict
        groups = state_dict["param_groups"]
        counts = [[len(group["params"]) for group in of] for of in (groups, self.param_groups)]
        if counts[0] != counts[1]:
            raise ValueError(f"the state has groups of {counts[0]} parameters, but this optimizer of {counts[1]}")
        parts = {}
        for name, member in self.members.items():
            mine, groups = groups[: len(member.param_groups)], groups[len(member.param_groups) :]
            numbers = [number for group in mine for number in group["params"]]
            state = {number: state_dict["state"][number] for number in numbers if number in state_dict["state"]}
            parts[name] = {"state": state, "param_groups": mine}
        for name, member in self.members.items():
            for group in parts[name]["param_groups"]:
                check_rule(group, member)
                if "lr" not in group:
                    raise ValueError(f"the state has no settings of {name}, such as lr: give that of all its groups")
            if isinstance(member, Optimizer):
                member.check_state(parts[name])
        for name, member in self.members.items():
            member.load_state_dict(parts[name])
        self._started = True
        self._link()
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError("Combined can be neither copied nor pickled: build another, and load this one's state_dict()")

    @property
    def roles(self) -> dict[str, str]:
        """Name of a parameter -> name of its member."""
        groups = [(name, group) for name, member in self.members.items() for group in member.param_groups]
        return {label: name for name, group in groups for _, label in named(group)}

    def table(self) -> list[dict[str, Any]]:
        """A row per member: role, tensors, parameters (elements), optimizer, lr."""
        rows = []
        for name, member in self.members.items():
            tensors = [p for group in member.param_groups for p in group["params"]]
            row = dict(role=name, tensors=len(tensors), parameters=sum(p.numel() for p in tensors))
            lr = member.param_groups[0].get("initial_lr", member.param_groups[0]["lr"])
            rows.append(row | dict(optimizer=class_path(type(member)), lr=lr))
        return rows

    def __repr__(self) -> str:
        """Who goes where, with the first names of each."""
        lines = []
        for row, member in zip(self.table(), self.members.values(), strict=True):
            names = [label for group in member.param_groups for _, label in named(group)]
            shown = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
            size = f"{row['tensors']:4} tensors {row['parameters']:13,} parameters"
            lines.append(f"{row['role']:10} {size}  {row['optimizer']} lr={row['lr']:g}  ({shown})")
        return "\n".join(lines)

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

    # The trainer's --------------------------------------------------------------------------------------------

    def set_lr(self, multiplier: float | Mapping[str, float]) -> dict[str, float]:
        """Set every lr to ``multiplier``, or its member's, times its initial one; returns name -> lr in force."""
        for name, member in self.members.items():
            factor = multiplier[name] if isinstance(multiplier, Mapping) else multiplier
            for group in member.param_groups:
                group["lr"] = group.setdefault("initial_lr", group["lr"]) * factor
        return {name: member.param_groups[0]["lr"] for name, member in self.members.items()}


def class_path(cls: type) -> str:
    """The shortest path under which ``cls`` can be imported: torch.optim.AdamW, not torch.optim.adamw.AdamW."""
    parts = cls.__module__.split(".")
    modules = [".".join(parts[:end]) for end in range(1, len(parts))]
    found = [module for module in modules if getattr(sys.modules.get(module), cls.__name__, None) is cls]
    return f"{[*found, cls.__module__][0]}.{cls.__name__}"
