"""nanoMuon's front door: Hydra composes the configuration, the Trainer runs it.

One process:    python train.py experiment=smoke
Many:           torchrun --nproc-per-node 8 train.py optim=muon
What it costs:  python train.py optim=muon plan=true plan.device=h100 plan.ranks=8
Every choice:   python train.py --help
From Python:    from train import Trainer, load_config
                Trainer(load_config(["experiment=smoke"])).run()
"""

import runpy
import sys
from pathlib import Path

from trainer.config import Config
from trainer.launch import cli, load_config
from trainer.loop import Trainer

__all__ = ["Trainer", "load_config"]

PLAN = Path(__file__).with_name("scripts") / "plan.py"


def train(config: Config) -> None:
    Trainer(config).run()


if __name__ == "__main__":
    if any(word.startswith(("plan=", "plan.")) for word in sys.argv[1:]):
        runpy.run_path(str(PLAN), run_name="__main__")  # which ends this process
    cli.main(train)
