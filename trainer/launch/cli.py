"""From the command line to the job: compose, check, take the run's directory, then let Hydra run it.

Every rank composes the same configuration.  Nothing is created and no process group starts before all jobs of the
command line are known to be right.
"""

import gc
import os
import re
import sys
import time
import traceback
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path

import hydra
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.utils import get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from common import UserError
from data import Loader, open_split
from data import prepare as prepare_data
from trainer.config import OPEN_SECTIONS, Config, register, validate, world_size
from trainer.launch import processes
from trainer.launch.hydra_errors import COMPOSITION_ERRORS, explain, refuse_unknown
from trainer.launch.rendezvous import agree, attempt, meet_anew, rank, report
from trainer.launch.sweep import JobFailed, Sweep, told_alike
from trainer.metrics import record
from trainer.parallel import teardown
from trainer.run import resume
from trainer.run.directory import claim

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
SUBMITIT = "hydra_plugins.hydra_submitit_launcher."


def main(train: Callable[[Config], None]) -> None:
    """Run ``train`` on the configuration of the command line: once, or once per job of a sweep (``-m``).

    Exit code 1 and one line ``error: …`` for what the user can mend; of a sweep also if a job has not finished.
    """
    register()
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # a defect shows its whole trace
    sweep = None
    try:
        sweep = prepare()
        hydra.main(str(CONFIGS), "train", version_base="1.3")(lambda composed: run_job(composed, train, sweep))()
    except UserError as error:
        report(error)
        sys.exit(1)
    except COMPOSITION_ERRORS as error:
        report(UserError(explain(error, sys.argv[1:], CONFIGS)))
        sys.exit(1)
    except RuntimeError as error:
        if not type(error).__module__.startswith("submitit."):
            raise
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        report(JobFailed(f"a job of hydra/launcher has failed, others may go on: {said}; see {sweep.folder}/.submitit"))
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        complete = sweep is None or rank() > 0 or sweep.summary()
        teardown()
    if not complete:
        sys.exit(1)


def prepare() -> Sweep | None:
    """Check every job of the command line; returns the sweep, if it is one, with its folder settled.

    ``sys.argv`` is left as Hydra is to read it.
    """
    args, unknown = get_args_parser().parse_known_intermixed_args()
    informs = args.help or args.hydra_help or args.info or args.shell_completion
    if (informs or args.cfg) and rank() > 0:
        sys.exit(0)
    for option in unknown:
        raise UserError(f"{option}: no such option; see python train.py --help")
    if args.config_path or args.config_dir or args.config_name:
        raise UserError("other configuration folders are given as 'hydra.searchpath=[DIR]'")
    overrides = [settings_are_open(override) for override in args.overrides]
    sys.argv[1:] = [a for a in sys.argv[1:] if a not in args.overrides] + overrides
    if informs:
        return None
    sweep = check_jobs(overrides, args)
    if args.cfg:
        return None
    if sweep:
        if sweep.launcher.startswith(SUBMITIT):
            processes.prepare_submitit(sweep.launcher)
        sys.argv.append(f"hydra.sweep.dir={QuotedString(sweep.folder, Quote.single).with_quotes()}")
        sweep.begin()
    return sweep


def settings_are_open(override: str) -> str:
    """Let ``model.<key>`` and ``optim.<role>.<key>`` be set where the preset does not list it; the class checks it.
    ``run.from`` is ``run.from_`` inside, because Python keeps the word for itself."""
    override = re.sub(r"^run\.from=", "run.from_=", override)
    return re.sub(rf"^\+*((?:{'|'.join(map(re.escape, OPEN_SECTIONS))})\.[^=]+=)", r"++\1", override)


