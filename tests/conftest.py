"""What every test shares: a quiet, offline, single-threaded environment, and configurations as a user types them."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["WANDB_MODE"] = "offline"
os.environ["WANDB_SILENT"] = "true"
os.environ["HF_HUB_OFFLINE"] = "1"
for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "NANOMUON_DATA"):
    os.environ.pop(name, None)

import pytest  # noqa: E402
from hypothesis import settings  # noqa: E402

from tests.runs import SHORT  # noqa: E402

settings.register_profile("nanomuon", deadline=None, max_examples=30)
settings.load_profile("nanomuon")


@pytest.fixture(scope="session")
def configure():
    """``configure("experiment=smoke", "train.steps=3", world_size=2)`` -> the validated config."""
    from trainer.launch import load_config

    return lambda *overrides, world_size=1: load_config(overrides, world_size)


@pytest.fixture
def no_plot(monkeypatch):
    """The picture of a run takes a second, and has tests of its own."""
    from trainer.metrics import record

    monkeypatch.setattr(record, "loss_vs_time", lambda *_: None)


@pytest.fixture
def run(configure, tmp_path, no_plot):
    """``run("name", "key=value")`` -> the trained Trainer of a short run in that folder, as train.py would do it."""
    from trainer.loop import Trainer

    def trained(name: str, *overrides: str) -> Trainer:
        trainer = Trainer(configure(*SHORT, f"run.dir={tmp_path / name}", *overrides))
        trainer.run()
        return trainer

    return trained
