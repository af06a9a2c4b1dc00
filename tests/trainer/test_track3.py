"""A preset that names a record of track 3 is that record: the losses of its own code, step by step.

Each tests/trainer/data/track3_*.json says which problem, source and settings its figures belong to.
"""

import json
import math
from pathlib import Path

import pytest
import torch

from common import UserError
from optim.schedule import in_steps
from tests.errors import check_names, raises_naming
from trainer.config import register
from trainer.launch import cli
from trainer.loop import Trainer
from trainer.model import GPT
from trainer.parallel import initialise
from trainer.schedules.config import brought

DATA = Path(__file__).parent / "data"
# The problem of the figures, as their files describe it.
PROBLEM = [
    "experiment=track3", "data=sample", "data.order=sequential", "logger=jsonl", "logger.every=1",
    "train.dtype=float64", "model.n_layer=2", "model.n_embd=32", "model.n_head=2",
    "train.steps=40", "train.batch_tokens=512", "train.seq_len=64", "train.micro_batch=4",
    "eval.tokens=2048", "eval.every=10", "eval.late_every=null", "schedule.horizon=null", "checkpoint.last=false",
]  # fmt: skip
NAMES = sorted(path.stem for path in (Path(__file__).parents[2] / "configs/optim/track3").glob("*.yaml"))
QUICK = ("muon", "soap_muon_46")  # two that share nothing but the problem
ROLES = ("embedding", "head", "scalar", "matrix")  # in the order of the figures


def lines_of(trainer):
    """The lines of the record of a run."""
    trainer.run()
    return [json.loads(line) for line in (trainer.metrics.directory / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", NAMES)
def test_the_small_copy_takes_a_record_as_it_is(configure, name):
    """The schedule ends with the run, at whatever length."""
    small, own = (configure(f"experiment={e}", f"optim=track3/{name}") for e in ("track3_cpu", "track3"))
    assert small.train.steps == 400 and small.schedule.multiplier("matrix", 400)(399) < 0.01
    assert (small.optim, small.model.init, small.train.loss) == (own.optim, own.model.init, own.train.loss)


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in NAMES])
def test_losses_are_those_of_the_records_own_code(configure, tmp_path, no_plot, name):
    golden = json.loads((DATA / f"track3_{name}.json").read_text())
    words = [*PROBLEM, *golden["overrides"], f"optim=track3/{name}", f"run.dir={tmp_path / 'run'}"]
    trainer = Trainer(configure(*words))
    if "stock" in golden:
        begin_with_factors(trainer)
    lines = lines_of(trainer)
    assert [line["train/loss"] for line in lines[1:]] == pytest.approx(golden["train"], rel=1e-9)
    found = {line["step"]: line["val/loss"] for line in lines if "val/loss" in line}
    assert found == pytest.approx(dict(golden["val"]), rel=1e-9)
    for line, rates in ((lines[1], golden["lr_first"]), (lines[-1], golden["lr_last"])):
        assert [line[f"lr/{role}"] for role in ROLES] == pytest.approx(rates, rel=1e-12)


def begin_with_factors(trainer):
    """The bases of factors of low rank are rounding: the figures begin with factors that have a basis."""
    optimizer = trainer.optimizers.members["matrix"]
    for group in optimizer.param_groups:
        group["step"] = 1
    for state in optimizer.state.values():
        for side in {"left", "right"} & state.keys():
            size = state[side].shape[-1]
            state[side].copy_(30 * torch.linspace(2, 1, size, dtype=torch.float64).diag())


@pytest.mark.parametrize("name", ["soap_muon_44", "soap_muon_46"])
def test_first_losses_are_those_of_the_record_as_it_begins(configure, tmp_path, no_plot, name):
    """Later ones differ by rounding, as the record's own do: see begin_with_factors."""
    golden = json.loads((DATA / f"track3_{name}.json").read_text())
    config = configure(*PROBLEM, f"optim=track3/{name}", "schedule.horizon=40", f"run.dir={tmp_path / 'run'}")
    config.train.steps = len(golden["stock"])
    lines = lines_of(Trainer(config))
    assert [line["train/loss"] for line in lines[1:]] == pytest.approx(golden["stock"], rel=1e-9)


