"""On a convex, even non-smooth function the averaged iterate of SGD converges like 1/√k."""

import numpy as np
import torch
from scipy.optimize import linprog

from scripts.lecture.descend import descend, moments, optimizer, parameter, slope
from scripts.lecture.experiment import Check
from scripts.lecture.problems import FiniteSum, sampler
from scripts.lecture.style import COLOURS, guide

TITLE = "Convex, not smooth: the average of the iterates"
METHODS = ("sgd",)
SIZE = (8.0, 4.2)


def deviations() -> FiniteSum:
    """Mean |⟨a_i, x⟩ − y_i|; the minimum by linear programming."""
    generator = torch.Generator().manual_seed(6)
    a = torch.randn(100, 5, generator=generator, dtype=torch.float64)
    y = a @ torch.randn(5, generator=generator, dtype=torch.float64)
    y += 0.5 * torch.randn(100, generator=generator, dtype=torch.float64)
    m, n = a.shape
    eye = np.eye(m)
    cost = np.concatenate([np.zeros(n), np.full(m, 1 / m)])
    limits = np.block([[a.numpy(), -eye], [-a.numpy(), -eye]])
    found = linprog(cost, limits, np.concatenate([y, -y]), bounds=[(None, None)] * n + [(0, None)] * m)
    x = torch.from_numpy(found.x[:n])
    return FiniteSum(a, y, lambda t, y: (t - y).abs(), lambda t, y: (t - y).sign(), 0.0, np.inf, x, found.fun)


def averaged(problem: FiniteSum, start: torch.Tensor, repeats: int, steps: int, rate, times: set[int]) -> list[tuple]:
    """(k, mean gap of x̄_k, mean gap of x_k) at the times."""
    x, total, weight, curve = parameter(start, repeats), 0.0, 0.0, []
    for k, point in descend(optimizer("sgd", x), x, sampler(problem, 1, seed=7), steps, rate):
        if k in times:
            curve.append((k, problem.gap(total / weight).mean().item(), problem.gap(point).mean().item()))
        total, weight = total + rate(k) * point, weight + rate(k)
    return curve


def measure(short: bool) -> dict:
    repeats, lengths = (64, (50, 200, 800)) if short else (256, (100, 400, 1600, 6400))
    problem, start = deviations(), torch.zeros(5, dtype=torch.float64)
    sigma = problem.a.square().sum(-1).mean().sqrt().item()  # of the subgradients ± a_i, wherever x is
    radius = (start - problem.x_star).norm().item()
    constant = []
    for k in lengths:
        alpha = radius / (sigma * k**0.5)
        constant += averaged(problem, start, repeats, k, lambda _, alpha=alpha: alpha, {k})
    alpha0, last = radius / sigma, lengths[-1]
    falling = averaged(problem, start, repeats, last, lambda k: alpha0 / (k + 1) ** 0.5, moments(last, 80) - {0})
    bounds = {
        k: (radius * sigma / k**0.5, (1.25 * radius**2 / alpha0 + 5 * alpha0 * sigma**2 * np.log(k + 1)) / k**0.5)
        for k, _, _ in constant + falling
    }
    return dict(constant=constant, falling=falling, bounds=bounds)


def check(measured: dict) -> list[Check]:
    constant, falling, bounds = measured["constant"], measured["falling"], measured["bounds"]
    tail = [(k, gap) for k, gap, _ in falling if k >= falling[-1][0] / 30]
    return [
        Check(
            "constant α = R/(σ√k): largest ratio to the bound", max(g / bounds[k][0] for k, g, _ in constant), high=1
        ),
        Check("α₀/√(k+1): largest ratio to the bound", max(g / bounds[k][1] for k, g, _ in falling), high=1),
        Check("constant: exponent of k", slope(*zip(*[(k, g) for k, g, _ in constant], strict=True)), high=-0.4),
        Check("falling: exponent of k", slope(*zip(*tail, strict=True)), high=-0.4),
        Check("constant: f − f* of the last iterate / of the average", constant[-1][2] / constant[-1][1], low=1.5),
    ]


def draw(measured: dict, figure) -> None:
    axes = figure.subplots()
    constant, falling, bounds = measured["constant"], measured["falling"], measured["bounds"]
    ks = [k for k, _, _ in constant]
    axes.plot(ks, [g for _, g, _ in constant], "o-", color=COLOURS[0], label=r"average, $α = R/(σ\sqrt{k})$")
    axes.plot(ks, [g for _, _, g in constant], "s:", color=COLOURS[3], label=r"last iterate, $α = R/(σ\sqrt{k})$")
    axes.plot(ks, [bounds[k][0] for k in ks], "--", color=COLOURS[0], linewidth=1, label=r"its bound, $Rσ/\sqrt{k}$")
    axes.plot(
        [k for k, _, _ in falling], [g for _, g, _ in falling], color=COLOURS[1], label=r"average, $α_0/\sqrt{k+1}$"
    )
    axes.plot(
        [k for k, _, _ in falling],
        [bounds[k][1] for k, _, _ in falling],
        "--",
        color=COLOURS[1],
        linewidth=1,
        label="its bound",
    )
    axes.set(xscale="log", yscale="log", xlim=(10, None), xlabel="iterations k", ylabel=r"mean of $f - f$*")
    guide(axes, ncols=2)
