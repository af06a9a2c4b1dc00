"""With the decreasing step of the theorem SGD converges, like 1/k."""

import torch

from scripts.lecture.descend import descend, moments, optimizer, parameter, slope
from scripts.lecture.experiment import Check
from scripts.lecture.problems import logistic, sampler
from scripts.lecture.style import COLOURS, guide

TITLE = "A decreasing step converges like 1/k"
METHODS = ("sgd",)
SIZE = (8.0, 4.0)


def measure(short: bool) -> dict:
    repeats, steps = (128, 2000) if short else (256, 20_000)
    problem, start = logistic(), torch.full((10,), 1.0, dtype=torch.float64)
    times, curves, sigma2 = moments(steps), {}, 0.0
    rates = {
        r"$α_k = (2k+1)/(2μ(k+1)^2)$": lambda k: (2 * k + 1) / (2 * problem.mu * (k + 1) ** 2),
        "α = 0.05": lambda k: 0.05,
    }
    for label, rate in rates.items():
        x, curve = parameter(start, repeats), []
        for k, point in descend(optimizer("sgd", x), x, sampler(problem, 1, seed=5), steps, rate):
            if k in times:
                curve.append((k, problem.gap(point).mean().item()))
                if len(curves) == 0:
                    sigma2 = max(sigma2, problem.second_moment(point).mean().item())
        curves[label] = curve
    bound = [(k, problem.smooth * sigma2 / (2 * problem.mu**2 * k)) for k, _ in curve if k]
    return dict(curves=curves, bound=bound)


def check(measured: dict) -> list[Check]:
    decreasing, constant = measured["curves"].values()
    last = decreasing[-1][0]
    worst = max(gap / bound for (_, gap), (_, bound) in zip(decreasing[1:], measured["bound"], strict=True))
    tail = [(k, gap) for k, gap in decreasing if k >= last / 30]
    return [
        Check("largest ratio of the measured mean to the bound", worst, high=1.0),
        Check("exponent of k in f − f*", slope(*zip(*tail, strict=True)), -1.12, -0.88),
        Check(
            "in the end: f − f* of the constant step / of the decreasing one",
            constant[-1][1] / decreasing[-1][1],
            low=5,
        ),
    ]


def draw(measured: dict, figure) -> None:
    axes = figure.subplots()
    for (label, curve), colour in zip(measured["curves"].items(), COLOURS, strict=False):
        axes.plot(*zip(*curve[1:], strict=True), color=colour, label=f"SGD, {label}")
    axes.plot(*zip(*measured["bound"], strict=True), "--", color=COLOURS[0], linewidth=1, label=r"bound $Lσ^2/(2μ^2k)$")
    axes.set(xscale="log", yscale="log", xlabel="iteration k", ylabel=r"mean of $f(x_k) - f$*")
    guide(axes)
