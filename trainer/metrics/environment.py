"""What is needed to repeat a run, and what its speed is measured against."""

import importlib.metadata
import json
import os
import platform
import shlex
import sys
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from data import TrainValSplit
from trainer.config import Config
from trainer.language_model import ModelConfig, field_defaults
from trainer.parallel import Parallel

from .identity import model_hash

# Settings that came later: with these values the model is that of the records before them, and has their hash.
LATER = {"param": "standard", "base_width": None, "base_head_dim": None}
PACKAGES = ("torch", "accelerate", "transformers", "datasets", "numpy", "tiktoken", "wandb", "hydra-core")

# Dense bf16 FLOP/s by a part of the device's name, from the makers' data sheets; the first that fits counts.
PEAK_FLOPS = {
    "GB300": 2500e12,
    "GB200": 2500e12,
    "B300": 2250e12,
    "B200": 2250e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "RTX 5090": 209e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}


def header(config: Config, parallel: Parallel, split: TrainValSplit | None = None) -> dict[str, Any]:
    """What a comparison of records must know of a run and of the conditions that it runs under."""
    train, (chosen, default) = config.train, model_settings(config.model)
    return {
        "name": config.run.name,
        "optim": config.logger.label or config.optim.name,
        "model": config.model.name,
        "model_hash": model_hash({k: v for k, v in (chosen | default).items() if (k, v) not in LATER.items()}),
        "model_settings": chosen,
        "model_defaults": default,
        "data": f"{config.data.name}-{split.tokenizer if split else config.data.tokenizer or 'gpt2'}",
        "data_hash": split.fingerprint[:12] if split else None,
        "seed": config.seed,
        "steps": train.steps,
        "batch_tokens": train.batch_tokens,
        "seq_len": train.seq_len,
        "micro_batch": train.micro_batch,
        "eval_tokens": config.eval.tokens,
        "target": config.eval.target,
        "precision": str(parallel.dtype).removeprefix("torch."),
        "device": describe(parallel),
    }


def model_settings(model: ModelConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a model is: its settings that differ from the defaults of its class, and those that do not."""
    named = ("name", "family", "presets")  # what a model is called does not change it
    usual = field_defaults(model)
    chosen: dict[str, Any] = {}
    default: dict[str, Any] = {}
    for key, value in asdict(model).items():
        if key not in named:
            # As it is read again from the record, where JSON has no word for infinity or a path.
            plain = json.loads(json.dumps(value, default=str), parse_constant=str)
            (default if key in usual and value == usual[key] else chosen)[key] = plain
    return chosen, default


def describe(parallel: Parallel) -> str:
    ranks = f"{parallel.world_size} rank{'s' * (parallel.world_size > 1)}"
    return f"{ranks} ({parallel.mode}) on {device_name(parallel.device)}"


def environment(parallel: Parallel, source: str) -> dict[str, Any]:
    """Versions, device, command.  No environment variables, no paths."""
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "source": source,
        "python": platform.python_version(),
        "versions": {name: version for name in PACKAGES if (version := installed_version(name))},
        "platform": platform.platform(),
        "cuda": torch.version.cuda,
        "device": device_name(parallel.device),
        "world_size": parallel.world_size,
        "mode": parallel.mode,
        "threads": torch.get_num_threads(),
    }


def installed_version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} ({os.cpu_count()} cores)"


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 FLOP/s of one device, None where it is not known."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((flops for part, flops in PEAK_FLOPS.items() if part in name), None)
