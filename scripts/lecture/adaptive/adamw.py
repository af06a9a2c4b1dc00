"""AdamW decays every weight alike; L2 in Adam decays weights by the inverse size of their gradients."""

import torch

from scripts.lecture.descend import descend, optimizer, parameter
from scripts.lecture.experiment import Check
from scripts.lecture.style import COLOURS, guide

TITLE = "AdamW against Adam with an L2 penalty"
METHODS = ("adam", "adamw")
SIZE = (7.6, 3.8)

SCALES = (0.1, 10.0)
STEPS, RATE, DECAY = 1000, 0.01, 0.03


def measure(short: bool) -> dict:
    repeats, curves = 2048, {}
    scales = torch.tensor(SCALES, dtype=torch.float64)
    for name, label in (("adam", "Adam + L2"), ("adamw", "AdamW")):
        generator, x = torch.Generator().manual_seed(22), parameter(torch.ones(2, dtype=torch.float64), repeats)

        def noise(x, k, generator=generator):
            return scales * torch.randn(x.shape, generator=generator, dtype=torch.float64)

        run = descend(optimizer(name, x, lr=RATE, betas=(0.9, 0.95), weight_decay=DECAY), x, noise, STEPS)
        curves[label] = [(k, point.mean(0).clone()) for k, point in run if k % 10 == 0]
    return curves


def check(measured: dict) -> list[Check]:
    kept = (1 - RATE * DECAY) ** STEPS
    ends = {label: curve[-1][1].tolist() for label, curve in measured.items()}
    return [
        Check("Adam + L2, gradients of 0.1: what is left of the weight", ends["Adam + L2"][0], high=0.3),
        Check("Adam + L2, gradients of 10", ends["Adam + L2"][1], low=0.9),
        Check(f"AdamW, gradients of 0.1 (exact: {kept:.2f})", ends["AdamW"][0], kept - 0.05, kept + 0.05),
        Check("AdamW, gradients of 10", ends["AdamW"][1], kept - 0.05, kept + 0.05),
    ]


def draw(measured: dict, figure) -> None:
    axes = figure.subplots()
    for (label, curve), colour in zip(measured.items(), COLOURS, strict=False):
        for i, (scale, style) in enumerate(zip(SCALES, ("-", "--"), strict=True)):
            axes.plot(
                [k for k, _ in curve],
                [mean[i] for _, mean in curve],
                style,
                color=colour,
                label=f"{label}, gradients of {scale:g}",
            )
    axes.set(xlabel="step k", ylabel="mean weight", ylim=(0, 1.1))
    guide(axes, loc="lower left")
