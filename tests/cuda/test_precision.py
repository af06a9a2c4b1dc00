"""Tensor cores round the inputs of float32 products: emulated on the CPU, an optimizer's are not rounded."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from optim import SOAP, Muon, Shampoo
from optim.precision import full_float32
from optim.roots import inverse_root
from tests.cuda.fake import PRODUCTS

BITS = {"high": 10, "medium": 7}  # of the mantissa, beside the leading one: TF32's and bfloat16's


def rounded(x: torch.Tensor, bits: int) -> torch.Tensor:
    mantissa, exponent = torch.frexp(x)
    return torch.ldexp((mantissa * 2.0 ** (bits + 1)).round() / 2.0 ** (bits + 1), exponent)


class TensorCores(TorchDispatchMode):
    """Products of float32 matrices as a GPU makes them under the precision that is set."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        bits = BITS.get(torch.get_float32_matmul_precision())
        if bits and function._schema.name.removeprefix("aten::") in PRODUCTS:
            *rest, a, b = args
            if a.dtype == torch.float32:
                args = (*rest, rounded(a, bits), rounded(b, bits))
        return function(*args, **(kwargs or {}))


@pytest.fixture(params=BITS)
def tensor_cores(request):
    torch.set_float32_matmul_precision(request.param)
    yield TensorCores()
    torch.set_float32_matmul_precision("highest")


def ill_conditioned(size: int, condition: float) -> torch.Tensor:
    torch.manual_seed(0)
    basis = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64)).Q
    return (basis * torch.logspace(0, -torch.tensor(condition).log10().item(), size, dtype=torch.float64)) @ basis.mT


def test_roots_need_full_products(tensor_cores):
    """What the switch is for: without it the same root is a hundred times further off."""
    matrix = ill_conditioned(48, 1e4)
    exact = inverse_root(matrix, 0.25)
    with tensor_cores:
        root = inverse_root(matrix.float(), 0.25, method="newton")
        with full_float32():
            better = inverse_root(matrix.float(), 0.25, method="newton")
    error, smaller = ((x - exact).norm() / exact.norm() for x in (root, better))
    assert smaller < 1e-4 and error > 100 * smaller


RULES = {
    "muon, Gram form": lambda p: Muon(p, polar="polar_express_gram", dtype=torch.float32),
    "shampoo, Newton": lambda p: Shampoo(p, root="newton", eps=1e-6),
    "soap": lambda p: SOAP(p, update_freq=1),
}


@pytest.mark.parametrize("rule", RULES)
def test_no_step_rounds_its_products(rule, tensor_cores):
    weights = []
    for mode in (tensor_cores, torch.no_grad()):
        torch.manual_seed(1)
        parameter = nn.Parameter(torch.randn(24, 96))
        optimizer = RULES[rule]([parameter])
        for _ in range(3):
            parameter.grad = torch.randn(24, 96)
            with mode:
                optimizer.step()
        weights.append(parameter.detach())
    assert torch.equal(*weights)


def test_the_program_keeps_its_setting():
    for usual in ("high", "medium", "highest"):
        torch.set_float32_matmul_precision(usual)
        with pytest.raises(KeyError), full_float32():
            assert torch.get_float32_matmul_precision() == "highest"
            raise KeyError
        assert torch.get_float32_matmul_precision() == usual
