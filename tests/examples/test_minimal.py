"""examples/minimal.py trains, and prints the same losses alone and on two sharded ranks."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples/minimal.py"


def losses(*launcher: str, cwd: Path) -> dict[int, float]:
    """Printed loss of each printed step; started from another folder, with nothing of the checkout on the path."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run([sys.executable, *launcher, str(EXAMPLE)], cwd=cwd, env=environment, capture_output=True,
                          text=True, timeout=240)  # fmt: skip
    assert done.returncode == 0, done.stderr
    return {int(step): float(loss) for step, loss in re.findall(r"step +(\d+) +loss ([\d.]+)", done.stdout)}


@pytest.mark.slow
def test_learns_and_does_not_depend_on_the_number_of_ranks(tmp_path):
    alone = losses(cwd=tmp_path)
    assert len(alone) > 5 and alone[0] > 5 and alone[max(alone)] < 3
    sharded = losses("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", cwd=tmp_path)
    assert sharded == pytest.approx(alone, abs=5e-3)


def test_stays_a_page():
    assert len(EXAMPLE.read_text().splitlines()) <= 80
