"""What torch's own tests ask of an optimizer (test/test_optim.py), of ours: all but the refusals of docs/library.md."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as schedulers
from torch.optim.swa_utils import SWALR

from optim import SOAP, Combined, Lion, Muon, NorMuon
from tests.errors import raises_naming
from tests.optim.reference import seeded

RULES = {"muon": Muon, "normuon": NorMuon, "soap": SOAP, "lion": Lion}
KINDS = ["combined", *RULES]
each = pytest.mark.parametrize("kind", KINDS)


def weights() -> list[nn.Parameter]:
    return [nn.Parameter(seeded(shape, 0, i)) for i, shape in enumerate([(4, 5), (6, 4), (4, 4)])]


def made(kind: str, params, **settings) -> torch.optim.Optimizer:
    """``combined``: the last of the parameters (or groups) is AdamW's."""
    params = list(params)
    if kind != "combined":
        return RULES[kind](params, **{"lr": 0.02} | settings)
    groups = [dict(optimizer=Muon, params=params[:-1]), dict(optimizer=torch.optim.AdamW, params=params[-1:])]
    return Combined([{"lr": 0.02} | settings | group for group in groups])


def train(params, optimizer, steps) -> list[torch.Tensor]:
    for step in steps:
        for i, param in enumerate(params):
            param.grad = seeded(param.shape, 1 + step, i)
        optimizer.step()
    return [param.detach().clone() for param in params]


def assert_equal(a, b) -> None:
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


SCHEDULES = {
    "LambdaLR": lambda o: schedulers.LambdaLR(o, lambda step: 0.9**step),
    "MultiplicativeLR": lambda o: schedulers.MultiplicativeLR(o, lambda step: 0.9),
    "StepLR": lambda o: schedulers.StepLR(o, 2),
    "MultiStepLR": lambda o: schedulers.MultiStepLR(o, [1, 3]),
    "ConstantLR": lambda o: schedulers.ConstantLR(o, total_iters=2),
    "LinearLR": lambda o: schedulers.LinearLR(o, total_iters=3),
    "ExponentialLR": lambda o: schedulers.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: schedulers.PolynomialLR(o, 4),
    "CosineAnnealingLR": lambda o: schedulers.CosineAnnealingLR(o, 4),
    "CosineAnnealingWarmRestarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, 2),
    "CyclicLR": lambda o: schedulers.CyclicLR(o, 0.01, 0.1, 2, cycle_momentum=False),
    "OneCycleLR": lambda o: schedulers.OneCycleLR(o, 0.1, total_steps=5, cycle_momentum=False),
    "ReduceLROnPlateau": lambda o: schedulers.ReduceLROnPlateau(o, patience=0),
    "ChainedScheduler": lambda o: schedulers.ChainedScheduler([SCHEDULES["StepLR"](o), SCHEDULES["ExponentialLR"](o)]),
    "SequentialLR": lambda o: schedulers.SequentialLR(o, [SCHEDULES["LinearLR"](o), SCHEDULES["StepLR"](o)], [2]),
    "SWALR": lambda o: SWALR(o, 0.05, 3),
}


@each
@pytest.mark.parametrize("name", SCHEDULES)
def test_schedulers_set_the_rates_that_they_set_for_sgd(kind, name):
    params = weights()
    optimizer, sgd = made(kind, params), torch.optim.SGD(weights(), lr=0.02)
    schedule, reference = SCHEDULES[name](optimizer), SCHEDULES[name](sgd)
    for step in range(4):
        train(params, optimizer, [step])
        sgd.step()
        for one in (schedule, reference):
            one.step(*[1.0] * (name == "ReduceLROnPlateau"))
        rates = {float(group["lr"]) for group in optimizer.param_groups}
        assert rates == {sgd.param_groups[0]["lr"]}
    SCHEDULES[name](optimizer).load_state_dict(copy.deepcopy(schedule.state_dict()))


def test_every_scheduler_of_torch_is_asked():
    classes = {name for name, value in vars(schedulers).items() if isinstance(value, type)}
    ours = {name for name in schedulers.__all__ if name in classes} - {"LRScheduler"}
    assert ours <= set(SCHEDULES)


@each
def test_a_cycled_momentum(kind):
    """torch asks the first group of an optimizer that has a momentum, or betas, among its defaults."""
    optimizer = made(kind, weights())
    if kind == "combined":
        with raises_naming(ValueError, "momentum"):
            schedulers.OneCycleLR(optimizer, 0.1, total_steps=5)
        return
    schedulers.OneCycleLR(optimizer, 0.1, total_steps=5)
    group = optimizer.param_groups[0]
    assert (group["momentum"] if "momentum" in group else group["betas"][0]) == 0.95


@each
def test_a_closure_is_called_once_with_gradients_on(kind):
    params, calls = weights(), []
    optimizer = made(kind, params)

    def closure():
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = sum(param.square().sum() for param in params)
        loss.backward()
        return loss

    before = sum(param.square().sum() for param in params)
    assert optimizer.step(closure).item() == before.item() and calls == [True]
    with torch.no_grad():
        optimizer.step(closure)
    assert calls == [True, True]


