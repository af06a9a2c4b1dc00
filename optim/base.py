"""What all optimizers here share: the frame of a step, checks of settings, and this rank's part of a tensor."""

import difflib
from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from .parameters import check_apart, check_trainable
from .precision import full_float32
from .settings import settings_of, typed

Group = dict[str, Any]
"""A parameter group: ``params`` and the settings in force for them."""
Tensors = list[Tensor]

COUNTERS = ("step", "lr_max", "weight_sum")
"""What steps change in a group by themselves."""
_OF_SCHEDULERS = {"initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum", "swa_lr"}
ALSO_IN_GROUPS = {"params", "param_names", "name", "rule"} | _OF_SCHEDULERS
"""What a group may hold beside settings: torch's own keys, those of its schedulers, a label, and whose group it is."""
NEVER_NEGATIVE = (
    *("lr", "weight_decay", "eps", "graft_eps", "radius", "alpha", "warmup"),
    *("floor", "brake", "cautious_decay", *COUNTERS),
)

LARGEST = torch.finfo(torch.float32).max


class Optimizer(torch.optim.Optimizer):
    """Base of both families, :class:`MatrixOptimizer` and :class:`Elementwise`, which fill in the other methods.

    Raises:
        ValueError: a setting that does not exist or is out of range, at construction, when a state dict is loaded, or
            in the step after it was changed; a parameter that cannot be trained so; in ``step``, before anything
            changes, a parameter that is not what it was at construction, a sparse gradient, or no gradient at all in
            the first step.
    """

    group_settings: dict[str, Any] = {}
    """Types of the settings that groups have and the constructor has not."""
    squares = True  # whether the rule squares gradients; those of 2^59 and more are scaled down for it, see limits.py
    _stepped = False
    _loading: dict[str, Any] | None = None  # the state dict that is being loaded, as the user's hooks have left it

    def state_shapes(self, group: Group, param: Tensor) -> dict[str, tuple[int, ...]]:
        """Whole shapes of the state of a parameter, by name."""
        raise NotImplementedError

    def check_group(self, group: Group) -> None:
        """Raises ValueError for a setting of a parameter group that is out of range."""

    def add_param_group(self, param_group: Group) -> None:
        super().add_param_group(param_group)
        self.param_groups[-1].setdefault("rule", rule_of(self))
        self._check_settings(self.param_groups[-1], self.defaults)
        check_trainable(named(self.param_groups[-1]))
        if len(set(self.param_groups[-1]["params"])) < len(self.param_groups[-1]["params"]):
            raise ValueError("a parameter is given twice: give model.parameters(), which has shared ones once")
        check_apart(pair for group in self.param_groups for pair in named(group))
        self._remember()

    def update_params(self) -> None:
        """One update of every parameter that has a gradient."""
        raise NotImplementedError

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update of every parameter that has a gradient; returns what ``closure`` returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._check_params()
        for index, group in enumerate(self.param_groups):
            if self._in_force[index] != _settings(group):
                self._check_settings(group, self.defaults)
                self.settings_changed()
                self._in_force[index] = _settings(group)
        with full_float32():
            self.update_params()
        self._stepped = True
        return loss

    def settings_changed(self) -> None:
        """Called in the step after a setting of a group (other than lr) was changed, by a scheduler or by hand."""

    def _remember(self) -> None:
        """What parameters and settings are now, for the checks of later steps."""
        self._origin = {
            param: (index, param.shape, param.dtype, param.device)
            for index, group in enumerate(self.param_groups)
            for param in group["params"]
        }
        self._in_force = [_settings(group) for group in self.param_groups]

    def _check_params(self) -> None:
        if len(self.param_groups) != len(self._in_force):
            raise ValueError(f"parameter groups came or went since {type(self).__name__} was built: {_BUILD}")
        for index, group in enumerate(self.param_groups):
            for param, name in named(group):
                was, now = self._origin.get(param), (index, param.shape, param.dtype, param.device)
                if was is None:
                    raise ValueError(f"{name} was not there when {type(self).__name__} was built: {_BUILD}")
                if was != now:
                    changes = ", ".join(f"{a} -> {b}" for a, b in zip(was, now, strict=True) if a != b)
                    raise ValueError(
                        f"{name} changed since {type(self).__name__} was built (group, shape, dtype or device: "
                        f"{changes}): {_BUILD}"
                    )
                if param.grad is not None and param.grad.layout != torch.strided:
                    raise ValueError(f"{name} has a sparse gradient: use nn.Embedding(sparse=False) or SparseAdam")

    def check_first_gradients(self) -> None:
        """Raises ValueError in a first step without any gradient: the parameters are not those that the model uses."""
        if self._stepped:
            return
        trainable = [p for group in self.param_groups for p in group["params"] if p.requires_grad and p.numel()]
        if trainable and all(p.grad is None for p in trainable):
            raise ValueError(f"no parameter of {type(self).__name__} has a gradient in the first step: {_BUILD}")

    def check_groups(self) -> None:
        """Raises ValueError for a setting of any group that does not exist or is out of range."""
        for group in self.param_groups:
            self._check_settings(group, self.defaults)

    def _check_settings(self, group: Group, defaults: Group) -> None:
        check_rule(group, self)
        types = settings_of(type(self)) | self.group_settings
        for key, value in group.items():
            if key in ALSO_IN_GROUPS:
                continue
            if key not in defaults:
                close = difflib.get_close_matches(key, defaults, 1)
                hint = f"did you mean {close[0]}?" if close else f"it has {', '.join(defaults)}"
                raise ValueError(f"{key}={value}: {type(self).__name__} has no such setting of a group; {hint}")
            try:
                group[key] = typed(value, types.get(key, Any))
            except ValueError as error:
                raise ValueError(f"{key}={value}: {error}") from None
            if key in NEVER_NEGATIVE and not 0 <= group[key] <= LARGEST:
                raise ValueError(f"{key}={value}: give a finite number of float32, {key} >= 0")
        self.check_group(group)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """What ``load_state_dict`` and copies end with: a group may lack settings that its checkpoint did not know."""
        defaults = state.get("defaults") or self.defaults
        own_groups = vars(self).get("param_groups", state["param_groups"])
        for group, own in zip(state["param_groups"], own_groups, strict=True):
            group |= {"param_names": own["param_names"]} if "param_names" in own else {}
            self.rename_settings(group, defaults)
            for key, value in {**defaults, "rule": rule_of(self)}.items():
                group.setdefault(key, value)
            self._check_settings(group, defaults)
        super().__setstate__(state)
        if "_origin" not in vars(self):  # a copy
            self._remember()
        self._in_force = [_settings(group) for group in self.param_groups]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's.

        Raises:
            ValueError: it is the state of another rule, of other shapes or settings; nothing is changed then.
        """

        def look(_: Any, loading: dict[str, Any]) -> None:
            self.check_state(loading)
            self._loading = loading

        handle = self.register_load_state_dict_pre_hook(look)  # the last one
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
            self._loading = None

    def check_state(self, state_dict: dict[str, Any]) -> None:
        """Raises ValueError for a state dict that is not one of this optimizer's."""
        for saved, group in zip(state_dict["param_groups"], self.param_groups, strict=False):
            if len(saved["params"]) != len(group["params"]):
                break  # torch says it
            settings = self.defaults | saved | {"params": group["params"]}
            self.rename_settings(settings, self.defaults)
            self._check_settings(settings, self.defaults)
            for number, (param, name) in zip(saved["params"], named(group), strict=True):
                state = state_dict["state"].get(number, {})
                shapes, live = self.state_shapes(settings, param), self.state.get(param, {})
                _check_state(f"{name}: the state", type(self).__name__, state, shapes, live)
            for key in self.defaults.keys() & set(COUNTERS) - saved.keys():  # a rule with the same names of state
                raise ValueError(f"the state has no {key}, which {type(self).__name__} counts: give the state of the "
                                 "same optimizer")  # fmt: skip

    def rename_settings(self, group: Group, defaults: Group) -> None:
        """Give settings of earlier versions their present names."""


