"""The Triton kernel against torch's products, in Triton's interpreter; left out where Triton is not installed."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from optim import symmetric

CHECK = """
import torch
from optim.symmetric import symmetric_product
torch.manual_seed(0)
for stack, rows, inner in ((1, 1, 1), (2, 17, 40), (1, 64, 64), (2, 130, 70), (1, 200, 33)):
    x = torch.randn(stack, rows, inner)
    old = torch.randn(stack, rows, rows)
    old = old + old.mT
    for beta, alpha in ((0.0, 1.0), (0.5, -2.0)):
        out = old.clone()
        symmetric_product(x, x.mT, out, beta, alpha)
        torch.testing.assert_close(out, beta * old + alpha * x @ x.mT, rtol=1e-4, atol=1e-4)
        assert torch.equal(out[:, 64:, :64], out[:, :64, 64:].mT)  # tiles beyond the diagonal are copies
    out = torch.full((stack, rows, rows), float("nan"))  # with beta = 0 nothing of it is read
    symmetric_product(x, x.mT, out)
    assert out.isfinite().all()
print("equal")
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_equals_torch_in_the_interpreter():
    ran = subprocess.run([sys.executable, "-c", CHECK], cwd=Path(__file__).parents[2], capture_output=True, text=True,
                         env=os.environ | {"TRITON_INTERPRET": "1"}, timeout=300)  # fmt: skip
    assert ran.stdout == "equal\n", ran.stderr[-2000:]


def test_it_is_off_unless_asked_for(monkeypatch):
    symmetric.is_enabled.cache_clear()
    monkeypatch.delenv("NANOMUON_TRITON", raising=False)
    assert not symmetric.is_enabled()
    symmetric.is_enabled.cache_clear()


@pytest.mark.skipif(importlib.util.find_spec("triton") is not None, reason="Triton is installed")
def test_asked_for_without_triton_is_one_clear_line(monkeypatch):
    symmetric.is_enabled.cache_clear()
    monkeypatch.setenv("NANOMUON_TRITON", "1")
    with pytest.raises(RuntimeError, match="^NANOMUON_TRITON=1 needs Triton: pip install triton, or unset it$"):
        symmetric.is_enabled()
    symmetric.is_enabled.cache_clear()


def test_dtypes_are_those_whose_sums_fit_in_float32():
    assert torch.float64 not in symmetric.DTYPES
