"""What the trainer asks of a model; `model._target_` names any class that fulfils it.

Shapes: B sequences, T tokens.
"""

import difflib
import hashlib
import importlib
import inspect
import os
import re
import sys
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from typing import Any, ClassVar

import torch
from omegaconf import OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from common import UserError
from optim.by_name import BY_NAME

CONTRACT = "see trainer/language_model.py"
# What selective recomputation does not make again: all work that grows with the width or the length of a sequence by
# more than memory traffic does. Norms, activations and rotations, half of the bytes, are made again as they are read.
KEPT = [
    getattr(torch.ops.aten, name).default
    for name in (
        *("mm", "addmm", "_scaled_dot_product_flash_attention", "_scaled_dot_product_flash_attention_for_cpu"),
        *("_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention"),
    )
] + [torch.ops.higher_order.flex_attention]


@dataclass
class ModelConfig:
    """What the section `model` has for every class. A class of one's own adds its settings in a dataclass that extends
    this one, and may override the two methods."""

    _target_: str = "trainer.model.GPT"  # importable path of the class, a LanguageModel
    name: str = ""  # of the model in the run's name and its record; default: the class's name in lower case
    family: str = "custom"  # which value an optimizer's preset gives to this model where it has {family: value}
    presets: str | None = None  # the family whose values it takes from presets that have none for its own

    def check(self) -> None:
        """Raise ValueError, in one line, for the first setting that cannot work."""

    def activation_bytes(self, seq_len: int, width: int) -> int:
        """Estimate of what one sequence keeps for the backward pass, where an activation has `width` bytes; it decides
        the default of train.micro_batch. 0, unknown: a rank's whole share goes through in one pass."""
        return 0

    @property
    def width_ratio(self) -> float:
        """Width over the one for which learning rates were tuned, which they follow: schedules/mup.py.  1: not."""
        return 1.0


class LanguageModel(nn.Module, ABC):
    """A model that the trainer can train: `model._target_=my.module.MyModel`, a class that extends this one.

    It is built under torch.device("meta"), then sharded, then filled tensor by tensor by `init_parameter`. Buffers are
    not filled, so compute constants in `forward`. An example in one page: examples/grouped_query_gpt.py.
    """

    Config: ClassVar[type[ModelConfig]]  # the dataclass of its settings
    head: ClassVar[str] = "lm_head"  # name of the output projection's module: its weights have the role `head`
    blocks: nn.ModuleList  # what is sharded, recomputed and compiled, each as one
    # A class whose forward pass runs its blocks by `recomputed` has `recompute = "none"`, which
    # parallel.activation_checkpointing sets.
    recompute: str

    def __init__(self, config: ModelConfig, vocab_size: int, seq_len: int, document_start: int | None = None):
        """With `document_start`, the token that starts each document, attention is to stay inside a document."""
        super().__init__()
        config.check()
        self.config, self.vocab_size, self.seq_len = config, vocab_size, seq_len
        self.document_start = document_start

    @abstractmethod
    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """tokens, targets (B, T) int64 → the sum of the tokens' losses, in nats, without the targets IGNORE_INDEX.

        Text is drawn from a class whose targets may be None, for the logits (B, T, vocab_size). See `check_logits`."""

    @abstractmethod
    def init_parameter(self, name: str, seed: int) -> Tensor:
        """The whole initial value of one parameter on the CPU: a function of (seed, name) alone; see `init_tensor`."""

    @abstractmethod
    def flops_per_token(self) -> float:
        """Floating-point operations of one token's forward and backward pass."""

    def modules_to_compile(self) -> list[nn.Module]:
        return list(self.blocks)


def recomputed(how: str, function: Callable[..., Tensor], *inputs: Any) -> Tensor:
    """function(*inputs), a block of a model, of which the backward pass is to find only the inputs (``full``), beside
    them what KEPT makes (``selective``), or everything (``none``)."""
    if how == "none" or not torch.is_grad_enabled():
        return function(*inputs)
    contexts: dict[str, Any] = {"context_fn": _keep_products} if how == "selective" else {}
    return checkpoint(function, *inputs, use_reentrant=False, **contexts)


def _keep_products() -> tuple[Any, Any]:
    return create_selective_checkpoint_contexts(KEPT)


def init_tensor(name: str, shape: torch.Size, seed: int, mean: float, std: float) -> Tensor:
    """Normal values that depend on (seed, name, shape) only: not on rank, order or any global random state."""
    if std == 0:
        return torch.full(shape, mean)
    return torch.empty(shape).normal_(mean, std, generator=init_generator(name, seed))


def init_generator(name: str, seed: int) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def model_class(target: Any) -> type[LanguageModel]:
    """The class that ``model._target_`` names; its module may also lie in the current folder.

    Raises UserError: it cannot be imported, or is not what the trainer can train.
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
    if not (isinstance(config, type) and issubclass(config, ModelConfig) and "__dataclass_fields__" in vars(config)):
        raise UserError(f"{where}: {name}.Config must be a dataclass that extends ModelConfig: add it, {CONTRACT}")
    return cls


def gives_logits(cls: type[LanguageModel]) -> bool:
    """Whether the forward pass gives logits where it is given no targets."""
    return inspect.signature(cls.forward).parameters["targets"].default is None


def check_logits(cls: type[LanguageModel]) -> None:
    if not gives_logits(cls):
        raise UserError(f"model._target_={cls.__module__}.{cls.__name__} has no logits to draw text from: let "
                        "forward(tokens, targets=None) return them, (B, T, V), without targets")  # fmt: skip


def check_needs(cls: type[LanguageModel], measured: Any, recompute: str) -> None:
    """Raise UserError unless the class can give logits and each token's loss, which the section eval may ask for, and
    recompute activations, where that is asked for."""
    if measured.sample is not None or measured.tasks:
        check_logits(cls)
    if recompute != "none" and not hasattr(cls, "recompute"):
        raise UserError(f"parallel.activation_checkpointing={recompute}, but {cls.__module__}.{cls.__name__} has no "
                        "attribute recompute: leave it off, or let its forward pass read one")  # fmt: skip
    bins = next((key for key in ("by_frequency", "by_position") if getattr(measured, key)), None)
    if bins and "reduction" not in inspect.signature(cls.forward).parameters:
        raise UserError(f"eval.{bins}, but model._target_={cls.__module__}.{cls.__name__} does not give each token's "
                        'loss: leave it out, or let forward(tokens, targets, reduction="sum") return them, (B, T), for '
                        'reduction="none"')  # fmt: skip


def resolve_model(section: Mapping[str, Any]) -> ModelConfig:
    """The section as an instance of its class's ``Config``.

    Raises UserError: naming the key, the value and the mend.
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


def field_defaults(section: Any) -> dict[str, Any]:
    """Key -> default of every setting of a section that has one, sections inside it included."""
    found = {}
    for field in fields(section):
        value = getattr(section, field.name)
        if is_dataclass(value):
            found[field.name] = field_defaults(value)
        elif field.default not in (MISSING, "???"):  # of dataclasses, of configs/
            found[field.name] = field.default
        elif field.default_factory is not MISSING:
            found[field.name] = field.default_factory()
    return found


def by_family(settings: Mapping[str, Any], family: str, role: str, presets: str | None = None) -> dict[str, Any]:
    """A role's ``settings`` with every ``{family: value, …}`` replaced by the entry of the model's ``family``, else of
    the family ``presets``.

    Raises UserError: there is neither.
    """
    chosen = {}
    for name, value in settings.items():
        if isinstance(value, Mapping) and name != BY_NAME:
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
