"""nanoMuon's front door: Hydra composes the configuration, the Trainer runs it.

One process:    python train.py experiment=smoke
Many:           torchrun --nproc-per-node 8 train.py optim=muon
Every choice:   python train.py --help
From Python:    from train import Trainer, load_config
                Trainer(load_config(["experiment=smoke"])).run()
"""

from trainer.config import Config
from trainer.launch import cli, load_config
from trainer.loop import Trainer

__all__ = ["Trainer", "load_config"]


def train(config: Config) -> None:
    Trainer(config).run()


if __name__ == "__main__":
    cli.main(train)
