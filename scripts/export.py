"""Write the weights of a run as safetensors.

    python scripts/export.py runs/mine mine.safetensors      our parameter names, whole matrices, of any model
    python scripts/export.py runs/mine mine/ --hf            a folder for transformers, with tokenizer and model card
    python scripts/export.py runs/mine mine/ --hf --push OWNER/NAME      and onto the Hugging Face hub

The newest good checkpoint is taken; RUN@STEP, or a checkpoint's own folder, may be given in place of the run's.
GPT-2's architecture goes as GPT2LMHeadModel, another one with modelling code of its own.
"""

import argparse
import json
import sys
from pathlib import Path

from safetensors import SafetensorError

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from trainer.model import GPTConfig  # noqa: E402
from trainer.run import storage  # noqa: E402
from trainer.run.dcp_index import read_weights  # noqa: E402
from trainer.run.storage import CheckpointError  # noqa: E402
from trainer.run.weights import find_checkpoint, load_trained  # noqa: E402


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run's directory, RUN@STEP, or one of its checkpoints")
    parser.add_argument("out", type=Path, help="a file, or with --hf a folder")
    parser.add_argument("--hf", action="store_true", help="a folder as transformers reads it")
    parser.add_argument("--push", metavar="OWNER/NAME", help="upload the folder to this model repository, new or not")
    options = parser.parse_args(arguments)
    if options.push and not options.hf:
        parser.error("--push uploads a folder for transformers: give --hf too")
    try:
        folder, faults = find_checkpoint(options.run)
        for fault in faults:
            print(f"warning: {fault}", file=sys.stderr)
        check_place(options.out, options.hf)
        (export_hf if options.hf else export)(folder, options.out)
    except (CheckpointError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        print(f"error: {options.out} cannot be written ({reason})", file=sys.stderr)
        return 1
    print(f"{options.out}: the weights after update {storage.step_of(folder)}, from {folder}")
    return push(options.out, options.push) if options.push else 0


def check_place(out: Path, hf: bool) -> None:
    """Raises ValueError: something other than an earlier export is there, and would be written over."""
    if hf and out.is_dir() and any(out.iterdir()) and not (out / "model.safetensors").exists():
        raise ValueError(f"{out} holds other files, such as a README.md that this would write over: give a new folder")
    if not hf and out.is_file() and out.suffix != ".safetensors":
        raise ValueError(f"{out} is there already: give another name, such as {out}.safetensors")


def export(folder: Path, out: Path) -> None:
    """One file; its metadata say which run and step it is."""
    from trainer.run.hf_folder import save_weights

    weights, state = read_weights(folder), storage.read_state(folder)
    about = {"format": "pt", "step": str(state["step"]), "vocab_size": str(state["vocab_size"])}
    save_weights(weights, about | {"config": json.dumps(state["config"])}, out)


def export_hf(folder: Path, out: Path) -> None:
    from trainer.run.hf_folder import write_hf_folder

    if (target := storage.read_state(folder)["config"].get("model._target_")) != GPTConfig._target_:
        raise ValueError(f"model._target_={target}: only {GPTConfig._target_} has a form for --hf, leave it out")
    write_hf_folder(load_trained(folder), out)


def push(out: Path, name: str) -> int:
    """Upload the folder; the account is that of ``hf auth login`` or HF_TOKEN.  Returns the exit code."""
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        api.create_repo(name, exist_ok=True)
        print(f"uploaded: {api.upload_folder(repo_id=name, folder_path=out)}")
    except Exception as error:  # of the hub, the network and the account, each with a class of its own
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        mend = f"{out} is whole, `hf upload {name} {out}` sends it later"
        print(f"error: --push {name}: {reason}; {mend}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
