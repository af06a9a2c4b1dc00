"""Optimizers for sharded models: whole-matrix rules on FSDP2, DDP or plain parameters.

    from nanomuon import Muon   # in a checkout the package is called optim
    optimizer = Muon([p for p in model.blocks.parameters() if p.ndim == 2], lr=0.02)

Nothing here knows of Hydra or of the trainer.  docs/optimizers.md lists all of them.
"""

from .adamh import AdamH
from .adamuon import AdaMuon
from .ademamix import AdEMAMix
from .adopt import ADOPT
from .dion2 import Dion2, NorDion2
from .elementwise import AdagradInside, Lion, RMSpropInside, Signum
from .kl_soap import KLSOAP
from .kron import PSGDKron
from .mars import MARS
from .matrix import MatrixOptimizer
from .muon import Muon
from .normuon import NorMuon
from .schedule_free import ScheduleFreeAdamW
from .scion import Scion
from .shampoo import Shampoo
from .soap import SOAP
from .soap_muon import SOAPMuon
from .steepest import Steepest
from .uncorrected_adam import UncorrectedAdam

__version__ = "0.2.0"

__all__ = [
    "ADOPT", "AdEMAMix", "AdaMuon", "AdagradInside", "AdamH", "Dion2", "KLSOAP", "Lion", "MARS", "MatrixOptimizer",
    "Muon", "NorDion2", "NorMuon", "PSGDKron", "RMSpropInside", "SOAP", "SOAPMuon", "ScheduleFreeAdamW", "Scion",
    "Shampoo", "Signum", "Steepest", "UncorrectedAdam",
]  # fmt: skip
