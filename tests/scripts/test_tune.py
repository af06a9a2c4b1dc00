"""Equal-budget tuning: the spaces, the budget, kills, and a real tuning of the smallest model."""

import importlib
import math
import multiprocessing
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution

from common import UserError
from scripts.tuning import report, space
from scripts.tuning import study as study_module
from scripts.tuning.objective import TunedTrainer, overrides_of
from scripts.tuning.study import Plan, Study, used, work
from tests.errors import check_names, raises_naming
from tests.runs import SHORT, TINY, read_record
from tests.scripts import tune_worker
from trainer.launch import cli, load_config
from trainer.run.directory import identity

ROOT = Path(__file__).resolve().parents[2]
WAIT = 0.05, 0.8  # seconds before a kill
REPORTS = 9  # of one process before a kill, at most: five do less than the 54 of both studies


@pytest.mark.parametrize(
    ("text", "value", "expected"),
    [
        ("log 1e-4..1e-1", None, FloatDistribution(1e-4, 0.1, log=True)),
        ("0.85..0.98", None, FloatDistribution(0.85, 0.98)),
        ("-1..2.5", None, FloatDistribution(-1, 2.5)),
        ("around 4", 0.01, FloatDistribution(0.0025, 0.04, log=True)),
        ([5, 10], 10, CategoricalDistribution((5, 10))),
    ],
)
def test_spaces(text, value, expected):
    assert space.parse("optim.tune.x", text, value) == expected


@pytest.mark.parametrize(
    "text", ["1e-4", "log 0..1", "2..1", "a..b", "around 1", "around x", [], "log -1..1", "1..nan"]
)
def test_what_is_no_space_is_named(text):
    with raises_naming(UserError, "optim.tune.x", text):
        space.parse("optim.tune.x", text, 0.5)
    with raises_naming(UserError, "optim.tune.x", "None"):
        space.parse("optim.tune.x", "around 4", None)


@pytest.mark.parametrize("optim", sorted(path.stem for path in (cli.CONFIGS / "optim").glob("*.yaml")))
def test_every_preset_can_be_tuned_and_a_run_knows_nothing_of_it(optim):
    words = ["experiment=smoke", f"optim={optim}"]
    config = load_config(words)
    found = space.build(space.section(words), config.optim)
    assert 2 <= len(found) <= 4 and found["optim.lr_scale"] == FloatDistribution(1 / 8, 8, log=True)
    assert config.optim.tune == {}
    drawn = {k: d.choices[0] if isinstance(d, CategoricalDistribution) else d.low for k, d in found.items()}
    changed = identity(load_config([*words, *overrides_of(drawn)]))
    assert {key for key in changed if changed[key] != identity(config)[key]} >= found.keys()


def test_a_space_may_be_set_on_the_command_line():
    words = ["experiment=smoke", "optim=muon", "optim.tune.matrix.momentum=0.9..0.95"]
    found = space.build(space.section(words), load_config(words).optim)
    assert found["optim.matrix.momentum"] == FloatDistribution(0.9, 0.95)


def test_a_budget_is_used_exactly(tmp_path):
    (study, _) = tune_worker.studies(tmp_path)
    work([study], tune_worker.until(-1), lambda: None)
    check_whole(study)
    stopped = {used(trial) for trial in study.trials if trial.state.name == "PRUNED"}
    full = [trial.values[0] for trial in study.trials if trial.state.name == "COMPLETE"]
    assert 10 in stopped and len(full) < 3, "successive halving stops most after a ninth"
    assert study.best.values[0] == min(full)


def check_whole(study: Study) -> None:
    """Exactly the budget, and no trial twice."""
    assert study.spent == study.plan.total == 270
    assert all(trial.state.name in ("COMPLETE", "PRUNED") for trial in study.trials)
    assert len({str(trial.params) for trial in study.trials}) == len(study.trials)
    assert all(sorted(t.intermediate_values) == list(range(10, used(t) + 1, 10)) for t in study.trials)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10 if "NANOMUON_SOAK" in os.environ else 1))
