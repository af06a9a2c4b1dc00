"""The gradient of one random term is an unbiased estimate, n times cheaper than the whole gradient."""

import torch

from scripts.lecture.descend import descend, moments, optimizer, parameter, slope
from scripts.lecture.experiment import Check
from scripts.lecture.problems import logistic, sampler
from scripts.lecture.style import COLOURS, guide

TITLE = "Finite sums: an unbiased gradient, n times cheaper"
METHODS = ("sgd",)
SIZE = (9.2, 3.8)

MU = 0.05


def measure(short: bool) -> dict:
    repeats, steps = (64, 2000) if short else (256, 20_000)
    problem, start = logistic(mu=MU), torch.full((10,), 1.0, dtype=torch.float64)
    each, full = problem.each(start), problem.full(start)
    pairs = torch.combinations(torch.arange(200))
    biases = [(each.mean(0) - full).norm().item(), (problem.batch(start, pairs).mean(0) - full).norm().item()]
    x = parameter(start)
    whole = [
        (200 * k, problem.gap(point).item())
        for k, point in descend(optimizer("sgd", x, lr=1 / problem.smooth), x, lambda x, k: problem.full(x), 100)
    ]
    x, times, single = parameter(start, repeats), moments(steps), []
    # The step of the theorem, but never above 1/L.
    rate = lambda k: min(1 / problem.smooth, (2 * k + 1) / (2 * MU * (k + 1) ** 2))  # noqa: E731
    for k, point in descend(optimizer("sgd", x), x, sampler(problem, 1, seed=2), steps, rate):
        if k in times:
            single.append((k, problem.gap(point).mean().item()))
    return dict(each=each, full=full, biases=biases, whole=whole, single=single)


def check(measured: dict) -> list[Check]:
    whole, single = dict(measured["whole"]), measured["single"]
    late = [(k, gap) for k, gap in single if k >= single[-1][0] / 10]
    at_pass = min(single, key=lambda pair: abs(pair[0] - 200))[1]
    linear = [whole[200 * (k + 3)] / whole[200 * k] for k in (3, 6, 9)]
    return [
        Check("‖mean of all ∇f_i − ∇f‖", measured["biases"][0], high=1e-12),
        Check("‖mean over all batches of 2 − ∇f‖", measured["biases"][1], high=1e-12),
        Check("after one pass: SGD's f − f* / gradient descent's", at_pass / whole[200], high=0.6),
        Check(
            "in the end: gradient descent's f − f* with as many gradients of terms / SGD's",
            whole[min(single[-1][0], 20_000)] / single[-1][1],
            high=0.3,
        ),
        Check("gradient descent: factor on f − f* in 3 steps, largest of three places", max(linear), high=0.5),
        Check("SGD: exponent of k in f − f* over the last decade", slope(*zip(*late, strict=True)), -1.4, -0.6),
    ]


def draw(measured: dict, figure) -> None:
    left, right = figure.subplots(1, 2, width_ratios=(2, 3))
    each, full = measured["each"][:, :2], measured["full"]
    left.scatter(*each.T, s=9, color=COLOURS[5], alpha=0.7, label=r"$\nabla f_i$, i = 1 … 200")
    left.plot(*full[:2], "*", color="black", markersize=12, label=r"$\nabla f$, their mean")
    left.set(xlabel="first coordinate of the gradient", ylabel="second coordinate")
    guide(left)
    for key, label, colour in (("whole", "gradient descent", "black"), ("single", "SGD, batch 1", COLOURS[0])):
        points = [(k, gap) for k, gap in measured[key] if k]
        right.plot(*zip(*points, strict=True), color=colour, label=label)
    right.axvline(200, color="black", linewidth=0.8, linestyle=":", label="one pass")
    right.set(xscale="log", yscale="log", ylim=(1e-5, None), xlabel="gradients of terms computed", ylabel="f − f*")
    guide(right)
