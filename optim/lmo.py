"""Norms, their duals and linear minimization oracles, for vectors and for stacks of matrices.

LMO(G) minimises <G, W> over the unit ball of a norm, so that <G, LMO(G)> = -‖G‖_dual. Weights are fan-out × fan-in,
m×n; the operator norms are those of Bernstein and Newhouse (arXiv 2409.20325) and Pethick et al. (arXiv 2502.07529).

A tensor with one dimension is a vector. One with more is a stack of matrices [..., m, n], each with a norm of its own.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.linalg import vector_norm

from .polar import finite_part, polar, power_of_two


@dataclass(frozen=True)
class Norm:
    """norm and dual take x in float32 at least, one number a vector or matrix; ascent(x, polar of x) is -LMO(x)."""

    norm: Callable[[Tensor], Tensor]
    dual: Callable[[Tensor], Tensor]
    ascent: Callable[[Tensor, Callable[[Tensor], Tensor]], Tensor]
    of_matrices: bool


def norm(x: Tensor, kind: str) -> Tensor:
    """‖x‖ of the kind named, in float32 at least, without x's last dimension (vector) or last two (matrices).

    Raises ValueError for an unknown kind, a scalar, or a vector where the norm is one of matrices; so do the others.
    """
    return _find(x, kind).norm(_full(x))


def dual_norm(x: Tensor, kind: str) -> Tensor:
    """max <x, w> over ‖w‖ <= 1, shaped as `norm`."""
    return _find(x, kind).dual(_full(x))


def lmo(x: Tensor, kind: str, polar_method: str = "svd", polar_steps: int | None = None) -> Tensor:
    """argmin <x, w> over ‖w‖ <= 1, in x's shape and dtype; 0 for 0, and never finite where x is NaN.

    polar_method, polar_steps: how the kinds made of UVᵀ (spectral, rms_to_rms) get it, see `polar`.
    """
    return _find(x, kind).ascent(x, lambda y: polar(y, polar_method, polar_steps)).neg_()


def _find(x: Tensor, kind: str) -> Norm:
    if kind not in NORMS:
        raise ValueError(f"norm {kind!r} is unknown: choose one of {', '.join(NORMS)}")
    if x.ndim < (2 if NORMS[kind].of_matrices else 1):
        raise ValueError(f"norm {kind!r} does not apply to a tensor of shape {tuple(x.shape)}")
    return NORMS[kind]


def _full(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _dims(x: Tensor) -> tuple[int, ...]:
    return (-1,) if x.ndim == 1 else (-2, -1)


def _root_size(x: Tensor) -> float:
    return math.sqrt(math.prod(x.shape[-2:]))


def _gain(x: Tensor) -> float:
    return math.sqrt(x.shape[-2] / x.shape[-1])


def _entries(x: Tensor, p: float) -> Tensor:
    return _length(x, _dims(x)) if p == 2 else torch.as_tensor(vector_norm(x, p, dim=_dims(x)))


def _length(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """The Euclidean norm over dims, also where its square leaves the range of x's dtype."""
    power = power_of_two(x, dims)
    length: Tensor = vector_norm(x * power, dim=dims, keepdim=True) / power
    return length.squeeze(dims)


def _unit(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """x divided by its Euclidean norm over dims; 0 stays 0."""
    full = _full(x)
    scaled = full * power_of_two(full, dims)
    length = vector_norm(scaled, dim=dims, keepdim=True)
    return scaled.div_(torch.where(length == 0, 1.0, length)).to(x.dtype)


def _sign(x: Tensor) -> Tensor:
    return torch.where(x.isnan(), x, x.sign())


def _largest_entry(x: Tensor) -> Tensor:
    """The sign of the first entry of the largest size, in its place; zero elsewhere."""
    flat = x.flatten(-len(_dims(x)))
    index = flat.abs().argmax(-1, keepdim=True)
    return torch.zeros_like(flat).scatter_(-1, index, _sign(flat.gather(-1, index))).view(x.shape)


def _singular_values(x: Tensor) -> Tensor:
    part, finite = finite_part(x, x.dtype)
    return torch.where(finite.squeeze(-1), torch.linalg.svdvals(part), torch.nan)


def _largest_pair(x: Tensor) -> Tensor:
    """u₁v₁ᵀ of the largest singular value."""
    part, finite = finite_part(x, _full(x).dtype)
    u, s, vh = torch.linalg.svd(part, full_matrices=False)
    pair = u[..., :, :1] * vh[..., :1, :] * s[..., :1].sign().unsqueeze(-1)
    return torch.where(finite, pair, torch.nan).to(x.dtype)


_EUCLIDEAN = Norm(lambda x: _entries(x, 2), lambda x: _entries(x, 2), lambda x, _: _unit(x, _dims(x)), False)

NORMS: dict[str, Norm] = {
    "l1": Norm(lambda x: _entries(x, 1), lambda x: _entries(x, math.inf), lambda x, _: _largest_entry(x), False),
    "l2": _EUCLIDEAN,
    "frobenius": _EUCLIDEAN,
    "linf": Norm(lambda x: _entries(x, math.inf), lambda x: _entries(x, 1), lambda x, _: _sign(x), False),
    # ‖x‖₂/√N, N the number of entries
    "rms": Norm(
        lambda x: _entries(x, 2) / _root_size(x),
        lambda x: _entries(x, 2) * _root_size(x),
        lambda x, _: _unit(x, _dims(x)) * _root_size(x),
        False,
    ),
    "spectral": Norm(
        lambda x: _singular_values(x).amax(-1),
        lambda x: _singular_values(x).sum(-1),
        lambda x, polar_of: polar_of(x),
        True,
    ),
    "nuclear": Norm(
        lambda x: _singular_values(x).sum(-1),
        lambda x: _singular_values(x).amax(-1),
        lambda x, _: _largest_pair(x),
        True,
    ),
    # max ‖Wv‖_RMS over ‖v‖_RMS <= 1
    "rms_to_rms": Norm(
        lambda x: _singular_values(x).amax(-1) / _gain(x),
        lambda x: _singular_values(x).sum(-1) * _gain(x),
        lambda x, polar_of: polar_of(x) * _gain(x),
        True,
    ),
    # the largest RMS of a column: max ‖Wv‖_RMS over ‖v‖₁ <= 1
    "one_to_rms": Norm(
        lambda x: _length(x, (-2,)).amax(-1) / math.sqrt(x.shape[-2]),
        lambda x: _length(x, (-2,)).sum(-1) * math.sqrt(x.shape[-2]),
        lambda x, _: _unit(x, (-2,)) * math.sqrt(x.shape[-2]),
        True,
    ),
    # √n times the largest norm of a row: max ‖Wv‖_∞ over ‖v‖_RMS <= 1
    "rms_to_inf": Norm(
        lambda x: _length(x, (-1,)).amax(-1) * math.sqrt(x.shape[-1]),
        lambda x: _length(x, (-1,)).sum(-1) / math.sqrt(x.shape[-1]),
        lambda x, _: _unit(x, (-1,)) / math.sqrt(x.shape[-1]),
        True,
    ),
}
