"""Optimizers for sharded models: whole-matrix rules on FSDP2, DDP or plain parameters.

    from optim import Muon
    optimizer = Muon([p for p in model.blocks.parameters() if p.ndim == 2], lr=0.02)

Nothing here knows of Hydra or of the trainer.  docs/optimizers.md lists all of them.
"""

from optim.elementwise import AdagradInside, Lion, RMSpropInside, Signum
from optim.matrix import MatrixOptimizer
from optim.muon import Muon
from optim.normuon import NorMuon
from optim.scion import Scion
from optim.shampoo import Shampoo
from optim.soap import SOAP
from optim.steepest import Steepest

__all__ = [
    "SOAP",
    "AdagradInside",
    "Lion",
    "MatrixOptimizer",
    "Muon",
    "NorMuon",
    "RMSpropInside",
    "Scion",
    "Shampoo",
    "Signum",
    "Steepest",
]
