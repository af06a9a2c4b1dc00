"""What ranks agree on before there is a process group, through torchrun's key-value store."""

import json
import os
import socket
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from functools import cache

import torch.distributed as dist

from common import UserError
from trainer.config import world_size


def rank() -> int:
    return int(os.environ.get("RANK", 0))


def restart_count() -> int:
    """How often torchrun has restarted the workers."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


@cache
def store() -> dist.Store:
    """The store of this job: torchrun's agent holds it; without an agent rank 0 does, on the same port.

    Raises:
        UserError: several processes are announced, but not where to meet.
    """
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        if name not in os.environ:
            raise UserError(
                f"WORLD_SIZE={world_size()} but {name} is not set: start with torchrun --nproc-per-node N train.py …"
            )
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    tcp = dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=rank() == 0 and not agent,
        wait_for_workers=False,
        multi_tenant=True,  # the process group opens the same port later
        timeout=timedelta(minutes=5),
    )
    return dist.PrefixStore("nanomuon", tcp)


def broadcast_rank0(key: str, compute: Callable[[], str]) -> str:
    """``compute()`` of rank 0, on every rank.  Workers that torchrun restarts get what the first ones agreed on.

    Raises:
        UserError: on every rank, if ``compute`` raised it or a UserError.
    """
    if world_size() == 1:
        return compute()
    if rank() == 0 and not store().check([key]):
        try:
            said = {"value": compute()}
        except UserError as error:
            said = {"error": str(error)}
        store().set(key, json.dumps(said))
    said = json.loads(store().get(key))
    if "error" in said:
        raise UserError(said["error"])
    return said["value"]


def reinit_rendezvous(number: int) -> None:
    """Give job ``number`` of a sweep, and restarted workers, a store of their own: a new process group would trip over
    the last one's keys."""
    if world_size() > 1 and (number > 0 or restart_count() > 0):
        os.environ["MASTER_PORT"] = broadcast_rank0(f"port {number} {restart_count()}", _free_port)
        os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"  # rank 0 holds it, on the new port


def _free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return str(probe.getsockname()[1])


def report_error(error: Exception) -> None:
    """Print ``error: …`` once for all ranks that met the same error."""
    line = f"error: {error}"
    if world_size() > 1:
        mine = f"{rank()} {line}"
        try:
            first = store().compare_set(f"error {restart_count()}", "", mine).decode()
        except (UserError, RuntimeError):
            first = mine
        if first != mine:
            if first.partition(" ")[2] == line:
                time.sleep(2)  # torchrun ends all ranks when one is gone: the first one speaks before that
                return
            line = f"error: rank {rank()}: {error}"
    print(line, file=sys.stderr, flush=True)
