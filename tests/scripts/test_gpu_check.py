"""The GPU's acceptance run, on a CPU and with the few packages that it asks for."""

import json
import os
import subprocess
import sys

import pytest

from tests.runs import ROOT

ABSENT = "accelerate rich tiktoken pyarrow matplotlib zstandard datasets wandb transformers safetensors scipy plotly"
WITHOUT = f"""
import runpy, sys
sys.modules.update(dict.fromkeys({ABSENT.split()}))
sys.argv = ["gpu_check.py", *sys.argv[1:]]
runpy.run_path("scripts/gpu_check.py", run_name="__main__")
"""


@pytest.mark.slow
def test_every_section_runs_on_a_cpu(tmp_path):
    words = [sys.executable, "-c", WITHOUT, "--out", tmp_path / "check", "--device", "cpu"]
    ran = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=240,
                         env=os.environ | {"OMP_NUM_THREADS": "1"})  # fmt: skip
    assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr[-2000:]
    results = json.loads((tmp_path / "check.json").read_text())
    assert results["exchange"]["largest_difference"] == 0 and results["saved and loaded"]["bitwise"]
    assert results["not finite"]["unchanged"] and results["as on the CPU"]["relative_difference"] == 0
    assert results["GPT-2 124M"]["tokens_per_s"] > 0 and results["on 8 devices"]["projected"]
    assert results["train.py"]["left_out"] and results["choice: q, k, v as three products"]["ms"] > 0
    assert results["little room"]["left_out"] and results["machine"]["attention"] == "FLASH_ATTENTION"
    assert results["host waits"]["left_out"] and "| machine | device | cpu |" in (tmp_path / "check.md").read_text()


def test_a_section_that_fails_or_hangs_is_reported():
    import time

    from scripts.gpu_check import section

    def fails():
        raise RuntimeError("no such kernel\nand more")

    assert section(fails, 10)["failed"] == "RuntimeError: no such kernel"
    assert "0 s" in section(lambda: time.sleep(20), 0.2)["failed"]
