"""The Polyak–Łojasiewicz condition is enough: a function that is not convex, with the same bound."""

import torch

from scripts.lecture.descend import descend, moments, optimizer, parameter
from scripts.lecture.experiment import Check
from scripts.lecture.style import COLOURS, MUTED, guide

TITLE = "PL without convexity"
METHODS = ("sgd",)
SIZE = (9.2, 3.8)

L, MU = 8.0, 1 / 32
RATES = (0.1, 0.05, 0.025)


def value(x: torch.Tensor) -> torch.Tensor:
    return x.square() + 3 * x.sin().square()


def derivative(x: torch.Tensor) -> torch.Tensor:
    return 2 * x + 3 * (2 * x).sin()


def measure(short: bool) -> dict:
    repeats, steps = (1024, 300) if short else (8192, 1000)
    start, times, curves = torch.tensor(3.0, dtype=torch.float64), moments(steps), {}
    for rate in RATES:
        generator, x, curve, sigma2 = torch.Generator().manual_seed(8), parameter(start, repeats), [], 0.0

        def noisy(x, k, generator=generator):
            return derivative(x) + 2 * torch.randint(2, x.shape, generator=generator) - 1

        for k, point in descend(optimizer("sgd", x, lr=rate), x, noisy, steps):
            if k in times:
                sigma2 = max(sigma2, derivative(point).square().mean().item() + 1)
                curve.append((k, value(point).mean().item()))
        floor = L * sigma2 * rate / (4 * MU)
        bound = [(k, (1 - 2 * rate * MU) ** k * value(start).item() + floor) for k, _ in curve]
        curves[rate] = dict(curve=curve, bound=bound)
    ends = {}
    for rate in (1 / L, 1.0):
        x = parameter(start)
        *_, (_, point) = descend(optimizer("sgd", x, lr=rate), x, lambda x, k: derivative(x), 200)
        ends[rate] = value(point).item()
    return dict(curves=curves, ends=ends)


def check(measured: dict) -> list[Check]:
    grid = torch.linspace(-10, 10, 20_001, dtype=torch.float64)
    away = grid[grid.abs() > 1e-3]
    ratio = (derivative(away).square() / (2 * value(away))).min().item()
    curves = measured["curves"].values()
    worst = max(g / b for c in curves for (_, g), (_, b) in zip(c["curve"], c["bound"], strict=True))
    ends = [c["curve"][-1][1] for c in curves]
    return [
        Check("smallest f″ (negative: not convex)", (2 + 6 * (2 * grid).cos()).min().item(), high=-3.9),
        Check("largest f″ = L", (2 + 6 * (2 * grid).cos()).max().item(), 7.9, 8.0001),
        Check("smallest ‖∇f‖²/(2(f − f*)), which must be at least μ", ratio, low=MU),
        Check("largest ratio of the measured mean to the bound", worst, high=1),
        Check(f"f in the end at α = {RATES[0]:g} / at α = {RATES[-1]:g}", ends[0] / ends[-1], low=2.5),
        Check("no noise, α = 1/L: f after 200 steps", measured["ends"][1 / L], high=1e-9),
        Check("no noise, α = 1 < 1/(2μ): f after 200 steps", measured["ends"][1.0], low=0.1),
    ]


def draw(measured: dict, figure) -> None:
    left, right = figure.subplots(1, 2, width_ratios=(2, 3))
    x = torch.linspace(-4, 4, 400)
    left.plot(x, value(x), color="black")
    left.plot(3, value(torch.tensor(3.0)), "o", color=COLOURS[0], label="start")
    left.set(xlabel="x", ylabel="f(x) = x² + 3 sin² x")
    guide(left, loc="upper center")
    for (rate, curve), colour in zip(measured["curves"].items(), COLOURS, strict=False):
        right.plot(*zip(*curve["curve"][1:], strict=True), color=colour, label=f"SGD, α = {rate:g}")
        right.plot(*zip(*curve["bound"][1:], strict=True), "--", color=colour, linewidth=1)
    right.plot([], [], "--", color=MUTED, linewidth=1, label="the bound, by step")
    right.set(xscale="log", yscale="log", xlabel="iteration k", ylabel=r"mean of $f(x_k) - f$*")
    guide(right)
