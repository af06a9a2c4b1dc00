"""One job of a command line: its run directory, then training in this process or in processes of its own."""

import gc
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from common import UserError
from data import Loader, open_split
from data import prepare as prepare_data
from trainer.config import Config, Resume, world_size
from trainer.evaluate.measure import check_tasks
from trainer.launch import processes
from trainer.launch.compose import check
from trainer.launch.failures import report_failed_ranks, silent_ranks
from trainer.launch.rendezvous import broadcast_rank0, rank, reinit_rendezvous, report_error, restart_count
from trainer.launch.sweep import JobFailed, Sweep
from trainer.metrics import record
from trainer.run import resume
from trainer.run.directory import acquire_run_dir

ERROR_TIMEOUT = 15.0  # seconds between the first rank and the last to meet an error that all ranks meet
Train = Callable[[Config], None]


def run_job(composed: DictConfig, train: Train, sweep: Sweep | None) -> None:
    """Run the job that Hydra has composed; one that fails ends the command line, or leaves the sweep to the others."""
    job = HydraConfig.get()
    number = 0 if OmegaConf.is_missing(job.job, "num") else job.job.num
    searched = [override for override in job.overrides.hydra if override.startswith("hydra.searchpath=")]
    overrides = job.overrides.task
    if sweep:  # whose order is its own; Hydra only counts
        composed, overrides = sweep.composed[number], sweep.overrides[number]
    processes.export_submitit_ranks()
    started = time.monotonic()
    try:
        config = check(composed, processes.job_world_size(composed, job.launcher))
        if sweep:
            config.run, config.logger = sweep.jobs[number].run, sweep.jobs[number].logger
            if rank() == 0:
                print(f"job {number + 1} of {len(sweep.jobs)}: {sweep.names[number]}", flush=True)
        train_or_launch(config, train, number, [*overrides, *searched], sweep)
        if sweep:
            sweep.statuses[number] = "stopped"  # unless its record says that it has finished
            stop_sweep_if_preempted(config, number, time.monotonic() - started)
        return
    except JobFailed:
        others_go_on = True
    except UserError as error:
        report_error(error, number)
        # Where a rank has not failed, it waits for this one in vain.
        others_go_on = sweep is not None and (world_size() == 1 or not silent_ranks(f"failed {number}", ERROR_TIMEOUT))
    except Exception:
        traceback.print_exc()
        others_go_on = world_size() == 1
    if sweep:
        sweep.statuses[number] = "failed"
    if sweep and others_go_on:
        record.abandon()
        gc.collect()  # what the job has left, on the device too
        return
    exit_all_ranks(sweep)


def train_or_launch(config: Config, train: Train, number: int, overrides: Sequence[str], sweep: Sweep | None) -> None:
    """Call ``train`` if this process is one of the job's, otherwise start those; neither if the run is finished."""
    config.run.dir = broadcast_rank0(f"job {number}", lambda: prepare_run_dir(config))
    if config.run.resume == Resume.never:
        config.run.resume = Resume.auto  # the directory is this run's own from now on
    if done := broadcast_rank0(f"finished {number} {restart_count()}", lambda: resume.finished(config)):
        if rank() == 0:
            print(done)
    elif processes.is_launched() or (not sweep and config.run.processes in (None, 1)):
        reinit_rendezvous(number)
        with report_failed_ranks():
            train(config)
    else:
        processes.launch(config, overrides)


def prepare_run_dir(config: Config) -> str:
    """On rank 0: see that what the run begins with is there, that tasks are, and that the data can be read and fill a
    batch; then take the run's directory; returns its path."""
    resume.check_sources(config)
    check_tasks(config)
    if not config.data.download:  # which may take long; the Trainer does it, one rank a node
        prepare_data(config.data)
        files, train = open_split(config.data).train, config.train
        sequences = train.batch_tokens // train.seq_len
        Loader(files, seq_len=train.seq_len, batch_sequences=sequences, order=config.data.order).close()
    return acquire_run_dir(config)


def stop_sweep_if_preempted(config: Config, number: int, seconds: float) -> None:
    """End the sweep if a signal has stopped the job that returned: it was meant for all of them."""
    limit = config.train.max_minutes
    by_limit = limit is not None and seconds >= 60 * limit
    preempted = broadcast_rank0(
        f"stopped {number} {restart_count()}", lambda: "" if by_limit or resume.finished(config) else "preempted"
    )
    if preempted and not processes.in_submitit_job():
        sys.exit(1)
    gc.collect()


def exit_all_ranks(sweep: Sweep | None) -> None:
    """End all with exit code 1."""
    if world_size() > 1:  # at once: the other ranks may wait in a collective
        if sweep and rank() == 0:
            sweep.summary()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)
    sys.exit(1)
