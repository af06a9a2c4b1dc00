"""Starting again: whether the run is finished, whether it is in use, where it goes on, and what has changed."""

import itertools
import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from common import UserError, write_text
from trainer.config import Config, Resume
from trainer.metrics.jsonl import FILE, read_lines
from trainer.parallel import Parallel
from trainer.run import storage
from trainer.run.checkpoint import CheckpointError, Checkpoints, Progress
from trainer.run.directory import BRANCHES, defaults, excluded_from_identity, lock_run_dir
from trainer.run.initial import weights_file

NO_CHECKPOINT = "run.from={} holds no checkpoint: give the directory of a run or of a checkpoint"


def finished(config: Config) -> str:
    """One line if the run in ``run.dir`` has done all its steps and saved the last, if it saves; otherwise nothing."""
    lines = read_lines(config.run.path / FILE)
    if not lines or lines[-1]["step"] != config.train.steps or "val/loss" not in lines[-1]:
        return ""
    saved = storage.committed(config.run.checkpoints) if config.checkpoint.last else []
    if saved and storage.step_of(saved[0]) != config.train.steps:
        return ""  # the record is complete, the last weights are lost
    if saved:
        _check_from(config, saved[0])
    loss = float("nan") if lines[-1]["val/loss"] is None else lines[-1]["val/loss"]
    gone = "" if saved or not config.checkpoint.last else f"; its weights are not in {config.run.checkpoints}"
    return f"{config.run.dir} is finished: step {config.train.steps}, val loss {loss:.4f}; nothing to do{gone}"


def check_sources(config: Config) -> None:
    """On rank 0, before a new run takes its directory. Raises UserError: what it is to begin with is not there."""
    if config.run.dir and (config.run.path / "run.json").exists():
        return
    if config.run.init:
        try:
            weights_file(Path(config.run.init.removeprefix("hf:")))
        except ValueError as error:
            raise UserError(f"run.init={config.run.init}: {error}") from None
    if config.run.from_:
        source = storage.at_step(Path(config.run.from_))
        if storage.step_of(source) is None and not storage.committed(source / "checkpoints"):
            raise CheckpointError(NO_CHECKPOINT.format(source))


def resume(config: Config, parallel: Parallel, checkpoints: Checkpoints) -> tuple[Progress, list[str], ExitStack]:
    """Load the newest good checkpoint, if there is one.

    Returns where the run stands, what to tell about it, and what keeps other processes out of its directory while open.
    Raises CheckpointError: there are checkpoints but none is good, or one is wanted and there is none.
    Raises UserError: another process holds the directory, there is a record without a checkpoint, or ``run.from`` is of
    a run whose settings differ in more than schedule and length, or not what the directory's run went on from.
    """
    with ExitStack() as stack:
        parallel.broadcast_rank0(lambda: bool(stack.enter_context(lock_run_dir(config.run.path))))
        progress, notices = _load(config, parallel, checkpoints)
        return progress, notices, stack.pop_all()


def _load(config: Config, parallel: Parallel, checkpoints: Checkpoints) -> tuple[Progress, list[str]]:
    folder, notices = parallel.broadcast_rank0(lambda: find(config))
    if folder is None:
        parallel.broadcast_rank0(lambda: _keep_record(config))
        return Progress(), notices
    saved, other = storage.read_state(folder), folder.parent != checkpoints.folder  # other: run.from
    notices += changes(saved, config, folder, checkpoints.about, BRANCHES if other else ())
    progress = checkpoints.load(folder)
    asked = config.train.micro_batch
    if progress.micro_batch and saved["config"].get("train.micro_batch") == asked:
        config.train.micro_batch = progress.micro_batch  # the same sums, to the bit
    if progress.step > config.train.steps:
        raise UserError(f"train.steps={config.train.steps}, but {folder} is of a later update: give at least "
                        f"train.steps={progress.step}, or an earlier checkpoint of that run")  # fmt: skip
    if other:
        checkpoints.latest = None
        progress.branch = f"{folder.parent.parent.resolve().name}@{progress.step}"
        parallel.broadcast_rank0(lambda: _take_record(folder.parent.parent, config.run.path))
    record = config.run.path / FILE
    last, losses = parallel.broadcast_rank0(lambda: _measured(record, progress.val_step))
    if losses and progress.val_loss not in (None, *losses):
        raise UserError(
            f"{record} is of another run: val/loss after update {progress.val_step} is {losses[-1]} there and "
            f"{progress.val_loss} in {folder}; bring this run's own record back, or choose a new run.dir"
        )
    if last is None or last < progress.step:
        progress.val_step = None  # measure again what can be: all of it after update 0
        if progress.step:
            lost = f"from update {last + 1} on" if last is not None else "from the start on"
            notices.append(f"warning: {record} lacks what was measured {lost}, up to the checkpoint")
    return progress, notices + [f"going on after update {progress.step} of {config.train.steps}, from {folder}"]


def _measured(record: Path, step: int | None) -> tuple[int | None, list[float]]:
    """The last step of a record, and its validation losses after update ``step``, of every time that it was reached."""
    lines = read_lines(record)
    losses = [line["val/loss"] for line in lines if line["step"] == step and line.get("val/loss") is not None]
    return max((line["step"] for line in lines), default=None), losses


