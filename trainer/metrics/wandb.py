"""The W&B run beside metrics.jsonl: its axes, its tags, and what stands in its summary."""

import netrc
import os
import shlex
import sys
from typing import Any
from urllib.parse import urlparse

from omegaconf import OmegaConf

from trainer.config import Config
from trainer.metrics.summary import AXES
from trainer.parallel import Parallel


def start(config: Config, parallel: Parallel, run_id: str | None) -> str:
    """Open the run, or go on with it, through Accelerate's trackers.  On all ranks; returns what to tell on rank 0."""
    settings: dict[str, Any] = {}
    if parallel.is_main:
        import wandb

        # Our environment.json says what a reader needs; host, user and environment stay on this machine.
        quiet = wandb.Settings(silent=True, console="off", disable_git=True, save_code=False, x_disable_meta=True)
        settings = {
            "dir": config.run.dir,
            "id": run_id,
            "resume": "allow",  # a run that is started again goes on under its id
            "name": config.run.name,
            "group": config.logger.group,
            "tags": [config.optim.name, config.model.name, config.data.name, *config.logger.tags],
            "mode": wandb_mode(),
            "settings": quiet,
        }
    parallel.accelerator.log_with = ["wandb"]
    values: Any = OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True)
    parallel.accelerator.init_trackers(config.logger.project, values, {"wandb": settings})
    if not parallel.is_main:
        return ""
    run = parallel.accelerator.get_tracker("wandb", unwrap=True)
    for axis in AXES.values():
        run.define_metric(axis, hidden=True)
    run.define_metric("*", step_metric="step")
    run.define_metric("val/loss", step_metric="train_time_s", summary="min,last")
    if not run.offline:
        return f"wandb {run.url}"
    directory = shlex.quote(str(config.run.path))  # with a folder for every time that the run was started
    return f"wandb offline, upload with: wandb sync {directory}/wandb/offline-run-*"


def abandon() -> None:
    """End the open run as failed, so that the next one in this process is another."""
    if (wandb := sys.modules.get("wandb")) and wandb.run:
        wandb.finish(exit_code=1)


def wandb_mode() -> str | None:
    """``offline`` where this machine has no key and nothing is said; otherwise W&B's own choice."""
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    if os.environ.get("WANDB_MODE") or os.environ.get("WANDB_API_KEY"):
        return None
    try:
        known = netrc.netrc(os.environ.get("NETRC")).authenticators(host or "")
    except (OSError, netrc.NetrcParseError):
        known = None
    return None if known else "offline"
