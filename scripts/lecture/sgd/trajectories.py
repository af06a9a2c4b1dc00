"""Trajectories of SGD with batches of two points: quick progress far away, wandering near the minimum."""

import torch

from scripts.lecture.descend import descend, optimizer, parameter
from scripts.lecture.experiment import Check
from scripts.lecture.problems import least_squares, sampler
from scripts.lecture.style import COLOURS, guide

TITLE = "Trajectories with batches of two"
METHODS = ("sgd",)
SIZE = (9.2, 4.0)

RATES = (0.24, 0.12, 0.06, 0.03)


def data() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    t = torch.rand(60, generator=generator, dtype=torch.float64) * 3 - 1.5
    y = 0.5 + 0.8 * t + 0.6 * torch.randn(60, generator=generator, dtype=torch.float64)
    return torch.stack([torch.ones(60, dtype=torch.float64), t], dim=1), y


def measure(short: bool) -> dict:
    repeats, steps = 512 if short else 2048, 1000
    problem, start = least_squares(*data()), torch.tensor([-2.5, -1.5], dtype=torch.float64)
    distances, paths = {}, {}
    for rate in RATES:
        x, tail = parameter(start, repeats), []
        for k, point in descend(optimizer("sgd", x, lr=rate), x, sampler(problem, 2, seed=4), steps):
            if k <= 150:
                paths.setdefault(rate, []).append(point[:2].clone())
            if k > steps // 2 and k % 10 == 0:
                tail.append((point - problem.x_star).square().sum(-1).mean().item())
        distances[rate] = sum(tail) / len(tail)
    x = parameter(start)
    full = [point.clone() for _, point in descend(optimizer("sgd", x, lr=0.24), x, lambda x, k: problem.full(x), 60)]
    pairs = torch.combinations(torch.arange(60))
    near = problem.x_star + 0.05 * (start - problem.x_star)
    agreement = [((problem.batch(p, pairs) @ problem.full(p)) > 0).double().mean().item() for p in (start, near)]
    return dict(problem=problem, distances=distances, paths=paths, full=full, agreement=agreement, pairs=pairs)


def check(measured: dict) -> list[Check]:
    halved = [measured["distances"][a] / measured["distances"][b] for a, b in zip(RATES, RATES[1:], strict=False)]
    far, near = measured["agreement"]
    return [
        Check("batches whose gradient is within 90° of the whole gradient, at the start", far, low=0.9),
        Check("the same at a twentieth of the distance", near, high=0.75),
        Check("mean ‖x − x*‖² at α / at α/2, smallest", min(halved), 1.6, 2.8),
        Check("the same, largest", max(halved), 1.6, 2.8),
    ]


def draw(measured: dict, figure) -> None:
    left, right = figure.subplots(1, 2, width_ratios=(2, 3))
    problem, t = measured["problem"], torch.tensor([-1.6, 1.6], dtype=torch.float64)
    left.scatter(problem.a[:, 1], problem.y, s=12, color=COLOURS[5], label="data")
    left.plot(t, problem.x_star[0] + problem.x_star[1] * t, color="black", label="x*, fit of all points")
    for number, index in enumerate((7, 400, 1203)):
        pair = measured["pairs"][index]
        a, b = torch.linalg.solve(problem.a[pair], problem.y[pair])
        left.plot(
            t, a + b * t, "--", linewidth=1, color=COLOURS[number], label="fits of batches" if not number else None
        )
        left.scatter(problem.a[pair, 1], problem.y[pair], s=28, color=COLOURS[number], zorder=3)
    left.set(xlabel="t", ylabel="y", ylim=(-3, 4))
    guide(left, loc="upper left")
    grid = torch.meshgrid(torch.linspace(-3, 2.2, 80), torch.linspace(-2.2, 2.2, 80), indexing="ij")
    levels = problem.gap(torch.stack(grid, -1).double())
    right.contour(*grid, levels, levels=[0.02, 0.1, 0.3, 0.8, 1.6, 3, 5], colors="#b8bfca", linewidths=0.7)
    for rate, number, colour in ((RATES[0], 0, COLOURS[0]), (RATES[0], 1, COLOURS[3]), (RATES[-1], 0, COLOURS[1])):
        path = torch.stack(measured["paths"][rate])[:, number]
        label = f"SGD, batch 2, α = {rate:g}, run {number + 1}"
        right.plot(*path.T, "-o", markersize=2, linewidth=0.8, color=colour, label=label)
    right.plot(*torch.stack(measured["full"]).T, "-o", markersize=3, color="black", label="gradient descent")
    right.plot(*problem.x_star, "*", markersize=13, color=COLOURS[4], label="x*", linestyle="none")
    right.set(xlabel="intercept", ylabel="slope")
    guide(right, loc="lower right")
