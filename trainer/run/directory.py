"""A run's directory: its name, and whose it is.

``run.json`` holds what makes a run that run: every setting that changes its numbers.  A directory whose run.json says
something else belongs to another run and is refused, never overwritten.
"""

import fcntl
import hashlib
import json
import re
import secrets
import sys
import time
from dataclasses import asdict
from itertools import chain, count
from pathlib import Path
from typing import IO, Any

from common import UserError, write_json
from optim.routing import ROLES, resolve_target
from optim.settings import defaults_of
from trainer.config import Config, Resume
from trainer.language_model import field_defaults

# What does not change the training: where it runs, how it is watched, how often it is saved.
NOT_IDENTITY = (
    *("run", "sweep", "eval", "checkpoint", "parallel", "logger", "data.download", "data.workers"),
    *("train.micro_batch", "train.non_finite", "train.max_skips", "train.max_minutes", "train.timeout_minutes"),
    "train.profile",
)
BRANCHES = ("schedule.", "train.steps")  # what a run that goes on from another may change: a cool-down, a longer run
SHOWN = 8  # differences that an error lists
FORMAT = 2  # of run.json: settings have other names than in 1
LOCK_TIMEOUT = 120  # seconds for which a run that is just saving its last checkpoint may still hold its directory


def new_directory(config: Config) -> Path:
    """``runs/<date>-<time>-<name>``, with a number behind it if two runs start in one second."""
    name = f"{time.strftime('%Y%m%d-%H%M%S')}-{folder_name(str(config.run.name))}"
    candidates = (Path("runs", name + suffix) for suffix in chain([""], map("-{}".format, count(2))))
    return next(path for path in candidates if not path.exists())


def job_name(overrides: list[str], seed: int) -> str:
    """A readable folder name for one job of a sweep, from its overrides and its seed."""
    words = [override.lstrip("+") for override in overrides]
    if not any(word.startswith("seed=") for word in words):
        words.append(f"seed={seed}")
    return folder_name(",".join(map(folder_name, words)))


def folder_name(text: str) -> str:
    """What a text is called as one folder."""
    name = re.sub(r"[^\w.,=+-]", "_", text)
    if len(name.encode()) <= 150:
        return name
    return f"{name.encode()[:130].decode(errors='ignore')}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def settings(config: Config) -> dict[str, Any]:
    """Dotted key -> value of every setting."""
    return _flatten(asdict(config))


def excluded_from_identity(key: str) -> bool:
    """Whether a setting may differ between two parts of the same run."""
    return key != "run.init" and f"{key}.".startswith(tuple(f"{free}." for free in NOT_IDENTITY))


def identity(config: Config) -> dict[str, Any]:
    """Dotted key -> value of every setting that makes this run differ from others."""
    return {key: value for key, value in settings(config).items() if not excluded_from_identity(key)}


def acquire_run_dir(config: Config) -> str:
    """Take ``run.dir``, or a new directory, for this run and return it.  On rank 0, after every check of the config.

    Raises UserError: it belongs to another run, or holds other files, or ``run.resume`` forbids what it holds.
    """
    directory = Path(config.run.dir) if config.run.dir else new_directory(config)
    mark, mine = directory / "run.json", identity(config)
    try:
        if mark.exists():
            _compare(mark, config)
            if config.run.resume == Resume.never:
                holds = f"run.dir={directory} already holds this run, and run.resume=never"
                raise UserError(f"{holds}: choose a new run.dir")
            return str(directory)
        if config.run.resume == Resume.must:
            raise UserError(f"run.resume=must, but run.dir={directory} holds no run: give the run.dir of a started run")
        if directory.exists() and (not directory.is_dir() or _holds_files(directory)):
            raise UserError(f"run.dir={directory} holds files that are not a run's: choose an empty or new folder")
        directory.mkdir(parents=True, exist_ok=True)
        saved = {"format": FORMAT, "name": config.run.name, "id": secrets.token_hex(4), "identity": mine}
        write_json(mark, saved, exclusive=True)
    except FileExistsError:  # another start of this moment was first
        _compare(mark, config)
    except OSError as error:
        raise UserError(f"run.dir={directory} cannot be used ({error.strerror}): choose another folder") from None
    return str(directory)


def lock_run_dir(directory: Path, timeout: float = LOCK_TIMEOUT) -> IO[str]:
    """Keep other processes out of a run's directory for as long as the result is open.  On rank 0.

    Raises UserError: another process holds it, and still does after ``timeout`` seconds.
    """
    file = (directory / "run.json").open()
    deadline, announced = time.monotonic() + timeout, False
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        except BlockingIOError:
            if time.monotonic() > deadline:
                file.close()
                raise UserError(f"run.dir={directory} is in use by another process: wait for it or stop it") from None
            if not announced:
                print(f"{directory} is still in use, waiting up to {timeout:.0f} s", file=sys.stderr, flush=True)
                announced = True
            time.sleep(0.2)
        except OSError:  # a file system without locks
            return file


def _holds_files(directory: Path) -> bool:
    """Beside what a kill has left while the mark was being written."""
    return any(not path.name.startswith(".run.json.") for path in directory.iterdir())


def run_id(directory: Path) -> str | None:
    """The random name under which trackers know the run, from its run.json; None if there is none."""
    try:
        return json.loads((directory / "run.json").read_text(encoding="utf-8"))["id"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def defaults(config: Config) -> dict[str, Any]:
    """Dotted key -> value of every setting that has a default: what a run of before had that does not know the key.

    A key that is new must have the default that changes nothing."""
    found = field_defaults(config)
    for role in ROLES:
        if own := getattr(config.optim, role):
            found["optim"][role] = defaults_of(resolve_target(own, f"optim.{role}")[0])
    return _flatten(found)


def _compare(mark: Path, config: Config) -> None:
    known = defaults(config)
    mine = known | identity(config)
    try:
        saved = json.loads(mark.read_text(encoding="utf-8"))
        theirs, version = known | saved["identity"], saved.get("format", 1)
        different = [key for key in {**theirs, **mine} if theirs.get(key) != mine.get(key)]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{mark} is damaged: choose a new run.dir") from None
    if version != FORMAT:
        raise UserError(
            f"run.dir={mark.parent} was begun by {'nanoMuon 0.1' if version == 1 else 'a later version of nanoMuon'}, "
            "whose settings have other names: go on with that version, or choose a new run.dir"
        )
    if different:
        diff = "; ".join(f"{key} is {theirs.get(key)} there and {mine.get(key)} here" for key in different[:SHOWN])
        more = f" (and {len(different) - SHOWN} more)" if len(different) > SHOWN else ""
        mend = "choose a new run.dir or the same settings"
        if all(key.startswith(BRANCHES) for key in different):
            mend = f"choose the same settings, or go on from it by run.from={mark.parent} in a new run.dir"
        raise UserError(f"run.dir={mark.parent} belongs to another run: {diff}{more}; {mend}")


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        return {k: v for name, inner in value.items() for k, v in _flatten(inner, f"{prefix}{name}.").items()}
    return {prefix[:-1]: str(value) if isinstance(value, str) else list(value) if isinstance(value, tuple) else value}
