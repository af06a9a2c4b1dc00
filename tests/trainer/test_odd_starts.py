"""Names that are no folder, and environments that are no launcher's: one line, before anything starts."""

import sys
from pathlib import Path

import pytest

from common import UserError
from tests.errors import check_names, error_lines, raises_naming
from trainer.launch import load_config
from trainer.launch.cli import main
from trainer.run.directory import acquire_run_dir


@pytest.mark.parametrize(("key", "sign"), [("run.name", "\n"), ("run.dir", "\0"), ("logger.label", "\x1b")])
def test_signs_that_are_no_text_are_told(key, sign):
    with raises_naming(UserError, f"{key}={f'a{sign}b'!r}", "control characters"):
        load_config(["experiment=smoke", f"{key}='a{sign}b'"])


@pytest.mark.parametrize(
    "said",
    [{"WORLD_SIZE": "abc"}, {"WORLD_SIZE": "0"}, {"WORLD_SIZE": ""}, {"WORLD_SIZE": "2", "RANK": "5"}, {"RANK": "-1"},
     {"LOCAL_WORLD_SIZE": "2.0"}, {"MASTER_PORT": "tcp"}],
)  # fmt: skip
def test_what_is_no_rank_is_told_before_anything_starts(monkeypatch, capsys, said):
    for key, value in said.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr(sys, "argv", ["train.py", "experiment=smoke"])
    with pytest.raises(SystemExit):
        main(lambda config: None)
    (line,) = error_lines(capsys.readouterr().err)
    check_names(line, list(said.items())[-1][0], "give")


@pytest.mark.parametrize("name", ["../../x", "a/b", "x" * 300, "ü" * 200])
def test_a_name_is_one_folder(configure, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    path = Path(acquire_run_dir(configure("experiment=smoke", f"run.name='{name}'")))
    assert path.parent == Path("runs") and path.resolve().parent == tmp_path / "runs" and path.is_dir()


def test_a_folder_that_cannot_be_is_one_line(configure, tmp_path):
    for folder in ("x" * 300, "file/run"):
        (tmp_path / "file").touch()
        with raises_naming(UserError, f"run.dir={tmp_path}/{folder}", "choose another folder"):
            acquire_run_dir(configure("experiment=smoke", f"run.dir={tmp_path}/{folder}"))
