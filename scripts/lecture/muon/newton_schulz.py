"""How fast the iterations for the polar factor converge, and which one does not."""

import torch

from optim.polar import polar
from scripts.lecture.experiment import Check
from scripts.lecture.style import COLOURS, guide

TITLE = "Newton–Schulz and Polar Express"
METHODS = ("muon",)
SIZE = (10.0, 4.0)

METHODS_DRAWN = {
    "newton_schulz5": "Newton–Schulz, Jordan's",
    "polar_express": "Polar Express",
    "quintic": "(2, −1.5, 0.5)",
    "cubic": "classical (1.5, −0.5)",
}
MOST = 16


def measure(short: bool) -> dict:
    generator = torch.Generator().manual_seed(41)
    side = 100 if short else 200
    q, r = (torch.linalg.qr(torch.randn(side, side, generator=generator, dtype=torch.float64)).Q for _ in range(2))
    sigma = torch.logspace(0, -4, side, dtype=torch.float64)
    matrix = q @ sigma.diag() @ r.mT
    sigma = sigma / sigma.norm()
    mapped = {}
    for method in METHODS_DRAWN:  # singular vectors stay: read the values in their order off Qᵀ X R
        mapped[method] = (q.mT @ polar(matrix, method, 5) @ r).diagonal()
    gaussian = torch.randn(64, 192, generator=generator, dtype=torch.float64)
    exact = polar(gaussian, "svd")
    errors, late = {}, []
    for method in METHODS_DRAWN:
        results = [polar(gaussian, method, k) for k in range(1, MOST + 1)]
        errors[method] = [((x - exact).norm() / 8).item() for x in results]
        if method == "newton_schulz5":
            late = [torch.linalg.svdvals(x) for x in results[4:]]
    bounds = (min(v[-1].item() for v in late), max(v[0].item() for v in late))
    return dict(sigma=sigma, mapped=mapped, errors=errors, bounds=bounds)


def check(measured: dict) -> list[Check]:
    errors, sigma = measured["errors"], measured["sigma"]
    kept = measured["mapped"]["polar_express"][sigma > 1e-3]
    return [
        Check("Jordan's: smallest singular value after 5 … 16 steps", measured["bounds"][0], 0.66, 0.75),
        Check("Jordan's: largest", measured["bounds"][1], 1.1, 1.22),
        Check("Jordan's: smallest error after 5 … 16 steps", min(errors["newton_schulz5"][4:]), low=0.05),
        Check("Polar Express: error after 5 steps", errors["polar_express"][4], high=0.15),
        Check("Polar Express: error after 9 steps", errors["polar_express"][8], high=1e-6),
        Check("Polar Express: largest |σ − 1| after 5 steps from σ > 0.001", (kept - 1).abs().max().item(), high=0.35),
        Check("(2, −1.5, 0.5): error after 16 steps", errors["quintic"][-1], high=1e-9),
        Check(
            "after 5 steps: error of the classical / of Polar Express",
            errors["cubic"][4] / errors["polar_express"][4],
            low=2,
        ),
        Check("classical: error after 16 steps", errors["cubic"][-1], high=1e-3),
    ]


def draw(measured: dict, figure) -> None:
    left, right = figure.subplots(1, 2)
    left.axhline(1, color="black", linewidth=0.8)
    left.axhspan(0.68, 1.13, color="#eef0f4", zorder=0)
    for (method, label), colour in zip(METHODS_DRAWN.items(), COLOURS, strict=False):
        left.plot(measured["sigma"], measured["mapped"][method], color=colour, label=label)
        errors = [max(e, 1e-15) for e in measured["errors"][method]]
        right.plot(range(1, MOST + 1), errors, "o-", markersize=3.5, color=colour, label=label)
    left.set(xscale="log", xlabel=r"singular value of $X/\|X\|_F$", ylabel="after 5 steps", ylim=(0, 1.45))
    right.set(yscale="log", xlabel="steps", ylabel=r"$\|X - UV^T\|_F\,/\,\sqrt{64}$")
    guide(left, loc="upper left", ncols=2, fontsize=7.5)
    guide(right, loc="lower left")