@pytest.mark.parametrize(
    ("name", "steps", "horizon", "init"),
    [
        ("adam", 5625, 5625, "torch"),
        ("muon", 3250, 3250, "fan_in"),
        ("muonh", 3250, 3250, "muonh"),
        ("normuon", 3250, 3300, "fan_in"),
        ("shampoo", 4100, 4150, "fan_in"),
        ("soap_muon_44", 2750, 2900, "soap_muon"),
        ("soap_muon_46", 2690, 2900, "soap_muon"),
        ("spectral", 8225, 8500, "fan_in"),
    ],
)
def test_a_record_has_its_length_and_its_initial_weights(configure, name, steps, horizon, init):
    config = configure("experiment=track3", f"optim=track3/{name}", "logger=jsonl")
    assert (config.train.steps, config.schedule.end(steps), config.model.init) == (steps, horizon, init)
    assert config.model.zero_init_proj == (name != "muonh")


def test_the_first_loss_at_full_size_is_that_of_equal_odds(configure):
    config = configure("experiment=track3", "logger=jsonl").model
    model = GPT(config, vocab_size=50257, seq_len=1024)
    initialise(model, seed=0)
    tokens = torch.arange(0, 50257, 3000)[None]
    with torch.no_grad():
        loss = model(tokens[:, :-1], tokens[:, 1:]).item() / (tokens.numel() - 1)
    assert loss == pytest.approx(math.log(50304), rel=1e-6)


@pytest.mark.parametrize("number", [44, 46])
def test_soap_muon_has_its_schedules(configure, number):
    """At every step of the record, as its formulas give them."""
    config = configure("experiment=track3", f"optim=track3/soap_muon_{number}", "logger=jsonl")
    steps, end = config.train.steps, config.schedule.end(config.train.steps)
    factors = dict(matrix=3.3169534699576625e-06, embedding=4.976805410800738e-05, head=5.184172302917436e-07,
                   scalar=1.6589351369335795e-06)  # fmt: skip
    for role, factor in factors.items():
        lr, multiplier = getattr(config.optim, role)["lr"], config.schedule.multiplier(role, steps)
        for t in range(steps):
            assert lr * multiplier(t) == pytest.approx(min(lr, factor * (2900 - t) ** 1.2), rel=1e-12)
    lines = config.schedule.lines("matrix", steps)
    for t in range(steps):
        mu = 0.85 + 0.1 * t / 300 if t < 300 else 0.95 - 0.1 * max(0, t - 2700) / 200
        floor = 0.45 if t < 1375 else 0.45 * max(0, 1625 - t) / 250
        wanted = dict(momentum=mu, gate_floor=floor, gate_cap=0.85 if t < 1625 else 1.0)
        assert {key: at(t) for key, at in lines.items()} == pytest.approx(wanted, rel=1e-12, abs=1e-12)
    look, tail = config.lookahead, config.average
    assert (look.size, look.decay, in_steps(look.start, end), in_steps(look.stop, end)) == (0.3, 0.99, 300, 1950)
    if number == 46:
        assert (tail.blend, tail.exclude, in_steps(tail.length, end)) == (0.6, ["embedding"], 150)
        assert (in_steps(tail.start, end), in_steps(tail.stop, end)) == (2400, 2900)
    else:
        assert not tail.blend


def test_a_record_s_schedule_is_not_lost_and_does_not_win_unsaid(configure):
    assert configure("experiment=track3", "schedule.name=cosine", "schedule.decay=0").schedule.name == "cosine"
    assert configure("experiment=track3", "optim=adamw", "schedule=cosine").schedule.name == "cosine"
    register()
    for load in (lambda *words: configure(*words), lambda *words: cli.compose_jobs(words)):
        with raises_naming(UserError, "schedule=cosine", "warmdown", "schedule.name"):
            load("experiment=track3", "schedule=cosine")
        with raises_naming(UserError, "model=gpt2_124m", "fan_in", "model.init"):
            load("model=gpt2_124m", "optim=track3/muon")
        for word, model, usual in (("experiment=smoke", "tiny", "fan_in"), ("data=sample", "gpt2_124m", "gpt2")):
            with raises_naming(UserError, f"model={model}", "model.init=torch", f"in place of {usual}"):
                load(word, "optim=track3/adam")
    assert configure("model=gpt2_124m", "optim=track3/muon", "model.init=gpt2").model.init == "gpt2"
    assert configure("experiment=track3_cpu", "optim=track3/adam").model.init == "torch"


def test_what_a_record_brings_to_another_model_is_said(configure):
    assert brought(configure("experiment=smoke", "optim=muon")) is None
    assert brought(configure("experiment=track3_cpu")) is None
    told = brought(configure("experiment=track3_cpu", "model.name=mine", "optim=track3/soap_muon_46")) or ""
    check_names(told, "model.init=soap_muon", "loss=sum", "schedule.name=power", "lookahead.size=0.3", "average.blend")
