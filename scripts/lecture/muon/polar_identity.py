"""Shampoo without accumulation is the polar factor, which is Muon's step without momentum."""

import torch
from torch import Tensor

from optim.polar import polar
from scripts.lecture.descend import descend, optimizer, parameter
from scripts.lecture.experiment import Check
from scripts.lecture.style import COLOURS, guide

TITLE = "Muon is Shampoo without accumulation"
METHODS = ("shampoo", "muon", "steepest")
SIZE = (7.8, 3.9)

BETAS = (0.0, 0.5, 0.9, 0.99)


def step_of(name: str, gradients: Tensor, **settings) -> Tensor:
    """The last update of W, as a positive direction, when the optimizer sees these gradients with lr 1."""
    w = parameter(torch.zeros_like(gradients[0]))
    points = [
        p.clone()
        for _, p in descend(
            optimizer(name, w, lr=1.0, **settings), w, lambda w, k: gradients[k].clone(), len(gradients)
        )
    ]
    return points[-2] - points[-1]


def shampoo(gradients: Tensor, beta2: float = 0.0, eps: float = 0.0, **settings) -> Tensor:
    return step_of("shampoo", gradients, betas=(0.0, beta2), eps=eps, graft="none", update_freq=1, **settings)


def measure(short: bool) -> dict:
    generator = torch.Generator().manual_seed(40)
    gradients = torch.randn(20 if short else 60, 24, 32, generator=generator, dtype=torch.float64)
    thin = torch.randn(9, 4, generator=generator, dtype=torch.float64)
    shapes = {
        "6×6": torch.randn(6, 6, generator=generator, dtype=torch.float64),
        "5×9": torch.randn(5, 9, generator=generator, dtype=torch.float64),
        "9×9 of rank 4": thin @ torch.randn(4, 9, generator=generator, dtype=torch.float64),
    }
    errors = {}
    for label, g in shapes.items():
        exact = polar(g, "svd")
        errors[label] = (shampoo(g[None]) - exact).abs().max().item()
        errors[f"{label}, one-sided"] = (shampoo(g[None], one_sided=True) - exact).abs().max().item()
    last = gradients[-1:]
    muon = step_of("muon", last, momentum=0.0, polar="svd", polar_steps=None)
    spectral = step_of("steepest", last, polar="svd", polar_steps=None)
    twins = [(twin - shampoo(last)).abs().max().item() for twin in (muon, spectral)]
    values = {beta: torch.linalg.svdvals(shampoo(gradients, beta)) for beta in BETAS}
    damped = torch.linalg.svdvals(shampoo(shapes["6×6"][None], eps=1.0))
    return dict(errors=errors, twins=twins, values=values, own=torch.linalg.svdvals(last[0]), damped=damped)


def check(measured: dict) -> list[Check]:
    values = measured["values"]
    spread = {beta: (v[0] / v[-1]).item() for beta, v in values.items()}
    return [
        *[
            Check(f"{label}: Shampoo's step − UVᵀ, largest entry", error, high=1e-6)
            for label, error in measured["errors"].items()
        ],
        Check("24×32: Muon without momentum − Shampoo, largest entry", measured["twins"][0], high=1e-6),
        Check("24×32: spectral descent − Shampoo", measured["twins"][1], high=1e-6),
        Check("largest / smallest singular value of the update, β₂ = 0", spread[0.0], 1 - 1e-6, 1 + 1e-6),
        Check("the same, β₂ = 0.5", spread[0.5], low=1.2),
        Check(
            "the same, β₂ = 0.99, less / more than the gradient's own",
            spread[0.99] * measured["own"][-1].item() / measured["own"][0].item(),
            0.3,
            3.0,
        ),
        Check("6×6 with ε = 1: largest singular value (undamped: 1)", measured["damped"][0].item(), high=0.99),
    ]


def draw(measured: dict, figure) -> None:
    axes, index = figure.subplots(), range(1, 25)
    for (beta, values), colour in zip(measured["values"].items(), COLOURS, strict=False):
        axes.plot(index, values / values.mean(), "o-", markersize=3.5, color=colour, label=f"β₂ = {beta:g}")
    axes.plot(index, measured["own"] / measured["own"].mean(), ":", color="black", label="the gradient")
    axes.set(xlabel="number of the singular value", ylabel="singular value / mean", ylim=(0, None))
    guide(axes, ncols=2)
