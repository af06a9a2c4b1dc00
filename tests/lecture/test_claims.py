"""Every claim of the lecture, measured in a short form with the seeds of the figures; and what breaks one is seen."""

import pytest
import torch

from optim import lmo, polar
from scripts.lecture import descend
from scripts.lecture.experiment import TOPIC_OF, load

optimizer = descend.optimizer


def failures(name: str) -> list[str]:
    torch.manual_seed(0)
    experiment = load(name)
    checks = experiment.check(experiment.measure(short=True))
    assert checks
    return [str(check) for check in checks if not check.holds]


@pytest.mark.parametrize("name", TOPIC_OF)
def test_claim(name, monkeypatch):
    used, resolve = set(), descend.resolve_target
    monkeypatch.setattr(descend, "resolve_target", lambda settings, where: used.add(where) or resolve(settings, where))
    assert not failures(name)
    assert used <= set(load(name).METHODS), "METHODS leads readers from a method to its experiments"


def forced(**settings):
    """The optimizers asked for, with these settings whatever else is asked for."""
    return lambda name, tensor, **asked: optimizer(name, tensor, **(asked | settings))


BROKEN = {  # experiment, what is replaced in it, by what
    "no noise": ("noise_ball", "sampler", lambda problem, size, seed: lambda x, k: problem.full(x)),
    "a constant step": (
        "decreasing_step",
        "descend",
        lambda method, x, gradient, steps, rate: descend.descend(method, x, gradient, steps, lambda k: 0.05),
    ),
    "a step above 1/L": ("descent_lemma", "optimizer", forced(lr=3.0)),
    "AMSGrad is Adam": ("amsgrad", "optimizer", forced(amsgrad=False)),
    "AdamW is Adam": ("adamw", "optimizer", lambda name, tensor, **asked: optimizer("adam", tensor, **asked)),
    "epsilon outside": (
        "epsilon",
        "optimizer",
        lambda name, tensor, **asked: optimizer(name.removesuffix("_inside"), tensor, **asked),
    ),
    "the oracle's sign": ("oracles", "lmo", lambda x, kind: -lmo.lmo(x, kind)),
    "Frobenius for spectral": (
        "balls",
        "norm",
        lambda x, kind: lmo.norm(x, "frobenius" if kind == "spectral" else kind),
    ),
    "one sign for every norm": ("steepest_family", "optimizer", forced(norm="linf")),
    "Shampoo damped": ("polar_identity", "optimizer", forced(eps=0.1)),
    "Jordan's iteration": (
        "newton_schulz",
        "polar",
        lambda x, method, steps=None: polar.polar(x, "svd" if method == "svd" else "newton_schulz5", steps),
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_claim_is_seen(case, monkeypatch):
    name, attribute, replacement = BROKEN[case]
    monkeypatch.setattr(load(name), attribute, replacement)
    try:
        assert failures(name)
    except (ValueError, TypeError) as error:
        pytest.fail(f"the experiment broke instead of its claim: {error}")
