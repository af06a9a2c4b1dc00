"""What a polar factor costs by SVD, by an eigendecomposition and by products."""

import math
import time

import torch

from optim.polar import polar, polar_flops
from scripts.lecture.experiment import Check
from scripts.lecture.style import COLOURS, guide

TITLE = "The cost of a polar factor"
METHODS = ("muon",)
SIZE = (9.6, 3.8)

CONTENDERS = {
    "svd": "SVD",
    "eigh": "eigh of GGᵀ",
    "newton_schulz5": "Newton–Schulz, 5 steps",
    "polar_express": "Polar Express, 5 steps",
}
SIDES = (64, 128, 256, 512, 1024)


def measure(short: bool) -> dict:
    side, repeats = 256, 5 if short else 9
    x = torch.randn(side, 4 * side, generator=torch.Generator().manual_seed(42))
    times = {method: math.inf for method in CONTENDERS}
    for _ in range(repeats):
        for method in CONTENDERS:
            start = time.process_time()
            polar(x, method)
            times[method] = min(times[method], time.process_time() - start)
    ratios = {method: float(f"{seconds / times['polar_express']:.1g}") for method, seconds in times.items()}
    flops = {method: [polar_flops((m, 4 * m), method) for m in SIDES] for method in CONTENDERS}
    exact = polar(x.double(), "svd")
    errors = {method: ((polar(x, method).double() - exact).norm() / side**0.5).item() for method in CONTENDERS}
    return dict(ratios=ratios, flops=flops, errors=errors)


def check(measured: dict) -> list[Check]:
    ratios, errors = measured["ratios"], measured["errors"]
    return [
        Check("time of the SVD / of Polar Express, to one digit", ratios["svd"], low=1.5),
        Check("time of eigh / of Newton–Schulz", ratios["eigh"] / ratios["newton_schulz5"], high=10),
        Check("time of eigh / of the SVD", ratios["eigh"] / ratios["svd"], high=1.25),
        Check("error of eigh in float32, ‖X − UVᵀ‖_F/√m", errors["eigh"], high=1e-5),
        Check("error of Polar Express, 5 steps", errors["polar_express"], high=0.15),
        Check("error of Newton–Schulz, 5 steps", errors["newton_schulz5"], 0.05, 0.35),
    ]


def draw(measured: dict, figure) -> None:
    left, right = figure.subplots(1, 2)
    for (method, label), colour, marker in zip(CONTENDERS.items(), COLOURS, ("s-", "D-", "o-", "^--"), strict=False):
        left.plot(SIDES, [f / 1e9 for f in measured["flops"][method]], marker, markersize=5, color=colour, label=label)
        right.barh([label], [measured["ratios"][method]], color=colour)
        right.text(measured["ratios"][method], label, f" {measured['ratios'][method]:g}", va="center")
    left.set(
        xscale="log",
        yscale="log",
        xlabel="m (matrices of m×4m)",
        ylabel="arithmetic, GFLOP",
        xticks=SIDES,
        xticklabels=SIDES,
    )
    left.minorticks_off()
    right.set(xlabel="time / time of Polar Express")
    right.margins(x=0.12)
    right.invert_yaxis()
    guide(left)
