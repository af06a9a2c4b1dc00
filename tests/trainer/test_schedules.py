"""What follows the step against a plain loop in float64: every number by hand but the gradient, which is autograd's."""

import copy
import math

import numpy as np
import pytest
import torch

from tests.errors import check_names
from tests.runs import TINY, read_record
from trainer.evaluate.validation import validation_batches, validation_loss
from trainer.loop import Trainer

STEPS, LR, MU = 10, 0.05, 0.9
# Heavy-ball momentum, whose rule the loop below writes out in one line.
PROBLEM = [*TINY, "optim=sgd_momentum", "train.dtype=float64", f"train.steps={STEPS}", "eval.every=1", "logger.every=1",
           "checkpoint.last=false", "train.micro_batch=8", "schedule=constant",
           *(f"optim.{role}.lr={LR}" for role in ("matrix", "embedding", "head", "scalar"))]  # fmt: skip


class Plain:
    """The loop: ``lr(role, step)`` and ``mu(role, step)`` of every update; ``shift(step)`` and ``decay`` of a
    look-ahead."""

    lr = staticmethod(lambda role, step: LR)
    mu = staticmethod(lambda role, step: MU)
    shift = staticmethod(lambda step: 0.0)
    decay = 0.0
    clip, total = None, False  # total: the sum of the losses is differentiated, not their mean

    def averaged(self, step, weights, state):
        """Name -> what is evaluated after ``step`` updates; ``state`` is kept from update to update."""
        return weights

    def run(self, trainer):
        """(train/loss, grad_norm, val/loss) after every update."""
        model = copy.deepcopy(trainer.model)
        weights, roles = dict(model.named_parameters()), trainer.optimizers.roles
        momentum = {name: torch.zeros_like(w) for name, w in weights.items()}
        mean = {name: torch.zeros_like(w) for name, w in weights.items()}
        state, found = {}, []
        for step in range(STEPS):
            before = {name: w.detach().clone() for name, w in weights.items()}
            with torch.no_grad():
                for name, w in weights.items():
                    w += self.shift(step) * mean[name]
            loss = sum(model(x, y) for x, y in trainer.loader.batch(step))
            tokens = trainer.config.train.batch_tokens
            found_grads = torch.autograd.grad(loss if self.total else loss / tokens, weights.values())
            grads = dict(zip(weights, found_grads, strict=True))
            norm = math.sqrt(sum(g.square().sum().item() for g in grads.values())) / (tokens if self.total else 1)
            with torch.no_grad():
                for name, w in weights.items():
                    g = grads[name] * min(1.0, self.clip / (norm + 1e-6)) if self.clip else grads[name]
                    momentum[name] = self.mu(roles[name], step) * momentum[name] + g
                    w -= self.lr(roles[name], step) * momentum[name]
                    mean[name] = self.decay * mean[name] + (1 - self.decay) * (w - before[name])
                kept = {name: w.clone() for name, w in weights.items()}
                for name, value in self.averaged(step + 1, kept, state).items():
                    weights[name].copy_(value)
            batches = validation_batches(trainer.config, trainer.split, trainer.parallel)
            found.append((loss.item() / tokens, norm, validation_loss(model, trainer.parallel, batches)))
            with torch.no_grad():
                for name, value in kept.items():
                    weights[name].copy_(value)
        return found


@pytest.fixture
def check(configure, tmp_path, no_plot):
    """The record of a run with these overrides has the losses, the norms and the learning rates of a plain loop."""

    def same(plain, *overrides):
        trainer = Trainer(configure(*PROBLEM, f"run.dir={tmp_path / 'run'}", *overrides))
        expected = plain.run(trainer)
        trainer.run()
        lines = read_record(tmp_path / "run")[1:]
        found = [(line["train/loss"], line["grad_norm"], line["val/loss"]) for line in lines]
        assert np.array(found) == pytest.approx(np.array(expected), rel=1e-12)
        for step, line in enumerate(lines):
            for role in ("matrix", "embedding", "head", "scalar"):
                assert line[f"lr/{role}"] == pytest.approx(plain.lr(role, step), rel=1e-14), (role, step)
        return lines

    return same


def fall(step):
    """As schedule.name=power with these settings."""
    return min(1.0, (12 - step) / 8) ** 1.2


FALL = ["schedule.name=power", "schedule.decay=8", "schedule.power=1.2", "schedule.horizon=12"]


