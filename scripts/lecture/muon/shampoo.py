"""Shampoo: fewer steps than Adam where the curvature is a Kronecker product, at more work a step."""

import torch

from scripts.lecture.descend import descend, optimizer, parameter, slope
from scripts.lecture.experiment import Check
from scripts.lecture.style import COLOURS, guide

TITLE = "Shampoo against Adam"
METHODS = ("shampoo", "adam", "muon")
SIZE = (9.8, 4.0)

RATES = {"adam": (0.1, 0.3, 1.0), "shampoo": (0.1, 0.3, 1.0), "muon": (0.3, 1.0, 3.0)}
LABELS = {"adam": "Adam", "shampoo": "Shampoo", "muon": "Muon"}
SETTINGS = {
    "adam": dict(betas=(0.9, 0.95)),
    "shampoo": dict(betas=(0.95, 0.95), update_freq=1),
    "muon": dict(polar="svd", polar_steps=None),
}


def turned(size: int, generator: torch.Generator) -> torch.Tensor:
    q = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q
    return (q * torch.logspace(0, -3, size, dtype=torch.float64)) @ q.mT


def measure(short: bool) -> dict:
    steps = 200
    generator = torch.Generator().manual_seed(43)
    a, b = turned(16, generator), turned(24, generator)
    start = torch.randn(16, 24, generator=generator, dtype=torch.float64)
    curves, best = {}, {}
    for name, rates in RATES.items():
        for lr in rates[1:2] if short else rates:
            w = parameter(start)
            method = optimizer(name, w, **SETTINGS[name])
            run = descend(method, w, lambda w, k: a @ w @ b, steps, lambda k, lr=lr: lr * (1 - k / steps))
            curve = [((a @ w @ b) * w).sum().item() / 2 for _, w in run]
            if name not in curves or curve[-1] < curves[name][-1]:
                curves[name], best[name] = curve, lr
    lengths = {}
    for kind in ("sum", "ema"):
        w, constant = parameter(torch.zeros(4, 6, dtype=torch.float64)), torch.randn(4, 6, generator=generator).double()
        method = optimizer("shampoo", w, lr=1.0, betas=(0.0, 0.95), statistics=kind, graft="none", update_freq=1)
        points = torch.stack([p.clone() for _, p in descend(method, w, lambda w, k, g=constant: g.clone(), 100)])
        lengths[kind] = points.diff(dim=0).norm(dim=(1, 2)).tolist()
    work = optimizer("shampoo", torch.nn.Parameter(torch.zeros(2, 2)), update_freq=1)
    cost = work.flops(work.param_groups[0], (768, 3072)) / (768 * 3072)
    return dict(curves=curves, best=best, lengths=lengths, cost=cost)


def check(measured: dict) -> list[Check]:
    ends = {name: curve[-1] for name, curve in measured["curves"].items()}
    steps = range(1, 101)
    return [
        Check("f in the end: Adam / Shampoo, each at its best step", ends["adam"] / ends["shampoo"], low=3),
        Check(
            "Shampoo's arithmetic for 768×3072, roots in every step: FLOP a weight (Adam: about 12)",
            measured["cost"],
            low=1000,
        ),
        Check("sums: exponent of k in the length of the step", slope(steps, measured["lengths"]["sum"]), -0.51, -0.49),
        Check("moving averages: the same", slope(steps, measured["lengths"]["ema"]), -0.01, 0.01),
    ]


def draw(measured: dict, figure) -> None:
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    for (name, label), colour in zip(LABELS.items(), COLOURS, strict=False):
        left.plot(measured["curves"][name], color=colour, label=f"{label}, first α = {measured['best'][name]:g}")
    left.set(yscale="log", xlabel="step k", ylabel="$f(W_k)$")
    for (kind, label), colour in zip((("sum", "sums"), ("ema", "moving averages")), COLOURS[3:], strict=False):
        right.plot(range(1, 101), measured["lengths"][kind], color=colour, label=label)
    right.set(xscale="log", yscale="log", xlabel="step k", ylabel="length of the step, Frobenius")
    right.set_yticks([0.2, 0.5, 1, 2], ["0.2", "0.5", "1", "2"])
    right.minorticks_off()
    guide(left)
    guide(right)
