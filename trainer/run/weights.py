"""A trained model from the folder of its run: which checkpoint, its weights, its tokenizer."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common import UserError
from data import load_tokenizer
from data.tokenizer import Tokenizer
from trainer.language_model import LanguageModel, ModelConfig, check_logits, model_class, resolve_model
from trainer.run import storage
from trainer.run.dcp_index import read_weights
from trainer.run.storage import CheckpointError


@dataclass
class Trained:
    """A model as it was after update ``step``; ``settings`` has the dotted keys of the run's config."""

    model: LanguageModel
    tokenizer: Tokenizer
    settings: dict[str, Any]
    step: int
    folder: Path


def find_checkpoint(run: Path) -> tuple[Path, list[str]]:
    """The checkpoint that RUN, its newest good one, RUN@STEP or a checkpoint's own folder names, and what is wrong with
    newer ones.

    Raises CheckpointError: there is none.
    """
    run = storage.at_step(run)
    if storage.step_of(run) is not None:
        return run, []
    if not run.exists():
        raise CheckpointError(f"{run} does not exist: give the directory of a run that saved a checkpoint")
    folder, faults = storage.newest_good(run / "checkpoints")
    if folder is None:
        why = f": {faults[0]}" if faults else ""
        raise CheckpointError(f"{run} holds no good checkpoint{why}: give the directory of a run that saved one")
    return folder, faults


def load_trained(folder: Path, device: torch.device | str = "cpu", trust_code: bool = False) -> Trained:
    """The model of a checkpoint, whatever ranks and sharding wrote it, in evaluation mode.

    Args:
        trust_code: import the class that the checkpoint names, also where it is not one of ours.

    Raises CheckpointError: it is damaged, or does not fit its model. Raises UserError: its class is not trusted.
    """
    weights, state = read_weights(folder), storage.read_state(folder)
    tokenizer = tokenizer_of(state)
    model = build_model(state, tokenizer.eos, trust_code)
    load_weights(model, weights, folder)
    return Trained(model.to(device), tokenizer, state["config"], state["step"], folder)


def usable_device(name: str) -> torch.device:
    """Raises UserError: there is none of this name, or nothing can be computed on it."""
    try:
        torch.zeros(1, device=name).item()
        return torch.device(name)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise UserError(f"--device {name}: there is none here; leave it out, or give cpu") from None


def load_weights(model: LanguageModel, weights: dict[str, Tensor], source: Path) -> None:
    """Give a model on the meta device its weights. Raises CheckpointError where they are another model's."""
    expected = {name: parameter.shape for name, parameter in model.state_dict().items()}
    found = {name: tensor.shape for name, tensor in weights.items()}
    for name in sorted({**expected, **found}):
        if expected.get(name) != found.get(name):
            there, here = (list(shapes[name]) if name in shapes else "missing" for shapes in (found, expected))
            raise CheckpointError(f"{source}: the weights are another model's: {name} is {there} there, {here} here")
    model.load_state_dict(weights, assign=True)
    model.eval().requires_grad_(False)


def build_model(state: dict[str, Any], eos: int, trust_code: bool = False) -> LanguageModel:
    """The model of a checkpoint's state.json, without memory."""
    settings = state["config"]
    config = model_config(settings, trust_code)
    start = eos if settings.get("data.document_mask") else None
    cls = model_class(config._target_)
    check_logits(cls)
    with torch.device("meta"):
        return cls(config, state["vocab_size"], settings["train.seq_len"], start)


def model_config(settings: dict[str, Any], trust_code: bool = False) -> ModelConfig:
    """The section `model` of dotted settings. Raises UserError where it names code that is not ours."""
    section: dict[str, Any] = {}
    for key, value in settings.items():
        first, *parts = key.split(".")
        if first == "model":
            inner = section
            for part in parts[:-1]:
                inner = inner.setdefault(part, {})
            inner[parts[-1]] = value
    target = section.get("_target_")
    if not trust_code and target != ModelConfig._target_:
        raise UserError(f"model._target_={target}: not a class of nanoMuon's; --trust-code imports and runs it")
    return resolve_model(section)


def tokenizer_of(state: dict[str, Any]) -> Tokenizer:
    """The tokenizer in force, or by the vocabulary's size in checkpoints that do not say it."""
    by_size = {257: "byte", 50257: "gpt2"}
    name = state.get("tokenizer") or state["config"].get("data.tokenizer") or by_size.get(state.get("vocab_size", 0))
    if name is None:
        raise UserError(f"vocab_size={state.get('vocab_size')}: the checkpoint does not say its tokenizer")
    return load_tokenizer(name)
