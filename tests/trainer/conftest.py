"""A run of a few updates, for the tests of what it leaves on the disk."""

import json

import pytest

from trainer.loop import Trainer
from trainer.metrics import record

TINY = ["experiment=smoke", "logger=jsonl", "model.n_layer=1", "model.n_embd=16", "model.n_head=2", "train.seq_len=16",
        "train.batch_tokens=384", "train.steps=6", "eval.every=3", "eval.tokens=768", "logger.every=1",
        "checkpoint.every=2"]  # fmt: skip


@pytest.fixture
def run(configure, tmp_path, monkeypatch):
    """``run("name", "key=value")`` -> the trained Trainer of a run in that folder, as train.py would do it."""
    monkeypatch.setattr(record, "loss_vs_time", lambda *arguments: None)

    def trained(name: str, *overrides: str) -> Trainer:
        trainer = Trainer(configure(*TINY, f"run.dir={tmp_path / name}", *overrides))
        trainer.run()
        return trainer

    return trained


def lines(directory) -> list[dict]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def losses(directory) -> list[tuple]:
    return [(line["step"], line.get("train/loss"), line.get("val/loss")) for line in lines(directory)]
