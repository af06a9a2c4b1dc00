"""What ranks agree on before there is a process group, through torchrun's key-value store."""

import json
import os
import socket
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future
from datetime import timedelta
from functools import cache
from threading import Thread

import torch.distributed as dist

from common import UserError
from trainer.config import world_size
from trainer.mesh import check_launched

TIMEOUT = timedelta(minutes=5)  # between the first rank and the last to start
HELLO, HELLO_TIMEOUT = "nanomuon hello", timedelta(seconds=5)  # rank 0 says it as soon as its port listens


def rank() -> int:
    return int(os.environ.get("RANK", 0)) if world_size() > 1 else 0


def restart_count() -> int:
    """How often torchrun has restarted the workers."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


def check_environment() -> None:
    """Raises RendezvousError: what a launcher, or a script, says of this process is no number or cannot be."""
    for key in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT"):
        if (value := os.environ.get(key)) is not None and not value.strip().isdecimal():
            raise RendezvousError(f"{key}={value}: give a whole number, or unset it and start with torchrun")
    if rank() >= world_size():
        raise RendezvousError(f"RANK={rank()} WORLD_SIZE={world_size()}: give ranks from 0 to WORLD_SIZE - 1")


class RendezvousError(UserError):
    """The ranks cannot reach each other, not even to say so once."""


@cache
def store() -> dist.Store:
    """The store of this job: torchrun's agent holds it; without an agent rank 0 does, on the same port.

    Raises UserError: several processes are announced, but not where to meet. Raises RendezvousError: somebody else
    holds the port.
    """
    check_launched()
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        tcp = _open(*address, serve=not agent) if agent or rank() == 0 else _join(*address)
    except (RuntimeError, OSError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0].partition(". ")[0]
        where = f"MASTER_ADDR={address[0]} MASTER_PORT={address[1]}"
        raise RendezvousError(f"{where}: rank 0 cannot be reached there, give a free port ({reason})") from None
    return dist.PrefixStore("nanomuon", tcp)


def _open(host: str, port: int, serve: bool) -> dist.TCPStore:
    """multi_tenant: the process group opens the same port later."""
    tcp = dist.TCPStore(host, port, is_master=serve, wait_for_workers=False, multi_tenant=True, timeout=TIMEOUT)
    if serve:
        tcp.set(HELLO, "")
    return tcp


def _join(host: str, port: int) -> dist.TCPStore:
    """Rank 0's store.  Whatever else listens there is found out within seconds: it says no hello.

    Raises OSError, RuntimeError: nobody listens, or not rank 0.
    """
    deadline = time.monotonic() + TIMEOUT.total_seconds()
    while True:
        try:
            socket.create_connection((host, port), timeout=10).close()
            break
        except OSError:  # rank 0 has not started yet
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)
    connected: Future[dist.TCPStore] = Future()

    def connect() -> None:
        try:
            tcp = _open(host, port, serve=False)
            tcp.wait([HELLO], HELLO_TIMEOUT)
            connected.set_result(tcp)
        except RuntimeError as error:
            connected.set_exception(error)

    Thread(target=connect, daemon=True).start()  # torch's handshake has no time limit: it may have to be left behind
    return connected.result(2 * HELLO_TIMEOUT.total_seconds())


def broadcast_rank0(key: str, compute: Callable[[], str]) -> str:
    """Rank 0's ``compute()``, value or error, on every rank, before there is a process group.

    Workers that torchrun restarts get what the first ones got.

    Raises UserError: on every rank, if ``compute`` raised it.
    """
    if world_size() == 1:
        return compute()
    if rank() == 0 and not store().check([key]):
        try:
            message = {"value": compute()}
        except UserError as error:
            message = {"error": str(error)}
        store().set(key, json.dumps(message))
    message = json.loads(store().get(key))
    if "error" in message:
        raise UserError(message["error"])
    return message["value"]


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


def report_error(error: Exception, job: int = 0) -> None:
    """Print ``error: …`` once for all ranks that met the same error in a job."""
    line = f"error: {error}"
    if not isinstance(error, RendezvousError) and world_size() > 1:
        mine = f"{rank()} {line}"
        try:
            first = store().compare_set(f"error {job} {restart_count()}", "", mine).decode()
        except (UserError, RuntimeError):
            first = mine
        if first != mine:
            if first.partition(" ")[2] == line:
                time.sleep(2)  # torchrun ends all ranks when one is gone: the first one speaks before that
                return
            line = f"error: rank {rank()}: {error}"
    print(line, file=sys.stderr, flush=True)
