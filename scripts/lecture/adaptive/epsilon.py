"""Where epsilon stands matters: inside the root it is compared with squared gradients."""

import torch

from scripts.lecture.descend import optimizer, parameter
from scripts.lecture.experiment import Check
from scripts.lecture.style import COLOURS, guide

TITLE = "The place of ε"
METHODS = ("adagrad", "adagrad_inside", "rmsprop", "rmsprop_inside")
SIZE = (7.6, 3.8)

LABELS = {
    "adagrad": "AdaGrad, √v + ε",
    "adagrad_inside": "AdaGrad, √(v + ε)",
    "rmsprop": "RMSProp, √v + ε",
    "rmsprop_inside": "RMSProp, √(v + ε)",
}


def measure(short: bool) -> dict:
    gradients, steps = torch.logspace(-7, 1, 81, dtype=torch.float64), {}
    for name in LABELS:
        x = parameter(torch.zeros(81, dtype=torch.float64))
        method = optimizer(name, x, lr=1.0, eps=1e-6)
        x.grad = gradients.clone()
        method.step()
        steps[name] = -x.detach()
    return dict(gradients=gradients, steps=steps)


def check(measured: dict) -> list[Check]:
    at = {size: (measured["gradients"] - size).abs().argmin() for size in (1e-4, 1.0)}
    first = {name: {size: steps[i].item() for size, i in at.items()} for name, steps in measured["steps"].items()}
    checks = []
    for name in ("adagrad", "rmsprop"):
        for where, low, high in ((name, 0.9, 1.001), (f"{name}_inside", 0.01, 0.15)):
            share = first[where][1e-4] / first[where][1.0]
            checks.append(Check(f"{LABELS[where]}: step at a gradient of 1e-4 / at 1", share, low, high))
    return checks


def draw(measured: dict, figure) -> None:
    axes = figure.subplots()
    axes.axvspan(3e-5, 3e-4, color="#eef0f4", zorder=0)
    for (name, steps), colour in zip(measured["steps"].items(), COLOURS, strict=False):
        style = "--" if name.endswith("inside") else "-"
        axes.plot(measured["gradients"], steps, style, color=colour, label=LABELS[name])
    axes.set(xscale="log", yscale="log", ylim=(1e-4, 20), xlabel="size of the gradient", ylabel="first step / α")
    guide(axes, loc="lower right")
