"""Start training jobs in a fraction of a second: every rank is a fork of one process that has imported everything.

    with Template(tmp_path) as template:
        job = template.start([*TINY, "run.dir=…"], ranks=2, hook=["poison", {"steps": [3], "on": 0}])
        codes = job.wait()                   # see forks.Ranks

A hook is a function ``(rank, **arguments)`` of hooks.py, called in every rank before training begins.
"""

import functools
from pathlib import Path

from omegaconf import DictConfig

from tests.distributed.forks import Ranks


class Template:
    """The process that is forked; ``with`` ends all that it started."""

    def __init__(self, folder: Path):
        self.folder, self.jobs = Path(folder), []

    def __enter__(self) -> "Template":
        return self

    def __exit__(self, *error: object) -> None:
        for job in self.jobs:
            job.kill_all()

    def start(self, arguments: list[str], ranks: int = 1, hook: list | None = None, launched: bool | None = None
              ) -> Ranks:  # fmt: skip
        """``launched``: as by torchrun; if None, where there is more than one rank."""
        out = self.folder / f"job{len(self.jobs)}"
        out.mkdir(parents=True)
        request = {"arguments": arguments, "hook": hook}
        self.jobs.append(Ranks(__name__, request, ranks, out, ranks > 1 if launched is None else launched))
        return self.jobs[-1]

    def run(self, arguments: list[str], ranks: int = 1, hook: list | None = None, launched: bool | None = None,
            timeout: float = 120) -> Ranks:  # fmt: skip
        """Start a job and wait for its success."""
        job = self.start(arguments, ranks, hook, launched)
        codes = job.wait(timeout)
        assert not any(codes), f"exit codes {codes}\n{job.outputs(list(range(ranks)))}"
        return job


def prepare(request: dict) -> DictConfig:
    return _compose(tuple(request["arguments"]))


def child(request: dict, composed: DictConfig) -> int:
    """In the fork: what trainer/launch/job.py does."""
    from common import UserError
    from tests.distributed import hooks
    from trainer.config import world_size
    from trainer.launch.compose import check
    from trainer.launch.failures import report_failed_ranks
    from trainer.launch.rendezvous import broadcast_rank0, report_error
    from trainer.loop import Trainer
    from trainer.run import resume
    from trainer.run.directory import acquire_run_dir

    hooks.no_plot()
    if request["hook"]:
        name, arguments = request["hook"]
        getattr(hooks, name)(request["rank"], **arguments)
    try:
        config = check(composed, world_size())
        config.run.dir = broadcast_rank0("job", lambda: acquire_run_dir(config))
        done = broadcast_rank0("finished", lambda: resume.finished(config))
        with report_failed_ranks():
            print(done) if done else Trainer(config).run()
    except UserError as error:
        report_error(error)
        return 1
    return 0


@functools.cache
def _compose(arguments: tuple[str, ...]) -> DictConfig:
    import hydra

    from trainer.launch.compose import hydra_initialized, to_hydra

    overrides = [to_hydra(argument) for argument in arguments]
    with hydra_initialized(overrides):
        return hydra.compose("train", overrides=overrides)

