"""Momentum's part in Muon: without it, spectral descent of the stochastic gradient, it loses."""

import torch

from optim.lmo import dual_norm
from scripts.lecture import gpt
from scripts.lecture.descend import descend, optimizer, parameter
from scripts.lecture.experiment import Check
from scripts.lecture.style import COLOURS, guide

TITLE = "Momentum's part in Muon"
CLAIM = r"""The last slide's update, $W - \eta UV^\top$ of the gradient itself, is not yet Muon, which orthogonalizes
the *momentum*. $UV^\top$ has no small singular values: the noise of a batch, averaged away in no direction, enters
every one of them at full length."""
CAPTION = """Left: a fixed gradient of rank 4 (32×48, of Frobenius norm 1) plus fresh Gaussian noise in every step;
how much of the fall ‖G‖* that one step of unit spectral norm can bring Muon's steps bring, by momentum. Right: a GPT
of 2 layers and 64 channels on the sample text, 1024 bytes a step, mean over two seeds, each method at the best
learning rate of a grid of factors of 2. Embedding, head and gains have AdamW in both."""
METHODS = ("muon", "steepest")
CORRECTION = r"""The slide leaves the momentum out. In the NanoGPT speedrun's track 3 it is worth 8225 against 3250
steps; on our small model, where a batch is small but training is short, the gap is small too."""
SIZE = (9.8, 4.0)

MOMENTA = (0.0, 0.5, 0.8, 0.9, 0.95, 0.99)
NOISES = (0.02, 0.05, 0.1, 0.2)  # of one entry; the gradient's entries are about 0.026
CASES = {"Muon, μ = 0.95": ("optim=muon", 0.02), "without momentum": ("optim=steepest", 0.04)}


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
    losses, seeds = {}, (0,) if short else (0, 1)
    # The noisier the gradients, the sooner momentum pays.
    steps, tokens = (120, 64) if short else (300, 1024)
    for label, (words, lr) in CASES.items():
        settings = (words, f"optim.matrix.lr={lr}", f"train.batch_tokens={tokens}")
        curves = [gpt.train(*settings, f"seed={s}", steps=steps, evaluate_every=steps if short else 30) for s in seeds]
        losses[label] = [(c[0][0], sum(loss for _, loss in c) / len(c)) for c in zip(*curves, strict=True)]
    return dict(shares=share_of_the_fall(*((60, (0.02, 0.1)) if short else (400, NOISES))), losses=losses)


def check(measured: dict) -> list[Check]:
    shares, losses = measured["shares"], measured["losses"]
    muon, without = (curve[-1][1] for curve in losses.values())
    return [
        Check("noise 0.1: share of the possible fall without momentum", shares[0.1][0], high=0.7),
        Check("noise 0.1: share with μ = 0.95", shares[0.1][MOMENTA.index(0.95)], low=0.9),
        Check("noise 0.02: share without momentum", shares[0.02][0], low=0.9),
        Check("GPT: validation loss without momentum − with it, nats per byte", without - muon, low=0.01),
    ]


def draw(measured: dict, figure) -> None:
    left, right = figure.subplots(1, 2)
    for (noise, shares), colour in zip(measured["shares"].items(), COLOURS, strict=False):
        left.plot(range(len(MOMENTA)), [100 * s for s in shares], "o-", color=colour, label=f"noise {noise:g}")
    left.set(xticks=range(len(MOMENTA)), xticklabels=MOMENTA, xlabel="momentum μ", ylim=(0, 104))
    left.set(ylabel="share of the possible fall, %")
    for (label, curve), colour in zip(measured["losses"].items(), COLOURS, strict=False):
        right.plot(*zip(*curve, strict=True), color=colour, label=f"{label}, η = {CASES[label][1]:g}")
    right.set(xlabel="step", ylabel="validation loss, nats per byte", ylim=(2.1, 3.4))
    guide(left, loc="lower right")
    guide(right)
