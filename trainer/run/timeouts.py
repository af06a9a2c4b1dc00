"""How long collectives wait.  torch has a public setting only for groups that are yet to be made: the two private names
below reach those that exist, whose patience must shrink when the first, slow update is over."""

from datetime import timedelta

import torch.distributed as dist

NCCL_MARGIN = 2  # minutes


def set_timeouts(minutes: float, *, but: dist.ProcessGroup | None = None) -> None:
    """Of all process groups from now on, ``but`` one.

    NCCL's wait longer: when its time is over it ends the process at once, and nobody would be left to name the rank
    that hangs, which the hosts miss between each other.
    """
    if dist.is_initialized():
        for group in list(dist.distributed_c10d._world.pg_map):
            margin = NCCL_MARGIN if "nccl" in dist.get_backend(group) else 0
            if group is not but:
                dist.distributed_c10d._set_pg_timeout(timedelta(minutes=minutes + margin), group)
