"""Polar factors U Vᵀ of stacks of matrices X = U S Vᵀ (first version; the interface is final)."""

from collections.abc import Sequence

import torch
from torch import Tensor

Coefficients = Sequence[tuple[float, float, float]]

NEWTON_SCHULZ5 = [(3.4445, -4.7750, 2.0315)]
CUBIC = [(1.5, -0.5, 0.0)]
POLAR_EXPRESS = [
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
]


def _normalise(x: Tensor, safety: float) -> Tensor:
    norm = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
    return (x / (norm * (1 + safety)).clamp_min(1e-16)).to(x.dtype)


@torch.no_grad()
def newton_schulz(x: Tensor, coefficients: Coefficients, safety: float = 0.0) -> Tensor:
    if x.shape[-2] > x.shape[-1]:
        return newton_schulz(x.mT, coefficients, safety).mT
    shape = x.shape
    x = _normalise(x, safety).reshape(-1, *shape[-2:])
    for a, b, c in coefficients:
        gram = torch.bmm(x, x.mT)
        poly = torch.baddbmm(gram, gram, gram, beta=b, alpha=c) if c else gram.mul_(b)
        x = torch.baddbmm(x, poly, x, beta=a)
    return x.view(shape)


@torch.no_grad()
def polar_svd(x: Tensor) -> Tensor:
    finite = x.isfinite().all(-1, keepdim=True).all(-2, keepdim=True)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    u, s, vh = torch.linalg.svd(torch.where(finite, wide, 0.0), full_matrices=False)
    cut = s[..., :1] * max(x.shape[-2:]) * torch.finfo(s.dtype).eps
    out = (u * (s > cut).unsqueeze(-2)) @ vh
    return torch.where(finite, out, torch.nan).to(x.dtype)


POLAR_METHODS = {
    "polar_express": (POLAR_EXPRESS, 0.02),
    "polar_express_gram": (POLAR_EXPRESS, 0.02),
    "newton_schulz5": (NEWTON_SCHULZ5 * 5, 0.0),
    "cubic": (CUBIC * 12, 0.0),
    "svd": None,
    "eigh": None,
}


def polar(x: Tensor, method: str = "polar_express", steps: int | None = None) -> Tensor:
    if method in ("svd", "eigh"):
        return polar_svd(x)
    coefficients, safety = POLAR_METHODS[method]
    if steps is not None:
        coefficients = (list(coefficients) + [coefficients[-1]] * steps)[:steps]
    return newton_schulz(x, coefficients, safety)


def polar_flops(shape, method: str = "polar_express", steps: int | None = None) -> float:
    """FLOPs of the products for one matrix (or stack, counted whole) of this shape."""
    *batch, m, n = shape
    s, l = min(m, n), max(m, n)  # noqa: E741
    count = 1
    for b in batch:
        count *= b
    k = steps or 5
    return float(count * k * (4 * s * s * l + 2 * s**3))
