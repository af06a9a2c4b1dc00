"""The record of a run: metrics.jsonl, config.yaml, environment.json, loss_vs_time.png, W&B, and what is shown.

Only rank 0 writes and shows.  A part of the record that fails says so once and is left out; the run goes on.
"""

import os
import shlex
import statistics
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from omegaconf import OmegaConf
from torch import Tensor

from common import UserError, write_json, write_text
from data import TrainValSplit
from trainer.config import Config, LoggerKind
from trainer.language_model import ModelConfig, gives_logits, model_class
from trainer.metrics import wandb as wandb_run
from trainer.metrics.console import Display, duration
from trainer.metrics.environment import describe, environment, header, peak_flops
from trainer.metrics.jsonl import FILE, JsonLines, read_lines
from trainer.metrics.plot import loss_vs_time
from trainer.metrics.source import keep_source
from trainer.metrics.summary import summary
from trainer.parallel import Parallel
from trainer.schedules.config import brought
from trainer.schedules.due import eval_is_due
from trainer.schedules.mup import with_multipliers

Value = float | str | Tensor


class Metrics:
    """Collects what is measured by step, and writes the lines that are due.

    Values may be scalars on the device: they are read together, where a line is due, so that the host does not wait
    for the device in between.  A line that says that an update was skipped, or that the loss spikes, is always due.

    Args:
        config: resolved; ``run.dir`` belongs to this run already.
        parallel: rank, device and the Accelerator whose trackers are used.
        run_id: the name under which trackers know the run.
        split: the data that it reads.
        display: what shows the progress; tests give their own.
    """

    shown: ClassVar[Display | None] = None  # of the record that this process writes

    def __init__(
        self,
        config: Config,
        parallel: Parallel,
        run_id: str | None = None,
        split: TrainValSplit | None = None,
        display: Display | None = None,
    ):
        self.config, self.parallel, self.run_id, self.split = config, parallel, run_id, split
        self.directory = config.run.path
        self.on_host = parallel.device.type == "cpu"
        self.pending: dict[int, dict[str, Value]] = {}
        self.noted: dict[str, Any] = {}
        self.header_written = False
        self.recent: deque[float] = deque(maxlen=64)  # finite losses
        self.warned: set[str] = set()
        self.last: dict[str, Any] = {"tokens": 0, "train_time_s": 0.0}  # latest value of every key
        self.flops_per_token: float | None = None
        self.branch: str | None = None
        if parallel.is_main:
            self.display = display or Display(config.train.steps)

    def start(
        self,
        table: Sequence[Mapping[str, Any]] = (),
        flops_per_token: float | None = None,
        step: int = 0,
        unfinished: bool = True,
        branch: str | None = None,
    ) -> None:
        """Write what is known before the first step.

        Args:
            table: a row per role of the optimizers; printed.
            flops_per_token: of a forward and backward pass, for MFU.
            step: updates already done, by the run that is resumed; lines of later steps are removed.
            unfinished: the evaluation after ``step`` is still to be done, and to be added to its line.
            branch: RUN@STEP whose record this one begins with.

        Raises:
            UserError: nothing can be written into ``run.dir``.
        """
        self.flops_per_token, self.branch = flops_per_token, branch
        if self.parallel.is_main:
            self._open(step, unfinished)
            self.message(f"run directory {self.directory}, {describe(self.parallel)}")
            if table:
                self.display.table(with_multipliers(table, self.config))
            if self.source.startswith("not "):
                self.message(f"source {self.source}")
            for warning in (brought(self.config), self.config.schedule.early_end(self.config.train.steps)):
                if warning:
                    self.message(f"warning: {warning}")
        if self.config.logger.kind == LoggerKind.wandb:
            self._try("wandb", lambda: self.message(wandb_run.start(self.config, self.parallel, self.run_id)))
        if self.parallel.is_main:
            Metrics.shown = self.display
            self.display.start(step)

    def _open(self, step: int, unfinished: bool) -> None:
        path = self.directory / FILE
        lines = [line for line in read_lines(path) if line["step"] <= step]
        if unfinished and lines and lines[-1]["step"] == step:
            self.pending[step] = {key: value for key, value in lines.pop().items() if key != "run"}
        if step == 0:
            lines = []
        try:
            write_text(self.directory / "config.yaml", OmegaConf.to_yaml(OmegaConf.structured(self.config)))
            self.source = keep_source(self.directory)
            write_json(self.directory / "environment.json", environment(self.parallel, self.source))
            self.file = JsonLines(path, lines)
        except OSError as error:
            raise UserError(
                f"run.dir={self.directory} cannot be written ({error.strerror}): make room, or choose another folder"
            ) from None
        for line in lines:
            self.last |= line

    # What is measured --------------------------------------------------------------------------------------------

    def add(self, step: int, values: Mapping[str, Value]) -> None:
        """Numbers that belong to the weights after update ``step``, such as its training loss."""
        self.pending.setdefault(step, {}).update(values)

    def note(self, **values: Any) -> None:
        """Goes into the next line, whatever its step."""
        self.noted |= values

    def is_due(self, step: int) -> bool:
        """Whether step has a line in any case."""
        return eval_is_due(self.config, step) or step % self.config.logger.every == 0

    def write(self, step: int, seconds: float, *, at_once: bool = False) -> None:
        """The lines up to ``step`` that are due, or worth it; does nothing where none is due and the host would wait.

        Args:
            seconds: of training so far.
            at_once: look for lines that are worth it in any case.
        """
        if not (at_once or self.on_host or self.is_due(step)):
            return
        pending, self.pending = self.pending, {}
        if not self.parallel.is_main:
            return
        for at, line in _to_host(pending).items():
            unusual = self._unusual(at, line)
            if unusual or self.is_due(at):
                self._write_line(at, seconds, line | unusual)

    def _unusual(self, step: int, line: dict[str, Any]) -> dict[str, Any]:
        """What makes a line worth writing although none is due; ``skipped`` is left in a line only if it is."""
        if skipped := line.pop("skipped", 0):
            return {"skipped": int(skipped), "batch": step - 1}
        loss = line.get("train/loss")
        if loss is None:
            return {}
        excess = loss - statistics.fmean(self.recent) if is_spike(self.recent, loss) else None
        self.recent.append(loss)
        return {} if excess is None else {"spike": excess, "batch": step - 1}

    def _write_line(self, step: int, seconds: float, line: dict[str, Any]) -> None:
        tokens = step * self.config.train.batch_tokens
        line = {"step": step, "tokens": tokens, "train_time_s": seconds, **self._speed(tokens, seconds), **line}
        line |= self.noted
        self.noted = {}
        self.last |= line
        # The first line of every start says under which conditions it and the lines after it were measured.
        whole = line if self.header_written else {**line, "run": self._header()}
        self.header_written = True
        self._try(FILE, lambda: self.file.append(whole))
        self.display.update(line)
        if self.parallel.accelerator.trackers:
            self._try("wandb", lambda: self.parallel.accelerator.log(line, step=step))

    def _header(self) -> dict[str, Any]:
        known = header(self.config, self.parallel, self.split) | {"source": self.source}
        return known | ({"branch": self.branch} if self.branch else {})

    def _speed(self, tokens: int, seconds: float) -> dict[str, float]:
        """Since the line before."""
        more_tokens, more_seconds = tokens - self.last["tokens"], seconds - self.last["train_time_s"]
        if more_tokens <= 0 or more_seconds <= 0:
            return {}
        speed = {"perf/tokens_per_s": more_tokens / more_seconds}
        peak = peak_flops(self.parallel.device)
        if peak and self.flops_per_token and self.parallel.dtype == torch.bfloat16:
            used = self.flops_per_token * speed["perf/tokens_per_s"]
            speed["perf/mfu"] = used / (peak * self.parallel.world_size)
        return speed

    # What is said and kept ---------------------------------------------------------------------------------------

    def message(self, text: str) -> None:
        """Print above the bar, on rank 0."""
        if self.parallel.is_main:
            self.display.message(text)

    def retry(self) -> None:
        """Write the lines that the disk has refused so far, if there are any."""
        if self.parallel.is_main:
            self._try(FILE, self.file.retry)

    def sync(self) -> None:
        """Make the lines durable.  From any thread.

        Raises OSError: the disk has refused some of them: a checkpoint after them would leave a gap in the record.
        """
        if self.parallel.is_main:
            if self.file.unwritten:
                raise OSError("lines of metrics.jsonl could not be written")
            os.fsync(self.file.file.fileno())

    def finish(self, reason: str | None = None, step: int = 0) -> None:
        """Draw the picture and say what the run came to, or that it has stopped for ``reason`` after update ``step``.

        The trackers are closed with the processes.

        Raises UserError: the disk has refused lines to the end.
        """
        if not self.parallel.is_main:
            return
        self.display.stop()
        self.retry()
        self.file.close()
        picture = self.directory / "loss_vs_time.png"
        self._try(picture.name, lambda: loss_vs_time(self.file.lines, picture, self.config.run.name or ""))
        outcome = summary(self.file.lines, self.config.eval.target)
        accelerator = self.parallel.accelerator
        if accelerator.trackers:
            self._try("wandb", lambda: accelerator.get_tracker("wandb", unwrap=True).summary.update(outcome))
        if "target/steps" in outcome:
            steps, seconds = outcome["target/steps"], outcome["target/seconds"]
            self.message(f"val loss {self.config.eval.target:g} reached after {steps:,.0f} steps, {duration(seconds)}")
        if reason:
            again = f"to go on, start the same command with run.dir={self.directory}"
            self.message(f"stopped by {reason} after update {step} of {self.config.train.steps}; {again}")
        else:
            seconds, val_loss = self.last["train_time_s"], self.last.get("val/loss")
            val_loss = float("nan") if val_loss is None else val_loss  # null in a record that is gone on with
            speed = f", {self.last['tokens'] / seconds:,.0f} tokens/s" if seconds else ""
            trained = f"{duration(seconds)} of training{speed}"
            self.message(f"final val loss {val_loss:.4f} after {trained}; {self.directory}")
            if self.config.checkpoint.last and gives_logits(model_class(target := self.config.model._target_)):
                trust = "" if target == ModelConfig._target_ else " --trust-code"
                self.message(f"text from it: python scripts/sample.py {shlex.quote(str(self.directory))}{trust}")
        if lost := self.file.unwritten.count(b"\n"):
            raise UserError(f"{self.directory / FILE}: {lost} lines could not be written: make room there")

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
    if Metrics.shown:
        Metrics.shown.stop()
    wandb_run.abandon()


def is_spike(recent: Sequence[float], loss: float, deviations: float = 6.0) -> bool:
    """Whether ``loss`` exceeds the mean of the recent ones by so many of their standard deviations."""
    if len(recent) < 16:
        return False
    return loss > statistics.fmean(recent) + deviations * statistics.pstdev(recent)


def _to_host(pending: Mapping[int, Mapping[str, Value]]) -> dict[int, dict[str, Any]]:
    """Plain numbers in place of tensors, which leave the device all at once."""
    tensors = [value.double() for values in pending.values() for value in values.values() if isinstance(value, Tensor)]
    numbers = iter(torch.stack(tensors).tolist() if tensors else ())
    return {
        step: {key: next(numbers) if isinstance(value, Tensor) else value for key, value in values.items()}
        for step, values in pending.items()
    }
