"""SGD with a constant step converges to a ball around the minimum, not to the minimum."""

import math

import torch

from scripts.lecture.descend import descend, moments, optimizer, parameter
from scripts.lecture.experiment import Check
from scripts.lecture.problems import logistic, sampler
from scripts.lecture.style import COLOURS, MUTED, guide

TITLE = "A constant step ends in a noise ball"
METHODS = ("sgd",)
SIZE = (8.0, 4.2)

RATES = (0.2, 0.1, 0.05, 0.025)


def measure(short: bool) -> dict:
    repeats, steps = (64, 400) if short else (256, 2000)
    tail = range(steps // 2 + 10, steps + 1, 10)
    problem, start = logistic(), torch.full((10,), 1.0, dtype=torch.float64)
    times, curves = moments(steps), {}
    for rate in RATES:
        x, gaps, sigma2 = parameter(start, repeats), [], 0.0
        for k, point in descend(optimizer("sgd", x, lr=rate), x, sampler(problem, 1, seed=1), steps):
            if k in times or k in tail:
                sigma2 = max(sigma2, problem.second_moment(point).mean().item())
                gaps.append((k, problem.gap(point).mean().item()))
        decay = (1 - 2 * rate * problem.mu) ** torch.tensor([float(k) for k, _ in gaps])
        floor = problem.smooth * sigma2 * rate / (4 * problem.mu)
        bound = decay * problem.gap(start) + floor
        plateau = sum(gap for k, gap in gaps if k in tail) / len(tail)
        curves[rate] = dict(gaps=gaps, bound=bound.tolist(), floor=floor, plateau=plateau)
    x = parameter(start)
    full = [
        (k, problem.gap(point).item())
        for k, point in descend(optimizer("sgd", x, lr=RATES[0]), x, lambda x, k: problem.full(x), 200)
    ]
    return dict(curves=curves, times=times, full=full)


def check(measured: dict) -> list[Check]:
    curves = measured["curves"].values()
    worst = max(gap / bound for c in curves for (_, gap), bound in zip(c["gaps"], c["bound"], strict=True))
    slack = [ratio(c["floor"], c["plateau"]) for c in curves]
    plateaus = [c["plateau"] for c in curves]
    halved = [ratio(a, b) for a, b in zip(plateaus, plateaus[1:], strict=False)]
    return [
        Check("largest ratio of the measured mean to the bound", worst, high=1),
        Check("bound of the plateau / plateau, smallest over the steps", min(slack), 3, 40),
        Check("the same, largest", max(slack), 3, 40),
        Check("plateau at α / plateau at α/2, smallest", min(halved), 1.6, 2.8),
        Check("the same, largest", max(halved), 1.6, 2.8),
        Check("f − f* of gradient descent after 200 steps", measured["full"][-1][1], high=1e-9),
    ]


def ratio(a: float, b: float) -> float:
    """Without noise a plateau may be exactly 0."""
    return a / b if b else math.inf


def draw(measured: dict, figure) -> None:
    axes, times = figure.subplots(), measured["times"]
    for (rate, curve), colour in zip(measured["curves"].items(), COLOURS, strict=False):
        kept = [i for i, (k, _) in enumerate(curve["gaps"]) if k in times]
        ks = [max(curve["gaps"][i][0], 0.7) for i in kept]
        axes.plot(ks, [curve["gaps"][i][1] for i in kept], color=colour, label=f"SGD, α = {rate:g}")
        axes.plot(ks, [curve["bound"][i] for i in kept], "--", color=colour, linewidth=1)
    axes.plot(
        [max(k, 0.7) for k, _ in measured["full"]],
        [max(g, 1e-9) for _, g in measured["full"]],
        color="black",
        linewidth=1.2,
        label=f"gradient descent, α = {RATES[0]:g}",
    )
    axes.plot([], [], "--", color=MUTED, linewidth=1, label="the bound, by step")
    axes.set(xscale="log", yscale="log", ylim=(1e-4, None), xlabel="iteration k", ylabel=r"mean of $f(x_k) - f$*")
    guide(axes)
