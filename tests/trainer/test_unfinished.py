"""Runs that a full disk or a kill has left with less than they should have, and what the same command makes of them."""

import errno
import json
import os
import shutil
import time
from pathlib import Path

import pytest

from common import UserError
from tests.errors import check_names, raises_naming
from tests.runs import SHORT, cut_record, read_losses, read_record
from trainer.loop import Trainer
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


def test_a_record_that_ends_before_its_checkpoint_says_so_and_is_measured_again(run, tmp_path, capsys):
    whole = read_losses(run("run").checkpoints.folder.parent)
    cut_record(tmp_path / "run", lines=3, torn=9)
    capsys.readouterr()
    run("run")
    told = capsys.readouterr().out
    [warning] = [line for line in told.splitlines() if line.startswith("warning")]
    check_names(warning, "metrics.jsonl", "update 2 on")
    assert f"final val loss {whole[-1][2]:.4f}" in told, "that of the last weights, not the last one in the record"
    assert [line[0] for line in read_losses(tmp_path / "run")] == [0, 1, 6]


def test_a_loss_that_is_not_finite_is_an_end_too(run, tmp_path):
    trainer = run("run", "checkpoint.every=null", "checkpoint.last=false")
    file = tmp_path / "run" / "metrics.jsonl"
    *before, last = file.read_text().splitlines()
    file.write_text("\n".join([*before, json.dumps(json.loads(last) | {"val/loss": None})]) + "\n")
    assert "is finished: step 6, val loss nan" in resume.finished(trainer.config)


def test_a_run_that_ended_with_a_loss_that_is_not_finite_is_opened_again(run, tmp_path, capsys):
    run("run")
    file = tmp_path / "run" / "metrics.jsonl"
    *before, last = file.read_text().splitlines()
    file.write_text("\n".join([*before, json.dumps(json.loads(last) | {"val/loss": None})]) + "\n")
    run("run")
    assert "final val loss nan" in capsys.readouterr().out


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


@pytest.mark.parametrize("fault", [None, OSError(errno.ENOSPC, "No space left on device")])
def test_a_checkpoint_on_its_way_at_the_end_is_waited_for(configure, tmp_path, no_plot, capsys, fault):
    """Where the end has none of its own: after update 4 of 5."""
    words = "train.steps=5", "checkpoint.last=false", f"run.dir={tmp_path / 'run'}"
    trainer = Trainer(configure(*SHORT, *words))
    sync, calls = trainer.checkpoints.before_commit, []

    def slow():
        time.sleep(0.5)
        calls.append(fault)
        if len(calls) == 2 and fault:
            raise fault
        sync()

    trainer.checkpoints.before_commit = slow
    trainer.run()
    [newest, *_] = storage.committed(trainer.checkpoints.folder)
    assert storage.step_of(newest) == (2 if fault else 4)
    assert ("a checkpoint failed" in capsys.readouterr().out) == bool(fault)


def test_a_start_that_led_to_no_checkpoint_leaves_no_gap(run, tmp_path):
    run("whole")
    early = run("other", "checkpoint.every=null", "checkpoint.last=false", "train.steps=6")
    shutil.rmtree(early.checkpoints.folder, ignore_errors=True)
    cut = cut_record(tmp_path / "other", lines=2)
    run("other", f"run.from_={tmp_path / 'whole' / 'checkpoints' / 'step_00000004'}")
    assert read_losses(tmp_path / "other") == read_losses(tmp_path / "whole")
    assert (tmp_path / "other" / "metrics.1.jsonl").read_text() == cut, "nothing measured is lost"


def test_a_record_without_a_checkpoint_is_not_begun_anew(run, tmp_path):
    """Its checkpoints may be on a disk that is away, or were removed by somebody."""
    run("whole")
    run("run")
    (tmp_path / "run" / "checkpoints").rename(tmp_path / "elsewhere")
    (tmp_path / "run" / "checkpoints").symlink_to(tmp_path / "absent")
    record = tmp_path / "run" / "metrics.jsonl"
    before = cut_record(tmp_path / "run", lines=-1) + "\n\0"
    record.write_text(before)
    where = f"run.dir={tmp_path}/run", f"{tmp_path}/run/checkpoints"
    with raises_naming(UserError, *where, "step 5", "run.resume=restart"):
        run("run")
    assert record.read_text() == before
    (tmp_path / "run" / "checkpoints").unlink()
    run("run", "run.resume=restart")
    assert read_losses(tmp_path / "run") == read_losses(tmp_path / "whole")
    assert (tmp_path / "run" / "metrics.1.jsonl").read_text() == before


