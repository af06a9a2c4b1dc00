"""Inverse roots of stacks of symmetric positive semi-definite matrices, for Shampoo and its relatives."""

import torch
from torch import Tensor

from .polar import finite_part

ROOT_METHODS = ("eigh", "newton", "eigh_shift")
NEWTON_STEPS = 100
"""A step multiplies the smallest eigenvalue by up to e, so that 100 reach any condition number of float64."""


@torch.no_grad()
def inverse_root(a: Tensor, exponent: float, eps: float = 0.0, method: str = "eigh") -> Tensor:
    """(A + eps·I)^(-exponent) of every symmetric positive semi-definite A of a [..., n, n], in a's shape and dtype.

    With eps > 0, eigenvalues below (machine epsilon)·λ_max/16, about what eigh resolves, count as that: their own root
    would blow rounding up. With eps = 0 the power is that of the pseudo-inverse: eigenvalues below
    n·(machine epsilon)·λ_max give 0. A matrix with a NaN or an infinity becomes NaN.
    method: "eigh", or "newton" for exponents 1/p with a whole p, which is made of matrix products and in float32 more
    accurate; it leaves the matrices on which it does not converge, such as singular ones with eps = 0, to eigh.
    "eigh_shift" is what Meta's Shampoo does (arXiv 2309.06497): it adds no eps, but where the least eigenvalue is below
    it, all are shifted so that the least is eps. Of a singular A the least is rounding, and so then is the root.
    Raises ValueError for exponent <= 0, eps < 0, an unknown method, or an exponent that newton cannot take.
    """
    check_root(exponent, eps, method)
    work, finite = finite_part(a, torch.promote_types(a.dtype, torch.float32))
    if method == "newton":
        root = _newton_root(work, round(1 / exponent), eps)
    else:
        root = _eigh_root(work, exponent, eps, shift=method == "eigh_shift")
    return torch.where(finite, root, torch.nan).to(a.dtype)


def check_root(exponent: float, eps: float, method: str) -> None:
    """Raises the ValueError of :func:`inverse_root`."""
    if not 0 < exponent < torch.inf or eps < 0:
        raise ValueError(f"inverse_root needs exponent > 0 and eps >= 0, got exponent={exponent}, eps={eps}")
    _check(method)
    if method == "eigh_shift" and not eps:
        raise ValueError("root=eigh_shift needs eps > 0, to which it lifts the least eigenvalue: use root=eigh")
    if method == "newton" and abs(round(1 / exponent) * exponent - 1) > 1e-6:
        raise ValueError(f"root=newton needs an exponent 1/p with a whole p, got {exponent}: use root=eigh")


def inverse_root_flops(n: int, method: str = "eigh") -> float:
    """About what one n×n root costs; Newton's at 20 steps of four products. For balancing work, not for accounting."""
    _check(method)
    return (9.0 + 2.0) * n**3 if method != "newton" else 20 * 4 * 2.0 * n**3


def inverse_root_workspace(n: int, method: str = "eigh", dtype: torch.dtype = torch.float32) -> float:
    """Bytes that the root of an n×n matrix of this dtype allocates at once, its result included: so many n×n matrices,
    as tests count them; more where float32 fails and float64 takes over."""
    _check(method)
    return (4.0 if method != "newton" else 9.25) * torch.promote_types(dtype, torch.float32).itemsize * n**2


def eigh(a: Tensor) -> tuple[Tensor, Tensor]:
    """torch.linalg.eigh, tried again in float64 where it fails or returns something that is not finite.

    A matrix of the stack [..., n, n] with a NaN or an infinity gets NaN eigenvalues and eigenvectors.
    """
    part, finite = finite_part(a, a.dtype)
    values, vectors = _finite_eigh(part)
    return torch.where(finite.squeeze(-1), values, torch.nan), torch.where(finite, vectors, torch.nan)


def _finite_eigh(a: Tensor) -> tuple[Tensor, Tensor]:
    try:
        values, vectors = torch.linalg.eigh(a)
        failed = not (values.isfinite().all() and vectors.isfinite().all())
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # torch does not list it in its __all__
        failed = True
    if failed:
        values, vectors = (x.to(a.dtype) for x in torch.linalg.eigh(a.double()))
    return values, vectors


def _check(method: str) -> None:
    if method not in ROOT_METHODS:
        raise ValueError(f"root={method} is unknown: choose one of {', '.join(ROOT_METHODS)}")


def _eigh_root(a: Tensor, exponent: float, eps: float, shift: bool = False) -> Tensor:
    values, vectors = _finite_eigh(a)
    unit = values[..., -1:].clamp_min(0) * torch.finfo(a.dtype).eps
    if shift:
        least = values[..., :1]  # taken off first: beside one of rounding eps would be lost
        powers = torch.where(least < eps, values - least + eps, values).pow(-exponent)
    elif eps:
        powers = (torch.maximum(values, unit / 16) + eps).pow(-exponent)
    else:
        powers = torch.where(values > a.shape[-1] * unit, values.pow(-exponent), 0.0)
    return (vectors * powers.unsqueeze(-2)) @ vectors.mT


def _newton_root(a: Tensor, p: int, eps: float) -> Tensor:
    """Coupled Newton iteration for A^(-1/p) (Guo and Higham 2006, section 3; Anil et al., arXiv 2002.09018).

    M = X^p A is kept beside X and goes to I. Scaled so that the eigenvalues of M start in (0, (p+1)/2], each step maps
    them to μ((p+1-μ)/p)^p, which is at most 1 and increases to it.
    """
    identity = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    m = a + eps * identity
    scale = (1 + p) / (2 * torch.linalg.matrix_norm(m, keepdim=True).clamp_min(torch.finfo(a.dtype).tiny))
    m, x = m * scale, identity * scale.pow(1 / p)
    residual = _residual(m)
    for _ in range(NEWTON_STEPS):
        factor = ((p + 1) * identity - m) / p
        next_x, next_m = x @ factor, torch.linalg.matrix_power(factor, p) @ m
        next_residual = _residual(next_m)
        # Near I the residual is squared by every step, until rounding stops it: keep what is best before that.
        settled = (residual < 0.1) & (next_residual > residual / 2)
        x, m = torch.where(settled, x, next_x), torch.where(settled, m, next_m)
        residual = torch.where(settled, residual, next_residual)
        if settled.all():
            break
    return torch.where(residual < 0.1, x, _eigh_root(a, 1 / p, eps)) if (residual >= 0.1).any() else x


def _residual(m: Tensor) -> Tensor:
    """The largest entry of |M - I|, [..., 1, 1]; NaN counts as infinity."""
    deviation = m - torch.eye(m.shape[-1], dtype=m.dtype, device=m.device)
    return deviation.abs().amax(dim=(-2, -1), keepdim=True).nan_to_num(torch.inf)
