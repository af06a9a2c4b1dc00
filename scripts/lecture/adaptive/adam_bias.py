"""Adam's bias correction makes the first steps as long as the later ones."""

import torch

from scripts.lecture.descend import descend, optimizer, parameter
from scripts.lecture.experiment import Check
from scripts.lecture.style import COLOURS, guide

TITLE = "Adam and its bias correction"
METHODS = ("adam", "rmsprop")
SIZE = (7.6, 3.6)

GRADIENTS = (1e-3, 1.0, 1e3)
GAMMA = 0.99


def measure(short: bool) -> dict:
    steps = {}
    for name, settings in (("adam", dict(betas=(0.9, GAMMA))), ("rmsprop", dict(alpha=GAMMA))):
        x = parameter(torch.zeros(3, dtype=torch.float64))
        constant = torch.tensor(GRADIENTS, dtype=torch.float64)
        run = descend(optimizer(name, x, lr=1.0, eps=0.0, **settings), x, lambda x, k, g=constant: g.clone(), 300)
        steps[name] = -torch.stack([point.clone() for _, point in run]).diff(dim=0)
    expected = (1 - GAMMA ** torch.arange(1.0, 301, dtype=torch.float64)) ** -0.5
    return dict(steps=steps, expected=expected)


def check(measured: dict) -> list[Check]:
    adam, rmsprop = measured["steps"]["adam"], measured["steps"]["rmsprop"]
    return [
        Check(
            "Adam: largest |step/α − 1|, 300 steps, gradients 1e-3, 1, 1e3", (adam - 1).abs().max().item(), high=1e-9
        ),
        Check("RMSProp: first step / α", rmsprop[0, 1].item(), 9.99, 10.01),
        Check(
            "RMSProp: largest relative difference from α/√(1 − γᵏ)",
            (rmsprop / measured["expected"].unsqueeze(1) - 1).abs().max().item(),
            high=1e-9,
        ),
    ]


def draw(measured: dict, figure) -> None:
    axes, ks = figure.subplots(), range(1, 301)
    axes.plot(ks, measured["steps"]["adam"][:, 1], color=COLOURS[1], label="Adam (bias-corrected)")
    axes.plot(ks, measured["steps"]["rmsprop"][:, 1], color=COLOURS[0], label="RMSProp (not corrected)")
    axes.plot(ks, measured["expected"], "--", color="black", linewidth=0.9, label="α/√(1 − γᵏ)")
    axes.set(xscale="log", xlabel="step k", ylabel="length of the step / α", ylim=(0, 10.5))
    guide(axes)
