"""Optimizers for sharded models: whole-matrix rules on FSDP2, DDP or plain parameters.

    import nanomuon   # in a checkout the package is called optim
    optimizer = nanomuon.build(
        model, matrix=dict(optimizer=nanomuon.Muon, lr=0.02), scalar=dict(optimizer=torch.optim.AdamW, lr=3e-4)
    )

Nothing here knows of Hydra or of the trainer.  docs/optimizers.md lists all optimizers.
"""

from .adamh import AdamH
from .adamuon import AdaMuon
from .ademamix import AdEMAMix
from .adopt import ADOPT
from .combined import Combined
from .dion2 import Dion2, NorDion2
from .elementwise import AdagradInside, Lion, RMSpropInside, Signum
from .kl_soap import KLSOAP
from .kron import PSGDKron
from .mars import MARS
from .matrix import MatrixOptimizer
from .muon import Muon
from .normuon import NorMuon
from .qk_clip import qk_clip
from .routing import build
from .schedule_free import ScheduleFreeAdamW
from .scion import Scion
from .shampoo import Shampoo
from .soap import SOAP
from .soap_muon import SOAPMuon
from .steepest import Steepest
from .uncorrected_adam import UncorrectedAdam

__version__ = "0.2.0"

__all__ = [
    "ADOPT", "AdEMAMix", "AdaMuon", "AdagradInside", "AdamH", "Combined", "Dion2", "KLSOAP", "Lion", "MARS",
    "MatrixOptimizer", "Muon", "NorDion2", "NorMuon", "PSGDKron", "RMSpropInside", "SOAP", "SOAPMuon",
    "ScheduleFreeAdamW", "Scion", "Shampoo", "Signum", "Steepest", "UncorrectedAdam", "build",
    "qk_clip",
]  # fmt: skip
