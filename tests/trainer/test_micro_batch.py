"""A micro-batch for which a device has no room is halved in the warm-up, on every rank, and nothing else changes."""

import pytest
import torch
import torch.distributed as dist

from common import UserError
from tests.distributed import hooks
from tests.distributed.harness import run_workers
from tests.errors import raises_naming
from tests.runs import SHORT, read_losses, read_record
from trainer.launch import load_config
from trainer.loop import Trainer
from trainer.model import Block
from trainer.parallel import teardown
from trainer.run import micro_batch

BRIEF = ["model.n_layer=2", "train.steps=2", "eval.every=2", "checkpoint.every=1"]
WEIGHT = "blocks.1.mlp.fc.weight"


def small_device(monkeypatch, room: int, rank: int = 0) -> None:
    """In the backward pass of the first block, or from double as many sequences on in the forward pass of the last,
    that rank's memory is full."""
    forward = Block.forward

    def limited(self, x, *others):
        this = dist.get_rank() if dist.is_initialized() else 0
        if this != rank or not torch.is_grad_enabled() or len(x) <= room:
            return forward(self, x, *others)
        y = forward(self, x, *others)
        if len(x) > 2 * room and self is not limited.first:
            raise torch.OutOfMemoryError("in the forward pass")
        limited.first = limited.first or self
        if self is limited.first:
            y.register_hook(full)
        return y

    def full(gradient):
        raise torch.OutOfMemoryError("in the backward pass")

    limited.first = None
    monkeypatch.setattr(Block, "forward", limited)
    monkeypatch.setattr(micro_batch, "can_run_out", lambda device: True)


def test_what_does_not_fit_is_halved_said_recorded_and_kept(run, tmp_path, monkeypatch, capsys):
    plain = run("plain", *BRIEF, "train.micro_batch=6")
    with monkeypatch.context() as patch:
        small_device(patch, room=6)
        found = run("small", *BRIEF)
    assert (found.config.train.micro_batch, found.progress.micro_batch) == (6, 6)
    assert "train.micro_batch=24 does not fit into the memory of cpu: 6" in capsys.readouterr().out
    assert read_record(tmp_path / "small")[0]["run"]["micro_batch"] == 6
    assert read_losses(tmp_path / "small") == read_losses(tmp_path / "plain")
    assert torch.equal(found.model.get_parameter(WEIGHT), plain.model.get_parameter(WEIGHT))
    # On a larger device, from the middle of the run: the same sums as before, unless others are asked for.
    for name, asked, expected in (("on", [], 6), ("other", ["train.micro_batch=12"], 12)):
        trainer = run(name, *BRIEF, f"run.from={tmp_path / 'small'}@1", *asked)
        assert trainer.config.train.micro_batch == trainer.progress.micro_batch == expected
        assert (read_losses(tmp_path / name) == read_losses(tmp_path / "plain")) == (expected == 6)


def test_the_state_that_is_still_to_begin_needs_room_too(run, monkeypatch):
    room = []

    def runs_out(model, parallel, batch, beside, passes):
        room.append(beside)
        return len(batch[0]) > 8

    monkeypatch.setattr(micro_batch, "can_run_out", lambda device: True)
    monkeypatch.setattr(micro_batch, "runs_out", runs_out)
    trainer = run("adamw", "optim=adamw", "train.steps=1")
    held = [s for m in trainer.optimizers.members.values() for state in m.state.values() for s in state.values()]
    assert set(room) == {sum(value.nbytes for value in held)} and trainer.config.train.micro_batch == 6


def test_the_second_pass_of_an_update_is_tried_too(run, monkeypatch):
    """Which begins beside whole gradients; an update of one pass never does."""
    began = []
    runs_out = micro_batch.runs_out

    def noting(model, *others):
        began.append([])
        with model.register_forward_pre_hook(lambda model, _: began[-1].append(model.wte.weight.grad is not None)):
            return runs_out(model, *others) or len(others[1][0]) > 6

    monkeypatch.setattr(micro_batch, "can_run_out", lambda device: True)
    monkeypatch.setattr(micro_batch, "runs_out", noting)
    run("several", *BRIEF, "train.micro_batch=6")
    run("one", *BRIEF, "train.micro_batch=24")
    assert began == [[False, True], [False], [False, True], [False, True]]


def test_not_one_sequence(run, monkeypatch):
    small_device(monkeypatch, room=0)
    with raises_naming(UserError, "train.micro_batch=1", "16 tokens", "activation_checkpointing=full"):
        run("none", *BRIEF, "train.micro_batch=2")


def trained(rank: int, world_size: int, folder: str) -> dict:
    """Rank 1's memory holds 3 of its 12 sequences: forward passes fail at 12, backward passes at 6."""
    hooks.no_plot()
    found = {}
    for mode in ("fsdp", "ddp"):
        for device, asked in (("small", 12), ("large", 3)):
            with pytest.MonkeyPatch.context() as patch:
                if device == "small":
                    small_device(patch, room=3, rank=1)
                trainer = Trainer(load_config([*SHORT, f"run.dir={folder}/{mode}-{device}", *BRIEF,
                                               f"parallel={mode}", "train.dtype=bfloat16", "checkpoint.last=false",
                                               f"train.micro_batch={asked}"], world_size))  # fmt: skip
                trainer.run()
            found[f"{mode} {device}"] = trainer.config.train.micro_batch
    teardown()
    return found


@pytest.mark.slow
def test_ranks_agree(tmp_path):
    for found in run_workers(trained, 2, tmp_path, folder=str(tmp_path)):
        assert set(found.values()) == {3}
    for mode in ("fsdp", "ddp"):
        small, large = (read_losses(tmp_path / f"{mode}-{device}") for device in ("small", "large"))
        assert small == large
