"""What a model's class and its family decide: the settings of `model`, and which values of an optimizer's preset."""

import difflib
import importlib
import os
import re
import sys
import traceback
from collections.abc import Mapping
from dataclasses import is_dataclass
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from common import UserError
from trainer.language_model import LanguageModel, ModelConfig

CONTRACT = "see trainer/language_model.py"


def model_class(target: Any) -> type[LanguageModel]:
    """The class that ``model._target_`` names; its module may also lie in the current folder.

    Raises:
        UserError: it cannot be imported, or is not what the trainer can train.
    """
    where = f"model._target_={target}"
    module, _, name = str(target).rpartition(".")
    if not module:
        raise UserError(f"{where}: give the path of a class, such as my_package.MyModel")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        imported = importlib.import_module(module)
    except Exception as error:  # whatever the module's own code raises
        frame = traceback.extract_tb(error.__traceback__)[-1]
        at = "" if isinstance(error, ImportError | SyntaxError) else f", {frame.filename} line {frame.lineno}"
        raise UserError(
            f"{where}: {module} cannot be imported ({type(error).__name__}: {one_line(error)}{at}): give a class whose "
            "module lies in this folder or on PYTHONPATH"
        ) from error
    cls = getattr(imported, name, None)
    if cls is None:
        close = difflib.get_close_matches(name, [n for n, v in vars(imported).items() if isinstance(v, type)], 1)
        raise UserError(f"{where}: {module} has no {name}; {f'did you mean {close[0]}?' if close else CONTRACT}")
    if not isinstance(cls, type) or not issubclass(cls, LanguageModel):
        raise UserError(f"{where}: {name} does not extend trainer.language_model.LanguageModel: let it, {CONTRACT}")
    if cls.__abstractmethods__:
        raise UserError(f"{where}: {name} has no {', '.join(sorted(cls.__abstractmethods__))}: add it, {CONTRACT}")
    config = getattr(cls, "Config", None)
    if not is_dataclass(config) or "__dataclass_fields__" not in vars(config) or not issubclass(config, ModelConfig):  # type: ignore[arg-type]
        raise UserError(f"{where}: {name}.Config must be a dataclass that extends ModelConfig: add it, {CONTRACT}")
    return cls


def resolve_model(section: Mapping[str, Any]) -> ModelConfig:
    """The section as an instance of its class's ``Config``.

    Raises:
        UserError: naming the key, the value and the mend.
    """
    target = section.get("_target_", ModelConfig._target_)
    cls = model_class(target)
    try:
        schema = OmegaConf.structured(cls.Config)
    except OmegaConfBaseException as error:
        raise UserError(f"model._target_={target}: its Config cannot be read: {reason(error)}") from None
    try:
        merged = OmegaConf.merge(schema, OmegaConf.create(dict(section)))
    except OmegaConfBaseException as error:
        key = error.full_key or ""
        given = f"model.{key}={OmegaConf.select(OmegaConf.create(dict(section)), key)}"
        if not isinstance(error, ConfigKeyError | ConfigAttributeError):
            raise UserError(f"{given}: {reason(error)}") from None
        known = [str(name) for name in schema]
        close = difflib.get_close_matches(key, known, 1, 0.7)
        hint = f"did you mean model.{close[0]}?" if close else f"{cls.__name__} has {', '.join(known)}"
        other = "" if target == ModelConfig._target_ else "; model=custom brings no keys of another class"
        raise UserError(f"{given}: no such key; {hint}{other}") from None
    if missing := sorted(OmegaConf.missing_keys(merged)):
        raise UserError(f"model.{missing[0]} has no value: set model.{missing[0]}=…")
    config = OmegaConf.to_object(merged)
    assert isinstance(config, ModelConfig)
    config.name = config.name or cls.__name__.lower()
    return config


def by_family(settings: Mapping[str, Any], family: str, role: str, presets: str | None = None) -> dict[str, Any]:
    """A role's ``settings`` with every ``{family: value, …}`` replaced by the entry of the model's ``family``, else of
    the family ``presets``.

    Raises:
        UserError: there is neither.
    """
    chosen = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            found = next((key for key in (family, presets) if key in value), None)
            if found is None:
                also = f" or model.presets={presets}" if presets else ""
                raise UserError(
                    f"{role}.{name} has values for {', '.join(value)}, but none for model.family={family}{also}: set "
                    f"{role}.{name}.{family}=… or model.presets={next(iter(value), 'FAMILY')}"
                )
            value = value[found]
        chosen[name] = value
    return chosen


def reason(root: BaseException) -> str:
    """OmegaConf's reason without its trailing context, in the user's words."""
    line = one_line(root).rstrip(".")
    found = re.match(r"Invalid value '(.*)', expected one of \[(.*)\]", line)
    if found:
        choices = found.group(2).split(", ")
        close = difflib.get_close_matches(found.group(1), choices, 1)
        return f"choose one of {', '.join(choices)}" + (f"; did you mean {close[0]}?" if close else "")
    if "does not support deletion" in line:
        return "a key cannot be removed; give it another value"
    found = re.match(r"Value '(.*)'(?: of type '\w+')? could not be converted to (\w+)", line)
    if found:
        kind = {"Integer": "a whole number", "Float": "a number", "Boolean": "true or false"}
        return f"give {kind.get(found.group(2), found.group(2))}"
    return line[:1].lower() + line[1:]


def one_line(error: BaseException) -> str:
    text = re.split(r"\n\s*(?:full_key|reference_type|object_type)", str(error))[0]
    return re.sub(r"\s+", " ", text).strip()
