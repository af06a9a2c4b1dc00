"""Momentum's part in Muon: without it, spectral descent of the stochastic gradient, it loses."""

import torch

from optim.lmo import dual_norm
from scripts.lecture import gpt
from scripts.lecture.descend import descend, optimizer, parameter
from scripts.lecture.experiment import Check
from scripts.lecture.style import COLOURS, guide

TITLE = "Momentum's part in Muon"
METHODS = ("muon",)
SIZE = (9.8, 4.0)

MOMENTA = (0.0, 0.5, 0.8, 0.9, 0.95, 0.99)
NOISES = (0.02, 0.05, 0.1, 0.2)  # of one entry; the gradient's entries are about 0.026
TRAINED = (0.95, 0.0)  # momenta
RATES = (0.005, 0.01, 0.02, 0.04)
BEST = {0.95: 0.01, 0.0: 0.02}  # of these, by momentum; the short form has no time for the others


def share_of_the_fall(steps: int, noise_levels: tuple[float, ...]) -> dict[float, list[float]]:
    generator = torch.Generator().manual_seed(44)
    left, right = (torch.randn(size, 4, generator=generator, dtype=torch.float64) for size in (32, 48))
    exact = left @ right.mT / (left @ right.mT).norm()
    shares = {}
    for noise in noise_levels:
        shares[noise] = []
        for momentum in MOMENTA:
            noises = torch.Generator().manual_seed(45)

            def gradient(w, k, noise=noise, noises=noises):
                return exact + noise * torch.randn(w.shape, generator=noises, dtype=torch.float64)

            w = parameter(torch.zeros_like(exact))
            method = optimizer("muon", w, lr=1.0, momentum=momentum, nesterov=False, polar="svd", polar_steps=None)
            points = torch.stack([point.clone() for _, point in descend(method, w, gradient, steps)])
            moves = -points.diff(dim=0)[steps // 2 :]
            shares[noise].append(((moves * exact).sum((1, 2)).mean() / dual_norm(exact, "spectral")).item())
    return shares


def measure(short: bool) -> dict:
    steps, seeds = 200, (0,) if short else (0, 1)
    losses = {}
    for momentum in TRAINED:
        for lr in (BEST[momentum],) if short else RATES:
            words = (f"optim.matrix.momentum={momentum}", f"optim.matrix.lr={lr}", "train.batch_tokens=256")
            runs = [gpt.train("optim=muon", *words, f"seed={s}", steps=steps, evaluate_every=steps) for s in seeds]
            losses[momentum, lr] = [curve[-1][1] for curve in runs]
    return dict(shares=share_of_the_fall(*((60, (0.02, 0.1)) if short else (400, NOISES))), losses=losses)


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def check(measured: dict) -> list[Check]:
    shares, losses = measured["shares"], measured["losses"]
    muon, without = (min(mean(v) for (m, _), v in losses.items() if m == momentum) for momentum in TRAINED)
    return [
        Check("noise 0.1: share of the possible fall without momentum", shares[0.1][0], high=0.7),
        Check("noise 0.1: share with μ = 0.95", shares[0.1][MOMENTA.index(0.95)], low=0.9),
        Check("noise 0.02: share without momentum", shares[0.02][0], low=0.9),
        Check("GPT: validation loss without momentum − with it, each at its best", without - muon, low=0.015),
    ]


def draw(measured: dict, figure) -> None:
    left, right = figure.subplots(1, 2)
    for (noise, shares), colour in zip(measured["shares"].items(), COLOURS, strict=False):
        left.plot(range(len(MOMENTA)), [100 * s for s in shares], "o-", color=colour, label=f"noise {noise:g}")
    left.set(xticks=range(len(MOMENTA)), xticklabels=MOMENTA, xlabel="momentum μ", ylim=(0, 104))
    left.set(ylabel="share of the possible fall, %")
    for momentum, colour, shape in zip(TRAINED, COLOURS, "os", strict=False):
        found = {lr: losses for (m, lr), losses in measured["losses"].items() if m == momentum}
        label = f"Muon, μ = {momentum:g}" if momentum else "without momentum"
        right.plot(list(found), [mean(losses) for losses in found.values()], color=colour)
        for lr, losses in found.items():
            right.plot([lr] * len(losses), losses, shape, color=colour, markersize=5, label=label)
            label = None  # once
    right.set(xscale="log", xlabel="learning rate η of the matrices", ylabel="validation loss, nats per byte")
    right.set_xticks(RATES, RATES)
    right.minorticks_off()
    guide(left, loc="lower right")
    guide(right)
