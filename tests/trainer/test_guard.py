"""Updates that are not finite: what one process does about them, alone and in the loop."""

import math
import os
import signal
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from common import UserError
from optim import Lion, MatrixOptimizer, Muon, guarded
from optim.combined import Combined
from optim.elementwise import Elementwise
from optim.named_state import named_numbers, named_tensors
from tests.distributed.rules import Whitened
from tests.errors import check_names, raises_naming
from tests.optim.rules import with_all_rules
from tests.runs import TINY
from trainer import loop
from trainer.config import TrainConfig
from trainer.guard import NonFiniteGuard, _sum_of_bits, guarded_step
from trainer.loop import Trainer
from trainer.parallel import Parallel

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


# What is not finite ----------------------------------------------------------------------------------------------

KINDS = {
    "fused adamw": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "lion": lambda p: Lion(p, lr=0.1, weight_decay=0.1),
    "muon": lambda p: Muon(p, lr=0.1, weight_decay=0.1),
    "whitened": lambda p: Whitened(p, lr=0.1),
}
for base in (MatrixOptimizer, Elementwise):
    KINDS |= {name: partial(cls, lr=0.1) for name, (cls, _) in with_all_rules({}, base).items() if name not in KINDS}


def built(kind: str) -> tuple[nn.Module, Combined]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4, bias=False), nn.Linear(4, 6, bias=False))
    named = list(model.named_parameters())
    return model, Combined([dict(name="matrix", optimizer=KINDS[kind], params=named)])


def give_gradients(model: nn.Module, seed: int, poison: float | None = None) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    if poison is not None:
        next(model.parameters()).grad[1, 2] = poison


def everything(model: nn.Module, optimizers: Combined) -> list[torch.Tensor]:
    """Weights, state and counters."""
    numbers = torch.tensor(list(named_numbers(optimizers).values()), dtype=torch.float64)
    held = named_tensors(optimizers).values()
    return [tensor.detach().clone() for tensor in (*model.parameters(), *held, numbers)]


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


@pytest.mark.parametrize("kind", ["muon", "fused adamw", "adamw"])
def test_a_gradient_scaler_is_understood(kind):
    """With gradients scaled by a power of two, weights are the same to the bit; an overflow changes nothing."""
    (model, optimizers), (other, plain) = built(kind), built(kind)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for seed in range(4):
        give_gradients(model, seed, math.inf if seed == 1 else None)
        for parameter in model.parameters():
            scaler.scale(torch.ones(()))
            parameter.grad *= scaler.get_scale()
        scaler.step(optimizers)
        scaler.update()
        if seed != 1:
            give_gradients(other, seed)
            plain.step()
    assert scaler.get_scale() == 2.0**9
    for a, b in zip(everything(model, optimizers), everything(other, plain), strict=True):
        assert torch.equal(a, b)


class NoLooking(TorchDispatchMode):
    """Counts how often the host asks for a value that is on the device."""

    def __init__(self):
        super().__init__()
        self.asked = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.asked += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **kwargs or {})


def guarding(**settings) -> NonFiniteGuard:
    return NonFiniteGuard(TrainConfig(**settings), torch.device("cpu"))


def measured(loss: float, norm: float) -> torch.Tensor:
    return torch.tensor([loss, norm], dtype=torch.float64)


def error_of(guard: NonFiniteGuard) -> str:
    try:
        guard.check()
    except UserError as error:
        return str(error)
    return ""


def test_skipped_updates_are_counted_and_limited():
    model, optimizers = built("adamw")
    guard = guarding(non_finite="skip", max_skips=2)
    errors = []
    for step, loss in enumerate([5.0, math.nan, 4.0, math.inf, math.nan, math.nan], start=1):
        give_gradients(model, step)
        skipped = guard.step(optimizers, step, measured(loss, 2.0))
        assert skipped.item() == guard.skipped == {2: 1, 4: 1, 5: 2, 6: 3}.get(step, 0)
        errors.append(error_of(guard))
    assert errors[:5] == [""] * 5
    check_names(errors[5], "step 6", "loss nan", "norm 2.0", "3 updates", "train.max_skips=2")
    assert all(state["step"] == 2 for state in optimizers.members["matrix"].state.values())


