"""What is written is whole, what is damaged is refused, and what is loaded is what was saved."""

import json
import random
import shutil
import signal
from copy import deepcopy
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from common import UserError
from data import DataConfig, manifest, prepare
from data.shards import open_shard, write_shard
from optim import build
from optim.named_state import named_numbers, named_tensors
from optim.routing import ROLES, resolve_target
from tests.errors import check_names, raises_naming
from tests.runs import SHORT, cut_record, read_losses, read_record
from trainer import loop
from trainer.launch.compose import allow_extra_keys
from trainer.loop import Trainer
from trainer.run import resume, storage
from trainer.run.checkpoint import CheckpointError
from trainer.run.dcp_index import read_weights
from trainer.run.directory import lock_run_dir, run_id

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.fixture(scope="module")
def saved(tmp_path_factory, configure):
    """A folder with the checkpoints of steps 4 and 6."""
    trainer = Trainer(configure(*SHORT, f"run.dir={tmp_path_factory.mktemp('runs') / 'run'}"))
    trainer.run()
    return trainer


@pytest.fixture
def copy(saved, tmp_path):
    """A copy of those checkpoints that a test may damage."""
    return shutil.copytree(saved.checkpoints.folder, tmp_path / "checkpoints")


def test_plain_dcp_tools_read_it(saved):
    folder = storage.folder_of(saved.checkpoints.folder, 6)
    assert {path.name for path in folder.iterdir()} == {*storage.verify(folder), storage.MANIFEST}
    weights = {f"model.{name}": torch.zeros_like(value) for name, value in saved.model.state_dict().items()}
    dcp.load(weights, checkpoint_id=folder)
    for name, value in saved.model.state_dict().items():
        assert torch.equal(weights[f"model.{name}"], value)
        assert torch.equal(read_weights(folder)[name], value)


def test_torchs_state_tools_go_on_from_it(saved):
    """A program without this trainer: its model, ``optim.build``, DCP."""
    model, settings = deepcopy(saved.model), saved.config.optim
    roles = {role: resolve_target(getattr(settings, role), role) for role in ROLES}
    optimizer = build(model, **{role: {"optimizer": cls, **kwargs} for role, (cls, kwargs) in roles.items()})
    state = {"model": get_model_state_dict(model), "optim": get_optimizer_state_dict(model, optimizer)}
    dcp.load(state, checkpoint_id=storage.folder_of(saved.checkpoints.folder, 6))
    set_model_state_dict(model, state["model"])
    set_optimizer_state_dict(model, optimizer, state["optim"])
    theirs = named_tensors(saved.optimizers)
    assert len(theirs) > 20 and theirs.keys() == named_tensors(optimizer).keys()
    for name, value in named_tensors(optimizer).items():
        assert torch.equal(value, theirs[name]), name
    assert named_numbers(optimizer) == named_numbers(saved.optimizers)


def test_a_checkpoint_with_the_names_of_before_goes_on(saved, copy):
    """Format 2: model/<parameter>, optim/<role>/<parameter>/<key>, rng/<rank>/<device>."""
    folder = storage.folder_of(copy, 6)
    index = json.loads((folder / storage.INDEX).read_text())

    def former(name):
        kind, rest = name.split(".", 1)
        if kind == "optim":
            return "optim/matrix/" + "/".join(rest.removeprefix("state.").rsplit(".", 1))
        return f"{kind}/{rest}" if kind == "model" else name.replace(".", "/")

    (folder / storage.INDEX).write_text(json.dumps({former(name): entry for name, entry in index.items()}))
    expected = {name: value.clone() for name, value in saved.checkpoints.tensors().items()}
    for tensor in saved.checkpoints.tensors().values():
        tensor.zero_() if tensor.is_floating_point() else None
    saved.checkpoints.load(folder)
    for name, value in saved.checkpoints.tensors().items():
        assert name.startswith("rng") or torch.equal(value, expected[name]), name


def test_random_numbers_go_on(saved):
    draws = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        saved.checkpoints.load(storage.folder_of(saved.checkpoints.folder, 6))
        draws.append(torch.rand(3))
    assert torch.equal(*draws)


# Damage ----------------------------------------------------------------------------------------------------------


def damage(newest, older, dice) -> str:
    """One random mutation of the newest checkpoint; returns the file's name."""
    path = dice.choice(sorted(newest.iterdir()))
    content = bytearray(path.read_bytes())
    kind = dice.choice(["truncate", "flip", "delete", "append", "swap", "empty"])
    if kind == "truncate":
        path.write_bytes(content[: dice.randrange(len(content))])
    elif kind == "flip":
        content[dice.randrange(len(content))] ^= 1 << dice.randrange(8)
        path.write_bytes(content)
    elif kind == "append":
        path.write_bytes(content + b"\0")
    elif kind == "swap":
        other = (older / path.name).read_bytes()
        (older / path.name).write_bytes(content)
        path.write_bytes(other)
    elif kind == "empty":
        path.write_bytes(b"")
    else:
        path.unlink()
    return path.name


