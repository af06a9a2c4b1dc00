"""A larger batch lowers the noise ball in proportion, and costs in proportion."""

import torch

from scripts.lecture.descend import descend, moments, optimizer, parameter
from scripts.lecture.experiment import Check
from scripts.lecture.problems import logistic, sampler
from scripts.lecture.style import COLOURS, guide

TITLE = "Batch size"
METHODS = ("sgd",)
SIZE = (9.2, 3.8)

BATCHES = (1, 4, 16, 64, 256)


def measure(short: bool) -> dict:
    repeats, steps = (128, 400) if short else (256, 1000)
    problem, start = logistic(), torch.full((10,), 1.0, dtype=torch.float64)
    times, curves = moments(steps), {}
    for size in BATCHES:
        x, curve, tail = parameter(start, repeats), [], []
        for k, point in descend(optimizer("sgd", x, lr=0.1), x, sampler(problem, size, seed=11), steps):
            if k in times:
                curve.append((k, problem.gap(point).mean().item()))
            if k >= 60 and k % 4 == 0:
                tail.append(problem.gap(point).mean().item())
        curves[size] = dict(curve=curve, plateau=sum(tail) / len(tail))
    return curves


def check(measured: dict) -> list[Check]:
    products = [size * curve["plateau"] for size, curve in measured.items()]
    mean = sum(products) / len(products)
    return [
        Check("batch size × plateau, smallest / mean over the sizes", min(products) / mean, 0.9, 1.1),
        Check("the same, largest", max(products) / mean, 0.9, 1.1),
    ]


def draw(measured: dict, figure) -> None:
    left, right = figure.subplots(1, 2, sharey=True)
    for (size, found), colour in zip(measured.items(), COLOURS, strict=False):
        points = [(k, gap) for k, gap in found["curve"] if k]
        left.plot(*zip(*points, strict=True), color=colour, label=f"b = {size}")
        right.plot([k * size for k, _ in points], [gap for _, gap in points], color=colour)
    left.set(xscale="log", yscale="log", xlabel="iteration k", ylabel=r"mean of $f(x_k) - f$*")
    right.set(xscale="log", xlabel="gradients of terms computed, k · b")
    guide(left)
