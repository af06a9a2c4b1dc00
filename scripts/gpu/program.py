"""train.py itself, as its users start it, on the device at hand: a section of gpu_check.py."""

import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from scripts.gpu.report import Figures, require

ROOT = Path(__file__).resolve().parents[2]
OF_TORCHRUN = ("RANK", "LOCAL_", "WORLD_SIZE", "MASTER_", "TORCHELASTIC_")
SMALL = ["train.batch_tokens=384", "train.seq_len=16", "eval.tokens=384"]


def train_twice(on_gpu: bool) -> Figures:
    """Loader, evaluation, checkpoints and a trace; then another run that goes on from the checkpoint in the middle."""
    if importlib.util.find_spec("accelerate") is None:
        return dict(left_out="needs accelerate")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(OF_TORCHRUN)}
    environment |= {} if on_gpu else {"CUDA_VISIBLE_DEVICES": ""}
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, str(ROOT / "train.py"), "experiment=smoke", "logger=jsonl", "train.steps=8",
                 "eval.every=4", "eval.tokens=3072", "checkpoint.every=4", *([] if on_gpu else SMALL)]  # fmt: skip
        last = []
        runs = (["train.profile=3-4", f"run.dir={folder}/run"], [f"run.from={folder}/run@4", f"run.dir={folder}/on"])
        for own in runs:
            ran = subprocess.run([*words, *own], cwd=folder, env=environment, capture_output=True, text=True)
            if ran.returncode:
                return require(False, last=(ran.stdout + ran.stderr).strip().splitlines()[-1])
            last += [line for line in ran.stdout.splitlines() if line.startswith("final val loss")]
        traces = sorted(path.name for path in Path(folder, "run", "profile").iterdir())
    return require(len(traces) == 1 + on_gpu, last=last, traces=traces)
