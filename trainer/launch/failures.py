"""A rank that died or hangs ends the job with a message that names it."""

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch.distributed as dist

from common import UserError
from trainer.config import world_size
from trainer.launch.rendezvous import rank, restart_count, store


@contextmanager
def report_failed_ranks(wait: float = 5.0) -> Iterator[None]:
    """Turn a collective's failure into a UserError that names the ranks that do not answer.

    Every rank that meets such a failure says so in the launcher's store; those that stay silent for ``wait`` seconds
    are lost.
    """
    try:
        yield
    except RuntimeError as error:
        of_network = isinstance(error, dist.DistError) or re.search("gloo|nccl|timed out|connection", str(error), re.I)
        lost = silent_ranks("alive", wait) if of_network and world_size() > 1 else []
        if not lost:
            raise
        ranks = f"rank{'s' * (len(lost) > 1)} {', '.join(map(str, lost))}"
        raise UserError(
            f"{ranks} of {world_size()} died or hang, all ranks stop; to go on from the last checkpoint, start the "
            "same command with the same run.dir"
        ) from error


def silent_ranks(event: str, wait: float) -> list[int]:
    """Say to the other ranks that ``event`` has happened on this one; those that do not say so within ``wait`` seconds.

    Nobody is silent if the store is gone, and the launcher with it.
    """
    keys = {other: f"{event} {restart_count()} {other}" for other in range(world_size())}
    silent = set(keys)
    deadline = time.monotonic() + wait
    with suppress(RuntimeError, ValueError):
        store().set(keys[rank()], "")
        while silent and time.monotonic() < deadline:
            silent = {other for other in silent if not store().check([keys[other]])}
            time.sleep(0.1)
        return sorted(silent)
    return []
