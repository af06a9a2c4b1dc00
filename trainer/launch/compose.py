"""A configuration from overrides as a user types them: composed by Hydra from ``configs/``, then validated."""

import os
import re
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from operator import attrgetter

import hydra
import torch
from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.version import VersionBase
from omegaconf import DictConfig, OmegaConf

from common import UserError
from optim.by_name import BY_NAME
from optim.routing import ROLES, build_from_config
from trainer.config import OPEN_SECTIONS, Config, register, validate
from trainer.language_model import model_class, one_line
from trainer.launch.hydra_errors import COMPOSITION_ERRORS, CONFIGS, check_unknown_keys, choices, explain, new_name

TEXTS = ("run.dir", "run.name", "run.from_", "run.init", "logger.label", "logger.group")  # null, or not empty


def load(overrides: Sequence[str], world_size: int) -> Config:
    """The checked config of overrides as a user types them.  Raises UserError."""
    if isinstance(overrides, str):
        raise UserError(f"overrides={overrides!r}: give a list, [{overrides!r}]")
    overrides = [to_hydra(override) for override in overrides]
    with hydra_initialized(overrides):
        composed = hydra.compose("train", overrides=overrides)
        check_choices(composed, overrides)
        return check(composed, world_size)


@contextmanager
def hydra_initialized(overrides: Sequence[str]) -> Iterator[ConfigLoader]:
    """Hydra over ``configs/``, its errors told in one line; afterwards it is as it was, initialised or not.

    Raises UserError: composing ``overrides`` failed.
    """
    register()
    instance, base = GlobalHydra.instance(), VersionBase.instance()
    before = instance.hydra, base.version_base
    instance.clear()
    try:
        with hydra.initialize_config_dir(str(CONFIGS), job_name="train", version_base="1.3"):
            yield GlobalHydra.instance().config_loader()
    except COMPOSITION_ERRORS as error:
        raise UserError(explain(error, overrides)) from None
    except (AssertionError, AttributeError, TypeError, ValueError) as error:
        if not raised_in(error, "hydra", "omegaconf"):
            raise
        said = f"Hydra cannot compose what they ask for ({one_line(error)}): leave out one after the other"
        raise UserError(f"{' '.join(overrides)}: {said}") from None
    finally:
        GlobalHydra.set_instance(instance)  # Hydra would put a copy in its place
        instance.hydra, base.version_base = before


def raised_in(error: Exception, *packages: str) -> bool:
    """Whether the innermost frame of an error is code of one of these packages."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return frame.f_globals["__name__"].partition(".")[0] in packages


def check(composed: DictConfig, world_size: int) -> Config:
    """Raises UserError: for a key that the schema does not have, or a value that cannot be."""
    check_unknown_keys(composed)
    config = validate(composed, world_size)
    for key in TEXTS:  # of a variable of the shell that is not set, most often
        if isinstance(text := attrgetter(key)(config), str) and not text.strip():
            raise UserError(f"{key.rstrip('_')}={text}: it is empty; leave it out, or give null")
        if text and re.search(r"[\x00-\x1f\x7f]", text):
            raise UserError(f"{key.rstrip('_')}={text!r}: leave out line ends and other control characters")
    matrix = config.optim.matrix
    keeps_norms = matrix.get("constraint") or str(matrix.get("_target_")).endswith(".AdamH")
    if keeps_norms and getattr(config.model, "zero_init_proj", False):
        raise UserError(
            "model.zero_init_proj=true, but optim.matrix keeps the norms of matrices, and those would stay zero: give "
            "model.zero_init_proj=false"
        )
    check_by_name(config)
    return config


def check_by_name(config: Config) -> None:
    """Raises UserError: a pattern of ``optim.ROLE.by_name`` is no parameter's of the model, or says what cannot be of
    one that it is."""
    if not any(BY_NAME in getattr(config.optim, role) for role in ROLES):
        return
    with torch.device("meta"):  # how many tokens there are does not change what parameters are called
        model = model_class(config.model._target_)(config.model, 1, config.train.seq_len)
    try:
        build_from_config(model, asdict(config.optim), head_module=model.head)
    except ValueError as error:
        raise UserError(str(error)) from None


def check_choices(composed: DictConfig, overrides: Sequence[str]) -> None:
    """Raises UserError: ``schedule=NAME`` was asked for, or the model is not the track's and has other initial weights,
    but the optimizer's preset is a record, with its own schedule and initial weights."""

    words = [override.lstrip("+~").partition("=") for override in overrides]
    given = {name: value.strip("'") for name, _, value in words}

    def chosen(group: str, key: str) -> str | None:
        """NAME, if ``key`` is not given beside it."""
        return given.get(group) if f"{group}.{key}" not in given else None

    name, brings = chosen("schedule", "name"), f"optim={composed.optim.name} brings"
    if name and composed.schedule.name != name:
        raise UserError(
            f"schedule={name}: {brings} the schedule of its record, {composed.schedule.name}; to run it with another, "
            "give schedule.name and its settings"
        )
    name, init = chosen("model", "init"), composed.model.get("init")
    if not name and not composed.model.get("name", "").startswith("track3_") and "model.init" not in given:
        name = composed.model.get("name")  # the experiment's model, or the usual one
    own = CONFIGS / f"model/{name}.yaml"
    is_record = composed.optim.name.startswith("track3_")
    if is_record and own.exists() and (usual := OmegaConf.select(OmegaConf.load(own), "init")) != init:
        raise UserError(
            f"model={name}: {brings} the initial weights of its record, model.init={init}, in place of {usual}; say "
            "which you want by model.init=…, or give ~model.init for a model without such a key"
        )


def to_hydra(override: str) -> str:
    """An override in Hydra's grammar, which has no ``~/``, no ``experiment=null`` and no key ``from``.

    Raises UserError: the key has another name, or a group has no choice.
    """
    key, equals, value = override.partition("=")
    if new := new_name(key.lstrip("+~").partition("@")[0]):
        raise UserError(f"{override}: the key is called {new}")
    values = value.split(",")
    if "null" in values and (CONFIGS / key).is_dir():
        if key != "experiment":
            raise UserError(f"{override}: choose one of {', '.join(choices(key))}")
        values = ["[]" if choice == "null" else choice for choice in values]
    listed = set(re.findall(r"[^\s,\[\]]+", value)) if value[:1] in ("[", "{") else set()
    if (CONFIGS / key).is_dir() and listed - {*choices(key)}:  # Hydra fails on what are no names
        raise UserError(f"{override}: choose one of {', '.join(choices(key))}")
    if (CONFIGS / key).is_dir():  # Hydra fails on a choice that reads as a number or a truth value
        no_name = re.compile(r"[+-]?(\d[\d_.eE+-]*|inf|nan)|true|false", re.I)
        values = [f"'{value}'" if no_name.fullmatch(value) else value for value in values]
    values = [os.path.expanduser(path) if path.startswith("~/") else path for path in values]
    return allow_extra_keys(f"{key}{equals}{','.join(values)}")


def allow_extra_keys(override: str) -> str:
    """Let ``model.<key>`` and ``optim.<role>.<key>`` be set where the preset does not list it; the class checks it.
    ``run.from`` is ``run.from_`` inside, because Python keeps the word for itself."""
    override = re.sub(r"^run\.from=", "run.from_=", override)
    override = re.sub(rf"^\+*((?:{'|'.join(map(re.escape, OPEN_SECTIONS))})\.[^=]+=)", r"++\1", override)
    return re.sub(r"^\+*((?:optim|schedule)\.\w+=\{)", r"++\1", override)  # a role's whole section
