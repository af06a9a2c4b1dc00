"""Runs that a full disk or a kill has left with less than they should have, and what the same command makes of them."""

import errno
import json
import shutil

import pytest

from common import UserError
from tests.errors import check_names, raises_naming
from tests.runs import SHORT, cut_record, read_losses, read_record
from trainer.metrics import record
from trainer.metrics.jsonl import JsonLines
from trainer.run import resume, storage
from trainer.run.directory import acquire_run_dir

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def test_a_run_whose_last_save_failed_is_not_finished(run, configure, tmp_path, monkeypatch, capsys):
    """The record is complete, the last weights are not there: an error, and the same command makes up for it."""
    commit_it, full = storage.commit, [True]

    def refused(folder, files):
        if full and storage.step_of(folder) == 6:
            raise OSError(errno.ENOSPC, "No space left on device")
        commit_it(folder, files)

    monkeypatch.setattr(storage, "commit", refused)
    with raises_naming(UserError, f"{tmp_path}/run/checkpoints", "update 6", "make room"):
        run("run")
    assert "final val loss" in capsys.readouterr().out and read_losses(tmp_path / "run")[-1][0] == 6
    assert resume.finished(configure(*SHORT, f"run.dir={tmp_path / 'run'}")) == ""
    full.clear()
    again = run("run")
    assert again.checkpoints.latest == 6 and "is finished: step 6" in resume.finished(again.config)
    assert read_losses(tmp_path / "run") == read_losses(run("whole").checkpoints.folder.parent)


def test_a_loss_that_is_not_finite_is_an_end_too(run, tmp_path):
    trainer = run("run", "checkpoint.every=null")
    file = tmp_path / "run" / "metrics.jsonl"
    *before, last = file.read_text().splitlines()
    file.write_text("\n".join([*before, json.dumps(json.loads(last) | {"val/loss": None})]) + "\n")
    assert "is finished: step 6, val loss nan" in resume.finished(trainer.config)


def test_a_line_that_the_disk_refuses_holds_up_the_checkpoint_after_it(run, tmp_path, monkeypatch):
    write = JsonLines._write

    def full(self, text):
        if b'"step": 2,' in text and b'"step": 5,' not in text:
            self.unwritten = text
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, text)

    monkeypatch.setattr(JsonLines, "_write", full)
    trainer = run("run", "checkpoint.keep_last=9")
    assert [line["step"] for line in read_record(tmp_path / "run")] == [0, 1, 2, 3, 4, 5, 6]
    [told, *_] = [line for line in read_record(tmp_path / "run") if "checkpoint/failed" in line]
    assert told["step"] <= 5, "the save after update 4 waits for the one before it"
    check_names(told["checkpoint/failed"], "metrics.jsonl")
    assert {2, 6} & {storage.step_of(path) for path in storage.committed(trainer.checkpoints.folder)} == {6}


def test_a_start_that_led_to_no_checkpoint_leaves_no_gap(run, tmp_path):
    run("whole")
    early = run("other", "checkpoint.every=null", "train.steps=6")
    shutil.rmtree(early.checkpoints.folder, ignore_errors=True)
    cut_record(tmp_path / "other", lines=2)
    run("other", f"run.from_={tmp_path / 'whole' / 'checkpoints' / 'step_00000004'}")
    assert read_losses(tmp_path / "other") == read_losses(tmp_path / "whole")


def test_a_directory_that_cannot_be_written_is_one_line(run, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(record, "write_text", full)
    with raises_naming(UserError, f"run.dir={tmp_path}/run", "No space left on device", "make room"):
        run("run")


def test_a_kill_while_the_mark_was_written(configure, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".run.json.abcd").write_text("{")
    config = configure(*SHORT, f"run.dir={tmp_path / 'run'}")
    assert acquire_run_dir(config) == str(tmp_path / "run") and (tmp_path / "run" / "run.json").exists()