@each
def test_hooks(kind):
    params, called = weights(), []
    optimizer = made(kind, params)
    handles = [
        optimizer.register_step_pre_hook(lambda *_: called.append("step pre")),
        optimizer.register_step_post_hook(lambda *_: called.append("step post")),
        optimizer.register_state_dict_pre_hook(lambda _: called.append("save pre")),
        optimizer.register_state_dict_post_hook(lambda _, state: state | {"mine": 1}),
        optimizer.register_load_state_dict_pre_hook(lambda _, state: called.append(state["mine"])),
        optimizer.register_load_state_dict_post_hook(lambda _: called.append("load post")),
    ]
    train(params, optimizer, range(1))
    optimizer.load_state_dict(optimizer.state_dict())
    assert called == ["step pre", "step post", "save pre", 1, "load post"]
    for handle in handles:
        handle.remove()
    train(params, optimizer, range(1))
    assert "mine" not in optimizer.state_dict() and len(called) == 5


@each
@pytest.mark.parametrize("shape", [(), (1,)])
def test_a_rate_and_a_decay_that_are_tensors(kind, shape):
    numbers = dict(lr=0.02, weight_decay=0.1)
    tensors = {key: torch.full(shape, value) for key, value in numbers.items()}
    if kind == "combined":
        tensors["weight_decay"] = tensors["weight_decay"].squeeze()  # AdamW takes no other
    a, b = weights(), weights()
    expected, optimizer = train(a, made(kind, a, **numbers), range(3)), made(kind, b, **tensors)
    for x, y in zip(train(b, optimizer, range(3)), expected, strict=True):
        torch.testing.assert_close(x, y)
    assert all(isinstance(group["lr"], torch.Tensor) for group in optimizer.param_groups)


@each
def test_another_group_before_the_first_step(kind):
    params = weights()
    optimizer, extra = made(kind, params[:2]), dict(params=[params[2]], lr=0.1)
    if kind not in ("combined", "lion"):
        with raises_naming(RuntimeError, "all parameter groups", "construction"):
            optimizer.add_param_group(extra)
        return
    optimizer.add_param_group(extra | ({"optimizer": Lion} if kind == "combined" else {}))
    assert optimizer.param_groups[-1]["lr"] == 0.1
    before = params[2].detach().clone()
    after = train(params, optimizer, range(1))[2]
    torch.testing.assert_close((before - after).abs(), torch.full_like(after, 0.1))


@each
def test_zero_grad(kind):
    params = weights()
    optimizer = made(kind, params)
    train(params, optimizer, range(1))
    optimizer.zero_grad(set_to_none=False)
    assert all(not param.grad.any() for param in params)
    optimizer.zero_grad()
    assert all(param.grad is None for param in params)


@each
def test_loading_goes_by_the_order_of_parameters(kind):
    """Names, numbers in the state and the order of its keys do not count; as in torch."""
    params = weights()
    optimizer = made(kind, [(f"w{i}", param) for i, param in enumerate(params)])
    train(params, optimizer, range(3))
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"] = {number + 7: saved["state"][number] for number in reversed(saved["state"])}
    for group in saved["param_groups"]:
        group["params"] = [number + 7 for number in group["params"]]
    others = weights()
    for mine, theirs in zip(others, params, strict=True):
        mine.data.copy_(theirs.data)
    resumed = made(kind, others)
    resumed.load_state_dict(saved)
    assert_equal(train(others, resumed, range(3, 5)), train(params, optimizer, range(3, 5)))
    with raises_naming(ValueError, "group"):
        made(kind, weights()[1:]).load_state_dict(saved)


@each
@pytest.mark.parametrize("by", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_copies(kind, by):
    params = weights()
    optimizer = made(kind, params)
    train(params, optimizer, range(2))
    if kind != "lion":
        with raises_naming(TypeError, type(optimizer).__name__, "load", "state_dict()"):
            by(optimizer)
        return
    theirs = by(optimizer)
    others = theirs.param_groups[0]["params"]
    assert_equal(train(others, theirs, range(2, 4)), train(params, optimizer, range(2, 4)))


@each
def test_refusals(kind):
    def refused(params, *words, error=ValueError, **settings):
        with raises_naming(error, *words):
            made(kind, params, **settings)

    for dtype in (torch.complex64, torch.int64):
        refused([nn.Parameter(torch.ones(4, 4, dtype=dtype), requires_grad=False), *weights()], str(dtype), "floating")
    for setting in ("maximize", "foreach", "capturable", "differentiable"):
        if kind != "combined":  # AdamW has it
            refused(weights(), setting, error=TypeError, **{setting: True})
            refused([dict(params=weights(), **{setting: True})], setting, "no such setting")
    params = weights()
    if kind != "combined":
        with pytest.warns(UserWarning, match="duplicate"):
            refused([params[0], *params], "parameter is given twice")
        refused([dict(params=params), dict(params=params[:1])], "more than one parameter group")
    refused(params, "-1.0", lr=-1.0)
    optimizer = made(kind, params)
    with raises_naming(ValueError, "gradient", "first step"):
        optimizer.step()
    train(params, optimizer, range(1))
    params[0].grad = torch.eye(*params[0].shape).to_sparse()
    before = [param.detach().clone() for param in params]
    with raises_naming(ValueError, "sparse", "SparseAdam"):
        optimizer.step()
    assert_equal(before, [param.detach() for param in params])


@each
def test_a_parameter_without_a_gradient_stays(kind):
    params = weights()
    optimizer = made(kind, params)
    train(params, optimizer, range(1))
    before = params[0].detach().clone()
    params[0].grad = None
    optimizer.step()
    assert torch.equal(params[0].detach(), before)
