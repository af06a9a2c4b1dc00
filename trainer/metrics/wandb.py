"""The W&B run beside metrics.jsonl: its axes, its tags, and what stands in its summary."""

import netrc
import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlparse
from urllib.request import urlopen

from omegaconf import OmegaConf

from trainer.config import Config
from trainer.metrics.summary import AXES
from trainer.parallel import Parallel

REACH_TIMEOUT, INIT_TIMEOUT = 5.0, 30.0  # seconds for W&B to answer at all, and to open the run

MODES = ("online", "offline", "disabled", "shared", "run", "dryrun")  # W&B's own, and its names of before


def start(config: Config, parallel: Parallel, run_id: str | None) -> str:
    """Open the run, or go on with it, through Accelerate's trackers.  On all ranks; returns what to tell on rank 0.

    Where W&B cannot be reached the run is kept on the disk, to be uploaded later.
    """
    why, settings = "", dict[str, Any]()
    if parallel.is_main:
        import wandb

        # Our environment.json says what a reader needs; host, user and environment stay on this machine.
        quiet: dict[str, Any] = dict(silent=True, console="off", disable_git=True, save_code=False, x_disable_meta=True)
        mode, why = wandb_mode()
        settings = {
            "dir": config.run.dir,
            "id": run_id,
            "resume": "allow",  # a run that is started again goes on under its id
            "name": config.run.name,
            "group": config.logger.group,
            "tags": [config.optim.name, config.model.name, config.data.name, *config.logger.tags],
            "mode": mode,
            "settings": wandb.Settings(**quiet, init_timeout=INIT_TIMEOUT),
        }
    parallel.accelerator.log_with = ["wandb"]
    values: Any = OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True)
    try:
        parallel.accelerator.init_trackers(config.logger.project, values, {"wandb": settings})
    except Exception as error:  # whatever W&B may raise of its network, its server, the key or another variable
        why = f" ({(str(error).strip() or type(error).__name__).splitlines()[0]})"
        try:
            with _without_environment():
                settings |= {"mode": "offline"}
                settings["settings"].mode = "offline"
                parallel.accelerator.init_trackers(config.logger.project, values, {"wandb": settings})
        except Exception:
            parallel.accelerator.trackers = []  # half a tracker could not be closed
            raise
    if not parallel.is_main:
        return ""
    run = parallel.accelerator.get_tracker("wandb", unwrap=True)
    for axis in AXES.values():
        run.define_metric(axis, hidden=True)
    run.define_metric("*", step_metric="step")
    run.define_metric("val/loss", step_metric="train_time_s", summary="min,last")
    if not run.offline:
        return f"wandb {run.url}" if run.url else f"wandb is off (WANDB_MODE={os.environ.get('WANDB_MODE')})"
    directory = shlex.quote(str(config.run.path))  # with a folder for every time that the run was started
    return f"wandb offline{why}, upload with: wandb sync {directory}/wandb/offline-run-*"


@contextmanager
def _without_environment() -> Iterator[None]:
    """Leave W&B no variable that it could refuse again."""
    import wandb

    wandb.teardown()  # it has read them
    ours = {name: os.environ.pop(name) for name in list(os.environ) if name.startswith("WANDB_")}
    try:
        yield
    finally:
        os.environ.update(ours)  # another job of a sweep may succeed


def abandon() -> None:
    """End the open run as failed, so that the next one in this process is another."""
    if (wandb := sys.modules.get("wandb")) and wandb.run:
        wandb.finish(exit_code=1)


def wandb_mode() -> tuple[str | None, str]:
    """``offline``, and why, where this machine has no key or W&B does not answer; (None, "") for W&B's own choice."""
    for name, value in list(os.environ.items()):
        if name.startswith("WANDB_") and not value.strip():
            del os.environ[name]  # as of a script's unset variable; W&B would refuse it
    if mode := os.environ.get("WANDB_MODE"):
        known = mode in MODES
        return (None, "") if known else ("offline", f" (WANDB_MODE={mode} is none of {', '.join(MODES)})")
    if key := os.environ.get("WANDB_API_KEY"):
        os.environ["WANDB_API_KEY"] = key.strip()  # of the file that it was read from, most often
    url = os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai"
    if not os.environ.get("WANDB_API_KEY") and not _in_netrc(urlparse(url).hostname or ""):
        return "offline", " (no key)"
    try:
        urlopen(url, timeout=REACH_TIMEOUT).close()
    except HTTPError:  # it answers
        pass
    except (OSError, ValueError) as error:
        if not urlparse(url).hostname:  # with which W&B would not write files either
            del os.environ["WANDB_BASE_URL"]
        return "offline", f" ({url} cannot be reached: {getattr(error, 'reason', error)})"
    return None, ""


def _in_netrc(host: str) -> bool:
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
