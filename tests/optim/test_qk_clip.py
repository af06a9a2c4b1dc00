"""QK-clip on weights: the logits that it leaves, grouped queries, and every placement of the weights."""

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from optim import qk_clip
from tests.errors import raises_naming
from tests.optim.reference import seeded
from tests.optim.test_layouts import fsdp_of_tp
from tests.optim.threads import run_threads

HEADS, ROWS, TAU = 4, 5, 3.0


def layer(kept: int = HEADS) -> list[torch.Tensor]:
    """Weights and biases of queries, then of keys, with ``kept`` heads of keys."""
    shapes = [(HEADS * ROWS, 8), (HEADS * ROWS,), (kept * ROWS, 8), (kept * ROWS,)]
    return [2 * seeded(shape, 3, i, dtype=torch.float64) for i, shape in enumerate(shapes)]


def largest_logits(weights: list[torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """[heads], of every input x [n, 8] with every other."""
    (q, k), kept = (x @ w.T + b for w, b in (weights[:2], weights[2:])), len(weights[2]) // ROWS
    q = q.unflatten(1, (kept, HEADS // kept, ROWS))
    return torch.einsum("ighd,jgd->ghij", q, k.unflatten(1, (kept, ROWS))).flatten(2).amax(2).flatten()


@pytest.mark.parametrize("kept", [4, 2, 1])
def test_logits_of_the_same_inputs_are_then_tau_at_most(kept):
    weights, x = layer(kept), seeded((9, 8), 5, dtype=torch.float64)
    before = largest_logits(weights, x)
    tau = before.sort().values[1:3].mean().item()  # two heads exceed it
    qk_clip(weights[:2], weights[2:], before, tau)
    after = largest_logits(weights, x)
    torch.testing.assert_close(after[before > tau], torch.full_like(after[:2], tau), rtol=1e-12, atol=0)
    torch.testing.assert_close(after[before <= tau], before[before <= tau], rtol=1e-12, atol=0)
    if kept == HEADS:  # Kimi K2's algorithm 1 on every head
        for h, (at, s) in enumerate(zip(before.split(1), before, strict=True)):
            root = min(1.0, tau / s.item()) ** 0.5
            for got, original in zip(weights, layer(), strict=True):
                rows = slice(h * ROWS, (h + 1) * ROWS)
                torch.testing.assert_close(got[rows], original[rows] * root, rtol=1e-13, atol=0, msg=str(at))


PLACEMENTS = [(Shard(0), Shard(0)), (Shard(0), Replicate()), (Replicate(), Shard(1)), (Shard(1), Shard(0))]


def test_every_placement_of_the_weights_gives_the_same():
    largest = torch.tensor([1.0, 7.0, 40.0, 2.5], dtype=torch.float64)
    expected = layer()
    qk_clip(expected[:2], expected[2:], largest, TAU)

    def on_rank(rank):
        mesh = init_device_mesh("cpu", (2, 3))
        for placements in PLACEMENTS:
            own = [
                [p if p == Replicate() or p.dim < w.ndim else Replicate() for p in placements] for w in expected
            ]  # a bias has no columns
            got = [
                nn.Parameter(distribute_tensor(w, mesh, of, src_data_rank=None))
                for w, of in zip(layer(), own, strict=True)
            ]
            qk_clip(got[:2], got[2:], largest, TAU)
            for a, want, of in zip(got, expected, own, strict=True):
                assert torch.equal(a.to_local(), distribute_tensor(want, mesh, of, src_data_rank=None).to_local())
        mesh = init_device_mesh("cpu", (3, 2))
        got = [fsdp_of_tp(w, mesh, 0) for w in layer()]
        qk_clip(got[:2], got[2:], largest, TAU)
        for a, want in zip(got, expected, strict=True):
            assert torch.equal(a.to_local(), fsdp_of_tp(want, mesh, 0).to_local())

    run_threads(6, on_rank)


def test_heads_that_do_not_fit_the_rows_are_refused():
    with raises_naming(ValueError, "3 heads", "20 rows"):
        qk_clip([torch.ones(20, 8)], [torch.ones(20, 8)], torch.ones(3), TAU)
