"""A Triton kernel for products that are known to be symmetric: half of the tiles, each written twice.

Never needed: polar.py uses torch's products without it. NANOMUON_TRITON=1 turns it on, on CUDA, for the dtypes
in DTYPES. It has been compared with torch's products in Triton's interpreter only, and never been timed.
Types are ignored where Triton may be missing.
"""

import functools
import os
from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@functools.cache
def is_on() -> bool:
    """Whether the user asked for the kernel. Raises RuntimeError where Triton is not installed."""
    if os.environ.get("NANOMUON_TRITON", "0") in ("", "0"):
        return False
    try:
        import triton  # type: ignore[import, unused-ignore]  # noqa: F401
    except ImportError:
        raise RuntimeError("NANOMUON_TRITON=1 needs Triton: pip install triton, or unset it") from None
    return True


def symmetric_product(a: Tensor, b: Tensor, out: Tensor, beta: float = 0.0, alpha: float = 1.0) -> None:
    """out = beta·out + alpha·ab, where ab and out are symmetric. a [s, m, k], b [s, k, m], out [s, m, m], any strides;
    out shares no memory with a or b. Sums are taken in float32."""
    import triton

    stack, rows, inner = a.shape
    size = 64 if rows <= 512 else 128
    tiles = triton.cdiv(rows, size)
    precision = "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
    _kernel()[(tiles * (tiles + 1) // 2, stack)](
        a, b, out, rows, inner, *a.stride(), *b.stride(), *out.stride(), float(alpha), float(beta),
        SIZE=size, INNER=32, PRECISION=precision,
    )  # fmt: skip


@functools.cache
def _kernel() -> Any:
    import triton
    import triton.language as tl  # type: ignore[import, unused-ignore]

    @triton.jit  # type: ignore[untyped-decorator, unused-ignore]
    def kernel(  # type: ignore[no-untyped-def]  # Triton takes annotations for its own
        a, b, out, rows, inner, a_s, a_m, a_k, b_s, b_k, b_m, o_s, o_m, o_n, alpha, beta,
        SIZE: tl.constexpr, INNER: tl.constexpr, PRECISION: tl.constexpr,
    ):  # fmt: skip
        index = tl.program_id(0)  # of a tile on or below the diagonal, counted row by row
        row = ((tl.sqrt(8.0 * index + 1.0) - 1.0) / 2.0).to(tl.int32)
        row = tl.where((row + 1) * (row + 2) // 2 <= index, row + 1, row)  # the root may have been rounded
        row = tl.where(row * (row + 1) // 2 > index, row - 1, row)
        col = index - row * (row + 1) // 2
        stack = tl.program_id(1).to(tl.int64)
        i, j, k = row * SIZE + tl.arange(0, SIZE), col * SIZE + tl.arange(0, SIZE), tl.arange(0, INNER)
        total = tl.zeros((SIZE, SIZE), dtype=tl.float32)
        for start in range(0, inner, INNER):
            at = start + k
            left = tl.load(a + stack * a_s + i[:, None] * a_m + at[None, :] * a_k,
                           mask=(i[:, None] < rows) & (at[None, :] < inner), other=0.0)  # fmt: skip
            right = tl.load(b + stack * b_s + at[:, None] * b_k + j[None, :] * b_m,
                            mask=(at[:, None] < inner) & (j[None, :] < rows), other=0.0)  # fmt: skip
            total = tl.dot(left, right, total, input_precision=PRECISION)
        inside = (i[:, None] < rows) & (j[None, :] < rows)
        here = out + stack * o_s + i[:, None] * o_m + j[None, :] * o_n
        total *= alpha
        if beta != 0.0:
            total += beta * tl.load(here, mask=inside, other=0.0).to(tl.float32)
        value = total.to(out.dtype.element_ty)
        tl.store(here, value, mask=inside)
        if row != col:
            mirrored = out + stack * o_s + j[None, :] * o_m + i[:, None] * o_n
            tl.store(mirrored, value, mask=inside)

    return kernel
