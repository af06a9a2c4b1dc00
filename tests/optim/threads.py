"""Ranks as threads of one process, on torch's threaded process group: DTensors and collectives are real, and W ranks
start in milliseconds.  For laws that are checked on many drawn cases; tests/distributed has real processes."""

import threading
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.multi_threaded_pg import (
    ProcessLocalGroup,
    _install_threaded_pg,
    _uninstall_threaded_pg,
)


def run_threads(world_size: int, function: Callable[[int], object]) -> list:
    """``function(rank)`` on every rank; their results by rank.  The first error of a rank is raised here."""
    results, errors, store = [None] * world_size, [], dist.HashStore()

    def one(rank: int) -> None:
        try:
            dist.init_process_group("threaded", rank=rank, world_size=world_size, store=store)
            results[rank] = function(rank)
        except BaseException as error:
            errors.append(error)
            ProcessLocalGroup.exception_handle(error)  # the others wait for this rank

    _install_threaded_pg()
    torch._C._distributed_c10d._set_thread_isolation_mode(True)  # each thread has a registry of groups
    ProcessLocalGroup.reset()
    try:
        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(world_size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        torch._C._distributed_c10d._set_thread_isolation_mode(False)
        _uninstall_threaded_pg()
    if errors:
        raise next((error for error in errors if not isinstance(error, SystemExit)), errors[0])
    return results
