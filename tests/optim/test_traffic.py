"""Bytes, collectives, FLOPs and state of GPT-2 124M on every rank, against what the formulas give.

Measured at a quarter of its width: bytes are then a sixteenth, FLOPs a sixty-fourth, and shards are still even.
"""

import pytest
import torch

from optim.polar import polar_flops
from scripts.benchmark_traffic import STATE_PER_MATRIX, gpt2_shapes, one_step, state_bytes

SHAPES, BYTES, FLOPS = gpt2_shapes(12, 192), 16, 64
# W: MB sent a rank, TFLOP of the slowest rank, by hand for the full width.  MB: 2 b S (W-1)/W^2, b = 2 bytes,
# S = 12 * 12 * 768^2 = 84.9M elements.  TFLOP: five steps of 4 s^2 l + 2 s^3 on an s x l matrix are 0.0136, 0.0317 and
# 0.0408 for l = 768, 2304 and 3072, 1.522 for all 48.  Given out largest first, each to the rank with the least so far
# (Graham 1969): 2.4% above an eighth of it at W = 8, two of l = 2304 at 32, one of l = 3072 at 64.
EXPECTED = {8: (37.2, 0.195), 32: (10.3, 0.063), 64: (5.2, 0.041)}
WORLDS = [8, pytest.param(32, marks=pytest.mark.slow), pytest.param(64, marks=pytest.mark.slow)]


@pytest.mark.parametrize("world_size", WORLDS)
def test_a_step_sends_and_computes_what_the_formulas_say(world_size):
    settings = dict(polar="newton_schulz5", dtype=torch.bfloat16)
    ranks = [one_step(SHAPES, world_size, rank, **settings) for rank in range(world_size)]
    sent, flops = [rank["sent"] for rank in ranks], [rank["flops"] for rank in ranks]
    elements = sum(m * n for m, n in SHAPES)
    assert sum(sent) / world_size == pytest.approx(2 * 2 * elements * (world_size - 1) / world_size**2, rel=1e-12)
    assert BYTES * sum(sent) / world_size / 1e6 == pytest.approx(EXPECTED[world_size][0], abs=0.06)
    if world_size == 8:  # above, ranks that own nothing only receive
        assert max(sent) == pytest.approx(min(sent), rel=0.02)
    for rank in ranks:
        assert rank["calls"] == {"alltoall_base_": 2 * rank["buckets"], "allreduce_": 1}
    assert sum(flops) == sum(polar_flops(shape, "newton_schulz5") for shape in SHAPES), "each matrix exactly once"
    assert FLOPS * max(flops) / 1e12 <= EXPECTED[world_size][1] + 0.0005
    assert max(flops) <= 1.05 * sum(flops) / world_size or len(SHAPES) < 4 * world_size


def test_more_buckets_are_more_calls_but_not_more_bytes():
    one, many = (one_step(SHAPES, 8, 3, dtype=torch.float32, bucket_bytes=size) for size in (2**26, 2**20))
    assert one["buckets"] < many["buckets"] and many["calls"]["alltoall_base_"] == 2 * many["buckets"]
    assert one["sent"] == many["sent"]


def test_hybrid_sharding_sends_what_its_shard_group_alone_would():
    """No fallback to gathering whole tensors: the replicas do the same work side by side and send nothing across."""
    for rank in range(4):  # of the first group: DTensor's caches keep the groups of the mesh that they saw first
        alone, hybrid = (one_step(SHAPES, 4, rank, replicas, dtype=torch.float32) for replicas in (1, 2))
        assert alone == hybrid


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_owners_are_balanced_by_the_work_in_the_dtype_that_they_get(dtype):
    """The default polar method takes another form in bfloat16, with other FLOPs."""
    rank = one_step(SHAPES, 4, 0, dtype=dtype)
    assert rank["flops"] == rank["planned flops"] / 4
    assert rank["planned flops"] == sum(polar_flops(shape, dtype=dtype) for shape in SHAPES)


@pytest.mark.parametrize("world_size", [2, 8])
def test_state_is_an_equal_share_of_the_formula(world_size):
    ranks = [state_bytes(SHAPES, world_size, rank) for rank in range(world_size)]
    for cls, per_matrix in STATE_PER_MATRIX.items():
        share = 4 * sum(per_matrix(m, n) for m, n in SHAPES) / world_size
        held = [rank[cls] for rank in ranks]
        assert sum(held) == world_size * share, f"{cls.__name__} keeps something twice, or not at all"
        assert max(held) <= (1.10 if cls.__name__ in ("Shampoo", "SOAP") else 1.05) * share, cls
