"""State dicts: what is refused, and what hooks see.  Layouts: tests/distributed/test_state_dict.py."""

import copy
import inspect
import itertools

import pytest
import torch
from torch import nn

from optim import SOAP, AdamH, Dion2, Lion, Muon, NorMuon, Signum, UncorrectedAdam
from optim.base import Optimizer
from optim.combined import Combined
from tests.errors import raises_naming
from tests.optim.reference import seeded
from tests.optim.rules import find_rules


def built(cls, **settings):
    weight = nn.Parameter(seeded((4, 3), 0))
    optimizer = cls([("weight", weight)], **settings)
    weight.grad = seeded((4, 3), 1)
    optimizer.step()
    return optimizer


def together(params, rule):
    return Combined([dict(optimizer=rule, params=params)])


ALL_RULES = [cls for cls in find_rules(Optimizer) if "defaults" not in inspect.signature(cls).parameters]
TORCHS = [torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD, torch.optim.Muon]


NO_FLOATS = [torch.int32, torch.bool, torch.complex64]


class Kellers(torch.optim.Optimizer):
    """Whose group settings are among ours, and whose state is not."""

    def __init__(self, params):
        super().__init__(params, dict(lr=0.02, weight_decay=0.0, momentum=0.95))
        for group in self.param_groups:
            for param in group["params"]:
                self.state[param]["momentum_buffer"] = torch.zeros_like(param)

    def step(self):
        pass


@pytest.mark.parametrize(
    ("theirs", "cls", "words"),
    [
        (lambda: built(torch.optim.Muon), Muon, ("ns_coefficients", "Muon")),
        (lambda: built(torch.optim.AdamW), Muon, ("betas", "Muon")),
        (lambda: built(Kellers), Muon, ("weight", "momentum_buffer", "Muon", "momentum")),
        (lambda: built(Muon), NorMuon, ("weight", "row_mean_square", "NorMuon")),
        (lambda: built(NorMuon), Muon, ("beta2", "Muon")),
        (lambda: built(torch.optim.SGD, momentum=0.9), Signum, ("dampening", "Signum")),
        (lambda: built(Signum), Muon, ("step", "Muon")),  # the names of its state and all its settings are Muon's
        (lambda: built(Signum), Dion2, ("step", "Dion2")),
        (lambda: built(UncorrectedAdam), AdamH, ("step", "AdamH")),
        (lambda: built(SOAP, max_dim=2), SOAP, None),  # its own settings come with it
    ],
)
def test_the_state_of_another_rule_is_refused_at_load(theirs, cls, words):
    """One that does not say whose it is: torch's, or of an earlier version."""
    saved, optimizer = copy.deepcopy(theirs().state_dict()), built(cls)
    saved["param_groups"][0].pop("rule", None)
    if words is None:
        optimizer.load_state_dict(saved)
    else:
        before = copy.deepcopy(optimizer.state_dict())
        with raises_naming(ValueError, *words):
            optimizer.load_state_dict(saved)
        assert str(before) == str(optimizer.state_dict()), "nothing is loaded"
    optimizer.step()


def test_no_rule_takes_the_state_of_any_other():
    """AdamH's state has the names and shapes of ADOPT's, Steepest's those of Scion's, torch's Muon has Muon's name."""
    alone = {cls: built(cls) for cls in ALL_RULES}
    combined = {cls: built(together, rule=cls) for cls in [*ALL_RULES, *TORCHS]}
    for optimizers in (alone, combined):
        saved = {cls: copy.deepcopy(optimizer.state_dict()) for cls, optimizer in optimizers.items()}
        for cls, other in itertools.permutations(optimizers, 2):
            with raises_naming(ValueError, cls.__name__, other.__name__, "same optimizer"):
                optimizers[cls].load_state_dict(saved[other])
        assert all(str(optimizer.state_dict()) == str(saved[cls]) for cls, optimizer in optimizers.items())
    for cls in ALL_RULES:  # alone or with others, it is the same rule
        alone[cls].load_state_dict(combined[cls].state_dict())
        combined[cls].load_state_dict(alone[cls].state_dict())


