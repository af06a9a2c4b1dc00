"""Signals, limits, updates that are not finite, losses that leap: what one process does about them."""

import math
import os
import signal
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from common import UserError
from optim import Lion, Muon
from optim.routing import Optimizers
from tests.distributed.rules import Whitened
from tests.runs import started
from trainer.config import TrainConfig
from trainer.guard import Preempted, Stop, Watch, guarded_step, is_spike
from trainer.loop import Trainer
from trainer.metrics import record
from trainer.parallel import Parallel

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
ALONE = SimpleNamespace(world_size=1, is_main=True, rank=0, device=torch.device("cpu"))
TINY = ["experiment=smoke", "logger=jsonl", "model.n_layer=1", "model.n_embd=16", "model.n_head=2", "train.seq_len=16",
        "train.batch_tokens=384", "train.steps=6", "eval.every=3", "eval.tokens=768"]  # fmt: skip


# Stopping --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_signals_are_heard_and_given_back(number):
    before = signal.getsignal(number)
    with Stop(ALONE) as stop:
        stop.ask()
        assert stop.answer() == (None, False)
        os.kill(os.getpid(), number)
        assert stop.answer() == (None, False), "what was asked before the signal"
        stop.ask()
        assert stop.answer() == (number.name, False)
    assert signal.getsignal(number) == before


def test_limits_of_time():
    now = [1000.0]
    with Stop(ALONE, max_minutes=3, save_minutes=2, now=lambda: now[0]) as stop:

        def after(seconds: float) -> tuple:
            now[0] += seconds
            stop.ask()
            return stop.answer()

        assert after(119) == (None, False)
        assert after(2) == (None, True)
        stop.saving()
        assert after(58) == (None, False)
        assert after(2) == ("train.max_minutes=3", False)


def test_a_lost_launcher_is_noticed(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "test")
    with Stop(ALONE) as stop:
        stop.ask()
        assert stop.answer() == (None, False)
        monkeypatch.setattr(os, "getppid", lambda: 1 - stop.parent)  # another process
        stop.ask()
        assert stop.answer() == ("the loss of its launcher", False)


def test_stopping_between_items():
    seen = []
    with Stop(ALONE) as stop, pytest.raises(Preempted, match="SIGTERM"):
        for item in stop.between(range(5)):
            seen.append(item)
            if item == 1:
                os.kill(os.getpid(), signal.SIGTERM)
    assert seen == [0, 1, 2]


# What is not finite ----------------------------------------------------------------------------------------------

KINDS = {
    "fused adamw": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "lion": lambda p: Lion(p, lr=0.1, weight_decay=0.1),
    "muon": lambda p: Muon(p, lr=0.1, weight_decay=0.1),
    "whitened": lambda p: Whitened(p, lr=0.1),
}


def built(kind: str) -> tuple[nn.Module, Optimizers]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4, bias=False), nn.Linear(4, 6, bias=False))
    named = list(model.named_parameters())
    return model, Optimizers({"matrix": KINDS[kind](named)}, dict.fromkeys(dict(named), "matrix"))


def give_gradients(model: nn.Module, seed: int, poison: float | None = None) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    if poison is not None:
        next(model.parameters()).grad[1, 2] = poison


def everything(model: nn.Module, optimizers: Optimizers) -> list[torch.Tensor]:
    held = {k: v for k, v in optimizers.state_dict()["tensors"].items() if not k.endswith("/step")}
    return [tensor.detach().clone() for tensor in (*model.parameters(), *held.values())]


@pytest.mark.parametrize("kind", KINDS)
def test_a_guarded_step_is_the_step_or_nothing(kind):
    model, optimizers = built(kind)
    other, plain = built(kind)
    for seed in range(3):
        give_gradients(model, seed)
        guarded_step(optimizers, torch.tensor(False))
        give_gradients(other, seed)
        plain.step()
    for a, b in zip(everything(model, optimizers), everything(other, plain), strict=True):
        assert torch.equal(a, b)
    for poison in (math.nan, math.inf):
        before = everything(model, optimizers)
        give_gradients(model, 7, poison)
        guarded_step(optimizers, torch.tensor(True))
        for a, b in zip(everything(model, optimizers), before, strict=True):
            assert torch.equal(a, b)


