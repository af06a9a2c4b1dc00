"""One switch: products of float32 matrices in an optimizer are float32, whatever the model's are."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def full_float32() -> Iterator[None]:
    """Products of float32 matrices keep all 24 bits, also where the program allows tensor cores 11 (TF32) or 8.

    Inverse roots, eigenbases and the Gram form of a polar factor amplify what rounding leaves: Newton's inverse root of
    a matrix with condition number 1e4 is off by 3e-5 in float32 and by 3e-2 with TF32's inputs.
    """
    matmul = torch.backends.cuda.matmul
    usual, on_cuda = torch.get_float32_matmul_precision(), matmul.fp32_precision
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(usual)
        if matmul.fp32_precision != on_cuda:  # torch.backends.fp32_precision alone was set
            matmul.fp32_precision = on_cuda
