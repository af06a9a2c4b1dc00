"""A convex problem on which Adam goes to the worst point, and AMSGrad to the best."""

import torch

from scripts.lecture.descend import descend, optimizer, parameter
from scripts.lecture.experiment import Check
from scripts.lecture.style import COLOURS, guide

TITLE = "Adam fails on a convex problem; AMSGrad does not"
METHODS = ("adam", "amsgrad", "sgd")
SIZE = (7.6, 3.8)

CASES = {
    "Adam, β₂ = 0.1": ("adam", dict(betas=(0.0, 0.1))),
    "AMSGrad, β₂ = 0.1": ("amsgrad", dict(betas=(0.0, 0.1))),
    "Adam, β₂ = 0.999": ("adam", dict(betas=(0.0, 0.999))),
    "SGD": ("sgd", {}),
}


def measure(short: bool) -> dict:
    paths = {}
    for label, (name, settings) in CASES.items():
        x, path = parameter(torch.zeros(1, dtype=torch.float64)), []
        sign = lambda x, k: torch.full_like(x, 3.0 if k % 3 == 0 else -1.0)  # noqa: E731
        for k, point in descend(
            optimizer(name, x, **settings), x, sign, 2000 if short else 3000, lambda k: 0.1 / (k + 1) ** 0.5
        ):
            point.clamp_(-1, 1)
            path.append((k, point.item()))
        paths[label] = path
    return paths


def check(measured: dict) -> list[Check]:
    ends = {label: sum(x for _, x in path[-90:]) / 90 for label, path in measured.items()}
    bounds = {"Adam, β₂ = 0.1": (0.9, 1.0)}
    return [
        Check(f"{label}: mean of the last 90 iterates", end, *bounds.get(label, (-1.0, -0.9)))
        for label, end in ends.items()
    ]


def draw(measured: dict, figure) -> None:
    axes = figure.subplots()
    for (label, path), colour in zip(measured.items(), COLOURS, strict=False):
        axes.plot(*zip(*path, strict=True), color=colour, label=label)
    axes.axhline(-1, color="black", linewidth=0.8, linestyle=":", label="minimum")
    axes.set(xlabel="step k", ylabel="x", ylim=(-1.1, 1.1))
    guide(axes, loc="center right")