def test_killed_five_times_and_finished_by_two(tmp_path, seed):
    """All of the budget, no trial twice; where one process finishes it, trials and best of a study that none killed."""
    fork, draw = multiprocessing.get_context("fork"), random.Random(seed)
    killed = tmp_path / "killed"
    for _ in range(5):
        process = fork.Process(target=tune_worker.main, args=(killed, REPORTS))
        process.start()
        time.sleep(draw.uniform(*WAIT))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL
    assert any(study.spent < study.plan.total for study in tune_worker.studies(killed)), "nothing was left to do"
    shutil.copytree(killed, tmp_path / "alone")
    pair = [fork.Process(target=tune_worker.main, args=(killed,)) for _ in range(2)]
    for process in pair:
        process.start()
    for process in pair:
        process.join(timeout=120)
        assert process.exitcode == 0
    for study in tune_worker.studies(killed):
        check_whole(study)
    tune_worker.main(tmp_path / "alone")
    tune_worker.main(tmp_path / "undisturbed")
    assert str(tune_worker.trials(tmp_path / "alone")) == str(tune_worker.trials(tmp_path / "undisturbed"))
    for pair in zip(*(tune_worker.studies(tmp_path / name) for name in ("alone", "undisturbed")), strict=True):
        assert len({str((study.best.number, study.best.params, study.best.values)) for study in pair}) == 1


def test_a_trial_whose_process_lives_is_left_to_it(tmp_path):
    (study, _), (other, _) = tune_worker.studies(tmp_path), tune_worker.studies(tmp_path)
    mine, theirs = study.take(), other.take()
    assert (mine.trial.number, theirs.trial.number) == (0, 1)
    assert mine.report(5, math.nan) is False, "an evaluation in between is not counted"
    assert mine.report(10, 3.0) is False and theirs.report(10, 4.0) is True, "the worse of two"
    theirs.finish()
    mine.lock.close()  # as the system does when a process dies
    again = other.take()
    assert again.trial.number == 0 and again.params == mine.params and again.losses == {10: 3.0}
    third, fourth = study.take(), study.take()
    assert (third.allowance, fourth.allowance, study.take()) == (90, 80, None), "270 less 10 and 90 that are taken"


def test_a_trial_that_ends_while_another_process_looks_is_not_taken_again(tmp_path, monkeypatch):
    (study, _), (other, _) = tune_worker.studies(tmp_path), tune_worker.studies(tmp_path)
    mine, hold = study.take(), study_module.hold
    mine.report(10, 3.0)

    def hold_late(folder, name):
        if not mine.lock.closed:
            mine.finish()
        return hold(folder, name)

    monkeypatch.setattr(study_module, "hold", hold_late)
    assert other.take().trial.number == 1 and study.trials[0].state.name == "PRUNED"


def test_what_was_tuned_unequally_is_not_compared(tmp_path):
    saved = '{"budget": %d, "steps": 90, "every": 10, "seed": 3, "overrides": []}'
    for name, budget in (("x", 3), ("y", 4)):
        (tmp_path / name).mkdir()
        Study(tmp_path / name, "a", tune_worker.PLAN)
        (tmp_path / name / "tune.json").write_text(saved % budget)
    with raises_naming(UserError, "unequally", "budget is 3 in", "4 in"):
        report.read([tmp_path / "x", tmp_path / "y"])
    with raises_naming(UserError, "unequally", "a 0 of 270"):
        report.read([tmp_path / "x"])
    with raises_naming(UserError, "report=", "z", "no tuning"):
        report.read([tmp_path / "z"])


