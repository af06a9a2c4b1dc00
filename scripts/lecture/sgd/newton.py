"""Two phases: averaged SGD, then averaged SGD on the quadratic model there; like 1/k with a constant step."""

import torch
from torch import Tensor

from scripts.lecture.descend import descend, moments, optimizer, slope
from scripts.lecture.experiment import Check
from scripts.lecture.problems import FiniteSum, logistic, sampler
from scripts.lecture.style import COLOURS, guide

TITLE = "Two-phase Newton method"
METHODS = ("sgd",)
SIZE = (8.0, 4.0)


def problem_without_penalty() -> FiniteSum:
    """Newton's iteration in `logistic` needs no penalty to converge; the data are not separable."""
    return logistic(m=200, n=5, mu=0.0, seed=17)


def average(problem: FiniteSum, start: Tensor, rate: float, gradient, steps: int, times=()) -> tuple[Tensor, list]:
    """(mean of x_0 … x_{k-1}, its (k, mean gap) at the times) of SGD with a constant step from starts [repeats, n]."""
    x, total, curve = torch.nn.Parameter(start.clone()), torch.zeros_like(start), []
    for k, point in descend(optimizer("sgd", x, lr=rate), x, gradient, steps):
        if k in times:
            curve.append((k, problem.gap(total / k).mean().item()))
        if k < steps:
            total += point
    return total / steps, curve


def model_gradient(problem: FiniteSum, at: Tensor, seed: int):
    """Stochastic gradients of the quadratic model at `at` [repeats, n]."""
    generator = torch.Generator().manual_seed(seed)

    def gradient(x: Tensor, k: int) -> Tensor:
        index = torch.randint(len(problem.a), (*x.shape[:-1], 1), generator=generator)
        a, p = problem.a[index[..., 0]], torch.sigmoid((problem.a[index[..., 0]] * at).sum(-1, keepdim=True))
        curvature = p * (1 - p) * (a * (x - at)).sum(-1, keepdim=True)
        return problem.batch(at, index) + curvature * a

    return gradient


def measure(short: bool) -> dict:
    repeats, lengths = 256, (512, 8192) if short else (256, 512, 1024, 2048, 4096, 8192, 16384)
    problem = problem_without_penalty()
    rate = 1.5 / problem.a.square().sum(-1).mean().item()
    start = torch.zeros(repeats, 5, dtype=torch.float64)
    last = lengths[-1]
    _, single = average(problem, start, rate, sampler(problem, 1, 14), last, moments(last) - {0})
    double = []
    for steps in lengths:
        half, _ = average(problem, start, rate, sampler(problem, 1, 15), steps // 2)
        end, _ = average(problem, half, rate, model_gradient(problem, half, 16), steps // 2)
        double.append((steps, problem.gap(end).mean().item()))
    return dict(single=single, double=double)


def check(measured: dict) -> list[Check]:
    single, double = measured["single"], measured["double"]
    tail = [(k, gap) for k, gap in single if k >= single[-1][0] / 8]
    return [
        Check("two phases: exponent of k", slope(*zip(*[d for d in double if d[0] >= 512], strict=True)), -1.3, -0.7),
        Check("averaged SGD: exponent of k at the end", slope(*zip(*tail, strict=True)), low=-0.4),
        Check("in the end: f − f* of averaged SGD / of two phases", single[-1][1] / double[-1][1], low=1.4),
    ]


def draw(measured: dict, figure) -> None:
    axes = figure.subplots()
    single = [(k, gap) for k, gap in measured["single"] if k >= 30]
    axes.plot(*zip(*single, strict=True), color=COLOURS[0], label="averaged SGD, constant step")
    axes.plot(*zip(*measured["double"], strict=True), "o-", color=COLOURS[1], label="two phases, the same step")
    k, gap = measured["double"][-1]
    axes.plot([k / 30, k], [30 * gap, gap], ":", color="black", linewidth=1, label="1/k")
    axes.set(xscale="log", yscale="log", xlabel="stochastic gradients k", ylabel=r"mean of $f - f$*")
    guide(axes)