def check_jobs(overrides: Sequence[str], args: Namespace) -> Sweep | None:
    """Compose and validate every job; returns them, if they are a sweep.

    Raises:
        UserError: one line for the first job that cannot run.
    """
    with hydra.initialize_config_dir(str(CONFIGS), job_name="train", version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        try:
            whole = loader.load_configuration(
                "train", list(overrides), RunMode.MULTIRUN, validate_sweep_overrides=False
            )
            jobs, sweep = [list(overrides)], None
            if args.multirun or whole.hydra.mode == RunMode.MULTIRUN:
                check_plugins(whole.hydra)
                params = [f"{key}={value}" for key, value in (whole.hydra.sweeper.params or {}).items()]
                parsed = OverridesParser.create(config_loader=loader).parse_overrides(params + list(overrides))
                jobs = [job for batch in BasicSweeper.split_arguments(parsed, None) for job in batch]
                varying = [override.key_or_group for override in parsed if override.is_sweep_override()]
                sweep = Sweep(sweep_folder(whole.hydra.sweep.dir), varying, whole.hydra.launcher._target_)
            elif whole.hydra.launcher._target_.startswith(SUBMITIT):
                raise UserError("hydra/launcher starts the jobs of a sweep: give -m, for a single job too")
            composed = [hydra.compose("train", overrides=job) for job in jobs]
        except COMPOSITION_ERRORS as error:
            raise UserError(explain(error, overrides, CONFIGS)) from None
    for words, job in zip(jobs, composed, strict=True):
        refuse_unknown(job, CONFIGS)
        if sweep and job.run.dir:
            raise UserError(f"run.dir={job.run.dir} would be shared by the jobs of a sweep: give hydra.sweep.dir=DIR")
        config = validate(job, ranks_of(job, whole.hydra.launcher))
        if sweep:
            sweep.add(config, words, job.run.name)
    return sweep


def check_plugins(settings: DictConfig) -> None:
    if not settings.sweeper._target_.endswith(".BasicSweeper"):
        raise UserError("hydra/sweeper: only Hydra's basic sweeper names its jobs beforehand; leave it out")
    if processes.are_started() and settings.launcher._target_.startswith(SUBMITIT):
        raise UserError("hydra/launcher starts the processes itself: start with python train.py -m, without torchrun")


def sweep_folder(given: str) -> str:
    return agree("sweep", lambda: given if given != "." else f"runs/{time.strftime('%Y%m%d-%H%M%S')}-sweep")


def ranks_of(job: DictConfig, launcher: DictConfig) -> int:
    """Processes that will do a job: those that are started, or will be by Hydra's launcher or by this process."""
    if processes.are_started():
        return world_size()
    if launcher._target_.startswith(SUBMITIT):
        return launcher.nodes * launcher.tasks_per_node
    return job.run.processes or world_size()


def run_job(composed: DictConfig, train: Callable[[Config], None], sweep: Sweep | None) -> None:
    """One job: in this process, if it is one of the job's; otherwise in processes of its own."""
    job = HydraConfig.get()
    number, overrides = OmegaConf.select(job, "job.num", default=0), list(job.overrides.task)
    processes.join_submitit()
    began, where = time.monotonic(), ""
    try:
        config = validate(composed, ranks_of(composed, job.launcher))
        if sweep:
            sweep.place(config, overrides, composed.run.name)
            where = config.run.dir
            if rank() == 0:
                print(f"job {number + 1} of {len(sweep.jobs)}: {Path(where).name}", flush=True)
        config.run.dir = agree(f"job {number}", lambda: settle(config))
        if done := agree(f"finished {number} {attempt()}", lambda: resume.finished(config)):
            if rank() == 0:
                print(done)
        elif processes.are_started() or (not sweep and config.run.processes in (None, 1)):
            meet_anew(number)
            train(config)
        else:
            searched = [o for o in job.overrides.hydra if o.startswith("hydra.searchpath=")]
            processes.start(config, overrides + searched)
        if sweep:
            sweep.states[where] = "stopped"  # unless its record says that it has finished
            go_on_after(config, number, time.monotonic() - began)
        return
    except JobFailed:
        told = True
    except UserError as error:
        told = sweep is not None and told_alike(error, number)
        if not sweep:
            report(error)
    except Exception:
        traceback.print_exc()
        told = world_size() == 1
    if sweep:
        sweep.states[where] = "failed"
    if sweep and told:
        record.abandon()
        gc.collect()  # what the job has left, on the device too
        return
    fail(sweep)


def go_on_after(config: Config, number: int, seconds: float) -> None:
    """End the sweep if a signal has stopped the job that returned: it was meant for all of them."""
    limit = config.train.max_minutes
    its_own = limit is not None and seconds >= 60 * limit
    told = agree(f"stopped {number} {attempt()}", lambda: "" if its_own or resume.finished(config) else "to stop")
    if told and not processes.of_submitit():
        sys.exit(1)
    gc.collect()


def settle(config: Config) -> str:
    """On rank 0: see that the data can be read and fill a batch, then take the run's directory; returns its path."""
    if not config.data.download:  # which may take long; the Trainer does it, one rank a node
        prepare_data(config.data)
        files, train = open_split(config.data).train, config.train
        sequences = train.batch_tokens // train.seq_len
        Loader(files, seq_len=train.seq_len, batch_sequences=sequences, order=config.data.order).close()
    return claim(config)


def fail(sweep: Sweep | None) -> None:
    """End all with exit code 1."""
    if world_size() > 1:  # at once: the other ranks may wait in a collective
        if sweep and rank() == 0:
            sweep.summary()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)
    sys.exit(1)