def test_a_group_goes_on_saying_whose_it_is():
    optimizer = built(together, rule=torch.optim.AdamW)
    saved = copy.deepcopy(optimizer.state_dict())
    assert saved["param_groups"][0].pop("rule") == "torch.optim.AdamW"
    optimizer.load_state_dict(saved)  # of an earlier version
    assert optimizer.state_dict()["param_groups"][0]["rule"] == "torch.optim.AdamW"
    with raises_naming(ValueError, "rule=SOAP", "Muon"):
        Muon([{"params": [nn.Parameter(seeded((4, 3), 0))], "rule": "SOAP"}])


@pytest.mark.parametrize("cls", [Muon, SOAP, Lion])
def test_damaged_state_is_refused_at_load(cls):
    optimizer = built(cls)
    key = next(iter(optimizer.state_dict()["state"][0]))
    for damage, word in [
        (lambda state: state.pop(0), "nothing"),
        (lambda state: state[0].pop(key), "keeps"),
        (lambda state: state[0].update(extra=torch.ones(3)), "extra"),
        (lambda state: state[0].update({key: torch.ones(2, 3)}), key),
        (lambda state: state[0].update({key: 3.0}), key),
        *((lambda state, to=to: state[0].update({key: state[0][key].to(to)}), str(to)) for to in NO_FLOATS),
    ]:
        saved = copy.deepcopy(optimizer.state_dict())
        damage(saved["state"])
        with raises_naming(ValueError, "weight", cls.__name__, word):
            optimizer.load_state_dict(saved)
    optimizer.step()


def test_hooks_see_and_change_the_owners_state():
    optimizer, other = built(NorMuon), built(NorMuon)
    seen = []

    def double_at_save(_, state):
        state["state"][0]["row_mean_square"] = state["state"][0]["row_mean_square"] * 2

    def double_at_load(_, state):
        held = state["state"][0]
        return {**state, "state": {0: {**held, "row_mean_square": held["row_mean_square"] * 2}}}

    optimizer.register_state_dict_post_hook(double_at_save)
    other.register_load_state_dict_pre_hook(double_at_load)
    other.register_load_state_dict_post_hook(lambda it: seen.append(it.state[it.param_groups[0]["params"][0]]))
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    ours, theirs = (o.state[o.param_groups[0]["params"][0]]["row_mean_square"] for o in (optimizer, other))
    assert torch.equal(theirs, 4 * ours) and torch.equal(seen[0]["row_mean_square"], theirs)


def test_loading_does_not_share_the_owners_state():
    optimizer, other = built(NorMuon), built(NorMuon)
    saved = optimizer.state_dict()
    other.load_state_dict(saved)
    before = saved["state"][0]["row_mean_square"].clone()
    other.step()
    assert torch.equal(before, saved["state"][0]["row_mean_square"])


def test_counters_and_settings_that_a_state_dict_cannot_have():
    """A negative step made SOAP's weights NaN; a group without settings, as torch makes of one that is not there, was a
    KeyError in the next step."""
    for cls in (Muon, SOAP, UncorrectedAdam, AdamH):
        optimizer = built(cls)
        saved = copy.deepcopy(optimizer.state_dict())
        if "step" in saved["param_groups"][0]:
            saved["param_groups"][0]["step"] = -3
            with raises_naming(ValueError, "step=-3", ">= 0"):
                optimizer.load_state_dict(saved)
    optimizer = built(together, rule=torch.optim.AdamW)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"] = [{"params": saved["param_groups"][0]["params"]}]
    with raises_naming(ValueError, "AdamW", "lr"):
        optimizer.load_state_dict(saved)
    optimizer.step()


def test_names_are_those_of_the_optimizer_that_loads():
    """Parameters go by their order, as in torch; what was called otherwise is not named so in later errors."""
    optimizer = built(Lion)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0]["param_names"] = ["module.weight"]
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["param_names"] == ["weight"]
