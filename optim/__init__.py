"""Optimizers for sharded models: whole-matrix rules on FSDP2, DDP or plain parameters.

    from optim import Muon
    optimizer = Muon([p for p in model.blocks.parameters() if p.ndim == 2], lr=0.02)

Nothing here knows of Hydra or of the trainer.  docs/optimizers.md lists all of them.
"""

from optim.elementwise import AdagradInside, Lion, RMSpropInside, Signum
from optim.matrix import MatrixOptimizer
from optim.muon import Muon
from optim.normuon import NorMuon

__all__ = ["AdagradInside", "Lion", "MatrixOptimizer", "Muon", "NorMuon", "RMSpropInside", "Signum"]
