"""A run leaves its weights behind, and another goes on from any of its checkpoints with another schedule or length."""

import shutil

import pytest
import torch

from common import UserError
from tests.errors import check_names, raises_naming
from tests.runs import SHORT, read_losses, read_record
from trainer.run import resume, storage
from trainer.run.dcp_index import read_weights

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
COOL = ["schedule=wsd", "schedule.decay=2"]


@pytest.mark.parametrize("last", [True, False])
def test_the_weights_are_there_when_a_run_has_ended(run, tmp_path, last):
    trainer = run("run", "checkpoint.every=null", f"checkpoint.last={last}")
    steps = [storage.step_of(folder) for folder in storage.committed(trainer.checkpoints.folder)]
    assert steps == ([6] if last else [])
    if last:
        weights = read_weights(storage.folder_of(trainer.checkpoints.folder, 6))
        assert all(torch.equal(weights[name], value) for name, value in trainer.model.state_dict().items())


def test_a_branch_is_the_run_that_had_its_schedule_from_the_start(run, tmp_path):
    run("trunk", "schedule=constant", "checkpoint.keep_last=9")
    for start, steps in ((4, 6), (6, 8)):
        branch = run(f"branch{start}", *COOL, f"train.steps={steps}", f"run.from_={tmp_path}/trunk@{start}")
        whole = run(f"whole{start}", *COOL, f"train.steps={steps}")
        losses = read_losses(tmp_path / f"whole{start}")
        after = [row for row in read_losses(tmp_path / f"branch{start}") if row[0] > start]
        assert after == [row for row in losses if row[0] > start] and len(after) == 2
        expected = whole.checkpoints.tensors()
        assert all(torch.equal(value, expected[name]) for name, value in branch.checkpoints.tensors().items())
    assert len([line for line in read_record(tmp_path / "branch6") if line["step"] <= 6]) == 7, "the trunk's lines"


def test_the_record_says_where_it_branched(run, tmp_path):
    run("trunk", "schedule=constant", "checkpoint.keep_last=9")
    run("branch", *COOL, f"run.from_={tmp_path}/trunk@4")
    headers = [line["run"] for line in read_record(tmp_path / "branch") if "run" in line]
    assert [header.get("branch") for header in headers] == [None, "trunk@4"]
    run("again", *COOL, f"run.from_={tmp_path}/branch@6", "train.steps=8")
    assert [line["run"] for line in read_record(tmp_path / "again") if "run" in line][-1]["branch"] == "branch@6"


def test_a_copied_directory_has_not_gone_on_from_the_original(run, configure, tmp_path):
    """Its own checkpoints would win over ``run.from`` without a word."""
    settings = ["schedule=constant", "train.steps=2", "eval.every=2", "checkpoint.every=1"]
    trunk, copy, branch = (tmp_path / name for name in ("trunk", "copy", "branch"))
    run("trunk", *settings)
    shutil.copytree(trunk, copy)
    run("branch", *settings, f"run.from_={trunk}@1")

    def again(directory, source):
        config = configure(*SHORT, *settings, f"run.dir={directory}", f"run.from_={source}")
        return bool(resume.finished(config)), resume.find(config)[0]

    def refused(directory, source):
        with raises_naming(UserError, f"run.from={source}", f"run.dir={directory}", "run.from out", "new run.dir"):
            again(directory, source)

    for source in (trunk, f"{trunk}@1", storage.folder_of(trunk / "checkpoints", 1)):
        refused(copy, source)
        assert again(branch, source) == (True, storage.folder_of(branch / "checkpoints", 2)), "the command of its start"
    refused(trunk, f"{trunk}@1")  # no way back within a run
    refused(branch, f"{trunk}@2")
    shutil.rmtree(storage.folder_of(copy / "checkpoints", 2))
    refused(copy, trunk)  # it has not finished


def test_what_a_branch_may_not_change(run, tmp_path):
    run("trunk", "schedule=constant")
    with pytest.raises(UserError) as error:
        run("other", *COOL, f"run.from_={tmp_path}/trunk@4", "seed=1")
    check_names(str(error.value), "seed is 0 there and 1 here", "same settings")
    assert "schedule" not in str(error.value)
    with raises_naming(UserError, f"{tmp_path}/trunk@5", "update 5", "4, 6", "keep_last"):
        run("missing", *COOL, f"run.from_={tmp_path}/trunk@5")
    with raises_naming(UserError, "train.steps=5", "train.steps=6", "earlier checkpoint"):
        run("short", *COOL, f"run.from_={tmp_path}/trunk", "train.steps=5")
