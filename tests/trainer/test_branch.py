"""A run leaves its weights behind, and another goes on from any of its checkpoints with another schedule or length."""

import pytest
import torch

from common import UserError
from tests.errors import check_names, raises_naming
from tests.runs import read_losses, read_record
from trainer.run import storage
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
