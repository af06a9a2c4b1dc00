"""The Trainer as a Python prompt or a notebook uses it: a config from ``load_config``, no launcher."""

import gzip
import json
import math
import sys

import pytest
import torch

from common import UserError
from tests.errors import raises_naming
from tests.runs import SHORT, read_losses, read_record
from trainer.evaluate.validation import validation_batches, validation_loss
from trainer.launch import load_config
from trainer.loop import Trainer
from trainer.run.dcp_index import read_weights

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def test_a_run_from_a_python_prompt(tmp_path, monkeypatch):
    """Twice in one process and in any folder: each run makes a directory of its own below it."""
    monkeypatch.chdir(tmp_path)
    found = []
    for _ in range(2):
        trainer = Trainer(load_config([*SHORT, "checkpoint.every=null"]))
        found.append(trainer.run())
        directory = tmp_path / trainer.config.run.dir
        assert read_record(directory)[-1]["val/loss"] == found[-1] and (directory / "run.json").exists()
    assert found[0] == found[1] and math.isfinite(found[0])
    assert len(list((tmp_path / "runs").iterdir())) == 2


def test_a_directory_of_another_run_is_not_taken(tmp_path):
    Trainer(load_config([*SHORT, f"run.dir={tmp_path / 'run'}"])).run()
    before = read_record(tmp_path / "run")
    with raises_naming(UserError, f"run.dir={tmp_path / 'run'}", "seed", "new run.dir"):
        Trainer(load_config([*SHORT, f"run.dir={tmp_path / 'run'}", "seed=1"]))
    assert read_record(tmp_path / "run") == before


def test_every_line_has_what_was_measured_at_its_step(tmp_path):
    """The training loss of an update and the validation loss after it stand on one line."""
    Trainer(load_config([*SHORT, f"run.dir={tmp_path / 'run'}"])).run()
    found = read_record(tmp_path / "run")
    assert [line["step"] for line in found] == list(range(7))
    assert [line["step"] for line in found if "val/loss" in line] == [0, 3, 6]
    assert all("train/loss" in line and "lr/matrix" in line for line in found[1:])
    assert all("perf/peak_memory_bytes" in line for line in found if "val/loss" in line)


def test_updates_are_traced_for_perfetto(tmp_path, monkeypatch):
    Trainer(load_config([*SHORT, f"run.dir={tmp_path / 'run'}", "train.steps=4", "train.profile=2-3"])).run()
    (trace,) = (tmp_path / "run" / "profile").iterdir()
    assert trace.name == "updates-2-3-rank0.json.gz"
    with gzip.open(trace) as file:
        names = {event.get("name") for event in json.load(file)["traceEvents"]}
    assert {"update 2", "update 3", "Optimizer.step#Combined.step", "aten::mm"} <= names and "update 4" not in names
    step = Trainer.train_step
    monkeypatch.setattr(Trainer, "train_step", lambda self, number: (step(self, number) and "a signal", False))
    Trainer(load_config([*SHORT, f"run.dir={tmp_path / 'stopped'}", "train.profile=1-3"])).run()
    assert [path.name for path in (tmp_path / "stopped" / "profile").iterdir()] == ["updates-1-1-rank0.json.gz"]


@pytest.mark.parametrize("logger", ["jsonl", "wandb"])
def test_a_run_does_without_packages_for_other_choices(run, monkeypatch, capsys, logger, tmp_path):
    for name in ("wandb", "datasets", "transformers", "plotly"):
        monkeypatch.setitem(sys.modules, name, None)  # importing it is an ImportError
    run("run", f"logger={logger}")
    assert len(read_record(tmp_path / "run")) == 7
    assert ("wandb" in capsys.readouterr().out) == (logger == "wandb")


@pytest.mark.parametrize("updates", ["0-2", "5-7", "4-3", "two", "1-2-3"])
def test_updates_that_do_not_exist_cannot_be_traced(updates):
    with raises_naming(UserError, f"train.profile={updates}", "1-6", "10-13"):
        load_config([*SHORT, f"train.profile={updates}"])


def test_a_schedule_free_run_is_evaluated_and_saved_at_its_average(tmp_path):
    """Without a trace in training, and it goes on from a checkpoint bit for bit."""
    common = [*SHORT, "optim=schedule_free", "schedule=constant", "optim.lr_scale=3"]
    whole = Trainer(load_config([*common, f"run.dir={tmp_path / 'whole'}"]))
    final = whole.run()
    Trainer(load_config([*common, f"run.dir={tmp_path / 'rare'}", "eval.every=6", "checkpoint.every=null"])).run()
    losses = [line.get("train/loss") for line in read_record(tmp_path / "whole")]
    assert losses == [line.get("train/loss") for line in read_record(tmp_path / "rare")]

    latest = read_weights(tmp_path / "whole/checkpoints/step_00000006")
    trained = dict(whole.model.named_parameters())
    assert any(not torch.equal(trained[name], weight) for name, weight in latest.items())
    with torch.no_grad():
        for name, weight in latest.items():
            trained[name].copy_(weight)
    batches = validation_batches(whole.config, whole.split, whole.parallel)
    assert validation_loss(whole.model, whole.parallel, batches) == final

    start = f"run.from={tmp_path / 'whole/checkpoints/step_00000004'}"
    Trainer(load_config([*common, f"run.dir={tmp_path / 'rest'}", start])).run()
    assert read_losses(tmp_path / "rest") == read_losses(tmp_path / "whole")


def test_a_run_that_fails_lets_its_directory_go(tmp_path, monkeypatch):
    """Also where somebody keeps the exception, as a notebook does, and with it the Trainer."""
    where = [*SHORT, f"run.dir={tmp_path / 'run'}"]
    trainer = Trainer(load_config(where))
    monkeypatch.setattr(trainer, "train_step", lambda step: 1 / 0)
    with pytest.raises(ZeroDivisionError) as kept:
        trainer.run()
    assert kept.value is not None
    assert math.isfinite(Trainer(load_config([*where, "run.resume=restart"])).run())
