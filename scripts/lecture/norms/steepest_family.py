"""Gradient descent, normalised, sign and spectral descent: one step, four norms."""

import torch
from torch import Tensor

from optim.lmo import dual_norm, norm
from scripts.lecture.descend import descend, optimizer, parameter
from scripts.lecture.experiment import Check
from scripts.lecture.style import COLOURS, guide

TITLE = "One family: steepest descent under a norm"
METHODS = ("steepest", "sgd", "signum")
SIZE = (9.6, 4.0)

KINDS = {"frobenius": "ℓ₂ (Frobenius)", "linf": "ℓ∞ (sign)", "spectral": "spectral"}
RATES = {"frobenius": (0.3, 0.6, 1.25, 2.5), "linf": (0.04, 0.08, 0.15, 0.3), "spectral": (0.4, 0.8, 1.6, 3.2)}


def problem() -> tuple[Tensor, Tensor, Tensor]:
    """(A Aᵀ, W*, W₀) of f = ½ tr (W − W*) A Aᵀ (W − W*)ᵀ."""
    generator = torch.Generator().manual_seed(32)
    q = torch.linalg.qr(torch.randn(12, 12, generator=generator, dtype=torch.float64)).Q
    gram = (q * torch.logspace(0, -2.95, 12, dtype=torch.float64)) @ q.mT
    target = torch.randn(8, 12, generator=generator, dtype=torch.float64)
    return gram, target, torch.zeros(8, 12, dtype=torch.float64)


def smoothness(gram: Tensor, kind: str) -> float:
    """Of f in the norm: the largest tr D A Aᵀ Dᵀ over ‖D‖ ≤ 1, D 8×12 (ℓ∞: 8·max_s sᵀ A Aᵀ s, by trying every s)."""
    if kind == "frobenius":
        return torch.linalg.eigvalsh(gram)[-1].item()
    if kind == "spectral":
        return torch.linalg.eigvalsh(gram)[-8:].sum().item()
    signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=torch.float64)] * 12)
    return 8 * ((signs @ gram) * signs).sum(-1).max().item()


def run(name: str, steps: int, rate=None, **settings) -> tuple[list[float], list[Tensor]]:
    gram, target, start = problem()
    w, values, points = parameter(start), [], []
    for _, point in descend(optimizer(name, w, **settings), w, lambda w, k: (w - target) @ gram, steps, rate):
        values.append((((point - target) @ gram) * (point - target)).sum().item() / 2)
        points.append(point.clone())
    return values, points


def measure(short: bool) -> dict:
    steps, exact = 100 if short else 200, dict(polar="svd", polar_steps=None)
    normalised, best, regularised = {}, {}, {}
    for kind in KINDS:
        for lr in RATES[kind]:
            values, points = run("steepest", steps, lambda k, lr=lr: lr * (1 - k / steps), norm=kind, **exact)
            if kind not in best or values[-1] < normalised[kind][-1]:
                normalised[kind], best[kind] = values, lr
                lengths = norm(points[1] - points[0], kind).item() / lr
        gram = problem()[0]
        alpha = 1 / smoothness(gram, kind)
        values, points = run("steepest", 2 * steps, norm=kind, form="regularised", lr=alpha, **exact)
        gradients = [(point - problem()[1]) @ gram for point in points]
        promised = [alpha / 2 * dual_norm(g, kind).square().item() for g in gradients[:-1]]
        fall = min((a - b) / p for a, b, p in zip(values, values[1:], promised, strict=False) if p > 1e-10)
        regularised[kind] = dict(values=values, fall=fall, length=lengths, step=points[1] - points[0])
    twins = [
        (run("steepest", 20, norm="frobenius", form="regularised", lr=0.3)[1], run("sgd", 20, lr=0.3)[1]),
        (run("steepest", 20, norm="linf", lr=0.03)[1], run("signum", 20, lr=0.03, momentum=0.0, weight_decay=0.0)[1]),
    ]
    twins = [max((a - b).abs().max().item() for a, b in zip(*pair, strict=True)) for pair in twins]
    return dict(normalised=normalised, best=best, regularised=regularised, twins=twins)


def check(measured: dict) -> list[Check]:
    regularised, normalised = measured["regularised"], measured["normalised"]
    singular = torch.linalg.svdvals(regularised["spectral"]["step"])
    return [
        Check("ℓ₂, regularised, against torch's SGD: largest difference in 20 steps", measured["twins"][0], high=1e-9),
        Check("ℓ∞, normalised, against signSGD: the same", measured["twins"][1], high=1e-9),
        Check(
            "normalised step's length in its norm / α, smallest",
            min(r["length"] for r in regularised.values()),
            0.999,
            1.001,
        ),
        Check("the same, largest", max(r["length"] for r in regularised.values()), 0.999, 1.001),
        Check("spectral step: largest / smallest singular value", (singular[0] / singular[-1]).item(), 0.999, 1.001),
        *[
            Check(f"regularised, {label}: smallest fall of f / (α/2)‖g‖*²", regularised[kind]["fall"], low=1 - 1e-6)
            for kind, label in KINDS.items()
        ],
        Check(
            "normalised, f in the end: ℓ₂ / spectral", normalised["frobenius"][-1] / normalised["spectral"][-1], low=2
        ),
    ]


def draw(measured: dict, figure) -> None:
    left, right = figure.subplots(1, 2)
    for (kind, label), colour in zip(KINDS.items(), COLOURS, strict=False):
        left.plot(measured["normalised"][kind], color=colour, label=f"{label}, first α = {measured['best'][kind]:g}")
        right.plot(measured["regularised"][kind]["values"], color=colour, label=label)
    left.set(yscale="log", xlabel="step k", ylabel="$f(W_k)$", title="normalised steps")
    right.set(yscale="log", xlabel="step k", ylabel="$f(W_k)$", title="regularised steps, α = 1/L of the norm")
    guide(left)
    guide(right)