def test_skips_before_a_resume_count():
    model, optimizers = built("adamw")
    guard = guarding(non_finite="skip", max_skips=2)
    guard.skipped = 2
    give_gradients(model, 0)
    guard.step(optimizers, 9, measured(math.nan, 2.0))
    check_names(error_of(guard), "step 9", "3 updates", "train.max_skips=2")


@pytest.mark.parametrize("on_host", [True, False])
def test_after_a_stop_nothing_is_applied(on_host):
    """The device goes on alone until the host looks: what comes after a bad update must not be applied either."""
    model, optimizers = built("fused adamw")
    guard = guarding(non_finite="stop")
    guard.on_host = on_host
    give_gradients(model, 0)
    assert guard.step(optimizers, 1, measured(math.nan, 1.0)).item() == 1
    before = everything(model, optimizers)
    for step, loss in ((2, 3.0), (3, math.nan)):
        give_gradients(model, step)
        guard.step(optimizers, step, measured(loss, 1.0))
    for a, b in zip(everything(model, optimizers), before, strict=True):
        assert torch.equal(a, b)
    check_names(error_of(guard), "step 1 ", "loss nan", "norm 1.0", "train.non_finite=skip", "train.clip", "optim.*.lr")


# In the loop -----------------------------------------------------------------------------------------------------


@pytest.fixture
def trainer(configure, tmp_path, no_plot):
    def built(*overrides: str) -> Trainer:
        settings = ["train.steps=6", "eval.every=3", f"run.dir={tmp_path / 'run'}"]
        return Trainer(configure(*TINY, *settings, *overrides))

    return built


@pytest.fixture
def poisoned(monkeypatch):
    """Updates, numbered from 0, in which a gradient is not finite."""
    clip, train_step, updates, now = Parallel.clip, Trainer.train_step, set(), [None]

    def noted(self, step):
        now[0] = step
        return train_step(self, step)

    def patched(self, model, *settings):
        if now[0] in updates:
            next(model.parameters()).grad[0, 0] = math.inf
        return clip(self, model, *settings)

    monkeypatch.setattr(Trainer, "train_step", noted)
    monkeypatch.setattr(Parallel, "clip", patched)
    return updates


def test_told_to_stop_while_warming_up(trainer, monkeypatch, capsys):
    warm_up = loop.warm_up
    monkeypatch.setattr(loop, "warm_up", lambda *all: (os.kill(os.getpid(), signal.SIGTERM), warm_up(*all))[1])
    one = trainer()
    one.run()
    [said] = [line for line in capsys.readouterr().out.splitlines() if "SIGTERM" in line]
    check_names(said, "update 0 of 6", "to go on")
    assert one.metrics.file.lines == [] and (one.checkpoints.folder / "step_00000000").exists()


@pytest.mark.parametrize("on_host", [True, False])
def test_an_update_is_skipped_and_written_down(trainer, poisoned, on_host):
    poisoned.add(3)
    one = trainer("train.non_finite=skip", "logger.every=5", "train.steps=7", "eval.every=7")
    one.guard.on_host = one.metrics.on_host = on_host
    one.run()
    lines = {line["step"]: line for line in one.metrics.file.lines}
    assert list(lines) == [0, 4, 5, 7]
    assert lines[4]["skipped"] == 1 and lines[4]["batch"] == 3 and lines[4]["grad_norm"] is None
    assert lines[5].get("skipped") is None and math.isfinite(lines[7]["val/loss"])


def test_too_many_skips_end_the_run(trainer, poisoned):
    poisoned.update({2, 3, 4, 5})
    one = trainer("train.non_finite=skip", "train.max_skips=2")
    with raises_naming(UserError, "step 5", "norm inf", "3 updates", "train.max_skips=2"):
        one.run()
    assert [line["step"] for line in one.metrics.file.lines if "skipped" in line] == [3, 4, 5]


def test_a_gradient_whose_squares_leave_float32_is_not_applied(trainer, monkeypatch):
    clip = Parallel.clip

    def enlarged(self, model, *settings):
        next(model.parameters()).grad[0, 0] = 1e20
        return clip(self, model, *settings)

    monkeypatch.setattr(Parallel, "clip", enlarged)
    with raises_naming(UserError, "step 1", "norm inf", "train.clip=1.0"):
        trainer("checkpoint.every=2").run()


