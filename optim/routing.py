"""Which parameter goes to which optimizer.

Every parameter has exactly one role:

    matrix     weights of linear layers inside the network (2-D or more): convolutions, experts and LoRA's factors too
    embedding  tables looked up by index (``nn.Embedding``), also when tied to the head
    head       the output projection
    scalar     everything 1-D: norms, biases, class tokens
"""

import difflib
import fnmatch
import importlib
import math
import re
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .by_name import BY_NAME, split_by_name, typed_by_name
from .combined import Combined
from .matrix import RENAMED, MatrixOptimizer
from .settings import settings_of, typed

ROLES = ("matrix", "embedding", "head", "scalar")
MULTIPLIES = (nn.Linear, nn.Bilinear, nn.modules.conv._ConvNd, nn.MultiheadAttention, nn.RNNBase)
TABLE = re.compile(r"lora_embedding_|(pos|position)_emb(ed|edding|eddings)?$")  # tables that are no nn.Embedding
HF_CONV1D = ("transformers.pytorch_utils", "Conv1D")


def assign_roles(
    model: nn.Module, head_module: str = "lm_head", roles: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Role of every parameter by name, by the type of the module that it belongs to.

    A shared tensor appears once, under the first name that ``named_parameters`` gives it.

    Args:
        head_module: name of the module of the output projection.  Hugging Face models know theirs.
        roles: pattern -> role, for what should go elsewhere: ``{"*.router.weight": "scalar"}``; the last match counts.

    Raises:
        ValueError: a pattern that matches nothing, or a role that does not exist.
    """
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding | nn.EmbeddingBag)}
    output = getattr(model, "get_output_embeddings", lambda: None)()
    heads = {id(parameter) for parameter in output.parameters()} if output is not None else set()
    owned = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, MULTIPLIES) or is_hf_conv1d(module)
        for parameter in module.parameters(recurse=False)
    }
    assigned = {}
    for name, parameter in model.named_parameters():
        thin = id(parameter) not in owned and sum(size != 1 for size in parameter.shape) < 2  # a class token, a gain
        if id(parameter) in tables or TABLE.search(name):
            assigned[name] = "embedding"
        elif parameter.ndim < 2 or thin:
            assigned[name] = "scalar"
        elif head_module in name.split(".") or id(parameter) in heads:
            assigned[name] = "head"
        else:
            assigned[name] = "matrix"
    for pattern, role in (roles or {}).items():
        chosen = fnmatch.filter(assigned, pattern)
        if not chosen or role not in ROLES:
            raise ValueError(f"roles[{pattern!r}]={role}: no parameter has such a name, or the role is not in {ROLES}")
        assigned |= dict.fromkeys(chosen, role)
    return assigned


def resolve_target(settings: Mapping[str, Any], where: str) -> tuple[type, dict[str, Any]]:
    """The class that ``settings["_target_"]`` names, and its keyword arguments.

    Raises:
        ValueError: one line naming ``where`` and what is wrong: no such class, or no such setting of it.
    """
    target = settings.get("_target_")
    if not isinstance(target, str) or "." not in target:
        raise ValueError(f"{where}._target_={target}: name an optimizer class, such as torch.optim.AdamW")
    module, _, name = target.rpartition(".")
    try:
        optimizer = getattr(importlib.import_module(module), name)
    except Exception as error:  # whatever the module's own code raises
        raise ValueError(f"{where}._target_={target}: no such class ({error}); such as torch.optim.AdamW") from None
    if not isinstance(optimizer, type) or not issubclass(optimizer, torch.optim.Optimizer):
        raise ValueError(f"{where}._target_={target}: not an optimizer class; such as torch.optim.AdamW")
    kwargs = {key: value for key, value in settings.items() if key != "_target_"}
    accepted = settings_of(optimizer)
    for key, value in kwargs.items():
        if key == BY_NAME:
            more = getattr(optimizer, "group_settings", {})
            kwargs[key] = typed_by_name(value, {k: v for k, v in (accepted | more).items() if k != "step"}, where)
            continue
        if RENAMED.get(key) in accepted and key not in accepted:
            raise ValueError(f"{where}.{key}={value}: this setting is now called {RENAMED[key]}")
        if key not in accepted:
            close = difflib.get_close_matches(key, accepted, 1)
            hint = f"did you mean {close[0]}?" if close else f"it has {', '.join(accepted)}"
            raise ValueError(f"{where}.{key}={value}: {target} has no such setting; {hint}")
        try:
            kwargs[key] = typed(value, accepted[key])
        except ValueError as error:
            raise ValueError(f"{where}.{key}={value}: {error}") from None
        if isinstance(kwargs[key], float) and not math.isfinite(kwargs[key]):  # torch's eps may be infinite: no step
            raise ValueError(f"{where}.{key}={value}: give a finite number")
    return optimizer, kwargs


def build(
    model: nn.Module,
    *,
    matrix: Mapping[str, Any] | None = None,
    embedding: Mapping[str, Any] | None = None,
    head: Mapping[str, Any] | None = None,
    scalar: Mapping[str, Any] | None = None,
    head_module: str = "lm_head",
    roles: Mapping[str, str] | None = None,
    process_group: dist.ProcessGroup | None = None,
) -> Combined:
    """One optimizer over all trainable parameters of a model, each by its role.

        optimizer = build(model, matrix=dict(optimizer=Muon, lr=0.02), scalar=dict(optimizer=AdamW, lr=3e-4))
        print(optimizer)  # who goes where

    Args:
        model: plain, DDP-replicated or FSDP2-sharded, with its final parameters.
        matrix, embedding, head, scalar: ``optimizer``, a class, and its settings.  Embeddings and the head are treated
            like scalars where they are not given.
        head_module, roles: see :func:`assign_roles`.
        process_group: ranks that hold identical plain parameters (DDP) and share the work on matrices.

    Raises:
        ValueError: the settings of a role that the model has are missing, or one is wrong.
    """
    given = dict(matrix=matrix, embedding=embedding or scalar, head=head or scalar, scalar=scalar)
    assigned = assign_roles(model, head_module, roles)
    members: dict[str, list[tuple[str, Tensor]]] = {role: [] for role in ROLES}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            members[assigned[name]].append((name, parameter))
    groups = []
    for role, parameters in members.items():
        settings = dict(given[role] or {})
        if not parameters:
            continue
        if not settings:
            raise ValueError(f"{role} is missing, but the model has {len(parameters)} such parameters")
        params: list[Any] = [{"params": parameters}]
        if isinstance(settings.get("optimizer"), type) and issubclass(settings["optimizer"], MatrixOptimizer):
            params = _group_by_layout(model, parameters)
            settings = {"process_group": process_group, **settings}
        try:
            params = split_by_name(params, settings.pop(BY_NAME, {}))
        except ValueError as error:
            raise ValueError(f"{role}.{error}") from None
        groups.append({"name": role, **settings, "params": params})
    return Combined(groups)


def build_from_config(
    model: nn.Module,
    config: Mapping[str, Any],
    process_group: dist.ProcessGroup | None = None,
    head_module: str = "lm_head",
) -> Combined:
    """As :func:`build`, from ``config[role] = {"_target_": class path, **settings}``, which every role needs.

    Raises:
        ValueError: a role that the model has is missing, or a setting is wrong, by its key.
    """
    needed = set(assign_roles(model, head_module).values())
    settings: dict[str, Any] = {}
    for role in ROLES:
        if role in needed and not config.get(role):
            raise ValueError(f"optim.{role} is missing, but the model has such parameters")
        if role in needed:
            cls, kwargs = resolve_target(config[role], f"optim.{role}")
            settings[role] = {"optimizer": cls, **kwargs}
    try:
        return build(model, **settings, process_group=process_group, head_module=head_module)
    except ValueError as error:
        raise ValueError(f"optim.{error}") from None


def is_hf_conv1d(module: nn.Module) -> bool:
    return any((cls.__module__, cls.__name__) == HF_CONV1D for cls in type(module).__mro__)


def _group_by_layout(model: nn.Module, parameters: list[tuple[str, Tensor]]) -> list[Any]:
    """Groups for the weights that are stored otherwise than (fan_out, fan_in) or [E, m, n], which only their modules
    know: Hugging Face's Conv1D and torch's convolutions."""
    settings: dict[Any, tuple[tuple[str, bool], ...]] = {}
    for module in model.modules():
        if is_hf_conv1d(module):
            settings[module.weight] = (("conv1d", True),)
        elif isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            settings[module.weight] = (("stack", False),)
        elif isinstance(module, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d):
            settings[module.weight] = (("stack", False), ("conv1d", True))
    kinds: dict[tuple[tuple[str, bool], ...], list[tuple[str, Tensor]]] = {}
    for name, parameter in parameters:
        kinds.setdefault(settings.get(parameter, ()), []).append((name, parameter))
    return [{"params": members, **dict(kind)} for kind, members in kinds.items()]
