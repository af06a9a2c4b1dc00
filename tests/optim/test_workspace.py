"""What a rule says it allocates for a matrix is what it allocates: the engine sizes its buckets by it.  And no step
waits for the kernel's pages anew."""

import inspect
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import optim
from scripts.planning.live_bytes import LiveBytes
from tests.distributed.test_rules import RULES
from tests.optim.rules import find_rules

POLAR = ("polar_express", "polar_express_gram", "newton_schulz5", "cubic", "svd", "eigh")
CASES = RULES | {f"muon_{polar}": (optim.Muon, dict(polar=polar)) for polar in POLAR}
STEPS = 4  # among them steps with and without new roots or bases
MATRICES = 3


def allocated(cls, settings, shape, dtype):
    """Bytes a matrix: the most that precondition allocated at once in a few steps, and what the rule said."""
    weights = [nn.Parameter(torch.randn(shape)) for _ in range(MATRICES)]
    optimizer = cls(weights, dtype=dtype, **settings)
    group, peak = optimizer.param_groups[0], 0
    k, m, n = MATRICES, *shape
    sizes = optimizer.owner_state(group, (k, m, n))
    state = {name: torch.zeros(size) for name, size in sizes.items()}
    for group["step"] in range(1, 1 + STEPS):
        stack = torch.randn(k, m, n).to(dtype)
        with torch.no_grad(), LiveBytes() as live:
            optimizer.precondition(group, stack, state)
        peak = max(peak, live.peak)
    return peak / k, optimizer.workspace(group, shape, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES)
def test_workspace_is_what_is_allocated(case, dtype):
    for shape in [(48, 48), (128, 32), (32, 128)]:
        peak, said = allocated(*CASES[case], shape, dtype)
        assert peak <= 1.03 * said, f"{case} {shape}: {peak / said:.2f} of what it says"  # 3%: vectors, masks
        assert peak >= 0.4 * said, f"{case} {shape}: {peak / said:.2f} of what it says, so that buckets are too small"


@pytest.mark.parametrize("cls", find_rules())
def test_no_matrix_of_gpt2_needs_more_than_two_buckets_beyond_its_stack(cls):
    for shape in [(768, 768), (2304, 768), (3072, 768), (768, 3072)]:
        optimizer = cls([nn.Parameter(torch.empty(shape, device="meta"))])
        buckets = 2 * inspect.signature(optim.MatrixOptimizer).parameters["bucket_bytes"].default
        matrix = shape[0] * shape[1] * 4
        assert 6 * matrix + optimizer.workspace(optimizer.param_groups[0], shape) <= buckets


FAULTS = """
from resource import RUSAGE_SELF, getrusage
import torch
from optim import Muon

torch.set_num_threads(1)
weights = [torch.nn.Parameter(torch.ones(512, 512)) for _ in range(24)]
optimizer = Muon(weights, polar_steps=1)
for weight in weights:
    weight.grad = torch.ones(512, 512)
for _ in range(3):
    before = getrusage(RUSAGE_SELF).ru_minflt
    optimizer.step()
print(getrusage(RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another libc keeps memory by its own rules")
def test_a_step_has_the_pages_of_the_one_before():
    """25 MB of weights: a step that begins with no memory takes 6,000 faults.  In a process that has freed nothing."""
    root = Path(__file__).resolve().parents[2]
    found = subprocess.run([sys.executable, "-c", FAULTS], cwd=root, capture_output=True, text=True, check=True)
    assert int(found.stdout) < 600
