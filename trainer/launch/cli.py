"""From the command line to its jobs: all are composed and checked, then Hydra runs them one by one.

Every rank composes the same configuration.  Nothing is created and no process group starts before all jobs of the
command line are known to be right.
"""

import io
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence

import hydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from omegaconf import DictConfig
from rich.console import Console
from rich.progress import track

from common import UserError
from trainer.config import Config, register
from trainer.launch import processes
from trainer.launch.compose import check, check_choices, hydra_initialized, to_hydra
from trainer.launch.hydra_errors import COMPOSITION_ERRORS, CONFIGS, explain
from trainer.launch.hydra_private import BasicSweeper, get_args_parser
from trainer.launch.job import run_job
from trainer.launch.rendezvous import broadcast_rank0, check_environment, rank, report_error
from trainer.launch.sweep import JobFailed, Sweep, in_order
from trainer.parallel import teardown
from trainer.run.preemption import leave_with_launcher


def main(train: Callable[[Config], None]) -> None:
    """Run ``train`` on the configuration of the command line: once, or once per job of a sweep (``-m``).

    Exit code 1 and one line ``error: …`` for what the user can mend; of a sweep also if a job has not finished.
    """
    leave_with_launcher()
    register()  # --help composes too
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # a defect shows its whole trace
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that lacks a sign ends no run
    sweep = None
    try:
        sweep = parse_command_line()
        hydra.main(str(CONFIGS), "train", version_base="1.3")(lambda composed: run_job(composed, train, sweep))()
    except (UserError, *COMPOSITION_ERRORS) as error:
        report_error(error if isinstance(error, UserError) else UserError(explain(error, sys.argv[1:])))
        sys.exit(1)
    except RuntimeError as error:
        if sweep is None or not type(error).__module__.startswith("submitit."):
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        log = f"{sweep.folder}/.submitit"
        report_error(JobFailed(f"a job of hydra/launcher has failed, others may go on: {reason}; see {log}"))
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        complete = sweep is None or rank() > 0 or sweep.summary()
        teardown()
    if not complete:
        sys.exit(1)


def parse_command_line() -> Sweep | None:
    """Check every job of the command line; returns the sweep, if it is one, with its folder decided.

    ``sys.argv`` is left as Hydra is to read it.
    """
    check_environment()
    args, unknown = get_args_parser().parse_known_intermixed_args()
    info_only = args.help or args.hydra_help or args.info or args.shell_completion
    if (info_only or args.cfg) and rank() > 0:
        sys.exit(0)
    for option in unknown:
        raise UserError(f"{option}: no such option; see python train.py --help")
    if args.config_path or args.config_dir or args.config_name:
        raise UserError("other configuration folders are given as 'hydra.searchpath=[DIR]'")
    overrides = [to_hydra(override) for override in args.overrides]
    sys.argv[1:] = [a for a in sys.argv[1:] if a not in args.overrides] + overrides
    sweep = None if info_only else compose_jobs(overrides, args.multirun)
    if not sweep or args.cfg:
        return None
    if processes.is_submitit(sweep.launcher):
        processes.prepare_submitit(sweep.launcher)
    sys.argv.append(f"hydra.sweep.dir={processes.quoted(sweep.folder)}")
    sweep.start()
    return sweep


def compose_jobs(overrides: Sequence[str], multirun: bool = False) -> Sweep | None:
    """Compose and validate every job; returns them, if they are a sweep.

    Raises UserError: one line for the first job that cannot run.
    """
    with hydra_initialized(overrides) as loader:
        whole = loader.load_configuration("train", list(overrides), RunMode.MULTIRUN, validate_sweep_overrides=False)
        launcher = whole.hydra.launcher
        jobs, sweep = [list(overrides)], None
        if multirun or whole.hydra.mode == RunMode.MULTIRUN:
            check_plugins(whole.hydra)
            params = [f"{key}={value}" for key, value in (whole.hydra.sweeper.params or {}).items()]
            parsed = OverridesParser.create(config_loader=loader).parse_overrides(params + list(overrides))
            jobs = [list(job) for batch in BasicSweeper.split_arguments(parsed, None) for job in batch]
            jobs = in_order(jobs, whole.sweep.order)
            swept_keys = [override.key_or_group for override in parsed if override.is_sweep_override()]
            if not jobs:
                raise UserError(f"{' '.join(overrides)}: the sweep has no job; give every swept key a value")
            if of_hydra := [key for key in swept_keys if key.startswith("hydra")]:
                raise UserError(f"{of_hydra[0]}: a sweep is over keys of the runs, not of Hydra; give it one value")
            sweep = Sweep(broadcast_rank0("sweep", lambda: sweep_folder(whole.hydra)), swept_keys, launcher._target_)
        elif processes.is_submitit(launcher._target_):
            raise UserError("hydra/launcher starts the jobs of a sweep: give -m, for a single job too")
        composed = [hydra.compose("train", overrides=job) for job in watched(jobs)]
    for words, job in zip(jobs, composed, strict=True):
        check_choices(job, words)
        config = check(job, processes.job_world_size(job, launcher))
        if sweep:
            sweep.add(config, job, words, job.run.name)
    return sweep


def watched(jobs: list[list[str]]) -> Iterable[list[str]]:
    """A bar on rank 0's terminal while a sweep's jobs are composed, half a second each."""
    console = Console(stderr=True)
    few = len(jobs) < 10 or rank() > 0 or not console.is_terminal
    return track(jobs, "reading the jobs' settings", console=console, transient=True, disable=few)


def check_plugins(settings: DictConfig) -> None:
    if not settings.sweeper._target_.endswith(".BasicSweeper"):
        raise UserError("hydra/sweeper: only Hydra's basic sweeper names its jobs beforehand; leave it out")
    if processes.is_launched() and processes.is_submitit(settings.launcher._target_):
        raise UserError("hydra/launcher starts the processes itself: start with python train.py -m, without torchrun")


def sweep_folder(settings: DictConfig) -> str:
    return f"runs/{time.strftime('%Y%m%d-%H%M%S')}-sweep" if settings.sweep.dir == "." else settings.sweep.dir
