"""nanoMuon's front door: Hydra composes the configuration, the Trainer runs it.

One process:    python train.py experiment=smoke
Many:           torchrun --nproc-per-node 8 train.py optim=muon
Every choice:   python train.py --help
"""

from trainer.config import Config
from trainer.launch import cli
from trainer.loop import Trainer


def train(config: Config) -> None:
    Trainer(config).run()


if __name__ == "__main__":
    cli.main(train)
