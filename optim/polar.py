"""Polar factors: the nearest partial isometry U Vᵀ of every matrix X = U S Vᵀ of a stack.

One loop of products serves every iteration here. A step (a, b, c) maps X to p(XXᵀ) X with p(R) = aI + bR + cR², and p
can be applied in two ways:

- standard form: form R = XXᵀ and multiply p(R) X in every step, 4s²l + 2s³ FLOPs a step for s×l matrices, s <= l;
- Gram form (github.com/Dao-AILab/gram-newton-schulz): all factors commute with R, so that several steps can run on s×s
  matrices alone, R ← R p(R)², Q ← Q p(R), and meet X only once at the end, X ← QX. It pays where s << l.

The standard form is the Gram form that returns to X after every step: a form is a list of segments of steps.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from .minimax import Quintic, polar_express_coefficients

CACHE_BYTES = 2**21
"""On a CPU a stack is worked through in pieces of about this size, which stay in the cache between products."""

BLOCK_ROWS, MAX_BLOCKS = 96, 4
"""On a CPU a symmetric product is computed in up to 4 row blocks; narrower blocks cost more than they save."""


Form = str | Sequence[int]
Segments = list[Sequence[Quintic]]


@dataclass(frozen=True)
class Iteration:
    """coefficients(steps) is the list of (a, b, c); the input is divided by (1 + safety)·‖X‖_F."""

    coefficients: Callable[[int], Sequence[Quintic]]
    steps: int
    safety: float = 0.0
    form: Form = "standard"


def polar(x: Tensor, method: str = "polar_express", steps: int | None = None, *, overwrite: bool = False) -> Tensor:
    """The polar factor of every matrix of x [..., m, n], in x's shape and dtype.

    method is a name of `POLAR_METHODS`; steps overrides its number of iterations; overwrite allows the result to take
    the place of x, which saves its memory. Zero matrices stay zero, a matrix with a NaN or an infinity becomes NaN, and
    nothing but svd and eigh waits for the device.
    Raises ValueError for an unknown method, steps < 1, steps given to an exact method, or fewer than two dimensions.
    """
    chosen, count = _lookup(method, steps)
    if x.ndim < 2:
        raise ValueError(f"polar needs a matrix or a stack of matrices, got shape {tuple(x.shape)}")
    if x.numel() == 0:
        return x.clone()
    if not isinstance(chosen, Iteration):
        return chosen(x)
    return newton_schulz(x, chosen.coefficients(count), chosen.safety, chosen.form, overwrite)


@torch.no_grad()
def newton_schulz(
    x: Tensor, coefficients: Sequence[Quintic], safety: float = 0.0, form: Form = "standard", overwrite: bool = False,
    normalise: bool = True,
) -> Tensor:  # fmt: skip
    """Apply the odd polynomials a·X + b·XXᵀX + c·(XXᵀ)²X to X/((1 + safety)·‖X‖_F), one after the other.

    x: [..., m, n], any float dtype: the norm is taken in float32 at least, the products in x's dtype.
    form: "standard", "gram", "auto" (Gram where it is as accurate and needs clearly fewer FLOPs), or the increasing
    steps > 0 before which the Gram form returns to X.
    overwrite: put the result into x, which must be contiguous.
    normalise: False for an X whose singular values are at most about 1 already.
    """
    segments = plan_segments(coefficients, form, x.shape, x.dtype)
    result = x if overwrite else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    matrices, results = x.reshape(-1, *x.shape[-2:]), result.view(-1, *x.shape[-2:])
    if x.shape[-2] > x.shape[-1]:  # a view: a tall matrix keeps its layout, the products read it transposed
        matrices, results = matrices.mT, results.mT
    pieces, out = _pieces(matrices), _pieces(results)
    spare = torch.empty_like(out[0])
    rows, count = spare.shape[-2], 2 if len(segments) == len(coefficients) else 4
    squares = [x.new_empty(*spare.shape[:-1], rows) for _ in range(count)]
    for source, target in zip(pieces, out, strict=True):
        # X moves between two buffers, once a segment; started in the right one, it ends in the result.
        size = len(source)
        buffers = (target, spare[:size]) if len(segments) % 2 == 0 else (spare[:size], target)
        if normalise:
            _normalise(source, safety, out=buffers[0])
        else:
            buffers[0].copy_(source)
        _apply(segments, *buffers, *(square[:size] for square in squares))
    return result


def _pieces(x: Tensor) -> Sequence[Tensor]:
    if x.device.type != "cpu":
        return (x,)
    return torch.split(x, max(1, CACHE_BYTES // max(1, x.element_size() * x.shape[-2] * x.shape[-1])))


def _normalise(x: Tensor, safety: float, out: Tensor) -> None:
    torch.mul(x, power_of_two(x), out=out)
    # Of out, not of x, on whose memory layout the order of the sum would depend.
    norm = torch.linalg.vector_norm(out, dim=(-2, -1), keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
    # The floor is below every norm whose square float32 can hold: it only keeps zero finite.
    out.mul_((norm * (1 + safety)).clamp_min(torch.finfo(norm.dtype).tiny ** 0.5).reciprocal_())


def power_of_two(x: Tensor, dims: tuple[int, ...] = (-2, -1)) -> Tensor:
    """The power of two that brings x's largest entry to between 1/2 and 1, so that squares stay in the range of float32
    (or x's wider dtype), with x's dimensions ``dims`` reduced to 1.  Multiplying by it rounds nothing."""
    wide = torch.promote_types(x.dtype, torch.float32)
    if x.device.type == "cpu":  # whose kernel for this norm takes seven times as long
        largest = torch.maximum(x.amax(dims, keepdim=True), -x.amin(dims, keepdim=True)).to(wide)
    else:
        largest = torch.linalg.vector_norm(x, math.inf, dim=dims, keepdim=True, dtype=wide)
    tiny = torch.finfo(wide).tiny
    largest = largest.clamp(tiny, 0.5 / tiny)  # of 0 and inf too there is a power
    power: Tensor = torch.frexp(largest).mantissa / largest
    return power


def _apply(segments: Segments, x: Tensor, y: Tensor, r: Tensor, p: Tensor, *more: Tensor) -> None:
    """Run the segments on x [b, m, n], m <= n, by turns in x and y.

    r, p and, where a segment has several steps, two more [b, m, m] are overwritten.
    """
    q, s = more or (p, p)
    for segment in segments:
        _symmetric_product(x, x.mT, out=r)
        for step, coefficients in enumerate(segment):
            _polynomial(r, *coefficients, out=p)
            if step < len(segment) - 1:
                _symmetric_product(r, p, out=s)
                _symmetric_product(s, p, out=r)
            if step == 0:
                p, q = q, p
            else:
                _symmetric_product(q, p, out=s)
                q, s = s, q
        torch.bmm(q, x, out=y)
        x, y = y, x


def _polynomial(r: Tensor, a: float, b: float, c: float, out: Tensor) -> None:
    """out = aI + bR + cR²."""
    if c:
        out.copy_(r)
        _symmetric_product(r, r, out=out, beta=b, alpha=c)
    else:
        torch.mul(r, b, out=out)
    out.diagonal(dim1=-2, dim2=-1).add_(a)


def _symmetric_product(a: Tensor, b: Tensor, out: Tensor, beta: float = 0.0, alpha: float = 1.0) -> None:
    """out = beta·out + alpha·ab [b, m, m], known to be symmetric: a CPU copies the blocks above the diagonal."""
    rows = a.shape[-2]
    blocks = max(1, min(rows // BLOCK_ROWS, MAX_BLOCKS)) if a.device.type == "cpu" else 1
    for top, bottom in pairwise(rows * i // blocks for i in range(blocks + 1)):
        strip = out.narrow(1, top, bottom - top)
        block = strip.narrow(2, 0, bottom)
        torch.baddbmm(block, a.narrow(1, top, bottom - top), b.narrow(2, 0, bottom), beta=beta, alpha=alpha, out=block)
        if top:
            out.narrow(1, 0, top).narrow(2, top, bottom - top).copy_(strip.narrow(2, 0, top).mT)


def plan_segments(coefficients: Sequence[Quintic], form: Form, shape: Sequence[int], dtype: torch.dtype) -> Segments:
    """Split the steps at the points where the Gram form returns to X.

    Rounding in R is amplified by (Π aᵢ)² over the updates of R that have no return to X between them. Where that stays
    far below the error which the iteration itself leaves (float32: the five steps of Polar Express), no return is
    needed. Otherwise return before steps 2, 5, 8, … (counted from 0) as the Gram form's authors do, and in half
    precision before 1, 3, 5, …: three steps on R are too many there for matrices of low rank.
    """
    eps, count = torch.finfo(dtype).eps, len(coefficients)
    stable = eps * math.prod(a for a, _, _ in coefficients[:-1]) ** 2 < 1 / 32
    returns: dict[str, Sequence[int]] = {
        "standard": range(1, count),
        "gram": () if stable else range(2, count, 3) if eps < 1e-6 else range(1, count, 2),
    }
    if form == "auto":
        standard, gram = (_flops(shape, _split(coefficients, returns[name])) for name in ("standard", "gram"))
        form = "gram" if stable and gram < 0.9 * standard else "standard"
    if isinstance(form, str) and form not in returns:
        raise ValueError(f"form={form} is unknown: choose standard, gram or auto")
    return _split(coefficients, returns[form] if isinstance(form, str) else form)


def _split(coefficients: Sequence[Quintic], returns: Sequence[int]) -> Segments:
    return [coefficients[i:j] for i, j in pairwise([0, *returns, len(coefficients)])]


def _flops(shape: Sequence[int], segments: Segments) -> float:
    short, long = sorted(shape[-2:])
    products = sum(3 * (len(segment) - 1) + sum(c != 0 for _, _, c in segment) for segment in segments)
    return float(math.prod(shape[:-2]) * (4 * short**2 * long * len(segments) + 2 * short**3 * products))


@torch.no_grad()
def polar_svd(x: Tensor) -> Tensor:
    """The exact factor by SVD; directions below numerical rank, max(m, n)·eps·σ_max, are left out."""
    work, finite = finite_part(x, torch.promote_types(x.dtype, torch.float32))
    u, s, vh = torch.linalg.svd(work, full_matrices=False)
    kept = s > s[..., :1] * (max(x.shape[-2:]) * torch.finfo(s.dtype).eps)
    return torch.where(finite, (u * kept.unsqueeze(-2)) @ vh, torch.nan).to(x.dtype)


@torch.no_grad()
def polar_eigh(x: Tensor) -> Tensor:
    """The exact factor (XXᵀ)^(-1/2) X on the shorter side, in float64 since XXᵀ squares the condition number."""
    if x.shape[-2] > x.shape[-1]:
        return polar_eigh(x.mT).mT
    work, finite = finite_part(x, torch.float64)
    work = work / work.abs().amax(dim=(-2, -1), keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    values, vectors = torch.linalg.eigh(work @ work.mT)
    kept = values > values[..., -1:] * (x.shape[-1] * torch.finfo(torch.float64).eps)
    roots = torch.where(kept, values, torch.inf).rsqrt().unsqueeze(-2)
    return torch.where(finite, (vectors * roots) @ (vectors.mT @ work), torch.nan).to(x.dtype)


def finite_part(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x in dtype with its non-finite matrices zeroed, and the mask [..., 1, 1] of the others: LAPACK rejects NaN."""
    finite = x.isfinite().all(-1, keepdim=True).all(-2, keepdim=True)
    return torch.where(finite, x, 0.0).to(dtype), finite


def polar_flops(
    shape: Sequence[int], method: str = "polar_express", steps: int | None = None, dtype: torch.dtype = torch.float32
) -> float:
    """FLOPs of the products that `polar` makes for a tensor of this shape and dtype, each counted as 2mnk.

    For svd and eigh, the usual estimates (Golub and Van Loan, 4th edition, §8.6 and §8.3), for balancing only.
    """
    chosen, count = _lookup(method, steps)
    if isinstance(chosen, Iteration):
        return _flops(shape, plan_segments(chosen.coefficients(count), chosen.form, shape, dtype))
    short, long = sorted(shape[-2:])
    decomposition = 6 * long * short**2 + 20 * short**3 if chosen is polar_svd else 9 * short**3 + 4 * long * short**2
    return float(math.prod(shape[:-2]) * (decomposition + 2 * long * short**2))


def polar_workspace(
    shape: Sequence[int], method: str = "polar_express", steps: int | None = None, dtype: torch.dtype = torch.float32
) -> float:
    """Bytes that `polar` allocates at once for a matrix m×n of this dtype, without the result of an iteration (which
    may take x's place) but with that of svd and eigh; less where a CPU works through a stack in pieces."""
    chosen, count = _lookup(method, steps)
    short, long = sorted(shape)
    if isinstance(chosen, Iteration):
        coefficients = chosen.coefficients(count)
        squares = 2 if len(plan_segments(coefficients, chosen.form, shape, dtype)) == count else 4
        return float(dtype.itemsize * (short * long + squares * short**2))
    if chosen is polar_svd:
        return float(torch.promote_types(dtype, torch.float32).itemsize * (4 * short * long + short**2))
    return float(torch.float64.itemsize * (3 * short * long + 2 * short**2))


POLAR_METHODS: dict[str, Iteration | Callable[[Tensor], Tensor]] = {
    # Amsel et al., arXiv 2505.16932, as modded-nanogpt sets it; in the Gram form where that is as accurate and cheaper.
    "polar_express": Iteration(polar_express_coefficients, 5, safety=0.02, form="auto"),
    # The Gram form for every shape and dtype: in half precision some accuracy for speed.
    "polar_express_gram": Iteration(polar_express_coefficients, 5, safety=0.02, form="gram"),
    # Jordan et al., kellerjordan.github.io/posts/muon: fast, never converges, singular values end in about [.68, 1.13].
    "newton_schulz5": Iteration(lambda steps: [(3.4445, -4.7750, 2.0315)] * steps, 5),
    # The quintic of modded-nanogpt's optimization track: slower, converges.
    "quintic": Iteration(lambda steps: [(2.0, -1.5, 0.5)] * steps, 12),
    # Björck and Bowie 1971, the classical iteration: p(1) = 1 and p'(1) = 0.
    "cubic": Iteration(lambda steps: [(1.5, -0.5, 0.0)] * steps, 15),
    "svd": polar_svd,
    "eigh": polar_eigh,
}


def _lookup(method: str, steps: int | None) -> tuple[Iteration | Callable[[Tensor], Tensor], int]:
    if method not in POLAR_METHODS:
        raise ValueError(f"polar method {method!r} is unknown: choose one of {', '.join(POLAR_METHODS)}")
    chosen = POLAR_METHODS[method]
    if not isinstance(chosen, Iteration):
        if steps is not None:
            raise ValueError(f"polar method {method!r} is exact: leave its number of steps unset, not {steps}")
        return chosen, 0
    if steps is not None and not 1 <= steps <= 1000:  # more would never end
        raise ValueError(f"polar method {method!r} needs at least 1 step, got {steps}: give 1 to 1000")
    return chosen, chosen.steps if steps is None else steps