def find(config: Config) -> tuple[Path | None, list[str]]:
    """The checkpoint to go on from: of this run, else of ``run.from``; and what is wrong with newer ones.

    This run's newer ones are set aside: if they could be read another time after all, the run would leap to them and
    leave a gap in its record; and they would be counted among the newest that stay.

    Raises UserError: this run has not gone on from ``run.from``.
    """
    own = config.run.checkpoints
    storage.remove_partial(own)
    folder, faults = storage.newest_good(own)
    if folder:
        _check_from(config, folder)
        for damaged in storage.committed(own)[: len(faults)]:
            storage.set_aside(damaged)
    elif not faults and config.run.from_:
        own, folder, faults = _other(Path(config.run.from_))
    if folder is None and faults:
        raise CheckpointError(f"{faults[0]}; no good one is left in {own}: remove that folder to start anew")
    if folder is None and config.run.resume == Resume.must:
        raise CheckpointError(f"run.resume=must, but {own} holds no checkpoint: use run.resume=auto to start anew")
    return folder, [f"warning: {fault}; it is not used" for fault in faults]


def _check_from(config: Config, folder: Path) -> None:
    """Raises UserError: the run's own checkpoint did not come from ``run.from``, as in a directory that was copied."""
    if not config.run.from_:
        return
    run, step = storage.run_and_step(Path(config.run.from_))
    began = storage.read_state(folder).get("branch") or ""
    name, _, at = began.rpartition("@")
    if name != run.resolve().name or step not in (None, int(at)):
        raise UserError(
            f"run.from={config.run.from_}, but run.dir={config.run.dir} already holds a run that "
            f"{f'went on from {began}' if began else 'began by itself'}, up to update {storage.step_of(folder)}: leave "
            "run.from out to go on with that, or choose a new run.dir"
        )


def _other(source: Path) -> tuple[Path, Path | None, list[str]]:
    """``run.from``: a run's directory, RUN@STEP, or one of its checkpoints."""
    source = storage.at_step(source)
    if storage.step_of(source) is not None and (source / storage.MANIFEST).exists():
        storage.verify(source)
        return source.parent, source, []
    folder, faults = storage.newest_good(source / "checkpoints")
    if folder is None and not faults:
        raise CheckpointError(NO_CHECKPOINT.format(source))
    return source / "checkpoints", folder, faults


def changes(
    saved: dict[str, Any], config: Config, folder: Path, here: dict[str, Any], free: tuple[str, ...] = ()
) -> list[str]:
    """Settings that differ from those of the checkpoint and do not matter, in words.

    Args:
        saved: the checkpoint's state.json.
        here: ``Checkpoints.about`` of this run.
        free: keys, or beginnings of keys, that a branch may change beside those that no run depends on.

    Raises:
        UserError: for those that matter, each with both values; or the shards are others than those before.
    """
    known = defaults(config)
    then, now = known | saved["config"], known | here["config"]
    different = [key for key in {**then, **now} if then.get(key) != now.get(key)]
    different = [key for key in different if not key.startswith("run.") or key == "run.init"]  # a start's own
    matters = [key for key in different if not excluded_from_identity(key) and key != "data.dir"]  # shards may move
    matters = [key for key in matters if not key.startswith(free)]
    if matters:
        wrong = "; ".join(f"{key} is {then.get(key)} there and {now.get(key)} here" for key in matters)
        raise UserError(f"checkpoint {folder} is of another run: {wrong}; choose the same settings")
    if saved.get("shards", here["shards"]) != here["shards"]:
        raise UserError(
            f"checkpoint {folder} is of a run on other data: the shards in {config.data.folder} are not those that it "
            "has read; give data.dir=FOLDER that holds them, or begin a new run.dir"
        )
    changed = [f"{key} {then.get(key)} -> {now.get(key)}" for key in different]
    ranks = [f"{about['world_size']} ranks ({about['mode']})" for about in (saved, here)]
    if ranks[0] != ranks[1]:
        changed.append(" -> ".join(ranks))
    return [f"changed since the checkpoint: {', '.join(changed)}"] if changed else []


def _keep_record(config: Config) -> None:
    """Nothing that was measured is emptied: see to it before a run begins anew.

    Raises UserError: there is a record, and ``run.resume`` does not say what is to become of it.
    """
    lines = read_lines(config.run.path / FILE)
    if lines and config.run.resume != Resume.restart:
        raise UserError(
            f"run.dir={config.run.dir} has a record up to step {lines[-1]['step']}, but no checkpoint to go on "
            f"from in {config.run.checkpoints}: bring that back, choose a new run.dir, or give run.resume=restart to "
            "begin anew and keep the record beside the new one"
        )
    _set_record_aside(config.run.path)


def _set_record_aside(directory: Path) -> None:
    if (directory / FILE).exists() and (directory / FILE).stat().st_size:
        free = next(path for n in itertools.count(1) if not (path := directory / f"metrics.{n}.jsonl").exists())
        os.rename(directory / FILE, free)


def _take_record(source: Path, target: Path) -> None:
    """Begin the record with that of the run the checkpoint comes from; lines that led to no checkpoint stay aside."""
    _set_record_aside(target)
    if (source / FILE).exists():
        write_text(target / FILE, (source / FILE).read_text(encoding="utf-8", errors="replace"))