def restore(saved, copy) -> None:
    shutil.rmtree(copy)
    shutil.copytree(saved.checkpoints.folder, copy)


def test_three_hundred_mutations(saved, copy):
    """A damaged checkpoint is refused by name; the one before is taken if it is whole; never anything else."""
    dice = random.Random(11)
    newest, older = (storage.folder_of(copy, step) for step in (6, 4))
    harmless = 0
    for _ in range(300):
        name = damage(newest, older, dice)
        good, faults = storage.newest_good(copy)
        if good == newest:  # white space of the manifest: what it says is the same
            assert name in (storage.MANIFEST, storage.INDEX), "of another step, of the same layout"
            assert storage.verify(newest) == storage.verify(storage.folder_of(saved.checkpoints.folder, 6))
            harmless += 1
        else:
            assert str(newest) in faults[0]
            kept = storage.folder_of(saved.checkpoints.folder, 4)
            swapped = (older / name).read_bytes() != (kept / name).read_bytes()
            assert (good, len(faults)) == ((None, 2) if swapped else (older, 1))
            if name != storage.MANIFEST:
                assert name in faults[0]
        restore(saved, copy)
    assert harmless < 30
    print(f"300 mutations, {300 - harmless} refused by name, {harmless} that changed white space of the manifest")


def test_the_one_before_is_used_and_this_is_said(run, tmp_path, capsys):
    run("whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "damaged")
    for path in (tmp_path / "damaged" / "checkpoints" / "step_00000006").glob("__0_*"):
        path.write_bytes(path.read_bytes()[:-1])
    run("damaged")
    said = capsys.readouterr().out
    assert "step_00000006: __0_0.distcp has" in said and "going on after update 4 of 6" in said
    assert read_losses(tmp_path / "damaged") == read_losses(tmp_path / "whole")
    storage.verify(tmp_path / "damaged" / "checkpoints" / "step_00000006")  # written again


def test_a_damaged_one_does_not_take_the_place_of_a_good_one(run, tmp_path):
    """The only one that stays is the one just written, though the damaged one is of a later step."""
    folder = run("run").checkpoints.folder
    (storage.folder_of(folder, 6) / storage.STATE).unlink()
    run("run", "checkpoint.keep_last=1", "checkpoint.every=1", "train.max_minutes=1e-9")
    good, faults = storage.newest_good(folder)
    assert (good, faults) == (storage.folder_of(folder, 5), [])
    assert sorted(path.name for path in folder.iterdir()) == ["step_00000005", "step_00000006.damaged"]


def test_the_folder_of_another_step_is_refused(copy):
    """Its files fit its manifest, but they are not what the name says."""
    storage.folder_of(copy, 6).rename(storage.folder_of(copy, 9))
    good, faults = storage.newest_good(copy)
    assert good == storage.folder_of(copy, 4) and faults[0].endswith("manifest.json is that of step 6")


def test_no_good_checkpoint_is_an_error(run, tmp_path):
    run("run")
    for path in (tmp_path / "run" / "checkpoints").glob("*/__0_*"):
        path.unlink()
    with raises_naming(CheckpointError, "step_00000006", "__0_0.distcp", "remove that folder"):
        run("run")


def test_saved_by_the_clock(run):
    trainer = run("run", "checkpoint.every=null", "checkpoint.minutes=1e-9", "checkpoint.keep_last=9")
    assert [storage.step_of(path) for path in storage.committed(trainer.checkpoints.folder)] == [6, 5, 4, 3, 2, 1]


# Starting again --------------------------------------------------------------------------------------------------


def test_another_run_goes_on_from_this_one(run, tmp_path, capsys):
    run("whole")
    source = tmp_path / "whole" / "checkpoints" / "step_00000004"
    run("copy", f"run.from_={source}", "eval.every=2", "checkpoint.every=1")
    said = capsys.readouterr().out
    [said] = [line for line in said.splitlines() if "changed since" in line]
    check_names(said, "eval.every 3 -> 2", "checkpoint.every 2 -> 1")
    whole, copy = read_losses(tmp_path / "whole"), read_losses(tmp_path / "copy")
    assert [row[:2] for row in copy] == [row[:2] for row in whole], "its record begins with that of the other"
    assert json.loads((tmp_path / "copy/run.json").read_text())["id"] != run_id(tmp_path / "whole")


def test_run_from_as_it_is_typed():
    assert allow_extra_keys("run.from=runs/mine") == "run.from_=runs/mine"


def test_another_run_must_be_the_same_in_what_matters(run, tmp_path):
    run("whole", "optim.matrix.lr=0.02")
    words = "seed is 0 there and 3 here", "optim.matrix.lr is 0.02 there and 0.5 here", "same settings"
    with pytest.raises(UserError) as error:
        run("other", f"run.from_={tmp_path / 'whole'}", "seed=3", "optim.matrix.lr=0.5", "eval.every=2")
    check_names(str(error.value), *words)
    assert "eval" not in str(error.value)
    with raises_naming(CheckpointError, f"run.from={tmp_path}", "no checkpoint", "directory of a run"):
        run("third", f"run.from_={tmp_path}")


def test_other_shards_are_refused_and_moved_ones_accepted(run, tmp_path, capsys):
    here, there = (DataConfig("sample", dir=str(tmp_path / name), tokenizer="byte") for name in ("here", "there"))
    prepare(here)
    run("run", f"data.dir={here.dir}")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_00000006")
    shutil.move(here.dir, there.dir)
    run("moved", f"data.dir={there.dir}", f"run.from_={tmp_path / 'run'}")
    assert f"data.dir {here.dir} -> {there.dir}" in capsys.readouterr().out
    assert read_losses(tmp_path / "moved") == read_losses(tmp_path / "run")
    prepare(here)
    file, content = Path(here.dir) / "sample_train_000001.bin", manifest.read_manifest(here.folder)
    write_shard(file, open_shard(file)[1:])
    files = sorted(here.folder.glob("*.bin"), reverse=True)
    manifest.write_manifest(here.folder, content, content["documents"], files)
    with raises_naming(UserError, here.dir, "other data", "data.dir=", "new run.dir"):
        run("run", f"data.dir={here.dir}")


def test_a_checkpoint_that_must_be_there(run, tmp_path):
    run("run")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    cut_record(tmp_path / "run", lines=-1)
    with raises_naming(CheckpointError, "run.resume=must", f"{tmp_path}/run", "no checkpoint", "run.resume=auto"):
        run("run", "run.resume=must")


def test_a_finished_run_without_weights_is_not_begun_again(run, tmp_path):
    """Its record would be emptied."""
    run("run", "checkpoint.every=null", "checkpoint.last=false")
    before = read_record(tmp_path / "run")
    with raises_naming(UserError, f"{tmp_path}/run", "step 6", "no checkpoint", "new run.dir", "run.resume=restart"):
        run("run", "checkpoint.every=null", "checkpoint.last=false")
    assert read_record(tmp_path / "run") == before


def test_a_finished_run_with_weights_gives_its_loss_again(run, configure, tmp_path):
    run("run")
    before = read_record(tmp_path / "run")
    assert Trainer(configure(*SHORT, f"run.dir={tmp_path / 'run'}")).run() == before[-1]["val/loss"]
    assert read_record(tmp_path / "run") == before


def test_a_run_that_was_stopped_in_an_evaluation_completes_its_line(run, configure, tmp_path, monkeypatch):
    """The line of step 3 has the training loss when the run is stopped, and the validation loss when it goes on."""
    config = configure(*SHORT, f"run.dir={tmp_path / 'parts'}")
    trainer, evaluate = Trainer(config), loop.evaluate

    def interrupted(*arguments):
        if trainer.progress.step == 3:
            trainer.preemption.signal = signal.SIGTERM
        return evaluate(*arguments)

    monkeypatch.setattr(loop, "evaluate", interrupted)
    trainer.run()
    [*_, last] = read_record(tmp_path / "parts")
    assert last["step"] == 3 and "train/loss" in last and "val/loss" not in last
    run("parts")
    assert read_losses(tmp_path / "parts") == read_losses(run("whole").checkpoints.folder.parent)
    again = read_record(tmp_path / "parts")[3]
    assert {key: again[key] for key in last} == last, "what was measured before stays"


def test_finished_run(run, tmp_path):
    trainer = run("run")
    assert "is finished: step 6" in resume.finished(trainer.config)
    cut_record(tmp_path / "run", lines=-1)
    assert resume.finished(trainer.config) == ""


def test_a_directory_in_use_is_refused(run, tmp_path, capsys):
    run("run")
    first = lock_run_dir(tmp_path / "run")
    with raises_naming(UserError, f"run.dir={tmp_path}/run", "in use", "wait for it"):
        lock_run_dir(tmp_path / "run", timeout=0.3)
    first.close()
    lock_run_dir(tmp_path / "run", timeout=0).close()


def test_the_pause_is_recorded(saved):
    record = read_record(saved.checkpoints.folder.parent)
    pauses = {line["step"]: line.get("perf/checkpoint_pause_s") for line in record}
    assert [step for step, pause in pauses.items() if pause is not None] == [3, 5]
    assert pauses[3] > 0 and pauses[5] > 0
