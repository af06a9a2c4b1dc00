"""A preparation that is killed, at any moment, and started again ends with the bytes of an undisturbed one."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from data import build as building
from data import manifest, writer
from data.build import build
from data.config import DataConfig
from data.shards import open_shard

ROOT = Path(__file__).resolve().parents[2]
KILLS = 20 if os.environ.get("NANOMUON_SOAK") else 5


def contents(folder: Path) -> dict[str, bytes]:
    """All files but the lock's, empty, which a kill after everything else was done leaves behind."""
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.name != ".lock"}


class Crash(BaseException):
    """Nothing catches this, as nothing catches a power cut."""


def lose_what_is_buffered(self: writer.ShardWriter) -> None:
    """In place of ShardWriter.close: a killed process does not flush."""
    if self.file is not None and not self.file.closed:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), self.file.fileno())
        self.file.close()


@pytest.mark.parametrize("shard_tokens", [60_000, 10_000_000])
def test_stopping_at_every_commit(rows, local, monkeypatch, shard_tokens):
    """Stop at the n-th call that makes something durable or visible, for every n, then continue.

    60,000 tokens a shard stop around the ends of shards, 10,000,000 around the split of a corpus that is smaller.
    """
    monkeypatch.setattr(building, "CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # the order of calls matters here, not the disk
    config = local(rows[:600], shard_tokens=shard_tokens)
    build(config)
    expected = contents(config.folder)
    for number in stopped_at_every_commit(config, monkeypatch):
        for file in config.folder.glob("*.bin"):
            open_shard(file)
        if (config.folder / manifest.NAME).exists():
            assert manifest.verify_folder(config.folder) == []
        build(config)
        assert contents(config.folder) == expected, f"stopped at commit {number}"
    assert number > 10


def stopped_at_every_commit(config: DataConfig, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Prepare into new folders; yields n = 1, 2, … when one was stopped at its n-th commit, the last one never."""
    for number in range(1, 1000):
        config.dir, crashed = f"{config.dir}x", False
        with monkeypatch.context() as patch:
            patch.setattr(writer.ShardWriter, "close", lose_what_is_buffered)
            crashes_at(number, patch)
            try:
                build(config)
            except Crash:
                crashed = True
        yield number
        if not crashed:
            return


def crashes_at(number: int, patch: pytest.MonkeyPatch) -> None:
    """The `number`-th call of fsync, replace and sync_folder together does nothing but crash."""
    calls = 0

    def counted(real, *arguments):
        nonlocal calls
        calls += 1
        if calls == number:
            raise Crash
        return real(*arguments)

    for module, name in [(os, "fsync"), (os, "replace"), (writer, "sync_folder")]:
        patch.setattr(module, name, partial(counted, getattr(module, name)))


def test_final_names_come_from_renames_of_synced_files(rows, local, monkeypatch):
    """Against a power cut too: a file is synced before it gets its name, tokens before what counts them."""
    monkeypatch.setattr(building, "CHECKPOINT_SECONDS", 0.0)
    config, events = local(rows[:600], shard_tokens=60_000), []
    fsync, replace = os.fsync, os.replace

    def note_fsync(descriptor):
        events.append(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    def note_replace(source, target):
        assert os.stat(source).st_ino in events, f"{source} was not synced before it became {target}"
        if Path(target).name == building.PROGRESS:
            parts = [file.stat().st_ino for file in config.folder.glob("*.part")]
            assert not parts or parts[0] in events
        events.append(Path(target).name)
        replace(source, target)
        events[:] = [event for event in events if isinstance(event, str)]

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "replace", note_replace)
    build(config)
    assert set(contents(config.folder)) <= set(events) and building.PROGRESS in events


CHILD = """
import sys
from data import build
from data.config import DataConfig
build.CHECKPOINT_SECONDS = 0.02
build.load_tokenizer("gpt2")
config = DataConfig(name="local", source=sys.argv[1], dir=sys.argv[2], tokenizer="gpt2", shard_tokens=20_000, workers=2)
print("ready", flush=True)
build.build(config)
"""


def start(source: Path, out: Path) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", CHILD, str(source), str(out)]
    child = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, cwd=ROOT)
    assert child.stdout.readline() == b"ready\n"
    return child


@pytest.mark.slow
def test_kill_9_at_random_moments(rows, local, tmp_path):
    config = local(rows, tokenizer="gpt2", shard_tokens=20_000)
    began = time.monotonic()
    assert start(Path(config.source), tmp_path / "undisturbed").wait(120) == 0
    seconds = time.monotonic() - began
    expected = contents(tmp_path / "undisturbed")
    assert len(expected) > 30

    moments, kills, round_ = random.Random(0), 0, 0
    while kills < KILLS:
        out = tmp_path / f"round{round_}"
        round_ += 1
        assert round_ <= 10 * KILLS, "the children finish before they are killed"
        while kills < KILLS:
            child = start(Path(config.source), out)
            time.sleep(moments.uniform(0, seconds / 3))
            child.send_signal(signal.SIGKILL)
            if child.wait(60) == 0:
                break
            kills += 1
            for file in out.glob("*.bin"):
                open_shard(file)
        assert start(Path(config.source), out).wait(120) == 0
        assert contents(out) == expected
        assert manifest.verify_folder(out) == []
    print(f"{kills} kills in {round_} preparations of {len(expected)} files")


def test_a_killed_run_s_leftovers_are_cleared(rows, local):
    config = local(rows[:50])
    config.folder.mkdir()
    (config.folder / ".manifest.json.abc.tmp").write_bytes(b"half a")
    build(config)
    assert sorted(contents(config.folder)) == ["local_train_000001.bin", "local_val_000000.bin", "manifest.json"]


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"position": "x", "documents": {}, "cursor": null}'])
def test_a_corrupt_progress_file_is_named(rows, local, mistake, content):
    config = local(rows[:50])
    config.folder.mkdir()
    (config.folder / building.PROGRESS).write_bytes(content)
    with mistake(str(config.folder / building.PROGRESS), "corrupt", "empty the folder"):
        build(config)
