"""A run as train.py starts it."""

from trainer import rundir
from trainer.loop import Trainer
from trainer.schema import Config


def started(config: Config) -> Trainer:
    """The Trainer of ``config`` in the run directory that it gets."""
    config.run.dir = rundir.claim(config)
    return Trainer(config)
