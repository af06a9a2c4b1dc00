"""Optimizers for sharded models: whole-matrix rules on FSDP2, DDP or plain parameters.

    from nanomuon import Muon   # in a checkout the package is called optim
    optimizer = Muon([p for p in model.blocks.parameters() if p.ndim == 2], lr=0.02)

Nothing here knows of Hydra or of the trainer.  docs/optimizers.md lists all of them.
"""

from .ademamix import AdEMAMix
from .adopt import ADOPT
from .elementwise import AdagradInside, Lion, RMSpropInside, Signum
from .mars import MARS
from .matrix import MatrixOptimizer
from .muon import Muon
from .normuon import NorMuon
from .schedule_free import ScheduleFreeAdamW
from .scion import Scion
from .shampoo import Shampoo
from .soap import SOAP
from .steepest import Steepest

__version__ = "0.2.0"

__all__ = [
    "ADOPT", "MARS", "SOAP", "AdEMAMix", "AdagradInside", "Lion", "MatrixOptimizer", "Muon", "NorMuon", "RMSpropInside",
    "ScheduleFreeAdamW", "Scion", "Shampoo", "Signum", "Steepest",
]  # fmt: skip
