"""From the command line to the job: compose, check, take the run's directory, then let Hydra run it.

Every rank composes the same configuration.  Nothing is created and no process group starts before all jobs of the
command line are known to be right.  Under torchrun a sweep's jobs follow one another in the same processes.
"""

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
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from data import DataError, open_split
from data import prepare as prepare_data
from optim.routing import ROLES
from trainer import resume, rundir, schema
from trainer.agree import agree, attempt, meet_anew, rank, report
from trainer.commit import CheckpointError
from trainer.explain import COMPOSITION_ERRORS, explain, refuse_unknown
from trainer.loop import TrainingError
from trainer.parallel import teardown
from trainer.schema import Config, ConfigError, world_size

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
USER_ERRORS = (ConfigError, DataError, CheckpointError, TrainingError)


class JobFailed(Exception):
    """A job failed and has said why; the jobs after it in the sweep still run."""


def main(train: Callable[[Config], None]) -> None:
    """Run ``train`` on the configuration of the command line: once, or once per job of a sweep (``-m``).

    Exit code 1 and one line ``error: …`` for what the user can mend.
    """
    schema.register()
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # a defect shows its whole trace
    try:
        varying = prepare()
        hydra.main(str(CONFIGS), "train", version_base="1.3")(lambda composed: run_job(composed, train, varying))()
    except USER_ERRORS as error:
        report(error)
        sys.exit(1)
    except COMPOSITION_ERRORS as error:
        report(ConfigError(explain(error, sys.argv[1:], CONFIGS)))
        sys.exit(1)
    except JobFailed:
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        teardown()


def prepare() -> list[str]:
    """Check every job of the command line and settle the sweep's folder; returns the keys that the sweep varies.

    ``sys.argv`` is left as Hydra is to read it.
    """
    args, unknown = get_args_parser().parse_known_intermixed_args()
    informs = args.help or args.hydra_help or args.info or args.shell_completion
    if (informs or args.cfg) and rank() > 0:
        sys.exit(0)
    for option in unknown:
        raise ConfigError(f"{option}: no such option; see python train.py --help")
    if args.config_path or args.config_dir or args.config_name:
        raise ConfigError("other configuration folders are given as 'hydra.searchpath=[DIR]'")
    overrides = [settings_are_open(override) for override in args.overrides]
    sys.argv[1:] = [a for a in sys.argv[1:] if a not in args.overrides] + overrides
    if informs:
        return []
    varying, is_sweep = check_jobs(overrides, args)
    if is_sweep and not any(override.startswith("hydra.sweep.dir=") for override in overrides):
        folder = agree("sweep", lambda: f"runs/{time.strftime('%Y%m%d-%H%M%S')}-sweep")
        sys.argv.append(f"hydra.sweep.dir={folder}")
    return varying


def settings_are_open(override: str) -> str:
    """Let ``optim.<role>.<setting>`` be set where the preset does not list it; the schema checks it by the class.
    ``run.from`` is ``run.from_`` inside, because Python keeps the word for itself."""
    override = re.sub(r"^run\.from=", "run.from_=", override)
    return re.sub(rf"^\+*(optim\.(?:{'|'.join(ROLES)})\.[^=]+=)", r"++\1", override)


def check_jobs(overrides: Sequence[str], args: Namespace) -> tuple[list[str], bool]:
    """Compose and validate every job; returns the keys that vary between them, and whether it is a sweep.

    Raises:
        ConfigError: one line for the first job that cannot run.
    """
    with hydra.initialize_config_dir(str(CONFIGS), job_name="train", version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        try:
            whole = loader.load_configuration(
                "train", list(overrides), RunMode.MULTIRUN, validate_sweep_overrides=False
            )
            is_sweep = args.multirun or whole.hydra.mode == RunMode.MULTIRUN
            if not is_sweep or not whole.hydra.sweeper._target_.endswith(".BasicSweeper"):
                jobs, varying = [list(overrides)] if not is_sweep else [], []
            else:
                params = [f"{key}={value}" for key, value in (whole.hydra.sweeper.params or {}).items()]
                parsed = OverridesParser.create(config_loader=loader).parse_overrides(params + list(overrides))
                jobs = [job for batch in BasicSweeper.split_arguments(parsed, None) for job in batch]
                varying = [o.key_or_group for o in parsed if o.is_sweep_override()]
            composed = [hydra.compose("train", overrides=job) for job in jobs]
        except COMPOSITION_ERRORS as error:
            raise ConfigError(explain(error, overrides, CONFIGS)) from None
    for job in composed:
        refuse_unknown(job, CONFIGS)
        if is_sweep and job.run.dir:
            raise ConfigError(f"run.dir={job.run.dir} would be shared by the jobs of a sweep: give hydra.sweep.dir=DIR")
        schema.validate(job, world_size())
    return varying, is_sweep


def run_job(composed: DictConfig, train: Callable[[Config], None], varying: Sequence[str]) -> None:
    """One job, in the process that does it."""
    job = HydraConfig.get()
    in_sweep = job.mode == RunMode.MULTIRUN
    try:
        config = schema.validate(composed, world_size())
        if in_sweep:
            config.logger.group = config.logger.group or Path(job.sweep.dir).name
            kept = [o for o in job.overrides.task if o.lstrip("+").partition("=")[0] in varying]
            name = rundir.job_name(kept, config.seed)
            also = [o for o in kept if o.partition("=")[0] not in ("optim", "seed")]
            config.logger.label = config.logger.label or ",".join([config.optim.name, *also])
            config.run.name = composed.run.name or name
            config.run.dir = str(Path(job.sweep.dir) / name)
        number = OmegaConf.select(job, "job.num", default=0)
        config.run.dir = agree(f"job {number}", lambda: settle(config))
        done = agree(f"finished {number} {attempt()}", lambda: resume.finished(config))
        if done:
            if rank() == 0:
                print(done)
            return
        meet_anew(number)
        train(config)
    except USER_ERRORS as error:
        report(error)
        fail(in_sweep)
    except Exception:
        traceback.print_exc()
        fail(in_sweep)


def settle(config: Config) -> str:
    """On rank 0: see that the data can be read, then take the run's directory; returns its path."""
    if not config.data.download:  # which may take long; the Trainer does it, one rank a node
        prepare_data(config.data)
        open_split(config.data)
    return rundir.claim(config)


def fail(in_sweep: bool) -> None:
    """End this job with exit code 1; in one process, the sweep's other jobs still run."""
    if world_size() > 1:  # at once: the other ranks may wait in a collective, and Hydra would start the next job here
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)
    if in_sweep:
        raise JobFailed from None
    sys.exit(1)
