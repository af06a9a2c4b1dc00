"""The family of steepest descents on a small GPT."""

from scripts.lecture import gpt
from scripts.lecture.experiment import Check
from scripts.lecture.style import COLOURS, guide

TITLE = "The family on a small GPT"
METHODS = ("steepest",)
SIZE = (8.0, 4.0)

CASES = {
    "gradient descent (ℓ₂, regularised)": ("norm=frobenius", "form=regularised", "lr=0.1"),
    "normalised gradient descent (ℓ₂)": ("norm=frobenius", "lr=0.1"),
    "sign descent (ℓ∞)": ("norm=linf", "lr=0.001"),
    "spectral descent": ("norm=spectral", "lr=0.04"),
}


def measure(short: bool) -> dict:
    steps, every, size = (25, 25, "train.batch_tokens=256") if short else (240, 30, "train.batch_tokens=1024")
    curves = {}
    for label, words in CASES.items():
        settings = ("optim=steepest", size, *(f"optim.matrix.{word}" for word in words))
        curves[label] = gpt.train(*settings, steps=steps, evaluate_every=every)
    return curves


def check(measured: dict) -> list[Check]:
    ends = {label: curve[-1][1] for label, curve in measured.items()}
    spectral = ends["spectral descent"]
    return [
        Check(f"validation loss, nats per byte: {label} − spectral descent", end - spectral, low=0.0)
        for label, end in ends.items()
        if label != "spectral descent"
    ] + [
        Check(
            "fall of the validation loss, smallest of the four",
            min(c[0][1] - c[-1][1] for c in measured.values()),
            low=1.5,
        )
    ]


def draw(measured: dict, figure) -> None:
    axes = figure.subplots()
    for (label, curve), colour in zip(measured.items(), COLOURS, strict=False):
        axes.plot(*zip(*curve, strict=True), color=colour, label=label)
    axes.set(xlabel="step", ylabel="validation loss, nats per byte", ylim=(2, 3.8))
    guide(axes)
