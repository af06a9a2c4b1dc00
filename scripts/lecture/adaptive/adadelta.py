"""AdaDelta: steps do not fade, and have the units of the weights, so that no learning rate is needed."""

import torch

from scripts.lecture.descend import descend, optimizer, parameter, slope
from scripts.lecture.experiment import Check
from scripts.lecture.style import COLOURS, guide

TITLE = "AdaDelta"
METHODS = ("adagrad", "rmsprop", "adadelta", "sgd")
SIZE = (9.2, 3.8)

SCALES = (0.1, 1.0, 10.0)


def step_lengths(name: str, steps: int, **settings) -> list[float]:
    x = parameter(torch.zeros(1, dtype=torch.float64))
    run = descend(optimizer(name, x, **settings), x, lambda x, k: torch.ones_like(x), steps)
    return (-torch.cat([point.clone() for _, point in run]).diff()).tolist()


def measure(short: bool) -> dict:
    steps = 700 if short else 1500
    lengths = {
        "AdaGrad": step_lengths("adagrad", 1000, lr=0.01),
        "RMSProp": step_lengths("rmsprop", 1000, lr=0.01, alpha=0.9),
        "AdaDelta": step_lengths("adadelta", 1000, lr=1.0, rho=0.9, eps=1e-8),
    }
    curvature, curves = torch.tensor([1.0, 30.0], dtype=torch.float64), {}
    for name, settings in (("adadelta", dict(lr=1.0, rho=0.95, eps=1e-6)), ("sgd", dict(lr=0.03))):
        for scale in SCALES:
            x = parameter(torch.ones(2, dtype=torch.float64))
            run = descend(optimizer(name, x, **settings), x, lambda x, k, c=scale: c * curvature * x, steps)
            curves[name, scale] = [(curvature * point.square()).sum().item() / 2 for _, point in run]
    return dict(lengths=lengths, curves=curves)


def check(measured: dict) -> list[Check]:
    lengths, curves = measured["lengths"], measured["curves"]
    late = range(100, 1001)
    needed = [sum(value > 0.01 for value in curves["adadelta", c]) for c in SCALES]
    return [
        Check("AdaGrad: exponent of k in its steps", slope(late, lengths["AdaGrad"][99:]), -0.51, -0.49),
        Check("RMSProp: the same", slope(late, lengths["RMSProp"][99:]), -0.01, 0.01),
        Check("AdaDelta: the same", slope(late, lengths["AdaDelta"][99:]), low=0.0),
        Check("AdaDelta: steps to f/c = 0.01, most / fewest of c = 0.1, 1, 10", max(needed) / min(needed), high=1.1),
        Check("AdaDelta: f in the end", curves["adadelta", 1.0][-1], high=1e-2),
        Check(
            "SGD, loss times 10: f/c after 30 steps / at the start",
            curves["sgd", 10.0][30] / curves["sgd", 10.0][0],
            low=100,
        ),
    ]


def draw(measured: dict, figure) -> None:
    left, right = figure.subplots(1, 2)
    for (label, lengths), colour in zip(measured["lengths"].items(), COLOURS, strict=False):
        left.plot(range(1, 1001), [length / lengths[0] for length in lengths], color=colour, label=label)
    left.set(xscale="log", yscale="log", xlabel="step k", ylabel="length of step k / of step 1")
    for (name, scale), curve in measured["curves"].items():
        colour, label = (COLOURS[2], "AdaDelta") if name == "adadelta" else (COLOURS[3], "SGD, α = 0.03")
        style = dict(zip(SCALES, (":", "-", "--"), strict=True))[scale]
        right.plot([min(value, 1e4) for value in curve], style, color=colour, label=f"{label}, c = {scale:g}")
    right.set(yscale="log", ylim=(1e-6, 1e3), xlabel="step k", ylabel="f / c")
    guide(left)
    guide(right, fontsize=7.5, loc="upper right")