def rule_of(optimizer: torch.optim.Optimizer) -> str:
    """Whose a group is, ``group["rule"]``: rules may have the same names and shapes of state and mean other things."""
    cls = type(optimizer)
    return f"torch.optim.{cls.__name__}" if f"{cls.__module__}.".startswith("torch.optim.") else cls.__name__


def check_rule(group: Group, optimizer: torch.optim.Optimizer) -> None:
    """Raises ValueError for a group, such as one of a state dict, that is another rule's."""
    if (rule := group.get("rule", mine := rule_of(optimizer))) != mine:
        raise ValueError(f"rule={rule}: this is the state or group of {rule}, not of {mine}: give the same optimizer's")


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor (a view), or the tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


_BUILD = "build the optimizer after fully_shard, to_empty, to and the like, from model.parameters()"


def named(group: Group) -> Iterable[tuple[Tensor, str]]:
    """The parameters of a group and their names, or numbers and shapes where they have none."""
    params, names = group["params"], group.get("param_names")
    if names is None:
        names = [f"parameter {i} of its group {tuple(p.shape)}" for i, p in enumerate(params)]
    return zip(params, names, strict=False)


def _check_state(
    where: str, rule: str, state: dict[str, Any], shapes: dict[str, tuple[int, ...]], live: dict[str, Any]
) -> None:
    if state.keys() != shapes.keys():
        theirs, ours = (", ".join(sorted(keys)) or "nothing" for keys in (state, shapes))
        raise ValueError(f"{where} has {theirs}, but {rule} keeps {ours}: give the state of the same optimizer")
    for key, value in state.items():
        if not isinstance(value, Tensor) or tuple(value.shape) != shapes[key]:
            found = tuple(value.shape) if isinstance(value, Tensor) else value
            raise ValueError(f"{where} has {key} of {found}, but {rule} needs the shape {shapes[key]}")
        if not value.is_floating_point():
            raise ValueError(f"{where} has {key} of {value.dtype}, but {rule} needs floating-point numbers")
        if isinstance(live.get(key), DTensor) and not isinstance(value, DTensor):
            raise ValueError(
                f"{where} has {key} as a whole, but the parameter is sharded: load it by set_optimizer_state_dict of "
                "torch.distributed.checkpoint.state_dict with full_state_dict=True"
            )


