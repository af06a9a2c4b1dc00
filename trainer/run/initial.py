"""Weights that a run begins with in place of random ones: ``run.init``."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from common import UserError
from trainer.config import Config
from trainer.language_model import LanguageModel, one_line
from trainer.model import GPTConfig
from trainer.parallel import Parallel, unwrap
from trainer.run import storage
from trainer.run.huggingface import bare_name, from_hf

HF_FIXED = {"activation_function": ("gelu_new", "gelu_pytorch_tanh"), "layer_norm_epsilon": (1e-5,),
            "scale_attn_weights": (True,), "scale_attn_by_inverse_layer_idx": (False,)}  # fmt: skip


def load_initial(config: Config, model: nn.Module, parallel: Parallel) -> None:
    """Give the model, sharded or not, the weights of ``run.init``, unless the run goes on from a checkpoint.

    Every rank reads them. Raises UserError, on all: they cannot be read on one, or are another model's.
    """
    source = config.run.init
    if source is None or parallel.broadcast_rank0(lambda: bool(storage.committed(config.run.checkpoints))):
        return
    bare, weights = unwrap(model), dict[str, Tensor]()
    parallel.gather(lambda: weights.update(_weights_for(source, bare)))
    with torch.no_grad():
        for name, parameter in bare.named_parameters():
            value = weights[name].to(parameter.device, parameter.dtype)
            if isinstance(parameter, DTensor):  # every rank has read the whole
                value = distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
            parameter.copy_(value)


def _weights_for(source: str, model: LanguageModel) -> dict[str, Tensor]:
    """Those of ``source``, which are just the model's. Raises UserError where they are not."""
    try:
        weights = read_initial(source, model)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RuntimeError) as error:  # whatever is in it
        raise UserError(f"run.init={source}: {one_line(error)}") from None
    parameters = dict(model.named_parameters())
    for name in sorted({*parameters, *weights}):
        there, here = (list(of[name].shape) if name in of else "missing" for of in (weights, parameters))
        if there != here:
            raise UserError(f"run.init={source}: {name} is {there} there and {here} here: choose the model it is of")
        if not (weights[name].is_floating_point() and weights[name].isfinite().all()):
            raise UserError(f"run.init={source}: {name} of {weights[name].dtype} holds no finite weights: give others")
    return weights


def read_initial(source: str, model: LanguageModel) -> dict[str, Tensor]:
    """Whole weights under our names, from a folder of transformers' GPT-2, from nanoGPT's ckpt.pt, or from safetensors.

    Nothing is unpickled but tensors and plain values. Raises ValueError: another format or architecture.
    """
    given = Path(source.removeprefix("hf:"))
    path = weights_file(given)
    about: dict[str, Any] = read_config(given / "config.json") if given.is_dir() else {}
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            found: Any = load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path.name} cannot be read ({error})") from None
    else:
        try:
            found = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # a zip's, a pickle's, whatever is in the file
            raise ValueError(f"{path.name} cannot be read as weights alone ({str(error).splitlines()[0]})") from None
        if isinstance(found, dict) and isinstance(found.get("model"), dict):
            about, found = dict(found.get("model_args") or {}), found["model"]
    if not isinstance(found, dict) or not all(isinstance(v, Tensor) and isinstance(k, str) for k, v in found.items()):
        raise ValueError(f"{path.name} holds no state dict")
    if any(bare_name(name).startswith("blocks.") for name in found):
        return {bare_name(name): tensor for name, tensor in found.items()}
    if not isinstance(model.config, GPTConfig):
        raise ValueError(f"model._target_={model.config._target_} has no form there")
    check_same(about, model.config)
    return from_hf(found, model.config, model.vocab_size, model.seq_len)


def weights_file(path: Path) -> Path:
    """The file itself, or that of a folder. Raises ValueError: there is none."""
    if (path / "run.json").exists():
        raise ValueError("is a run of nanoMuon's: give run.from to go on from it, or what scripts/export.py writes")
    if path.is_dir():
        path /= "model.safetensors" if (path / "model.safetensors").exists() else "pytorch_model.bin"
    if not path.is_file():
        raise ValueError("holds no model.safetensors: give a folder of transformers', a ckpt.pt of nanoGPT, or a "
                         ".safetensors file")  # fmt: skip
    return path


def read_config(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        raise ValueError(f"{path.name} is missing or no JSON") from None
    return content if isinstance(content, dict) else {}


def check_same(about: dict[str, Any], config: GPTConfig) -> None:
    """Compare what their config says beside the tensors' shapes; the number of heads is in no shape."""
    for key in ("n_layer", "n_head", "n_embd"):
        if key in about and about[key] != getattr(config, key):
            raise ValueError(f"{key} is {about[key]} there and model.{key}={getattr(config, key)} here")
    if about.get("bias") is not None and about["bias"] != config.bias:
        raise ValueError(f"bias is {about['bias']} there and model.bias={config.bias} here")
    for key, allowed in HF_FIXED.items():
        if key in about and about[key] not in allowed:
            raise ValueError(f"{key} is {about[key]} there: only {' or '.join(map(str, allowed))} is GPT-2's")
