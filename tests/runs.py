"""A run as train.py starts it."""

from trainer.config import Config
from trainer.loop import Trainer
from trainer.run.directory import claim


def started(config: Config) -> Trainer:
    """The Trainer of ``config`` in the run directory that it gets."""
    config.run.dir = claim(config)
    return Trainer(config)
