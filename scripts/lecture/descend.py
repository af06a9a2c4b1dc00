"""Runs optimizers, by their presets in configs/optim/, on gradients that an experiment supplies."""

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from omegaconf import OmegaConf
from torch import Tensor

from optim.routing import resolve_target
from trainer.config import by_family

PRESETS = Path(__file__).resolve().parents[2] / "configs" / "optim"


def optimizer(name: str, tensor: Tensor, **settings) -> torch.optim.Optimizer:
    """The optimizer of weight matrices in `optim=NAME`, or a class of torch.optim by its path, with these settings.

    An elementwise optimizer takes any tensor, so a leading dimension can hold independent repeats.
    """
    preset = {"_target_": name}
    if not name.startswith("torch.optim."):
        file = OmegaConf.to_container(OmegaConf.load(PRESETS / f"{name}.yaml"))
        preset = by_family(file["matrix"], "tiny", name)
    kind, arguments = resolve_target(preset | settings, name)
    return kind([tensor], **arguments)


def parameter(start: Tensor, repeats: int | None = None) -> torch.nn.Parameter:
    """A parameter at `start`, or `repeats` of them stacked [repeats, *shape]."""
    value = start.clone() if repeats is None else start.expand(repeats, *start.shape).clone()
    return torch.nn.Parameter(value)


def descend(
    method: torch.optim.Optimizer,
    x: torch.nn.Parameter,
    gradient: Callable[[Tensor, int], Tensor],
    steps: int,
    rate: Callable[[int], float] | None = None,
) -> Iterator[tuple[int, Tensor]]:
    """Take `steps` steps; yields (k, x_k) before each of them and after the last, k = 0 … steps.

    gradient(x, k): at iterate k. rate(k): the lr of step k, by default the optimizer's own. x_k is the live tensor.
    """
    for k in range(steps):
        yield k, x.detach()
        if rate is not None:
            method.param_groups[0]["lr"] = rate(k)
        x.grad = gradient(x.detach(), k)
        method.step()
    yield steps, x.detach()


def moments(steps: int, count: int = 200) -> set[int]:
    """About `count` step numbers from 0 to `steps`, evenly spaced in the logarithm: where a curve is recorded."""
    grid = torch.logspace(0, torch.tensor(float(steps)).log10().item(), count)
    return {0, steps, *(round(k) for k in grid.tolist())}


def slope(x: list[float] | Tensor, y: list[float] | Tensor) -> float:
    """Of the least-squares line through (log x, log y): the exponent of a power law."""
    x, y = (torch.as_tensor(v, dtype=torch.float64).log() for v in (x, y))
    return (((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()).item()
