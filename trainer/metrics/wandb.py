"""The W&B run beside metrics.jsonl: its axes, its tags, and what stands in its summary."""

import netrc
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from omegaconf import OmegaConf

from trainer.config import Config
from trainer.parallel import Parallel
from trainer.run.directory import run_id

AXES = {"steps": "step", "tokens": "tokens", "seconds": "train_time_s"}  # name in the summary -> key of a line


def start(config: Config, parallel: Parallel) -> str:
    """Open the run, or go on with it, through Accelerate's trackers.  On all ranks; returns what to tell on rank 0."""
    settings: dict[str, Any] = {}
    if parallel.is_main:
        import wandb

        # Our environment.json says what a reader needs; host, user and environment stay on this machine.
        quiet = wandb.Settings(silent=True, console="off", disable_git=True, save_code=False, x_disable_meta=True)
        settings = {
            "dir": config.run.dir,
            "id": run_id(Path(config.run.dir)),
            "resume": "allow",  # a run that is started again goes on under its id
            "name": config.run.name,
            "group": config.logger.group,
            "tags": [config.optim.name, config.model.name, config.data.name, *config.logger.tags],
            "mode": wandb_mode(),
            "settings": quiet,
        }
    parallel.accelerator.log_with = ["wandb"]
    parallel.accelerator.init_trackers(config.logger.project, plain(config), {"wandb": settings})
    if not parallel.is_main:
        return ""
    run = parallel.accelerator.get_tracker("wandb", unwrap=True)
    for axis in AXES.values():
        run.define_metric(axis, hidden=True)
    run.define_metric("*", step_metric="step")
    run.define_metric("val/loss", step_metric="train_time_s", summary="min,last")
    files = f"{shlex.quote(config.run.dir)}/wandb/offline-run-*"  # one for every time that the run was started
    where = f"offline, upload with: wandb sync {files}" if run.offline else run.url
    return f"wandb {where}"


def abandon() -> None:
    """End the open run as failed, so that the next one in this process is another."""
    if (wandb := sys.modules.get("wandb")) and wandb.run:
        wandb.finish(exit_code=1)


def summary(lines: Sequence[Mapping[str, Any]], target: float | None) -> dict[str, float]:
    """What a run comes to, from the lines of its record.

    Returns:
        final/val_loss, final/steps, final/tokens, final/seconds; and if ``target`` was reached, target/<axis> by linear
        interpolation between the evaluations around it and target/evaluated_<axis> at the first one below.
    """
    evaluated = [line for line in lines if line.get("val/loss") is not None]
    if not evaluated:
        return {}
    last = evaluated[-1]
    found = {"final/val_loss": last["val/loss"]} | {f"final/{name}": last[key] for name, key in AXES.items()}
    first = next((i for i, line in enumerate(evaluated) if target is not None and line["val/loss"] <= target), None)
    if first is None:
        return found
    below, above = evaluated[first], evaluated[max(first - 1, 0)]
    fall = above["val/loss"] - below["val/loss"]
    part = (above["val/loss"] - target) / fall if fall > 0 else 1.0
    for name, key in AXES.items():
        found[f"target/{name}"] = above[key] + part * (below[key] - above[key])
        found[f"target/evaluated_{name}"] = below[key]
    return found | {"target/loss": target}


def plain(config: Config) -> dict[str, Any]:
    """The config as nested plain values."""
    return OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True)


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
