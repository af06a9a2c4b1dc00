"""Write the weights of a run as safetensors.

    python scripts/export.py runs/mine mine.safetensors      our parameter names, whole matrices, of any model
    python scripts/export.py runs/mine mine/ --hf            a folder for transformers' GPT2LMHeadModel (GPT-2 only)

The newest good checkpoint is taken; a checkpoint's own folder may be given in place of the run's.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from trainer.model import GPTConfig  # noqa: E402
from trainer.run import storage  # noqa: E402
from trainer.run.dcp_index import read_weights  # noqa: E402
from trainer.run.storage import CheckpointError  # noqa: E402


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run's directory, or one of its checkpoints")
    parser.add_argument("out", type=Path, help="a file, or with --hf a folder")
    parser.add_argument("--hf", action="store_true", help="as transformers' GPT2LMHeadModel reads it")
    options = parser.parse_args(arguments)
    try:
        folder = checkpoint(options.run)
        weights, state = read_weights(folder), storage.read_state(folder)
        (export_hf if options.hf else export)(weights, state, options.out)
    except (CheckpointError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        print(f"error: {options.out} cannot be written ({reason})", file=sys.stderr)
        return 1
    print(f"{options.out}: {len(weights)} tensors after update {state['step']}, from {folder}")
    return 0


def checkpoint(run: Path) -> Path:
    """The newest good checkpoint of a run; a checkpoint itself."""
    if storage.step_of(run) is not None:
        return run
    folder, faults = storage.newest_good(run / "checkpoints")
    for fault in faults:
        print(f"warning: {fault}", file=sys.stderr)
    if folder is None:
        raise CheckpointError(f"{run} holds no good checkpoint: give the directory of a run that saved one")
    return folder


def export(weights: dict[str, torch.Tensor], state: dict[str, Any], out: Path) -> None:
    """One file; its metadata say which run and step it is."""
    about = {"format": "pt", "step": str(state["step"]), "vocab_size": str(state["vocab_size"])}
    write(weights, about | {"config": json.dumps(state["config"])}, out)


def export_hf(weights: dict[str, torch.Tensor], state: dict[str, Any], out: Path) -> None:
    """config.json and model.safetensors in a folder."""
    from trainer.run.huggingface import hf_config, to_hf

    config = model_config(state["config"])
    theirs = to_hf(weights, config, state["vocab_size"])
    del theirs["lm_head.weight"]  # the same tensor as wte's
    out.mkdir(parents=True, exist_ok=True)
    write(theirs, {"format": "pt"}, out / "model.safetensors")
    hf_config(config, state["vocab_size"], state["config"]["train.seq_len"]).save_pretrained(out)


def model_config(settings: dict[str, Any]) -> GPTConfig:
    """The section `model` of a checkpoint's settings. Raises ValueError where it is not GPT's."""
    section = {key.removeprefix("model."): v for key, v in settings.items() if key.startswith("model.")}
    if (target := section["_target_"]) != GPTConfig._target_:
        raise ValueError(f"model._target_={target}: only {GPTConfig._target_} has a form for --hf, leave it out")
    return GPTConfig(**section)


def write(tensors: dict[str, torch.Tensor], metadata: dict[str, str], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial, metadata)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


if __name__ == "__main__":
    sys.exit(main())
