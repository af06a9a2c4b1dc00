"""The smallest runs, as users start them, and what they leave on the disk."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from trainer.metrics.jsonl import FILE, read_lines

ROOT = Path(__file__).resolve().parents[1]
# Everything takes part, and an update takes some 20 ms: 24 sequences, which 1, 2, 3 and 4 ranks share evenly.
TINY = ["experiment=smoke", "logger=jsonl", "model.n_layer=1", "model.n_embd=16", "model.n_head=2", "train.seq_len=16",
        "train.batch_tokens=384", "eval.tokens=768", "train.timeout_minutes=1"]  # fmt: skip
# A line for every update, an evaluation in the middle, a checkpoint that the next one does not yet replace.
SHORT = [*TINY, "train.steps=6", "eval.every=3", "logger.every=1", "checkpoint.every=2"]


def read_record(directory: Path | str) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl, all of which must be whole."""
    path = Path(directory) / FILE
    found = read_lines(path)
    assert len(found) == len(path.read_text().splitlines()), f"torn or foreign lines in {path}"
    return found


def read_losses(directory: Path | str, missing: float | None = None) -> list[tuple]:
    """Step, training loss, validation loss and gradient norm of every line: what must not depend on how it ran."""
    keys = ("step", "train/loss", "val/loss", "grad_norm")
    return [tuple(line.get(key, missing) for key in keys) for line in read_record(directory)]


def cut_record(directory: Path | str, lines: int, torn: int = 0) -> str:
    """Leave the first lines of the record (negative: all but the last ones), without the last ``torn`` bytes."""
    path = Path(directory) / FILE
    text = "".join(path.read_text().splitlines(keepends=True)[:lines])
    text = text[: len(text) - torn]
    path.write_text(text)
    return text


def train(*overrides: str, ranks: int = 0, cwd: Path = ROOT, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """train.py in the folder ``cwd``; under torchrun if ``ranks`` is above 0."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks else []
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *launcher, str(ROOT / "train.py"), *overrides]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout)
