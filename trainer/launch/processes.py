"""Processes of a job that nobody has started yet, or that SLURM has started without saying who they are."""

import logging
import os
import shutil
import signal
import sys
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import Quote, QuotedString
from omegaconf import DictConfig

from common import UserError
from trainer.config import Config, Resume, world_size
from trainer.launch.sweep import JobFailed

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
SHUTDOWN_TIMEOUT = 600  # seconds in which a job that is told to stop may write its checkpoint


def is_launched() -> bool:
    """Whether torchrun, accelerate launch, SLURM or the like has started this process as one of a job's.

    A RANK that some other program left in the environment is not enough."""
    return world_size() > 1 or {"RANK", "MASTER_ADDR"} <= os.environ.keys()


def job_world_size(job: DictConfig, launcher: DictConfig) -> int:
    """Processes that will do a job: those that are started, or will be by Hydra's launcher or by this process."""
    if is_launched():
        return world_size()
    if is_submitit(launcher._target_):
        return launcher.nodes * launcher.tasks_per_node
    return job.run.processes or world_size()


def is_submitit(launcher: str) -> bool:
    """Whether a class is one of submitit's launchers for Hydra."""
    return launcher.startswith("hydra_plugins.hydra_submitit_launcher.")


def in_submitit_job() -> bool:
    """Whether submitit, Hydra's launcher for SLURM, has started this process."""
    return "SUBMITIT_EXECUTOR" in os.environ


def prepare_submitit(launcher: str) -> None:
    """Before ``launcher``, one of submitit's classes for Hydra, is asked to start jobs."""
    if launcher.endswith(".SlurmLauncher") and shutil.which("srun") is None:
        raise UserError(
            "hydra/launcher=slurm: no srun on this machine; start where SLURM is, or leave hydra/launcher out"
        )
    # SLURM sends this before the time limit.  submitit's own SIGUSR2 would requeue the job and save nothing.
    os.environ.setdefault("SUBMITIT_PREEMPT_SIGNAL", "TERM")
    # Its processes unpickle our functions before train.py could say where they are.
    checkout = str(Path(__file__).resolve().parents[2])
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [checkout, os.environ.get("PYTHONPATH")]))


def export_submitit_ranks() -> None:
    """Tell this process its rank, which submitit knows."""
    if in_submitit_job() and not is_launched():
        from submitit.helpers import TorchDistributedEnvironment  # type: ignore[import-not-found]

        TorchDistributedEnvironment().export(set_cuda_visible_devices=False)


def job_arguments(config: Config, overrides: Sequence[str]) -> list[str]:
    """The command line of train.py that is this one job and no sweep."""
    decided = {
        "hydra.mode": "RUN",
        "run.dir": config.run.dir,
        "run.name": config.run.name,
        # never: seen to when the directory was acquired
        "run.resume": "auto" if config.run.resume == Resume.never else config.run.resume.value,
        "logger.group": config.logger.group,
        "logger.label": config.logger.label,
    }
    kept = [o for o in overrides if o.lstrip("+").partition("=")[0] not in decided]
    return kept + [f"{key}={quoted(value)}" for key, value in decided.items() if value is not None]


def quoted(value: str) -> str:
    """A text in Hydra's grammar."""
    return QuotedString(value, Quote.single).with_quotes()


def launch(config: Config, overrides: Sequence[str]) -> None:
    """Train in ``run.processes`` new processes, which torch's elastic agent starts and watches as torchrun does.

    Raises JobFailed: one of them failed; the others were ended. Raises SystemExit: this process was told to end, and
    has ended them.
    """
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)  # we say it below
    # torch 2.11 has no such setting.
    patience: dict[str, Any] = {"shutdown_timeout": SHUTDOWN_TIMEOUT}
    patience = {key: value for key, value in patience.items() if key in LaunchConfig.__dataclass_fields__}
    settings = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=config.run.processes or 1,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        max_restarts=0,
        **patience,
    )
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        elastic_launch(settings, sys.executable)("-u", os.path.abspath(sys.argv[0]), *job_arguments(config, overrides))
    except ChildFailedError as error:
        # When one has failed, the agent ends the others, by SIGTERM.
        causes = {rank: f for rank, f in error.failures.items() if f.exitcode != -signal.SIGTERM} or error.failures
        for rank, failure in causes.items():
            if failure.exitcode < 0:  # who exits by itself has said why
                name = failure.signal_name()
                print(f"error: {config.run.dir}: rank {rank} was ended by {name}", file=sys.stderr, flush=True)
        raise JobFailed from None
    except SignalException as stopped:
        sys.exit(128 + stopped.sigval)
    finally:
        for number, handler in handlers.items():  # the agent leaves its own
            signal.signal(number, handler)
