"""Checkpoint folders on disk: complete and durable under their final name, or not there at all.

    checkpoints/step_00000060/           manifest.json holds the size and SHA-256 of every other file
    checkpoints/step_00000060.partial/   being written or being removed; never read
    checkpoints/step_00000060.damaged/   found damaged when an older one was gone on from; for you to look at

A folder gets its final name by one rename, after everything in it is on the disk.  Nothing here needs torch.
"""

import hashlib
import json
import math
import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from common import UserError, sync_folder, write_json

FORMAT = 3  # 1: of nanoMuon 0.1, where roles and settings have other names; 2: with other names for the tensors
MANIFEST, STATE, INDEX = "manifest.json", "state.json", "index.json"

Files = dict[str, dict[str, Any]]  # name -> size in bytes, sha256


class CheckpointError(UserError):
    """A checkpoint cannot be used or written; the message names it and the fault."""


def folder_of(checkpoints: Path, step: int) -> Path:
    return checkpoints / f"step_{step:08d}"


def step_of(folder: Path) -> int | None:
    """The step in a folder's name; None if it is not the name of a committed checkpoint."""
    found = re.fullmatch(r"step_(\d{8,})", folder.name)
    return int(found[1]) if found else None


def partial_of(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.partial")


def committed(checkpoints: Path) -> list[Path]:
    """Committed checkpoints, newest first; their content is not looked at."""
    steps = {path: step for path in checkpoints.glob("step_*") if (step := step_of(path)) is not None}
    return sorted(steps, key=lambda path: steps[path], reverse=True)


def run_and_step(source: Path) -> tuple[Path, int | None]:
    """The run that a checkpoint's folder, RUN@STEP or RUN names, and the step if it names one; it need not exist."""
    if (step := step_of(source)) is not None:
        return source.parent.parent, step
    run, _, number = str(source).rpartition("@")
    if not run or not number.isdecimal() or source.exists():
        return source, None
    return Path(run), int(number)


def at_step(source: Path) -> Path:
    """RUN@STEP as that checkpoint's folder; any other path as it is.

    Raises CheckpointError: the run has none of that step.
    """
    run, step = run_and_step(source)
    if step is None or step == step_of(source):
        return source
    folder, found = folder_of(run / "checkpoints", step), committed(run / "checkpoints")
    if folder not in found:
        steps = ", ".join(str(step_of(path)) for path in reversed(found)) or "none"
        raise CheckpointError(f"{source}: that run holds no checkpoint of update {step}, but of {steps}; the run's "
                              "checkpoint.keep_last=N says how many stay")  # fmt: skip
    return folder


def fingerprint(path: Path) -> dict[str, Any]:
    """Size and SHA-256 of a file."""
    with path.open("rb") as file:
        return {"size": os.fstat(file.fileno()).st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def make_partial(partial: Path) -> None:
    """An empty partial folder, whatever a failed save has left.

    Raises OSError: the run's directory is not there any more; a second one must not grow in its place.
    """
    shutil.rmtree(partial, ignore_errors=True)
    partial.parent.mkdir(exist_ok=True)
    partial.mkdir()


def commit(folder: Path, files: Files) -> None:
    """Give the partial checkpoint its final name.

    Args:
        folder: final name; what already has this name is replaced.
        files: fingerprints of everything in the partial folder; the files themselves are on the disk.
    """
    partial = partial_of(folder)
    write_manifest(partial, step_of(folder), files)
    sync_folder(partial)
    replaced = folder.with_name(f"{folder.name}.replaced.partial")
    if folder.exists():
        os.rename(folder, replaced)
    os.rename(partial, folder)
    shutil.rmtree(replaced, ignore_errors=True)
    sync_folder(folder.parent)


def write_manifest(folder: Path, step: int | None, files: Files) -> None:
    write_json(folder / MANIFEST, {"format": FORMAT, "step": step, "files": files})


def remove(folder: Path) -> None:
    """Remove a checkpoint.  Killed halfway, it leaves a partial folder, never a damaged checkpoint."""
    if folder.exists():
        os.rename(folder, partial_of(folder))
    shutil.rmtree(partial_of(folder), ignore_errors=True)


def set_aside(folder: Path) -> None:
    """Rename a damaged checkpoint: it is not found again."""
    aside = folder.with_name(f"{folder.name}.damaged")
    shutil.rmtree(aside, ignore_errors=True)
    os.rename(folder, aside)


def remove_partial(checkpoints: Path) -> None:
    """Remove what killed processes have left."""
    for path in checkpoints.glob("step_*.partial"):
        shutil.rmtree(path, ignore_errors=True)


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """A JSON object of a checkpoint.

    Raises CheckpointError: it is missing or not a JSON object. Raises UserError: it cannot be read now.
    """
    try:
        value = json.loads((folder / name).read_text(encoding="utf-8"))
    except OSError as error:
        raise unreadable(folder, name, error) from None
    except (ValueError, RecursionError):
        raise CheckpointError(f"checkpoint {folder}: {name} is not JSON") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"checkpoint {folder}: {name} is not a JSON object")
    return value


def read_state(folder: Path) -> dict[str, Any]:
    """state.json of a checkpoint.  Raises as `read_json`, and CheckpointError where it lacks what a run needs."""
    state = read_json(folder, STATE)
    kinds: dict[str, Any] = {"step": int, "seconds": (int, float), "world_size": int, "mode": str}
    for key, kind in (kinds | {"numbers": dict, "config": dict}).items():
        if not isinstance(state.get(key), kind):
            raise CheckpointError(f"checkpoint {folder}: {STATE} has no sound {key!r} ({state.get(key)!r})")
    if state["step"] != step_of(folder):
        raise CheckpointError(f"checkpoint {folder}: {STATE} is that of step {state['step']}")
    return state


def unreadable(folder: Path, name: str, error: OSError) -> UserError:
    """A file that is not there is damage; one that cannot be read now may be whole: permissions, an absent disk."""
    said = f"checkpoint {folder}: {name} cannot be read ({error.strerror})"
    if isinstance(error, FileNotFoundError):
        return CheckpointError(said)
    return UserError(f"{said}: mend that and start again")


def verify(folder: Path) -> Files:
    """Compare every file with the manifest; return the manifest's files.

    Raises CheckpointError: naming the first file that is missing or different. Raises UserError: naming one that cannot
    be read now.
    """
    manifest = read_json(folder, MANIFEST)
    files = manifest.get("files")
    if manifest.get("format") == 1:
        raise CheckpointError(f"checkpoint {folder} is of nanoMuon 0.1: go on with that version, or begin a new run")
    if manifest.get("format") not in (2, FORMAT) or not isinstance(files, dict):
        raise CheckpointError(f"checkpoint {folder}: {MANIFEST} is damaged or of another format")
    if manifest.get("step") != step_of(folder):
        raise CheckpointError(f"checkpoint {folder}: {MANIFEST} is that of step {manifest.get('step')}")
    if INDEX not in files and ".metadata" in files and not (folder / INDEX).exists():
        raise CheckpointError(
            f"checkpoint {folder} has no {INDEX}, it is of an earlier nanoMuon: go on with that version (the run's "
            "environment.json names it), or begin a new run.dir by run.init=FILE, as its scripts/export.py writes one"
        )
    for name in (STATE, INDEX, ".metadata", *files):
        if name not in files or Path(name).name != name or "\0" in name:
            raise CheckpointError(f"checkpoint {folder}: {MANIFEST} is damaged at {name}")
    with ThreadPoolExecutor(8) as pool:  # hashing leaves Python's lock: as many files at once as there are cores
        for _ in pool.map(lambda name: _verify_file(folder, name, files[name]), files):
            pass
    return files


def _verify_file(folder: Path, name: str, expected: Any) -> None:
    try:
        if (folder / name).exists() and not (folder / name).is_file():  # a pipe would be waited for
            raise CheckpointError(f"checkpoint {folder}: {name} is no plain file")
        found = fingerprint(folder / name)
    except OSError as error:
        raise unreadable(folder, name, error) from None
    if not isinstance(expected, dict) or found["size"] != expected.get("size"):
        raise CheckpointError(f"checkpoint {folder}: {name} has {found['size']} bytes and not those of the manifest")
    if found != expected:
        raise CheckpointError(f"checkpoint {folder}: {name} differs from its SHA-256 in the manifest")


def newest_good(checkpoints: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that passes ``verify``, and what is wrong with the newer ones."""
    faults = []
    for folder in committed(checkpoints):
        try:
            verify(folder)
        except CheckpointError as error:
            faults.append(str(error))
        else:
            return folder, faults
    return None, faults


def prune(checkpoints: Path, keep_last: int, keep_best: int) -> None:
    """Remove all but the ``keep_last`` newest and the ``keep_best`` of lowest validation loss."""
    newest = committed(checkpoints)
    losses = {}
    for folder in newest if keep_best else []:
        with suppress(CheckpointError):
            state = read_json(folder, STATE)
            loss = state.get("val_loss")
            if loss is not None and math.isfinite(loss) and state.get("val_step") == state.get("step"):
                losses[folder] = loss
    best = sorted(losses, key=lambda folder: losses[folder])[:keep_best]
    for folder in newest[keep_last:]:
        if folder not in best:
            remove(folder)
