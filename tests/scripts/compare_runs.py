"""Records made up for the tests of compare.py."""

import json
from pathlib import Path

from scripts.speedrun import records

HEADER = {"name": "a-1", "optim": "a", "model": "tiny", "data": "sample", "seed": 1, "target": 3.0, "steps": 300,
          "batch_tokens": 1024, "device": "cpu"}  # fmt: skip


def lines(losses=(5.0, 4.0, 3.2, 2.9), seconds_per_step=0.1, **header) -> list[str]:
    """A record of one evaluation every 100 steps, the header first."""
    found = [json.dumps({"run": {**HEADER, **header}})]
    for i, loss in enumerate(losses):
        clock = {"step": 100 * i, "tokens": 102400 * i, "train_time_s": 100 * i * seconds_per_step}
        found.append(json.dumps({**clock, "val/loss": loss}))
    return found


def write_run(folder: Path, content: list[str] | bytes) -> records.Run:
    """As compare.py reads it."""
    folder.mkdir(parents=True, exist_ok=True)
    raw = content if isinstance(content, bytes) else ("\n".join(content) + "\n").encode()
    (folder / "metrics.jsonl").write_bytes(raw)
    return records.read_run(folder / "metrics.jsonl", "x/metrics.jsonl")


def write_runs(tmp_path: Path, optim: str, finals: list[float], **header) -> list[records.Run]:
    """One run per final loss; all are at 3.2 before it, so that the costs to the target 3 differ too."""
    found = []
    for seed, final in enumerate(finals, 1):
        folder = tmp_path / f"{optim}-{seed}-{len(list(tmp_path.iterdir()))}"
        found.append(write_run(folder, lines((5.0, 4.0, 3.2, final), optim=optim, seed=seed, **header)))
    return found
