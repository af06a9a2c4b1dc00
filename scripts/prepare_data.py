"""Text into token shards, and the check that shards are whole.

    python scripts/prepare_data.py data=fineweb [data.tokens=1_000_000_000]    FineWeb from the hub
    python scripts/prepare_data.py data=fineweb data.download=true             the same, tokenized already
    python scripts/prepare_data.py data=local data.source=FOLDER data.dir=OUT  your own .parquet, .jsonl or .txt
    python scripts/prepare_data.py verify DIR                                  headers, sizes, hashes, token range

Any key of the data section can be given, as for train.py; data/config.py lists them. A preparation that was
interrupted, in whatever way, is continued by the same command. docs/data.md has the formats.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from common import UserError  # noqa: E402
from data import manifest  # noqa: E402
from data.build import build, prepare  # noqa: E402
from data.config import DataConfig  # noqa: E402

LINE_SECONDS = 10.0  # between lines of progress where there is no terminal


@dataclass
class PrepareConfig:
    defaults: list[Any] = field(default_factory=lambda: ["_self_", {"data": "fineweb"}])
    data: DataConfig = field(default_factory=DataConfig)


def configure(overrides: list[str]) -> DataConfig:
    """The data section as Hydra composes it. Raises UserError with the first line of what Hydra says."""
    ConfigStore.instance().store(name="prepare_data", node=PrepareConfig)
    try:
        with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
            section = compose("prepare_data", overrides).data
            if unknown := sorted(set(section) - {f.name for f in fields(DataConfig)}):
                raise UserError(f"data.{unknown[0]}={section[unknown[0]]}: no such key; data/config.py lists them")
            return OmegaConf.to_object(section)
    except (HydraException, OmegaConfBaseException) as error:
        detail = error.__cause__ or error
        raise UserError(f"{' '.join(overrides)}: {str(detail).strip().splitlines()[0]}") from None


class Display:
    """A bar with tokens/s and time left; lines instead where there is no terminal."""

    def __init__(self) -> None:
        self.console = Console(stderr=True)
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[done]}"),
            TimeRemainingColumn(),
        )
        self.bar = Progress(*columns, console=self.console, disable=not self.console.is_terminal)
        self.task = self.bar.add_task("tokenizing", total=1.0, done="")
        self.first: tuple[float, int, float] | None = None
        self.spoke = time.monotonic()

    def report(self, tokens: int, fraction: float | None) -> None:
        now = time.monotonic()
        self.first = self.first or (now, tokens, fraction or 0.0)  # what an earlier process did does not count as speed
        seconds = now - self.first[0]
        done = f"{tokens:,} tokens"
        if seconds > 0:
            done += f"  {(tokens - self.first[1]) / seconds / 1e6:.2f}M tokens/s"
        total = None if fraction is None else 1.0  # None: the bar pulses, no time left is shown
        self.bar.update(self.task, completed=fraction or 0.0, total=total, done=done)
        if not self.console.is_terminal and now - self.spoke >= LINE_SECONDS:
            self.spoke = now
            gained = (fraction or 0.0) - self.first[2]
            left = f"  {seconds * (1 - fraction) / gained:,.0f} s left" if gained > 0 else ""
            print(done + left, file=sys.stderr, flush=True)


def run(config: DataConfig) -> None:
    if config.source == "sample" or config.download:
        prepare(config)
        content = manifest.read_manifest(config.folder)
    else:
        display = Display()
        with display.bar:
            content = build(config, display.report)
    documents, tokens = content["documents"], content["tokens"]
    bad = ", ".join(f"{count} {kind}" for kind, count in sorted(documents.items()) if kind != "written")
    print(
        f"{config.folder}: {len(content['shards'])} shards, {tokens['val']:,} validation and {tokens['train']:,} "
        f"training tokens of {content['tokenizer']['name']} from {documents.get('written', 'unknown')} documents"
    )
    if bad:
        print(f"counted besides: {bad} (docs/data.md says how each is treated)")


def verify(folder: Path) -> None:
    start = time.monotonic()
    problems = manifest.verify_folder(folder)
    for problem in problems:
        print(f"problem: {problem}")
    if problems:
        raise UserError(f"{folder}: {len(problems)} problem{'s' * (len(problems) > 1)}")
    total = sum(file.stat().st_size for file in folder.glob("*.bin"))
    checked = (
        "headers, sizes, token range and sha256" if manifest.read_manifest(folder) else "no manifest: headers and sizes"
    )
    print(f"{folder}: good ({checked}; {total:,} bytes in {time.monotonic() - start:.1f} s)")


def main(arguments: list[str]) -> int:
    try:
        if not arguments or arguments[0] in ("-h", "--help"):
            print(__doc__.strip())
        elif arguments[0] == "verify":
            if len(arguments) != 2:
                raise UserError("verify needs one folder: python scripts/prepare_data.py verify DIR")
            verify(Path(arguments[1]).expanduser())
        else:
            run(configure(arguments))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:  # a full disk, most often
        print(f"error: {error.filename or 'writing'}: {error.strerror}; the same command continues", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted: the same command continues", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