def test_a_run_may_end_before_its_horizon(check, capsys):
    """Where much of the learning rate is left it says so."""
    plain = Plain()
    plain.lr = lambda role, step: LR * fall(step)
    lines = check(plain, *FALL)
    assert lines[-1]["lr/matrix"] == pytest.approx(LR * (3 / 8) ** 1.2)
    (warning,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: schedule")]
    check_names(warning, "schedule.horizon=12", "update 10", "31%", "schedule.horizon=null")


def test_lookahead(check):
    """Shifts from update 3 to 7, by the multiplier that the update before had."""
    plain = Plain()
    plain.lr = lambda role, step: LR * fall(step)
    plain.shift = lambda step: 0.4 * fall(step - 1) if 3 <= step < 8 else 0.0
    plain.decay = 0.7
    check(plain, *FALL, "lookahead.size=0.4", "lookahead.decay=0.7", "lookahead.start=3", "lookahead.stop=8")


def test_lookahead_follows_the_embeddings_schedule_from_the_first_update(check):
    plain = Plain()
    plain.lr = lambda role, step: LR * (fall(step) if role == "embedding" else 1)
    plain.shift = lambda step: 0.4 * (fall(step - 1) if step else 1)
    plain.decay = 0.99
    own = ["schedule.embedding.name=power", "schedule.embedding.decay=8", "schedule.embedding.power=1.2"]
    check(plain, *own, "schedule.horizon=12", "lookahead.size=0.4")


class Late(Plain):
    """An average from update 4 to 8 of length 3, a share of .6 in what is evaluated, without the embeddings."""

    def __init__(self, roles):
        self.roles = roles

    def averaged(self, step, weights, state):
        for name, w in weights.items():
            if step == 4:
                state[name] = w.clone()
            elif 4 < step < 9:
                state[name] += (w - state[name]) / 3
        excluded = {name for name, role in self.roles.items() if role == "embedding"}
        return {n: w if step < 4 or n in excluded else 0.4 * w + 0.6 * state[n] for n, w in weights.items()}


def test_average(configure, check, tmp_path, no_plot):
    """It begins late, ends early, leaves the embeddings out and never reaches the training."""
    roles = Trainer(configure(*PROBLEM, f"run.dir={tmp_path / 'roles'}")).optimizers.roles
    words = ["average.blend=0.6", "average.length=3", "average.start=4", "average.stop=9"]
    check(Late(roles), *words, "average.exclude=[embedding]")


def test_lines_of_momentum_and_schedules_by_role(check):
    """A line's steps are whole; before its first point and after its last it is level."""
    plain = Plain()
    plain.mu = lambda role, step: np.interp(step, [2, 5, 7, 10], [0.5, 0.9, 0.9, 0.6]) if role == "matrix" else MU
    shapes = {
        "matrix": lambda step: 1 - step / STEPS,
        "embedding": lambda step: min(1, 1 - (step - 5) / 5),
        "head": lambda step: (step + 1) / 2 if step < 2 else (1 + math.cos(math.pi * (step - 2) / 8)) / 2,
        "scalar": lambda step: min(1, 1 - 0.75 * (step - 5) / 5),
    }
    plain.lr = lambda role, step: LR * shapes[role](step)
    check(
        plain, "schedule.name=warmdown", "schedule.decay=5",
        "schedule.matrix.decay=1.0", "schedule.matrix.momentum=[[2, 0.5], [5, 0.9], [0.7, 0.9], [1.0, 0.6]]",
        "schedule.head.name=cosine", "schedule.head.decay=0", "schedule.head.warmup=2", "schedule.scalar.final=0.25",
    )  # fmt: skip


@pytest.mark.parametrize("micro_batch", [24, 6])
def test_the_sum_of_the_losses_is_clipped_and_comes_in_micro_batches(check, micro_batch):
    """Norms are the mean's all the same; the clipping norm is below them, then above the later ones."""
    plain = Plain()
    plain.total, plain.clip = True, 1.5
    plain.lr = lambda role, step: LR / 100
    lines = check(plain, "train.loss=sum", "train.clip=1.5", f"train.micro_batch={micro_batch}", "optim.lr_scale=0.01")
    norms = [line["grad_norm"] for line in lines]
    assert max(norms) > 1.5 > min(norms), "some are clipped and some are not"


def test_evaluations_late_in_the_schedule(configure, tmp_path, no_plot):
    """In the last tenth of the horizon, which a run may not reach."""
    for name, horizon, expected in (("whole", "null", [0, 8, 16, 18, 19, 20]), ("short", 22, [0, 8, 16, 20])):
        words = ["train.steps=20", "eval.every=8", "eval.late_every=1", f"schedule.horizon={horizon}"]
        Trainer(configure(*PROBLEM, *words, f"run.dir={tmp_path / name}")).run()
        found = [line["step"] for line in read_record(tmp_path / name) if "val/loss" in line]
        assert found == expected