def test_a_run_stops_at_the_evaluation_that_decides(configure, tmp_path, no_plot):
    seen = []
    trainer = TunedTrainer(
        configure(*SHORT, f"run.dir={tmp_path / 'x'}"), lambda *at: bool(seen.append(at) or at[0] == 3)
    )
    loss = trainer.run()
    last = read_record(tmp_path / "x")[-1]
    assert trainer.stopped and [step for step, _ in seen] == [0, 3]
    assert (last["step"], last["val/loss"]) == (3, seen[-1][1]) and loss == last["val/loss"]


def test_rungs():
    assert Plan(20, 800, 20).rungs == [100, 300]
    assert Plan(20, 90, 10).rungs == [10, 30]
    assert Plan(20, 4, 2).rungs == [2]
    assert Plan(20, 4, 4).rungs == []


@pytest.fixture
def run(monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    tune = importlib.import_module("tune")

    def start(*words: object) -> tuple[int, str, str]:
        status = tune.main([str(word) for word in words])
        said = capsys.readouterr()
        return status, said.out, said.err

    return start


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["optim=muon", "budget=0"], ["budget=0"]),
        (["budget=2"], ["optim=", "optim=adamw,muon"]),
        (["optim=muon", "seeds=1,x"], ["seeds=1,x"]),
        (["optim=muon", "seeds=0,1", *TINY], ["seeds=0,1", "seed=0"]),
        (["optim=muon", "run.dir=x"], ["run.dir=x", "folder=DIR"]),
        (["optim=muon", "experiment=smoke", "eval.every=7"], ["train.steps=400", "eval.every=7"]),
        (["optim=moun"], ["optim=moun", "muon"]),
        (["report=nowhere"], ["report=nowhere"]),
    ],
)
def test_mistakes_give_one_line(run, tmp_path, monkeypatch, words, named):
    monkeypatch.chdir(tmp_path)
    status, _, said = run(*words)
    assert status == 1 and not list(tmp_path.iterdir())
    check_names(said.strip(), "error: ", *named)


def test_a_trial_is_one_process(run, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    check_names(run("optim=muon", *TINY)[2].strip(), "error: ", "WORLD_SIZE=2", "without torchrun")


@pytest.mark.slow
def test_a_real_tuning(run, tmp_path, no_plot):
    """Two optimizers, two full runs' worth each, one of them with steps that diverge; then the best on fresh seeds."""
    words = [*TINY, "train.steps=6", "eval.every=2", "budget=2", "seeds=1,2", f"folder={tmp_path / 't'}"]
    wild = ["optim.tune.matrix.lr=[0.003,1e30]"]
    status, said, _ = run("optim=adamw,muon", *wild, *words)
    assert status == 0 and "| muon | " in said
    assert (tmp_path / "t/tune.md").read_text() in said and (tmp_path / "t/tune.png").stat().st_size > 10000
    plan = Plan(2, 6, 2)
    losses = []
    for name in ("adamw", "muon"):
        study = Study(tmp_path / "t", name, plan)
        assert study.spent == 12
        losses += [loss for t in study.trials for loss in t.intermediate_values.values()]
        assert not list((tmp_path / "t" / "trials").glob("*/checkpoints")), "a trial leaves no weights"
        for trial in study.trials:
            lines = read_record(tmp_path / "t" / "trials" / f"{name}-{trial.number}")
            assert len(lines) and lines[-1]["step"] <= used(trial)
    assert any(map(math.isnan, losses)), "the wild ones diverged, and counted"
    final = sorted(path.name for path in (tmp_path / "t/final").iterdir() if path.is_dir())
    assert final == [f"optim={name},seed={seed}" for name in ("adamw", "muon") for seed in (1, 2)]
    before = (tmp_path / "t/tune.md").read_text()
    assert run("optim=adamw,muon", *wild, *words)[0] == 0 and (tmp_path / "t/tune.md").read_text() == before
    status, _, said = run("optim=adamw", *wild, *words, "budget=3")
    check_names(said.strip(), "budget is 2 there and 3 here", "folder")