def _settings(group: Group) -> Group:
    return {key: value for key, value in group.items() if key not in ("lr", *COUNTERS, *ALSO_IN_GROUPS)}


def check_fraction(**settings: float | tuple[float, ...]) -> None:
    """Raises ValueError for a number, or one of a tuple, that is not in [0, 1)."""
    for name, value in settings.items():
        if not all(0.0 <= part < 1.0 for part in (value if isinstance(value, tuple | list) else (value,))):
            raise ValueError(f"{name}={value} is not in [0, 1)")


def check_count(**settings: int) -> None:
    """Raises ValueError for a number below 1."""
    for name, value in settings.items():
        if value < 1:
            raise ValueError(f"{name}={value}: give a number of at least 1")


def check_choice(choices: Iterable[str], **settings: str) -> None:
    """Raises ValueError for a name that is not one of ``choices``."""
    for name, value in settings.items():
        if value not in choices:
            raise ValueError(f"{name}={value} is unknown: choose one of {', '.join(choices)}")


def whole_sums(sums: Tensors, params: Tensors) -> Tensors:
    """Sums [s] over whole tensors from those over this rank's parts of them; ``params`` say how they lie.

    Ranks call together: one all-reduce for each way of sharding, in float64, so that the number of ranks does not show
    in a float32 result that is summed in float64.
    """
    totals = [parts.double() for parts in sums]
    members: dict[tuple[Any, int], list[int]] = {}
    for i, param in enumerate(params):
        if not isinstance(param, DTensor):
            continue
        for dim, placement in enumerate(param.placements):
            if not placement.is_replicate():
                members.setdefault((param.device_mesh, dim), []).append(i)
    for (mesh, dim), indices in members.items():
        together = torch.stack([totals[i] for i in indices])
        dist.all_reduce(together, group=mesh.get_group(dim))
        for i, total in zip(indices, together.unbind(), strict=True):
            totals[i] = total
    return totals
