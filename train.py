"""nanoMuon's front door: Hydra composes the configuration, the Trainer runs it.

    python train.py experiment=smoke
    torchrun --nproc-per-node 8 train.py optim=muon
    python train.py --help
"""

from trainer import launch
from trainer.schema import Config


def train(config: Config) -> None:
    from trainer.loop import Trainer  # heavy imports come after the configuration is known to be right

    Trainer(config).run()


if __name__ == "__main__":
    launch.main(train)
