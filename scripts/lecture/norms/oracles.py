"""Linear minimization oracles and dual norms."""

import torch

from optim.lmo import NORMS, dual_norm, lmo, norm
from scripts.lecture.experiment import Check
from scripts.lecture.style import COLOURS, guide, note

TITLE = "Oracles and dual norms"
METHODS = ("steepest",)
SIZE = (9.6, 4.2)


def measure(short: bool) -> dict:
    generator = torch.Generator().manual_seed(31)
    matrix = torch.randn(6, 9, generator=generator, dtype=torch.float64)
    samples = torch.randn(500 if short else 4000, 6, 9, generator=generator, dtype=torch.float64)
    # Near the oracle the inequality is tight: perturb it by a little as well as at random.
    found = {}
    for kind in NORMS:
        best = lmo(matrix, kind)
        units = samples / norm(samples, kind)[:, None, None]
        wide = torch.cat([units, best + 0.05 * units])
        wide = wide / norm(wide, kind)[:, None, None]
        attained = (matrix * best).sum().item()
        found[kind] = dict(
            ratios=(matrix * wide).sum((-2, -1)) / dual_norm(matrix, kind),
            identity=attained / dual_norm(matrix, kind).item() + 1,
            scaled=(lmo(7 * matrix, kind) - best).abs().max().item(),
            odd=(lmo(-matrix, kind) + best).abs().max().item(),
        )
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    spectral = (lmo(matrix, "spectral") + u @ vh).abs().max().item()
    nuclear = (dual_norm(matrix, "spectral") - s.sum()).abs().item()
    vector = torch.tensor([0.9, 0.5], dtype=torch.float64)
    arrows = {kind: lmo(vector, kind) for kind in ("l1", "l2", "linf")}
    return dict(found=found, spectral=spectral, nuclear=nuclear, vector=vector, arrows=arrows)


def check(measured: dict) -> list[Check]:
    found = measured["found"].values()
    return [
        Check("norms checked", float(len(found)), low=10),
        Check("|⟨G, LMO(G)⟩ + ‖G‖*| / ‖G‖*, largest over the norms", max(abs(f["identity"]) for f in found), high=1e-9),
        Check(
            "smallest ⟨G, X⟩/‖G‖* of random X with ‖X‖ = 1", min(f["ratios"].min().item() for f in found), low=-1 - 1e-9
        ),
        Check("the same, largest over the norms", max(f["ratios"].min().item() for f in found), high=-0.8),
        Check("LMO(7G) against LMO(G), largest difference", max(f["scaled"] for f in found), high=1e-9),
        Check("LMO(−G) against −LMO(G)", max(f["odd"] for f in found), high=1e-9),
        Check("spectral: LMO(G) against −UVᵀ", measured["spectral"], high=1e-9),
        Check("spectral: dual norm against the sum of singular values", measured["nuclear"], high=1e-9),
    ]


def draw(measured: dict, figure) -> None:
    left, right = figure.subplots(1, 2, width_ratios=(2, 3))
    angle = torch.linspace(0, 2 * torch.pi, 361, dtype=torch.float64)
    circle = torch.stack([angle.cos(), angle.sin()], -1)
    arrow = dict(arrowstyle="-|>", linewidth=1.6, shrinkA=0, shrinkB=0)
    for (kind, end), label, colour in zip(measured["arrows"].items(), ("ℓ₁", "ℓ₂", "ℓ∞"), COLOURS, strict=False):
        ball = circle / norm(circle.unsqueeze(-2), kind)[:, None]
        left.plot(*ball.T, color=colour, linewidth=1, label=label)
        left.annotate("", end.tolist(), (0, 0), arrowprops=arrow | dict(color=colour))
    left.annotate("", measured["vector"].tolist(), (0, 0), arrowprops=arrow | dict(color="black"))
    left.text(*(measured["vector"] + 0.05), "g", fontsize=11)
    left.set(aspect="equal", xlim=(-1.3, 1.3), ylim=(-1.3, 1.6), xlabel="x₁", ylabel="x₂", title="LMO(g) on the ball")
    guide(left, ncols=3, loc="upper center")
    for row, found in enumerate(measured["found"].values()):
        ratios = found["ratios"][: len(found["ratios"]) // 2][:400]
        near = found["ratios"][len(found["ratios"]) // 2 :][:150]
        right.plot(ratios, [row] * len(ratios), "|", color=COLOURS[5], alpha=0.25, markersize=9)
        right.plot(near, [row] * len(near), "|", color=COLOURS[1], alpha=0.3, markersize=9)
        right.plot([found["identity"] - 1], [row], "|", color="black", markersize=15, markeredgewidth=2.5)
    right.axvline(-1, color="black", linewidth=0.7, linestyle=":")
    right.set(
        yticks=range(len(measured["found"])),
        yticklabels=measured["found"],
        xlabel="⟨G, X⟩ / ‖G‖*",
        xlim=(-1.08, 1),
        title="10 matrix norms",
    )
    note(right, "black: LMO(G)\ndark blue: near it\nlight blue: random X", 0.98, 0.5, ha="right")
