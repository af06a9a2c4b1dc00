"""Unit balls of vector norms and of matrix norms."""

import math

import torch

from optim.lmo import lmo, norm
from scripts.lecture.experiment import Check
from scripts.lecture.style import COLOURS, guide

TITLE = "Balls of vector and matrix norms"
METHODS = ()
SIZE = (10.0, 3.7)

VECTOR = {"l1": "ℓ₁", "l2": "ℓ₂", "linf": "ℓ∞"}
MATRIX = {"nuclear": "nuclear", "frobenius": "Frobenius", "spectral": "spectral"}
PLANES = {
    "vectors (x₁, x₂)": lambda c, s: torch.stack([c, s], -1).unsqueeze(-2),  # as 1×2 matrices
    "matrices diag(a, b)": lambda c, s: torch.stack([c, 0 * c, 0 * c, s], -1).unflatten(-1, (2, 2)),
    "matrices (a b; b a)": lambda c, s: torch.stack([c, s, s, c], -1).unflatten(-1, (2, 2)),
}


def measure(short: bool) -> dict:
    angle = torch.linspace(0, 2 * math.pi, 361, dtype=torch.float64)
    circle = (angle.cos(), angle.sin())
    outlines = {}
    for plane, embed in PLANES.items():
        for kind in VECTOR if plane.startswith("vectors") else MATRIX:
            radius = 1 / norm(embed(*circle), kind)
            outlines[plane, kind] = torch.stack([radius * part for part in circle])
    generator = torch.Generator().manual_seed(30)
    stack = torch.randn(100, 4, 7, generator=generator, dtype=torch.float64)
    values = torch.linalg.svdvals(stack)
    same = {
        kind: (norm(stack, kind) - norm(values.unsqueeze(-2), of)).abs().max().item()
        for kind, of in zip(MATRIX, VECTOR, strict=True)
    }
    sizes = {kind: (norm(lmo(stack, kind), kind) - 1).abs().max().item() for kind in (*VECTOR, *MATRIX)}
    return dict(outlines=outlines, same=same, sizes=sizes)


def check(measured: dict) -> list[Check]:
    outlines = measured["outlines"]
    corner = {kind: outlines["matrices (a b; b a)", kind].abs().amax().item() for kind in MATRIX}
    pairs = zip(VECTOR, MATRIX, strict=True)
    slices = [
        (outlines["vectors (x₁, x₂)", a] - outlines["matrices diag(a, b)", b]).abs().max().item() for a, b in pairs
    ]
    checks = [
        Check(
            f"{name} norm against {VECTOR[of]} of the singular values, 100 matrices 4×7: largest difference",
            measured["same"][kind],
            high=1e-9,
        )
        for (kind, name), of in zip(MATRIX.items(), VECTOR, strict=True)
    ]
    return checks + [
        Check("|‖LMO(G)‖ − 1|, largest over the six norms", max(measured["sizes"].values()), high=1e-9),
        Check("left and middle picture: largest difference", max(slices), high=1e-9),
        Check("right picture, spectral ball: largest |a| or |b|", corner["spectral"], 0.999, 1.001),
        Check("right picture, nuclear ball: the same", corner["nuclear"], 0.499, 0.501),
    ]


def draw(measured: dict, figure) -> None:
    for axes, plane in zip(figure.subplots(1, 3), PLANES, strict=True):
        kinds = VECTOR if plane.startswith("vectors") else MATRIX
        for (kind, label), colour in zip(kinds.items(), COLOURS, strict=False):
            axes.plot(*measured["outlines"][plane, kind], color=colour, label=label)
        axes.set(
            title=plane,
            aspect="equal",
            xlim=(-1.25, 1.25),
            ylim=(-1.25, 1.7),
            xlabel="x₁" if kinds is VECTOR else "a",
            ylabel="x₂" if kinds is VECTOR else "b",
        )
        guide(axes, ncols=3, loc="upper center", columnspacing=0.7, handlelength=1, fontsize=7.5)
