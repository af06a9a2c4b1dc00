"""A sweep: its jobs' names and directories, and what became of each.

    python train.py -m …                        each job has processes of its own (processes.py)
    torchrun … train.py -m …                    the jobs follow one another in the same processes
    python train.py -m hydra/launcher=slurm …   each job is one of SLURM's

The summary is read from the jobs' records, so it is the same for all three.
"""

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from common import UserError
from trainer.config import Config, Order
from trainer.launch.rendezvous import rank
from trainer.metrics.console import duration
from trainer.metrics.jsonl import FILE, read_lines
from trainer.run import resume
from trainer.run.directory import job_name

FINISHED, FINISHED_BEFORE = "finished", "finished before"


class JobFailed(Exception):
    """A job failed and has said why; the jobs after it in the sweep still run."""


def in_order(jobs: list[list[str]], order: Order) -> list[list[str]]:
    """The jobs, each a list of overrides, in the order in which they run.

    abba: all jobs of the first seed, all of the second one backwards, and so on, so that over an even number of seeds a
    machine that grows slower or faster evenly does so for every setting alike.

    Raises UserError: there are not several seeds to do so with.
    """
    if order == Order.listed:
        return jobs
    blocks: dict[str, list[list[str]]] = {}
    for job in jobs:
        seed = next((word for word in job if word.startswith("seed=")), "")
        blocks.setdefault(seed, []).append(job)
    if len(blocks) < 2:
        raise UserError("sweep.order=abba turns the order round from seed to seed: give several, such as seed=1,2,3,4")
    return [job for i, block in enumerate(blocks.values()) for job in block[:: -1 if i % 2 else 1]]


@dataclass
class Sweep:
    """The jobs in their order, each with its directory inside ``folder``."""

    folder: str
    swept_keys: list[str]  # those that have several values
    launcher: str = ""  # class of Hydra's
    jobs: list[Config] = field(default_factory=list)
    composed: list[DictConfig] = field(default_factory=list)  # the same, as this machine has not yet completed them
    overrides: list[list[str]] = field(default_factory=list)  # of each, without Hydra's own
    names: list[str] = field(default_factory=list)  # of the jobs' directories
    finished_before: set[int] = field(default_factory=set)  # jobs that had finished when the sweep began
    statuses: dict[int, str] = field(default_factory=dict)  # by job, what this process knows of the unfinished

    def add(self, config: Config, composed: DictConfig, overrides: Sequence[str], name: str | None) -> None:
        """Name a job after what varies in its ``overrides``, and give it a directory in the sweep's folder.

        Args:
            name: ``run.name``, if the user chose it.

        Raises:
            UserError: two jobs would share a directory.
        """
        if config.run.dir:
            raise UserError(
                f"run.dir={config.run.dir} would be shared by the jobs of a sweep: give hydra.sweep.dir=DIR"
            )
        kept = [o.lstrip("+") for o in overrides if o.lstrip("+").partition("=")[0] in self.swept_keys]
        also = [o for o in kept if o.partition("=")[0] not in ("optim", "seed")]
        folder = job_name(kept, config.seed)
        if folder in self.names:
            raise UserError(
                f"{' '.join(kept)}: two jobs would share the folder {folder}: give each value once, and values that "
                "differ in special characters only to two sweeps"
            )
        config.run.name, config.run.dir = name or folder, str(Path(self.folder) / folder)
        config.logger.group = config.logger.group or Path(self.folder).name
        config.logger.label = config.logger.label or ",".join([config.optim.name, *also])
        self.jobs.append(config)
        self.composed.append(composed)
        self.overrides.append([o for o in overrides if not o.lstrip("+~").startswith(("hydra.", "hydra/"))])
        self.names.append(folder)

    def start(self) -> None:
        """Note what is finished already; say how to start again."""
        self.finished_before = {number for number, config in enumerate(self.jobs) if resume.finished(config)}
        if rank() == 0:
            done = f", {len(self.finished_before)} of them finished" if self.finished_before else ""
            again = f"to start again: the same command with hydra.sweep.dir={shlex.quote(self.folder)}"
            print(f"sweep {self.folder}: {len(self.jobs)} jobs{done}; {again}", flush=True)

    def status(self, number: int) -> str:
        """finished, finished before, failed, stopped, or what the directory shows."""
        if resume.finished(self.jobs[number]):
            return FINISHED_BEFORE if number in self.finished_before else FINISHED
        shown = "unfinished" if Path(self.folder, self.names[number]).exists() else "not started"
        return self.statuses.get(number, shown)

    def summary(self, console: Console | None = None) -> bool:
        """Print a table of the jobs and how to compare them; returns whether all have finished."""
        table = Table(box=None, pad_edge=False, header_style="bold")
        table.add_column("job", overflow="fold")  # a name that is cut cannot be looked up
        table.add_column("status")
        for column in ("steps", "val loss", "trained"):
            table.add_column(column, justify="right")
        statuses = [self.status(number) for number in range(len(self.jobs))]
        for name, status in zip(self.names, statuses, strict=True):
            last = {key: value for line in read_lines(Path(self.folder, name, FILE)) for key, value in line.items()}
            loss = "-" if last.get("val/loss") is None else f"{last['val/loss']:.4f}"
            table.add_row(name, status, f"{last.get('step', 0)}", loss, duration(last.get("train_time_s", 0.0)))
        in_log = None if sys.stdout.isatty() else 200  # columns; a file has no width
        console = console or Console(soft_wrap=True, highlight=False, width=in_log)
        console.print(table)
        ended = {FINISHED, FINISHED_BEFORE}
        if ended.intersection(statuses):
            console.print(f"compare: {self.compare_command()}", markup=False)
        if missing := sum(status not in ended for status in statuses):
            same = f"the same command with hydra.sweep.dir={shlex.quote(self.folder)} runs only those"
            anew = "with run.resume=restart, those without a checkpoint begin anew"
            console.print(f"{missing} of {len(statuses)} jobs have not finished; {same} ({anew})", markup=False)
            if "submitit" in self.launcher:
                console.print(f"what they said: {self.folder}/.submitit/*/*_log.*", markup=False)
        return not missing

    def compare_command(self) -> str:
        """The command that draws the sweep's page."""
        labels = {config.logger.label or "" for config in self.jobs if resume.finished(config)}
        words = ["python", "scripts/compare.py", self.folder, "--out", str(Path(self.folder) / "speedrun")]
        return shlex.join(words + (["--baseline", "adamw"] if "adamw" in labels and len(labels) > 1 else []))
