"""Finite sums f = 1/m Σ f_i with known constants and minimum, for many repeats at once.

Points are [..., n], a batch of indices is [..., b]; everything is float64.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class FiniteSum:
    """f(x) = 1/m Σ loss(⟨a_i, x⟩, y_i) + mu/2 ‖x‖²; slope is the derivative of loss by its first argument."""

    a: Tensor  # [m, n]
    y: Tensor  # [m]
    loss: Callable[[Tensor, Tensor], Tensor]
    slope: Callable[[Tensor, Tensor], Tensor]
    mu: float
    smooth: float  # L; infinite where f is not smooth
    x_star: Tensor
    f_star: float

    def gap(self, x: Tensor) -> Tensor:
        """f(x) - f*, shaped [...]."""
        return self.value(x) - self.f_star

    def value(self, x: Tensor) -> Tensor:
        return self.loss(x @ self.a.mT, self.y).mean(-1) + self.mu / 2 * x.square().sum(-1)

    def full(self, x: Tensor) -> Tensor:
        """∇f, shaped as x."""
        return self.slope(x @ self.a.mT, self.y) @ self.a / len(self.a) + self.mu * x

    def batch(self, x: Tensor, index: Tensor) -> Tensor:
        """The mean of ∇f_i over the batch, shaped as x."""
        a, y = self.a[index], self.y[index]  # [..., b, n], [..., b]
        slopes = self.slope((a @ x.unsqueeze(-1)).squeeze(-1), y)
        return (slopes.unsqueeze(-2) @ a).squeeze(-2) / index.shape[-1] + self.mu * x

    def each(self, x: Tensor) -> Tensor:
        """All ∇f_i, [..., m, n]."""
        return self.slope(x @ self.a.mT, self.y).unsqueeze(-1) * self.a + self.mu * x.unsqueeze(-2)

    def second_moment(self, x: Tensor) -> Tensor:
        """E‖∇f_i(x)‖² over a uniform i, shaped [...]."""
        t = x @ self.a.mT
        s = self.slope(t, self.y)
        square = s.square() * self.a.square().sum(-1) + 2 * self.mu * s * t
        return square.mean(-1) + self.mu**2 * x.square().sum(-1)


def sampler(problem: FiniteSum, size: int, seed: int) -> Callable[[Tensor, int], Tensor]:
    """A stochastic gradient: the mean over a batch of `size` drawn with replacement, afresh for every repeat."""
    generator = torch.Generator().manual_seed(seed)
    m = len(problem.a)

    def gradient(x: Tensor, k: int) -> Tensor:
        return problem.batch(x, torch.randint(m, (*x.shape[:-1], size), generator=generator))

    return gradient


def logistic(m: int = 200, n: int = 10, mu: float = 1.0, seed: int = 0) -> FiniteSum:
    """The lecture's strongly convex binary logistic regression, on labels that a noisy linear rule gave."""
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(m, n, generator=generator, dtype=torch.float64)
    truth = torch.randn(n, generator=generator, dtype=torch.float64)
    y = torch.sign(a @ truth + torch.randn(m, generator=generator, dtype=torch.float64))
    smooth = mu + torch.linalg.eigvalsh(a.mT @ a / m)[-1].item() / 4
    draft = FiniteSum(a, y, _log_loss, _log_slope, mu, smooth, torch.zeros(n, dtype=torch.float64), 0.0)
    x = draft.x_star
    for _ in range(50):  # Newton's method, to rounding
        p = torch.sigmoid(a @ x)
        hessian = (a.mT * (p * (1 - p))) @ a / m + mu * torch.eye(n, dtype=torch.float64)
        x = x - torch.linalg.solve(hessian, draft.full(x))
    return FiniteSum(a, y, _log_loss, _log_slope, mu, smooth, x, draft.value(x).item())


def _log_loss(t: Tensor, y: Tensor) -> Tensor:
    return torch.nn.functional.softplus(-y * t)


def _log_slope(t: Tensor, y: Tensor) -> Tensor:
    return -y * torch.sigmoid(-y * t)


def least_squares(a: Tensor, y: Tensor) -> FiniteSum:
    """f_i = ½(⟨a_i, x⟩ - y_i)²; mu is the smallest curvature of f, not a penalty."""
    x = torch.linalg.lstsq(a, y.unsqueeze(-1)).solution.squeeze(-1)
    smooth = torch.linalg.eigvalsh(a.mT @ a / len(a))[-1].item()
    f_star = (a @ x - y).square().mean().item() / 2
    return FiniteSum(a, y, lambda t, y: (t - y).square() / 2, lambda t, y: t - y, 0.0, smooth, x, f_star)
