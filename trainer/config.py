"""The typed configuration: every key with its type, unit and default, and the checks between keys.

Hydra merges ``configs/`` and the command line into these classes, so an unknown key or a wrong type is refused while
the config is composed.  ``MISSING`` marks a value that ``configs/`` gives; a default stands either here or there.
The keys of the sections in ``OPEN_SECTIONS`` are those of the class that their ``_target_`` names.
"""

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from enum import StrEnum
from operator import attrgetter
from pathlib import Path
from typing import Any, get_type_hints

import torch
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf

from common import UserError
from data.config import DataConfig
from optim.by_name import BY_NAME
from optim.routing import ROLES, resolve_target
from trainer.language_model import ModelConfig, by_family, check_needs, model_class, one_line, resolve_model
from trainer.mesh import ParallelConfig, check_parallel, device_memory, divisors, nearest, use_expandable_segments
from trainer.model import GPTConfig
from trainer.schedules import mup
from trainer.schedules.config import AverageConfig, LookaheadConfig, Loss, ScheduleConfig, try_optimizer
from trainer.schedules.due import profiled

ABOVE_ZERO = (
    *(f"train.{key}" for key in ("steps", "batch_tokens", "seq_len", "micro_batch", "clip", "max_minutes")),
    *(f"eval.{key}" for key in ("every", "late_every", "tokens", "by_frequency", "by_position", "sample_tokens")),
    *("eval.task_examples", "eval.target", "checkpoint.every", "checkpoint.minutes", "checkpoint.keep_last"),
    *("run.processes", "train.timeout_minutes", "parallel.timeout_minutes", "optim.lr_scale", "optim.qk_clip"),
    "logger.every",
)
OPEN_SECTIONS = (
    *("model", "data.source", "optim.tune"),
    *(f"{section}.{role}" for section in ("optim", "schedule") for role in ROLES),
)


class Resume(StrEnum):
    auto = "auto"  # go on where this run's directory stands, or start
    never = "never"  # start, and refuse a directory that already holds this run
    must = "must"  # refuse to start anew
    restart = "restart"  # as auto, but where a record has no checkpoint: keep it as metrics.1.jsonl, and start


class Dtype(StrEnum):
    auto = "auto"  # bfloat16 on CUDA, float32 on CPU
    bfloat16 = "bfloat16"
    float32 = "float32"
    float64 = "float64"  # for proofs on the CPU


class NonFinite(StrEnum):
    stop = "stop"
    skip = "skip"


class LoggerKind(StrEnum):
    wandb = "wandb"
    jsonl = "jsonl"


class Order(StrEnum):
    listed = "listed"  # the first key of the command line varies slowest
    abba = "abba"  # seed by seed, every second one backwards: a machine that drifts hurts all settings alike


@dataclass
class RunConfig:
    name: str | None = None  # default: <optim>-<model>-<data>-s<seed>
    dir: str | None = None  # the run's directory; default: runs/<date>-<time>-<name>
    resume: Resume = Resume.auto
    from_: str | None = None  # typed run.from: another run, RUN@STEP, or one of its checkpoints, to go on from
    init: str | None = None  # weights to begin with: hf:FOLDER of a GPT-2, nanoGPT's ckpt.pt, or a .safetensors file
    processes: int | None = None  # of a run that no torchrun has started; default: one

    @property
    def path(self) -> Path:
        """``dir``, once the run has one."""
        assert self.dir is not None
        return Path(self.dir)

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"


@dataclass
class TrainConfig:
    steps: int = MISSING  # optimizer updates
    batch_tokens: int = MISSING  # tokens of one update, over all ranks and micro-batches
    seq_len: int = MISSING  # tokens of one sequence
    micro_batch: int | None = None  # sequences of a pass on one rank, fewer where a GPU lacks room; default: see below
    dtype: Dtype = Dtype.auto  # of the parameters and activations
    loss: Loss = Loss.mean  # of a batch's N tokens, to be differentiated; for the sum an eps beside |g| is 1/N of it
    clip: float | None = None  # largest norm of the whole gradient, of the mean with either loss; default: no clipping
    non_finite: NonFinite = NonFinite.stop  # when a loss or gradient is not finite: end the run, or skip the update
    max_skips: int = 10  # updates in a row that may be skipped
    max_minutes: float | None = None  # of wall-clock time, after which the run saves and ends; default: no limit
    profile: str | None = None  # updates, such as 10-13, of which every rank writes a trace; default: none
    timeout_minutes: float = 10.0  # of a collective after the first update; before it, parallel.timeout_minutes


