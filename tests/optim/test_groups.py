"""State of parameter groups that differ, and of the owner when it is loaded."""

import copy
from inspect import signature

import pytest
import torch

from optim import SOAP, Steepest
from optim.elementwise import Elementwise
from tests.optim.reference import seeded
from tests.optim.rules import find_rules
from tests.optim.test_rules import RULES


def test_groups_may_differ_in_the_state_they_need():
    weights = [torch.nn.Parameter(seeded((4, 3), 0, i)) for i in range(2)]
    optimizer = Steepest([{"params": weights[:1], "momentum": 0.9}, {"params": weights[1:], "momentum": 0.0}])
    before = [weight.detach().clone() for weight in weights]
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert all(not torch.equal(weight, old) for weight, old in zip(weights, before, strict=True))
    assert [set(optimizer.state[weight]) for weight in weights] == [{"momentum"}, set()]


@pytest.mark.parametrize("name", ["shampoo", "soap", "normuon"])
def test_loading_keeps_the_owners_state_in_its_own_precision(name):
    cls, settings = RULES[name]
    weight = torch.nn.Parameter(seeded((4, 3), 0).bfloat16())
    optimizer, other = (cls([weight], **settings) for _ in range(2))
    weight.grad = seeded((4, 3), 1).bfloat16()
    optimizer.step()
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    kept = [(key, value) for key, value in optimizer.state[weight].items() if key not in optimizer._shard_keys]
    assert kept and all(value.dtype == torch.float32 for _, value in kept)
    for key, value in kept:
        assert other.state[weight][key].dtype == torch.float32 and torch.equal(other.state[weight][key], value)
    other.step()


def test_a_state_dict_from_before_a_setting_was_renamed_loads():
    weight = torch.nn.Parameter(seeded((4, 3), 0))
    optimizer = SOAP([weight], update_freq=3)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0]["every"] = saved["param_groups"][0].pop("update_freq")
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["update_freq"] == 3 and "every" not in optimizer.param_groups[0]


@pytest.mark.parametrize("name", ["shampoo", "soap", "klsoap", "psgdkron"])
def test_blocks_of_unequal_size_begin_as_whole_matrices_do(name):
    """Roots, bases and factors at the identity: nothing that is multiplied is zero."""
    cls, settings = RULES[name]
    weight = torch.nn.Parameter(seeded((6, 4), 0))
    state = cls([{"params": [weight], "split": (4, 2)}], **settings).state[weight]
    squares = {k: v for k, v in state.items() if k.partition(".")[0].endswith(("_root", "_basis", "_factor"))}
    assert len(squares) == 4
    assert all(torch.equal(v.flatten(0, -3)[0], torch.eye(v.shape[-1])) for v in squares.values())


SCHEDULED = [
    (cls, key)
    for cls in [*find_rules(), *find_rules(Elementwise)]
    for key in ("momentum", "weight_decay")
    if key in signature(cls).parameters
]


@pytest.mark.parametrize(("cls", "key"), SCHEDULED)
def test_a_setting_that_a_schedule_changes_is_that_of_the_next_step(cls, key):
    """Equal to an optimizer that was built with it and goes on from the same state; not to one without the change."""

    def step(optimizer, number):
        (weight,) = optimizer.param_groups[0]["params"]
        weight.grad = seeded((4, 3), number, dtype=torch.float64)
        optimizer.step()
        return weight.detach().clone()

    def built(value, weight):
        return cls([torch.nn.Parameter(weight.clone())], **{key: value})

    optimizer = built(0.5, seeded((4, 3), 0, dtype=torch.float64))
    weight = [step(optimizer, number) for number in range(1, 4)][-1]
    others = [built(value, weight) for value in (0.99, 0.5)]
    saved = copy.deepcopy(optimizer.state_dict())
    for other in others:
        other.load_state_dict(saved)
    for changed in (optimizer, others[0]):
        changed.param_groups[0][key] = 0.99
    got, expected, unchanged = (step(one, 4) for one in (optimizer, *others))
    assert torch.equal(got, expected) and not torch.equal(got, unchanged)
