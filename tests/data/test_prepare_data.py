"""scripts/prepare_data.py as a user calls it."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from data.shards import open_shard

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "prepare_data.py"


@pytest.fixture(scope="module")
def program():
    spec = importlib.util.spec_from_file_location("prepare_data", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["prepare_data"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "text").mkdir()
    for i in range(20):
        (tmp_path / "text" / f"{i:02d}.txt").write_text(f"Document {i}. " * 50)
    (tmp_path / "text" / "99.txt").write_bytes(b"\xff")
    return tmp_path


def test_the_contract_from_another_folder(folder):
    """The command of the documentation, run from elsewhere, leaves the shards and nothing beside them."""
    command = [sys.executable, str(SCRIPT), "data=local", "data.source=text", "data.dir=out", "data.tokenizer=byte"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "2 shards" in done.stdout and "from 20 documents" in done.stdout and "1 invalid_utf8" in done.stdout
    assert sorted(path.name for path in folder.iterdir()) == ["out", "text"]
    expected = [t for i in range(20) for t in [256, *(f"Document {i}. " * 50).encode()]]
    shards = [open_shard(folder / "out" / f"local_{name}.bin") for name in ("val_000000", "train_000001")]
    found = [shard.tolist() for shard in shards]
    assert sorted(sum(found, [])) == sorted(expected) and found[0] != expected[: len(found[0])]

    done = subprocess.run([sys.executable, str(SCRIPT), "verify", "out"], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("out: good (headers, sizes, token range and sha256")
    with open(folder / "out" / "local_train_000001.bin", "r+b") as file:
        file.seek(2000)
        file.write(b"\x01\x01")
    done = subprocess.run([sys.executable, str(SCRIPT), "verify", "out"], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 1 and "problem: out/local_train_000001.bin: " in done.stdout
    assert done.stderr == "error: out: 1 problem\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["data=fineweeb"], "data/fineweeb"),
        (["data=local", "data.soruce=text"], "soruce"),
        (["data=local", "data.tokens=many"], "'many'"),
        (["data=local", "data.tokens=0"], "data.tokens=0"),
        (["seed=1"], "seed"),
        (["data=local"], "data.source=''"),
        (
            ["data=local", "data.source=text", "data.dir=/proc/version/out"],
            "data.dir=/proc/version/out: cannot be used",
        ),
        (["data=local", "data.source=text", "data.tokenizer=gpt5"], "data.tokenizer=gpt5"),
        (["data=sample", "data.dir=/proc/version/out"], "data.dir=/proc/version/out: cannot be used"),
        (["verify"], "verify needs one folder"),
        (["verify", "none"], "none: 1 problem"),
    ],
)
def test_mistakes_give_one_line(program, folder, monkeypatch, capsys, arguments, said):
    monkeypatch.chdir(folder)
    assert program.main(arguments) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and said in lines[0], lines
    assert [path.name for path in folder.iterdir()] == ["text"]


def test_a_full_disk_gives_one_line(program, folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)

    def full(*_, **__):
        raise OSError(28, os.strerror(28), "out/local_val_000000.bin.part")

    monkeypatch.setattr("data.writer.ShardWriter.write", full)
    assert program.main(["data=local", "data.source=text", "data.dir=out"]) == 1
    assert capsys.readouterr().err == (
        "error: out/local_val_000000.bin.part: No space left on device; the same command continues\n"
    )


def test_help_and_interruption(program, folder, monkeypatch, capsys):
    assert program.main(["--help"]) == 0 and "prepare_data.py data=local" in capsys.readouterr().out
    monkeypatch.setattr(program, "run", lambda config: (_ for _ in ()).throw(KeyboardInterrupt))
    assert program.main(["data=local"]) == 130
    assert capsys.readouterr().err == "interrupted: the same command continues\n"


def test_progress_without_a_terminal_is_lines_with_speed_and_time_left(program, capsys, monkeypatch):
    now = iter([0.0, 0.0, 20.0, 21.0])
    monkeypatch.setattr(program.time, "monotonic", lambda: next(now))
    display = program.Display()
    display.report(5_000_000, 0.5)
    display.report(25_000_000, 0.75)
    display.report(26_000_000, 0.76)
    assert capsys.readouterr().err == "25,000,000 tokens  1.00M tokens/s  20 s left\n"