class NoLooking(TorchDispatchMode):
    """Counts how often the host asks for a value that is on the device."""

    def __init__(self):
        super().__init__()
        self.asked = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.asked += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **kwargs or {})


def watch(**settings) -> Watch:
    return Watch(TrainConfig(**{"batch_tokens": 10, **settings}), ALONE)


def test_skipped_updates_are_counted_and_limited():
    model, optimizers = built("adamw")
    guard = watch(non_finite="skip", max_skips=2)
    verdicts = []
    for step, loss in enumerate([50.0, math.nan, 40.0, math.inf, math.nan, math.nan], start=1):
        give_gradients(model, step)
        guard.step(optimizers, step, torch.tensor([loss, 2.0], dtype=torch.float64))
        [(read, line)] = guard.read()
        assert read == step and line["grad_norm"] == 2.0
        assert line.get("skipped") == {2: 1, 4: 1, 5: 2, 6: 3}.get(step)
        assert line.get("batch") == (step - 1 if "skipped" in line else None)
        verdicts.append(guard.verdict())
    assert verdicts[:5] == [None] * 5 and "train.max_skips=2" in str(verdicts[5])
    assert all(state["step"] == 2 for state in optimizers.members["matrix"].state.values())


def test_a_leap_of_the_loss_is_only_written_down():
    model, optimizers = built("adamw")
    guard = watch()
    for step, loss in enumerate([20.0 + 0.1 * (k % 3) for k in range(20)] + [90.0, 20.0], start=1):
        give_gradients(model, step)
        guard.step(optimizers, step, torch.tensor([loss, 2.0], dtype=torch.float64))
        [(_, line)] = guard.read()
        assert ("spike" in line, line.get("batch")) == ((True, 20) if step == 21 else (False, None))
        assert step != 21 or line["spike"] == pytest.approx(7.0, abs=0.02), "9.0 a token, after 2.0"
    assert guard.verdict() is None
    assert all(state["step"] == 22 for state in optimizers.members["matrix"].state.values())


def test_after_a_stop_nothing_is_applied():
    """The device goes on alone until the host looks: what comes after a bad update must not be applied either."""
    model, optimizers = built("fused adamw")
    guard = watch(non_finite="stop")
    guard.on_host = False
    give_gradients(model, 0)
    guard.step(optimizers, 1, torch.tensor([math.nan, 1.0]))
    before = everything(model, optimizers)
    give_gradients(model, 1)
    guard.step(optimizers, 2, torch.tensor([30.0, 1.0]))
    for a, b in zip(everything(model, optimizers), before, strict=True):
        assert torch.equal(a, b)
    assert [step for step, line in guard.read() if "skipped" in line] == [1]
    assert str(guard.verdict()).startswith("step 1 has loss nan and gradient norm 1.0: the update was not applied")


@given(st.lists(st.floats(1.0, 2.0), min_size=16, max_size=64), st.floats(0.0, 100.0))
def test_spikes_are_far_above_the_rest(recent, loss):
    assert not is_spike(recent[:15], loss)
    assert not is_spike(recent, max(recent)) or len(set(recent)) > 1
    if loss <= sum(recent) / len(recent):
        assert not is_spike(recent, loss)
    assert is_spike(recent, 9.0), "six deviations are at most 3 here"


# In the loop -----------------------------------------------------------------------------------------------------


@pytest.fixture
def trainer(configure, tmp_path, monkeypatch):
    monkeypatch.setattr(record, "loss_vs_time", lambda *arguments: None)

    def built(*overrides: str) -> Trainer:
        return started(configure(*TINY, f"run.dir={tmp_path / 'run'}", *overrides))

    return built


@pytest.fixture
def poisoned(monkeypatch):
    """Updates, numbered from 0, in which a gradient is not finite."""
    clip, update, updates, now = Parallel.clip, Trainer.update, set(), [None]

    def noted(self, step):
        now[0] = step
        return update(self, step)

    def patched(self, model, max_norm=None):
        if now[0] in updates:
            next(model.parameters()).grad[0, 0] = math.inf
        return clip(self, model, max_norm)

    monkeypatch.setattr(Trainer, "update", noted)
    monkeypatch.setattr(Parallel, "clip", patched)
    return updates


