"""Every claim of the lecture, measured in a short form with the seeds of the figures; and what breaks one is seen."""

import re
from pathlib import Path

import pytest
import torch

from optim import lmo, polar
from scripts.lecture import descend, gpt
from scripts.lecture.experiment import TOPIC_OF, Check, load
from scripts.lecture.slides import METHODS

optimizer = descend.optimizer
DOCS = Path(__file__).resolve().parents[2] / "docs" / "lecture"


def checks_of(name: str) -> list[Check]:
    torch.manual_seed(0)
    return load(name).check(load(name).measure(short=True))


def failures(checks: list[Check]) -> list[str]:
    return [str(check) for check in checks if not check.holds]


@pytest.mark.parametrize("name", TOPIC_OF)
def test_claim(name, monkeypatch):
    used, resolve = set(), descend.resolve_target
    monkeypatch.setattr(descend, "resolve_target", lambda settings, where: used.add(where) or resolve(settings, where))
    checks = checks_of(name)
    assert checks and not failures(checks)
    page = (DOCS / f"{TOPIC_OF[name]}.md").read_text(encoding="utf-8")
    table = page.partition(f"<!-- {name} -->")[2].partition(f"<!-- /{name} -->")[0]
    shown = re.findall(r"^\| (.+?) \| [^|]+ \| [^|]+ \|$", table, re.M)[1:]
    assert [what.replace(r"\|", "|") for what in shown] == [check.what for check in checks]
    assert used <= set(load(name).METHODS), "METHODS leads readers from a method to its experiments"


def broken(preset, becomes=None, drop=(), **forced):
    """descend.optimizer, except that `preset` is another one, lacks the settings in `drop` and has those in `forced`.

    The other optimizers of an experiment stay whole, so that a failure is about this one.
    """

    def build(name, tensor, **asked):
        if name == preset:
            name, asked = becomes or name, {k: v for k, v in asked.items() if k not in drop} | forced
        return optimizer(name, tensor, **asked)

    return build


BROKEN_OPTIMIZERS = {  # optim= -> defect, the experiment that must see it, the optimizer with the defect
    "sgd": ("adds up what came before", "steepest_family", broken("sgd", momentum=0.5)),
    "sgd_momentum": ("has no momentum", "momentum", broken("sgd_momentum", momentum=0.0)),
    "nesterov": ("does not look ahead", "momentum", broken("nesterov", nesterov=False)),
    "adagrad": ("forgets", "adadelta", broken("adagrad", "rmsprop")),
    "adagrad_inside": ("has ε outside the root", "epsilon", broken("adagrad_inside", "adagrad")),
    "rmsprop": ("never forgets", "rmsprop", broken("rmsprop", "adagrad", drop=("alpha",))),
    "rmsprop_inside": ("has ε outside the root", "epsilon", broken("rmsprop_inside", "rmsprop")),
    "adadelta": ("has steps with the units of the gradient", "adadelta", broken("adadelta", "sgd", ("rho", "eps"))),
    "adam": ("does not correct the bias", "adam_bias", broken("adam", "rmsprop", drop=("betas",))),
    "amsgrad": ("forgets the largest v", "amsgrad", broken("amsgrad", amsgrad=False)),
    "adamw": ("decays through the gradient", "adamw", broken("adamw", "adam")),
    "steepest": ("knows one norm", "steepest_family", broken("steepest", norm="linf")),
    "signum": ("keeps a momentum", "steepest_family", broken("signum", momentum=0.9)),
    "muon": ("orthogonalizes no momentum", "gpt_momentum", broken("muon", momentum=0.0)),
    "shampoo": ("is damped", "polar_identity", broken("shampoo", eps=0.1)),
}


@pytest.mark.parametrize("preset", BROKEN_OPTIMIZERS)
def test_a_broken_optimizer_is_seen(preset, monkeypatch):
    _, name, defect = BROKEN_OPTIMIZERS[preset]
    assert preset in load(name).METHODS
    monkeypatch.setattr(load(name), "optimizer", defect)
    monkeypatch.setattr(gpt, "train", lambda *words, steps, **_: [(0, 3.0), (steps, 2.0)])  # too slow to be run again
    assert failures_of_a_broken(name)


def test_every_method_is_broken_once():
    assert set(BROKEN_OPTIMIZERS) == {preset for _, presets, _ in METHODS for preset in presets}


BROKEN_CLAIMS = {  # experiment, what is replaced in it, by what
    "no noise": ("noise_ball", "sampler", lambda problem, size, seed: lambda x, k: problem.full(x)),
    "a constant step": (
        "decreasing_step",
        "descend",
        lambda method, x, gradient, steps, rate: descend.descend(method, x, gradient, steps, lambda k: 0.05),
    ),
    "a step above 1/L": ("descent_lemma", "optimizer", broken("sgd", lr=3.0)),
    "the oracle's sign": ("oracles", "lmo", lambda x, kind: -lmo.lmo(x, kind)),
    "Frobenius for spectral": (
        "balls",
        "norm",
        lambda x, kind: lmo.norm(x, "frobenius" if kind == "spectral" else kind),
    ),
    "Jordan's iteration": (
        "newton_schulz",
        "polar",
        lambda x, method, steps=None: polar.polar(x, "svd" if method == "svd" else "newton_schulz5", steps),
    ),
}


@pytest.mark.parametrize("case", BROKEN_CLAIMS)
def test_a_broken_claim_is_seen(case, monkeypatch):
    name, attribute, replacement = BROKEN_CLAIMS[case]
    monkeypatch.setattr(load(name), attribute, replacement)
    assert failures_of_a_broken(name)


def failures_of_a_broken(name: str) -> list[str]:
    """As failures(), but an exception is not a claim that was seen to fail."""
    try:
        return failures(checks_of(name))
    except (ValueError, TypeError) as error:
        pytest.fail(f"the experiment broke instead of its claim: {error}")