def test_the_record_of_another_run_is_not_gone_on_with(run, tmp_path):
    run("run")
    run("other", "seed=7")
    foreign = (tmp_path / "other" / "metrics.jsonl").read_bytes()
    (tmp_path / "run" / "metrics.jsonl").write_bytes(foreign)
    with raises_naming(UserError, f"{tmp_path}/run/metrics.jsonl", "another run", "bring this run's own record back"):
        run("run")
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == foreign


def test_a_stop_before_the_first_update_lacks_nothing(run, tmp_path, capsys):
    run("run", "train.max_minutes=0.000001")
    run("run")
    assert "lacks what was measured" not in capsys.readouterr().out
    assert [line["step"] for line in read_record(tmp_path / "run") if "val/loss" in line] == [0, 3, 6]


def test_a_directory_that_is_renamed_is_not_made_again(run, configure, tmp_path):
    """The save fails loudly; the run's files stay together."""
    trainer = Trainer(configure(*SHORT, f"run.dir={tmp_path / 'run'}"))
    train_step = trainer.train_step

    def renamed(step):
        if step == 3:
            (tmp_path / "run").rename(tmp_path / "moved")
        return train_step(step)

    trainer.train_step = renamed
    with raises_naming(UserError, f"{tmp_path}/run", "update 6", "make room"):
        trainer.run()
    assert not (tmp_path / "run").exists()
    assert any("checkpoint/failed" in line for line in read_record(tmp_path / "moved"))


def test_a_checkpoint_that_cannot_be_read_now_is_not_damaged(run, tmp_path, monkeypatch):
    config = run("run").config
    (tmp_path / "run" / "metrics.jsonl").write_text("")
    fingerprint = storage.fingerprint
    for number in (errno.ESTALE, errno.EIO, errno.EMFILE, errno.EACCES):

        def away(path, number=number):
            if path.parent.name == "step_00000006":
                raise OSError(number, os.strerror(number))
            return fingerprint(path)

        monkeypatch.setattr(storage, "fingerprint", away)
        with raises_naming(UserError, "step_00000006", os.strerror(number), "start again"):
            resume.find(config)
        left = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
        assert left == ["step_00000004", "step_00000006"]


def test_lines_that_are_lost_at_the_end_are_an_error(run, tmp_path, monkeypatch):
    write = JsonLines._write

    def full(self, text):
        if b'"step": 4,' in text:
            self.unwritten = text
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, text)

    monkeypatch.setattr(JsonLines, "_write", full)
    with raises_naming(UserError, f"{tmp_path}/run/metrics.jsonl", "3 lines", "make room"):
        run("run", "checkpoint.every=null", "checkpoint.last=false")


def test_two_first_starts_of_one_directory(configure, tmp_path, monkeypatch):
    """The one that is second finds the first one's mark, whatever it saw before."""
    exists = Path.exists
    acquire_run_dir(configure(*SHORT, f"run.dir={tmp_path / 'run'}"))
    before = (tmp_path / "run" / "run.json").read_text()
    monkeypatch.setattr(Path, "exists", lambda path: path.name not in ("run.json", "run") and exists(path))
    assert acquire_run_dir(configure(*SHORT, f"run.dir={tmp_path / 'run'}")) == str(tmp_path / "run")
    with raises_naming(UserError, f"run.dir={tmp_path}/run", "seed", "new run.dir"):
        acquire_run_dir(configure(*SHORT, f"run.dir={tmp_path / 'run'}", "seed=1"))
    assert (tmp_path / "run" / "run.json").read_text() == before


def test_every_start_says_what_its_lines_were_measured_under(run, tmp_path):
    shutil.rmtree(storage.folder_of(run("run").checkpoints.folder, 6))
    run("run", "eval.tokens=384")
    headers = {line["step"]: line["run"] for line in read_record(tmp_path / "run") if "run" in line}
    assert {step: header["eval_tokens"] for step, header in headers.items()} == {0: 768, 5: 384}
    for key in ("model_hash", "data_hash", "precision", "device"):
        assert headers[0][key] == headers[5][key] and headers[0][key]
    assert headers[0]["data"] == "sample-byte", "the tokenizer in force"


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
