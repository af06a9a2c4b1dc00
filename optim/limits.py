"""Gradients whose squares leave float32 count as the largest ones whose squares it holds."""

import math

import torch
from torch import Tensor


def limit_matrices(stack: Tensor) -> None:
    """Scale, in place, each matrix of [k, m, n] whose Frobenius norm may exceed :func:`largest`, as a whole, so that
    its direction stays.  Of others every bit stays, and what is not finite does not become so."""
    wide = torch.promote_types(stack.dtype, torch.float32)
    stack.renorm_(math.inf, 0, largest(wide) / math.sqrt(stack.shape[-2] * stack.shape[-1]))


def limit_entries(grads: list[Tensor]) -> list[Tensor]:
    """The same in new tensors, of every entry by itself, as elementwise rules take it, however it is sharded."""
    excess = torch._foreach_abs(grads)
    torch._foreach_div_(excess, [largest(grad.dtype) for grad in grads])
    torch._foreach_clamp_min_(excess, 1.0)
    return list(torch._foreach_div(grads, excess))


def largest(dtype: torch.dtype) -> float:
    """2^59 in float32: 512 of its squares may be added up; of bfloat16 the same, 2^479 in float64, 2^7 in float16."""
    exponent = math.frexp(torch.finfo(dtype).max)[1]
    return math.ldexp(1.0, (exponent - 1) // 2 - exponent // 32)