@dataclass
class EvalConfig:
    every: int = MISSING  # updates between evaluations; the last update is always followed by one
    late_every: int | None = None  # the same in the last tenth of the schedule; default: as before it
    tokens: int = MISSING  # tokens of the validation set that are read, over all ranks
    sample: str | None = None  # a text that the model goes on with at every evaluation; default: none
    sample_tokens: int = 100  # so long
    by_frequency: int | None = None  # bins of tokens, by their count in the training data, to record the loss of
    by_position: int | None = None  # the same of places in the sequence
    tasks: list[str] = field(default_factory=list)  # of lm-evaluation-harness, scored at every evaluation
    task_examples: int | None = None  # only the first so many of each task; default: all
    target: float | None = None  # validation loss [nats per token] that a speedrun is timed to; only recorded


@dataclass
class CheckpointConfig:
    last: bool = True  # one after the last update; a run that is told to stop saves in any case
    every: int | None = None  # updates between checkpoints; default: none before the last
    minutes: float | None = None  # of wall-clock time between checkpoints, beside or in place of `every`
    keep_last: int = 2  # newest checkpoints that stay
    keep_best: int = 0  # checkpoints of the lowest validation loss that stay beside them


@dataclass
class OptimConfig:
    """Per role ``{_target_: class path, **settings}``.  A setting may be ``{family: value, …}``: see ``by_family``."""

    name: str = MISSING
    lr_scale: float = 1.0  # multiplies the learning rate of every role
    qk_clip: float | None = None  # attention logit above which a head's queries and keys shrink; default: no clipping
    tune: dict[str, Any] = field(default_factory=dict)  # what scripts/tune.py searches; a run has none of it
    matrix: dict[str, Any] = field(default_factory=dict)
    embedding: dict[str, Any] = field(default_factory=dict)
    head: dict[str, Any] = field(default_factory=dict)
    scalar: dict[str, Any] = field(default_factory=dict)


@dataclass
class LoggerConfig:
    kind: LoggerKind = MISSING
    every: int = 10  # updates between records of the training loss
    project: str = "nanomuon"  # W&B project
    label: str | None = None  # the method's name in comparisons; default: the optimizer and what a sweep varies
    group: str | None = None  # W&B group; default: the sweep's folder in a sweep
    tags: list[str] = field(default_factory=list)  # W&B tags beside optimizer, model and data


@dataclass
class SweepConfig:
    order: Order = Order.listed  # in which a sweep's jobs run