def test_the_run_stops_with_the_weights_before(trainer, poisoned):
    poisoned.add(2)
    one = trainer("checkpoint.every=2")
    with raises_naming(UserError, "step 3", "norm inf", "train.non_finite=skip"):
        one.run()
    saved = one.checkpoints.folder / "step_00000002"
    now = {name: value.clone() for name, value in one.checkpoints.tensors().items() if name.startswith("model.")}
    one.checkpoints.load(saved)
    for name, value in one.checkpoints.tensors().items():
        assert name not in now or torch.equal(now[name], value)


def test_nothing_is_saved_after_a_bad_update_that_the_host_has_not_seen(trainer, poisoned):
    """As on a GPU, where the host looks when a line or a checkpoint is due."""
    poisoned.add(2)
    one = trainer("checkpoint.every=2", "logger.every=6", "eval.every=6")
    one.guard.on_host = one.metrics.on_host = False
    with raises_naming(UserError, "step 3", "norm inf", "train.non_finite=skip"):
        one.run()
    assert [path.name for path in one.checkpoints.folder.iterdir()] == ["step_00000002"]
    assert [line["step"] for line in one.metrics.file.lines] == [0, 3]


def test_too_many_skips_are_noticed_afterwards(trainer, poisoned):
    poisoned.update({1, 2, 3})
    one = trainer("train.non_finite=skip", "train.max_skips=2", "logger.every=6", "eval.every=6")
    one.guard.on_host = one.metrics.on_host = False
    with raises_naming(UserError, "step 4", "3 updates", "train.max_skips=2"):
        one.run()


def test_the_host_never_waits_between_lines(trainer, monkeypatch):
    """As on a GPU: updates whose line is not due ask the device for nothing."""
    one = trainer("logger.every=100", "eval.every=100", "train.steps=100", "train.clip=1.0")
    one.guard.on_host = one.metrics.on_host = False
    one.metrics.start()
    monkeypatch.setattr(guarded, "read_later", lambda flag: lambda: False)  # on a GPU a copy to the host, an event
    with NoLooking() as mode:
        for step in range(3):
            assert one.train_step(step) == (None, False)
            one.metrics.write(step + 1, 0.0)
        assert mode.asked == 0
        one.preemption.signal = signal.SIGTERM
        assert one.train_step(3) == ("SIGTERM", False), "a signal is heard all the same"
        assert mode.asked == 0
        one.guard.on_host = True
        one.train_step(4)
        assert mode.asked > 0, "or this test sees nothing"


def test_a_line_tells_the_rates_of_its_update(trainer):
    one = trainer("logger.every=1", "train.steps=10", "schedule.warmup=0.3")
    for step in range(3):
        one.train_step(step)
    lines = [one.metrics.pending[step + 1] for step in range(3)]
    for role in ("matrix", "embedding", "head", "scalar"):
        rates = [line[f"lr/{role}"] for line in lines]
        assert rates == sorted(set(rates)) and rates[0] > 0, f"{role} does not warm up: {rates}"


# Replicas that differ --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(5, 7), (9,), (3, 4, 2), (1,), ()])
def test_no_bit_and_no_exchange_of_places_is_missed(dtype, shape):
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    weights = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    flat = weights.reshape(-1).view(integers)
    assert _sum_of_bits(weights) == _sum_of_bits(weights.clone())
    for place in {0, len(flat) // 2, len(flat) - 1}:
        for bit in range(8 * dtype.itemsize):
            flipped = flat.clone()
            flipped[place] ^= 1 << bit if bit < 8 * dtype.itemsize - 1 else -(1 << bit)
            assert _sum_of_bits(flipped.view(dtype).reshape(shape)) != _sum_of_bits(weights)
        exchanged = flat.clone()
        exchanged[[0, place]] = flat[[place, 0]]
        assert (_sum_of_bits(exchanged.view(dtype).reshape(shape)) == _sum_of_bits(weights)) == (place == 0)
    assert _sum_of_bits(torch.zeros(0, 3, dtype=dtype)) == 0
