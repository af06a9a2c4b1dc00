"""The record of a run: metrics.jsonl, config.yaml, environment.json, loss_vs_time.png, W&B, and what is shown.

Only rank 0 writes and shows.  A part of the record that fails says so once and is left out; the run goes on.
"""

import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar

import torch
from omegaconf import OmegaConf

from common import UserError, write_text
from trainer.config import Config, LoggerKind
from trainer.metrics import wandb as wandb_run
from trainer.metrics.console import Display, duration
from trainer.metrics.jsonl import JsonLines
from trainer.metrics.plot import loss_vs_time
from trainer.parallel import Parallel

PACKAGES = ("torch", "accelerate", "transformers", "datasets", "numpy", "tiktoken", "wandb", "hydra-core")

# Dense bf16 FLOP/s by a part of the device's name, from the makers' data sheets; the first that fits counts.
PEAK_FLOPS = {
    "GB300": 2500e12,
    "GB200": 2500e12,
    "B300": 2250e12,
    "B200": 2250e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "RTX 5090": 209e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}


class Record:
    """Opened in ``config.run.dir``, which belongs to this run already.

    Args:
        config: resolved.
        parallel: rank, device and the Accelerator whose trackers are used.
        display: what shows the progress; tests give their own.
    """

    shown: ClassVar[Display | None] = None  # of the record that this process writes

    def __init__(self, config: Config, parallel: Parallel, display: Display | None = None):
        self.config, self.parallel = config, parallel
        self.directory = Path(config.run.dir)
        self.warned: set[str] = set()
        self.flops_per_token: float | None = None
        self.previous = (0, 0.0)  # tokens and training seconds of the line before
        self.last: dict[str, Any] = {}  # latest value of every key
        if parallel.is_main:
            self.display = display or Display(config.train.steps)

    def start(
        self,
        table: Sequence[Mapping[str, Any]] = (),
        flops_per_token: float | None = None,
        step: int = 0,
        unfinished: bool = False,
    ) -> None:
        """Write what is known before the first step.

        Args:
            table: a row per role of the optimizers; printed.
            flops_per_token: of a forward and backward pass, for MFU.
            step: updates already done, by the run that is resumed; lines of later steps are removed.
            unfinished: the line of ``step`` itself is still to be written.

        Raises:
            UserError: nothing can be written into ``run.dir``.
        """
        self.flops_per_token = flops_per_token
        if self.parallel.is_main:
            self._open(last_step=step - (unfinished or step == 0))
            for line in self.metrics.lines:
                self._remember(line)
            self.message(f"run directory {self.directory}, {self.describe()}")
            if table:
                self.display.table(table)
        if self.config.logger.kind == LoggerKind.wandb:
            self._try("wandb", self._start_wandb)
        if self.parallel.is_main:
            Record.shown = self.display
            self.display.start(step)

    def _open(self, last_step: int) -> None:
        try:
            write_text(self.directory / "config.yaml", OmegaConf.to_yaml(OmegaConf.structured(self.config)))
            write_text(
                self.directory / "environment.json", json.dumps(environment(self.parallel), indent=1) + "\n"
            )
            self.metrics = JsonLines(self.directory / "metrics.jsonl", last_step)
        except OSError as error:
            raise UserError(
                f"run.dir={self.directory} cannot be written ({error.strerror}): make room, or choose another folder"
            ) from None

    def describe(self) -> str:
        ranks = f"{self.parallel.world_size} rank{'s' * (self.parallel.world_size > 1)}"
        return f"{ranks} ({self.parallel.mode}) on {device_name(self.parallel.device)}"

    def log(self, *, step: int, tokens: int, train_time_s: float, **metrics: float) -> None:
        """One line: what was measured on and after update ``step``.  Speed is that since the line before."""
        peak = self._peak_memory() if "val/loss" in metrics else {}
        if not self.parallel.is_main:
            return
        line = {"step": step, "tokens": tokens, "train_time_s": train_time_s, **metrics}
        line |= {**self._speed(tokens, train_time_s), **peak}
        self._remember(line)
        whole = {**line, "run": self.header()} if step == 0 else line
        self._try("metrics.jsonl", lambda: self.metrics.append(whole))
        self.display.update(line)
        if self.parallel.accelerator.trackers:
            self._try("wandb", lambda: self.parallel.accelerator.log(line, step=step))

    def header(self) -> dict[str, Any]:
        """What a comparison of records must know of a run; on the line of step 0."""
        config, train = self.config, self.config.train
        return {
            "name": config.run.name,
            "optim": config.logger.label or config.optim.name,
            "model": config.model.name,
            "data": f"{config.data.name}-{config.data.tokenizer or 'gpt2'}",
            "seed": config.seed,
            "steps": train.steps,
            "batch_tokens": train.batch_tokens,
            "seq_len": train.seq_len,
            "eval_tokens": config.eval.tokens,
            "target": config.eval.target,
            "device": self.describe(),
        }

    def message(self, text: str) -> None:
        """Print above the bar, on rank 0."""
        if self.parallel.is_main:
            self.display.message(text)

    def retry(self) -> None:
        """Write the lines that the disk has refused so far, if there are any."""
        if self.parallel.is_main:
            self._try("metrics.jsonl", self.metrics.retry)

    def sync(self) -> None:
        """Make the lines durable.  From any thread.

        Raises:
            OSError: the disk has refused some of them: a checkpoint after them would leave a gap in the record.
        """
        if self.parallel.is_main:
            if self.metrics.unwritten:
                raise OSError("lines of metrics.jsonl could not be written")
            os.fsync(self.metrics.file.fileno())

    def finish(self, text: str | None = None) -> None:
        """Draw the picture and print the last line, or ``text``; the trackers are closed with the processes."""
        if not self.parallel.is_main:
            return
        self.display.stop()
        self.retry()
        self.metrics.close()
        picture = self.directory / "loss_vs_time.png"
        self._try(picture.name, lambda: loss_vs_time(self.metrics.lines, picture, self.config.run.name))
        self.outcome = wandb_run.summary(self.metrics.lines, self.config.eval.target)
        if self.parallel.accelerator.trackers:
            self._try("wandb", self._summarise)
        seconds, tokens = self.last.get("train_time_s", 0.0), self.last.get("tokens", 0)
        speed = f", {tokens / seconds:,.0f} tokens/s" if seconds else ""
        val_loss = self.last.get("val/loss", float("nan"))
        final = f"final val loss {val_loss:.4f} after {duration(seconds)} of training{speed}; {self.directory}"
        if "target/steps" in self.outcome:
            steps, seconds = self.outcome["target/steps"], self.outcome["target/seconds"]
            self.message(f"val loss {self.config.eval.target:g} reached after {steps:,.0f} steps, {duration(seconds)}")
        self.message(text or final)

    def _remember(self, line: Mapping[str, Any]) -> None:
        self.last |= line
        self.previous = (line["tokens"], line["train_time_s"])

    def _speed(self, tokens: int, seconds: float) -> dict[str, float]:
        more_tokens, more_seconds = tokens - self.previous[0], seconds - self.previous[1]
        if more_tokens <= 0 or more_seconds <= 0:
            return {}
        speed = {"perf/tokens_per_s": more_tokens / more_seconds}
        peak = peak_flops(self.parallel.device)
        if peak and self.flops_per_token and self.parallel.dtype == torch.bfloat16:
            used = self.flops_per_token * speed["perf/tokens_per_s"]
            speed["perf/mfu"] = used / (peak * self.parallel.world_size)
        return speed

    def _peak_memory(self) -> dict[str, int]:
        """The largest peak of any rank.  A collective: evaluations are logged by all ranks."""
        mine = torch.tensor([self.parallel.peak_memory_bytes()], dtype=torch.int64, device=self.parallel.device)
        return {"perf/peak_memory_bytes": int(self.parallel.accelerator.gather(mine).max())}

    def _start_wandb(self) -> None:
        said = wandb_run.start(self.config, self.parallel)
        self.message(said)

    def _summarise(self) -> None:
        self.parallel.accelerator.get_tracker("wandb", unwrap=True).summary.update(self.outcome)

    def _try(self, what: str, act: Callable[[], Any]) -> None:
        """Do it; a failure is shown once and does not end the run."""
        try:
            act()
        except Exception as error:  # whatever a tracker or a disk may raise
            if what not in self.warned:
                self.warned.add(what)
                self.message(f"warning: {what} failed, training goes on without it: {error}")


def abandon() -> None:
    """After a run that failed in a process that goes on: take its bar from the screen, end its W&B run."""
    if Record.shown:
        Record.shown.stop()
    wandb_run.abandon()


def environment(parallel: Parallel) -> dict[str, Any]:
    """What is needed to repeat a run: versions, device, commit, command.  No environment variables, no paths."""
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "git": git_state(),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "platform": platform.platform(),
        "cuda": torch.version.cuda,
        "device": device_name(parallel.device),
        "world_size": parallel.world_size,
        "mode": parallel.mode,
        "threads": torch.get_num_threads(),
    }


def git_state() -> dict[str, Any] | None:
    """Commit of the checkout, and whether tracked files differ from it; None outside of git."""
    root = Path(__file__).resolve().parents[2]

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, timeout=20, check=True).stdout

    try:
        return {"commit": git("rev-parse", "HEAD").strip(), "dirty": bool(git("status", "--porcelain", "-uno").strip())}
    except (OSError, subprocess.SubprocessError):
        return None


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} ({os.cpu_count()} cores)"


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 FLOP/s of one device, None where it is not known."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((flops for part, flops in PEAK_FLOPS.items() if part in name), None)
