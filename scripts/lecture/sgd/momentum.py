"""Momentum speeds gradient descent up, but does not change the rate of SGD."""

import math

import torch

from scripts.lecture.descend import descend, moments, optimizer, parameter, slope
from scripts.lecture.experiment import Check
from scripts.lecture.problems import least_squares, logistic, sampler
from scripts.lecture.style import COLOURS, guide

TITLE = "Momentum does not improve the rate of SGD"
METHODS = ("sgd", "sgd_momentum", "nesterov")
SIZE = (9.2, 3.8)

NAMES = {"sgd": "no momentum", "sgd_momentum": "Polyak", "nesterov": "Nesterov"}
KAPPA = 1000.0


def exact(steps: int) -> dict[str, list[tuple[int, float]]]:
    root = torch.logspace(0, -math.log10(KAPPA) / 2, 10, dtype=torch.float64)  # eigenvalues 1 … 1/κ, L = 1
    problem = least_squares(root.diag() * 10**0.5, torch.zeros(10, dtype=torch.float64))
    beta = ((KAPPA**0.5 - 1) / (KAPPA**0.5 + 1)) ** 2
    settings = {
        "sgd": dict(lr=2 / (1 + 1 / KAPPA)),
        "sgd_momentum": dict(lr=(1 + beta**0.5) ** 2, momentum=beta),
        "nesterov": dict(lr=1.0, momentum=beta**0.5),
    }
    curves = {}
    for name, choice in settings.items():
        x = parameter(torch.ones(10, dtype=torch.float64))
        run = descend(optimizer(name, x, **choice), x, lambda x, k: problem.full(x), steps)
        curves[name] = [(k, problem.gap(point).item()) for k, point in run]
    return curves


def stochastic(repeats: int, steps: int) -> dict[str, list[tuple[int, float]]]:
    problem, start = logistic(), torch.full((10,), 1.0, dtype=torch.float64)
    times, curves = moments(steps), {}
    for name in NAMES:
        share = 1.0 if name == "sgd" else 0.1
        x, curve = parameter(start, repeats), []
        rate = lambda k, share=share: share * (2 * k + 1) / (2 * problem.mu * (k + 1) ** 2)  # noqa: E731
        for k, point in descend(optimizer(name, x), x, sampler(problem, 1, seed=12), steps, rate):
            if k in times:
                curve.append((k, problem.gap(point).mean().item()))
        curves[name] = curve
    return curves


def measure(short: bool) -> dict:
    return dict(exact=exact(400), stochastic=stochastic(*((128, 2000) if short else (256, 10_000))))


def check(measured: dict) -> list[Check]:
    ends = {name: curve[-1][1] for name, curve in measured["exact"].items()}
    checks = [
        Check(
            f"exact gradients, {NAMES[name]}: f − f* after 400 steps / without momentum",
            ends[name] / ends["sgd"],
            high=1e-3,
        )
        for name in ("sgd_momentum", "nesterov")
    ]
    path = [gap for _, gap in measured["exact"]["nesterov"]]
    # Looking ahead damps: with Polyak's formula at Nesterov's settings it is 0.03.
    checks.append(
        Check("exact gradients, Nesterov: f − f* after 50 steps / at the start", path[50] / path[0], high=3e-3)
    )
    last = {}
    for name, curve in measured["stochastic"].items():
        tail = [(k, gap) for k, gap in curve if k >= curve[-1][0] / 20]
        last[name] = curve[-1][1]
        checks.append(Check(f"stochastic, {NAMES[name]}: exponent of k", slope(*zip(*tail, strict=True)), -1.15, -0.85))
    for name in ("sgd_momentum", "nesterov"):
        ratio = last[name] / last["sgd"]
        checks.append(Check(f"stochastic, {NAMES[name]}: f − f* in the end / without momentum", ratio, 0.7, 1.4))
    return checks


def draw(measured: dict, figure) -> None:
    left, right = figure.subplots(1, 2)
    for (name, label), colour in zip(NAMES.items(), COLOURS, strict=False):
        left.plot(*zip(*measured["exact"][name], strict=True), color=colour, label=label)
        right.plot(*zip(*measured["stochastic"][name][1:], strict=True), color=colour, label=label)
    left.set(yscale="log", ylim=(1e-16, None), xlabel="iteration k", ylabel=r"$f(x_k) - f$*", title="exact gradients")
    right.set(
        xscale="log", yscale="log", xlabel="iteration k", ylabel=r"mean of $f(x_k) - f$*", title="stochastic gradients"
    )
    guide(left)
    guide(right)