def test_told_to_stop_while_warming_up(trainer, monkeypatch, capsys):
    warm_up = Trainer.warm_up
    monkeypatch.setattr(Trainer, "warm_up", lambda self: (os.kill(os.getpid(), signal.SIGTERM), warm_up(self)))
    one = trainer()
    one.run()
    assert "stopped by SIGTERM after update 0 of 6, and saved" in capsys.readouterr().out
    assert one.record.metrics.lines == [] and (one.checkpoints.folder / "step_00000000").exists()


@pytest.mark.parametrize("on_host", [True, False])
def test_an_update_is_skipped_and_written_down(trainer, poisoned, on_host):
    poisoned.add(3)
    one = trainer("train.non_finite=skip", "logger.every=5", "train.steps=7", "eval.every=7")
    one.watch.on_host = on_host
    one.run()
    lines = {line["step"]: line for line in one.record.metrics.lines}
    assert list(lines) == [0, 4, 5, 7]
    assert lines[4]["skipped"] == 1 and lines[4]["batch"] == 3 and lines[4]["grad_norm"] is None
    assert lines[5].get("skipped") is None and math.isfinite(lines[7]["val/loss"])


def test_too_many_skips_end_the_run(trainer, poisoned):
    poisoned.update({2, 3, 4, 5})
    one = trainer("train.non_finite=skip", "train.max_skips=2")
    with pytest.raises(UserError, match="step 5 has .* norm inf: 3 updates in a row were skipped"):
        one.run()
    assert [line["step"] for line in one.record.metrics.lines if "skipped" in line] == [3, 4, 5]


def test_the_run_stops_with_the_weights_before(trainer, poisoned):
    poisoned.add(2)
    one = trainer("checkpoint.every=2")
    with pytest.raises(UserError, match="step 3 has"):
        one.run()
    saved = one.checkpoints.folder / "step_00000002"
    now = {name: value.clone() for name, value in one.checkpoints.tensors().items() if name.startswith("model/")}
    one.checkpoints.load(saved)
    for name, value in one.checkpoints.tensors().items():
        assert name not in now or torch.equal(now[name], value)


def test_nothing_is_saved_after_a_bad_update_that_the_host_has_not_seen(trainer, poisoned):
    """As on a GPU, where the host looks when a line or a checkpoint is due."""
    poisoned.add(2)
    one = trainer("checkpoint.every=2", "logger.every=6", "eval.every=6")
    one.watch.on_host = False
    with pytest.raises(UserError, match="step 3 has"):
        one.run()
    assert [path.name for path in one.checkpoints.folder.iterdir()] == ["step_00000002"]
    assert [line["step"] for line in one.record.metrics.lines] == [0, 3]


def test_too_many_skips_are_noticed_afterwards(trainer, poisoned):
    poisoned.update({1, 2, 3})
    one = trainer("train.non_finite=skip", "train.max_skips=2", "logger.every=6", "eval.every=6")
    one.watch.on_host = False
    with pytest.raises(UserError, match="3 updates in a row were skipped"):
        one.run()


def test_the_host_never_waits_between_lines(trainer):
    """As on a GPU: updates whose line is not due ask the device for nothing."""
    one = trainer("logger.every=100", "eval.every=100", "train.steps=100", "train.clip=1.0")
    one.watch.on_host = False
    with NoLooking() as mode:
        for step in range(3):
            assert one.update(step) == ({}, None, False)
        assert mode.asked == 0
        one.stop.signal = signal.SIGTERM
        assert one.update(3) == ({}, "SIGTERM", False), "a signal is heard all the same"
        assert mode.asked == 0
        one.watch.on_host = True
        one.update(4)
        assert mode.asked > 0, "or this test sees nothing"


def test_a_line_tells_the_rates_of_its_update(trainer):
    one = trainer("logger.every=1", "train.steps=10", "schedule.warmup=0.3")
    lines = [one.update(step)[0] for step in range(3)]
    for role in ("matrix", "embedding", "head", "scalar"):
        rates = [line[f"lr/{role}"] for line in lines]
        assert rates == sorted(set(rates)) and rates[0] > 0, f"{role} does not warm up: {rates}"