@dataclass
class Config:
    seed: int = 0  # of the initial weights and of the order of the data
    run: RunConfig = field(default_factory=RunConfig)
    sweep: SweepConfig = field(default_factory=SweepConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    # Any class's settings: a ModelConfig after ``validate``.  GPT's keys stand for it in --help and in hints.
    model: Any = field(default=MISSING, metadata={"keys": GPTConfig})
    data: DataConfig = MISSING
    optim: OptimConfig = MISSING
    schedule: ScheduleConfig = MISSING
    lookahead: LookaheadConfig = field(default_factory=LookaheadConfig)
    average: AverageConfig = field(default_factory=AverageConfig)
    parallel: ParallelConfig = MISSING
    logger: LoggerConfig = MISSING


def register() -> None:
    """Make the schema known to Hydra as ``schema``, the first of ``configs/train.yaml``'s defaults."""
    ConfigStore.instance().store(name="schema", node=Config)


def keys(section: type = Config, prefix: str = "") -> Iterator[str]:
    """Every dotted key of the schema, sections included."""
    hints = get_type_hints(section)
    for f in fields(section):
        yield prefix + f.name
        inner = f.metadata.get("keys", hints[f.name])
        if isinstance(inner, type) and is_dataclass(inner):
            yield from keys(inner, f"{prefix}{f.name}.")


def validate(composed: DictConfig, world_size: int) -> Config:
    """The typed config with every derived value filled in, after all checks.

    Raises UserError: naming the key, the value and the mend.
    """
    use_expandable_segments()
    missing = sorted(OmegaConf.missing_keys(composed))
    if missing:
        raise UserError(f"{missing[0]} has no value: set {missing[0]}=…")
    config = OmegaConf.to_object(composed)
    assert isinstance(config, Config)
    config.model, config.optim.tune = resolve_model(config.model), {}
    config.run.name = config.run.name or f"{config.optim.name}-{config.model.name}-{config.data.name}-s{config.seed}"
    if config.train.dtype == Dtype.auto:
        config.train.dtype = Dtype.bfloat16 if torch.cuda.is_available() else Dtype.float32
    check_numbers(config)
    if (given := config.run.processes) not in (None, world_size):
        raise UserError(f"run.processes={given}, but {world_size} were started: leave it to torchrun")
    try:
        config.model.check()
        config.data.check()
        check_parallel(config.parallel, world_size if world_size > 1 else None)
        check_needs(model_class(config.model._target_), config.eval, config.parallel.activation_checkpointing)
        resolve_optim(config.optim, config.model)
        mup.check_lines(config.schedule, config.model.width_ratio)
    except ValueError as error:
        raise UserError(str(error)) from None
    fit_batch(config, world_size)
    profiled(config.train.profile, config.train.steps)
    config.schedule.check(config.train.steps, {role: getattr(config.optim, role) for role in ROLES})
    config.lookahead.check()
    config.average.check()
    return config


def check_numbers(config: Config) -> None:
    for key in ABOVE_ZERO:
        value = attrgetter(key)(config)
        most = 525_600 if key.endswith("timeout_minutes") else math.inf  # a year: timers count no further
        if value is not None and not 0 < value < most:
            raise UserError(f"{key}={value}: give a number above 0{f' and below {most}' if most < math.inf else ''}")
    for key in ("train.max_skips", "checkpoint.keep_best"):
        if (value := attrgetter(key)(config)) < 0:
            raise UserError(f"{key}={value}: give 0 or more")
    if not 0 <= config.seed < 2**32:
        raise UserError(f"seed={config.seed}: give a number from 0 to {2**32 - 1}")
    check_multiple("eval.tokens", config.eval.tokens, config.train.seq_len)


def check_multiple(key: str, tokens: int, seq_len: int) -> None:
    if tokens % seq_len:
        raise UserError(f"{key}={tokens} is no multiple of train.seq_len={seq_len}: {nearest(tokens, seq_len)}")


def fit_batch(config: Config, world_size: int) -> None:
    """Check that the global batch divides over ranks and passes; choose ``train.micro_batch`` where it is not given."""
    train = config.train
    check_multiple("train.batch_tokens", train.batch_tokens, train.seq_len)
    sequences, unit = train.batch_tokens // train.seq_len, world_size * (train.micro_batch or 1)
    if sequences % unit:
        split = f"{world_size} ranks" if world_size > 1 else "1 rank"
        split += f" x train.micro_batch={train.micro_batch}" if train.micro_batch else ""
        mend = nearest(train.batch_tokens, unit * train.seq_len)
        if train.micro_batch and sequences % world_size == 0:
            mend += f", or train.micro_batch one of {', '.join(map(str, divisors(sequences // world_size)[-6:]))}"
        raise UserError(
            f"train.batch_tokens={train.batch_tokens} is {sequences} sequences of train.seq_len={train.seq_len} tokens,"
            f" which {split} cannot share evenly: {mend}"
        )
    train.micro_batch = train.micro_batch or fitting_micro_batch(config, sequences // world_size, device_memory())


def fitting_micro_batch(config: Config, sequences: int, memory: float | None) -> int:
    """The largest divisor of a rank's ``sequences`` whose activations fill a quarter of a GPU, or 2 GiB on a CPU."""
    budget = 2 * 2**30 if memory is None else memory / 4  # which leaves room for logits, and for what is not compiled
    width = {Dtype.bfloat16: 2, Dtype.float32: 4, Dtype.float64: 8}[config.train.dtype]
    per_sequence = config.model.activation_bytes(config.train.seq_len, width)
    return max(n for n in divisors(sequences) if n == 1 or n * per_sequence <= budget)


def resolve_optim(optim: OptimConfig, model: ModelConfig) -> None:
    """Choose the values of the model's family, then try every role's class and settings on a small parameter."""
    for role in ROLES:
        settings = by_family(getattr(optim, role), model.family, f"optim.{role}", model.presets)
        setattr(optim, role, settings)
        if not settings:
            continue
        optimizer, arguments = resolve_target(settings, f"optim.{role}")
        settings |= {key: value for key, value in arguments.items() if isinstance(value, bool | int | float | str)}
        if "lr" in arguments:
            settings["lr"] = arguments["lr"] = arguments["lr"] * optim.lr_scale
        for own in (patterns := arguments.pop(BY_NAME, {})).values():
            own |= {"lr": own["lr"] * optim.lr_scale} if "lr" in own else {}
        settings |= mup.follow_width(role, optimizer, arguments, patterns, model.width_ratio)
        settings |= {BY_NAME: patterns} if patterns else {}
        try:
            for own in ({}, *patterns.values()):
                try_optimizer(role, optimizer, arguments, own)
        except Exception as error:  # of any author's class
            raise UserError(f"optim.{role}, {optimizer.__name__}: {one_line(error)}") from None


def world_size() -> int:
    """Number of processes of this job, as torchrun, accelerate or SLURM's batch file announced it."""
    return int(os.environ.get("WORLD_SIZE", 1))
