"""What all optimizers here share: the frame of a step, checks of settings, and this rank's part of a tensor."""

from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

Group = dict[str, Any]
"""A parameter group: ``params`` and the settings in force for them."""
Tensors = list[Tensor]


class Optimizer(torch.optim.Optimizer):
    """Base of both families, :class:`MatrixOptimizer` and :class:`Elementwise`, which fill in ``update_params``."""

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
        self.update_params()
        return loss


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


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor (a view), or the tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
