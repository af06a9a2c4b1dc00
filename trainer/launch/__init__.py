"""From the command line, or from Python, to a job: composition, sweeps, processes."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trainer.config import Config


def load_config(overrides: Sequence[str] = (), world_size: int = 1) -> "Config":
    """The validated config of ``python train.py OVERRIDES``, from a script, a prompt or a notebook.

    Nothing is created, and Hydra is left as it was.

    Args:
        overrides: as on the command line, for example ``["experiment=smoke", "optim.matrix.lr=0.02"]``.
        world_size: processes that will do the run.

    Raises:
        UserError: naming the key, the value and the mend.
    """
    from trainer.launch import compose  # only here: it imports Hydra

    return compose.load(overrides, world_size)
