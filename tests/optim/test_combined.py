"""One optimizer over all roles takes part in whatever takes a ``torch.optim.Optimizer``."""

import copy

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR

from optim import SOAP, Combined, Lion, Muon, NorMuon, build
from optim.routing import assign_roles
from tests.errors import raises_naming
from tests.optim.reference import seeded

MUON, ADAMW = dict(optimizer=Muon, lr=0.02), dict(optimizer=torch.optim.AdamW, lr=0.1)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.wte = nn.Embedding(7, 4)
        self.body = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self.lm_head = nn.Linear(4, 7, bias=False)
        for i, parameter in enumerate(self.parameters()):
            parameter.data = seeded(parameter.shape, 0, i)


def made(matrix=MUON, rest=ADAMW):
    model = Net()
    return model, build(model, matrix=matrix, scalar=rest)


def give_gradients(model, step):
    for i, parameter in enumerate(model.parameters()):
        parameter.grad = seeded(parameter.shape, 1 + step, i)


def train(model, optimizer, steps, scheduler=None):
    for step in steps:
        give_gradients(model, step)
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
    return [parameter.detach().clone() for parameter in model.parameters()]


def assert_equal(a, b):
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_it_is_its_members_stepped_one_by_one():
    model, optimizer = made()
    separate = Net()
    muon = Muon([separate.body.weight], lr=0.02)
    adamw = torch.optim.AdamW([p for p in separate.parameters() if p is not separate.body.weight], lr=0.1)
    for step in range(3):
        give_gradients(separate, step)
        muon.step()
        adamw.step()
    assert_equal(train(model, optimizer, range(3)), list(separate.parameters()))


def test_groups_in_one_constructor():
    a, b = Net(), Net()
    keller = Combined([
        dict(params=[a.body.weight], **MUON),
        dict(params=[p for p in a.parameters() if p is not a.body.weight], **ADAMW),
    ])  # fmt: skip
    assert_equal(train(a, keller, range(3)), train(b, build(b, matrix=MUON, scalar=ADAMW), range(3)))
    with raises_naming(ValueError, "optimizer=None", "class"):
        Combined([dict(params=[a.body.weight])])
    with raises_naming(ValueError, "two optimizers"):
        Combined([dict(params=[a.body.weight], **MUON), dict(params=a.parameters(), **ADAMW)])
    with raises_naming(ValueError, "hidden", "momentum"):
        Combined([dict(name="hidden", params=[a.body.weight], momentum=1.5, **MUON)])


@pytest.mark.parametrize("matrix", [MUON, dict(optimizer=SOAP, update_freq=2)])
def test_state_dicts_go_on(matrix):
    model, optimizer = made(matrix)
    schedule = LambdaLR(optimizer, lambda step: 1 / (1 + step))
    train(model, optimizer, range(3), schedule)
    other, resumed = made(matrix)
    again = LambdaLR(resumed, lambda step: 1 / (1 + step))
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    again.load_state_dict(schedule.state_dict())
    assert_equal(train(model, optimizer, range(3, 6), schedule), train(other, resumed, range(3, 6), again))
    assert [group["initial_lr"] for group in resumed.param_groups] == [g["initial_lr"] for g in optimizer.param_groups]


def test_the_state_of_another_is_refused_whole():
    model, optimizer = made()
    train(model, optimizer, range(2))
    before = str(optimizer.state_dict())
    for saved, words in [
        (made(dict(optimizer=NorMuon))[1].state_dict(), ("rule=NorMuon", "Muon")),
        (torch.optim.AdamW(Net().parameters()).state_dict(), ("groups", "[6]", "[1, 1, 1, 3]")),
    ]:
        with raises_naming(ValueError, *words):
            optimizer.load_state_dict(saved)
        assert str(optimizer.state_dict()) == before


def test_torchs_state_tools_before_the_first_step():
    """They let state come into being by a step of rate 0, which is not one of the run's."""
    model, optimizer = made(dict(optimizer=SOAP))
    state = get_optimizer_state_dict(model, optimizer)
    assert state["state"]["wte.weight"]["step"] == 0 and state["param_groups"][0]["step"] == 0
    fresh, plain = made(dict(optimizer=SOAP))
    assert_equal(train(model, optimizer, range(3)), train(fresh, plain, range(3)))
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer))
    other, resumed = made(dict(optimizer=SOAP))
    other.load_state_dict(model.state_dict())
    set_optimizer_state_dict(other, resumed, saved)
    assert_equal(train(model, optimizer, range(3, 5)), train(other, resumed, range(3, 5)))


def test_a_first_step_of_rate_0_counts():
    model, optimizer = made()
    schedule = LambdaLR(optimizer, lambda step: step / 3)  # a warm-up from 0
    train(model, optimizer, range(2), schedule)
    assert optimizer.param_groups[0]["step"] == 2 and optimizer.state[model.wte.weight]["step"] == 2


def test_closures_hooks_and_schedulers():
    model, optimizer = made()
    called = []
    optimizer.register_step_pre_hook(lambda *_: called.append("before"))
    optimizer.register_step_post_hook(lambda *_: called.append("after"))
    optimizer.register_state_dict_post_hook(lambda _, state: state | {"mine": 1})
    optimizer.register_load_state_dict_pre_hook(lambda _, state: called.append(state["mine"]))
    optimizer.register_load_state_dict_post_hook(lambda _: called.append("loaded"))

    def closure():
        called.append("closure")
        optimizer.zero_grad()
        loss = model.lm_head(model.norm(model.body(model.wte(torch.arange(7))))).square().mean()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() > optimizer.step(closure).item()
    optimizer.load_state_dict(optimizer.state_dict())
    assert called == ["before", "closure", "after"] * 2 + [1, "loaded"]
    cycle = OneCycleLR(optimizer, max_lr=[0.01, 0.1, 0.1, 0.1], total_steps=5, cycle_momentum=False)
    train(model, optimizer, range(4), cycle)
    assert optimizer.members["matrix"].param_groups[0]["lr"] == cycle.get_last_lr()[0] < 0.01


def test_gradient_scaler_skips_a_step_that_overflows():
    model, optimizer = made()
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.tensor(1.0))
    for step, poison in [(0, False), (1, True), (2, False)]:
        give_gradients(model, step)
        for parameter in model.parameters():
            parameter.grad *= scaler.get_scale()
        if poison:
            model.body.weight.grad[0, 0] = torch.inf
        scaler.step(optimizer)
        scaler.update()
    assert_equal(list(model.parameters()), train(*made(), [0, 2]))


def test_a_group_more_before_the_first_step_and_later():
    model, optimizer = made()
    extra = nn.Parameter(seeded((3, 3), 9))
    optimizer.add_param_group(dict(params=[extra], **MUON))
    extra.grad = seeded((3, 3), 10)
    train(model, optimizer, range(1))
    assert not torch.equal(extra.detach(), seeded((3, 3), 9))
    optimizer.add_param_group(dict(params=[nn.Parameter(seeded((2, 2), 9))], name="late", optimizer=Lion, lr=0.1))
    assert [row["role"] for row in optimizer.table()] == ["matrix", "embedding", "head", "scalar", "Muon", "late"]
    assert len({group["name"] for group in optimizer.param_groups}) == len(optimizer.param_groups)


def test_what_it_prints():
    text = repr(made()[1]).splitlines()
    assert len(text) == 4 and "matrix" in text[0] and "optim.Muon" in text[0] and "body.weight" in text[0]


class Parts(nn.Module):
    """One of every kind."""

    def __init__(self):
        super().__init__()
        from transformers.pytorch_utils import Conv1D

        self.tokens = nn.Embedding(7, 4)
        self.conv1d = Conv1D(6, 4)
        self.conv = nn.Conv2d(3, 4, 3)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 4))
        self.pos_embed = nn.Parameter(torch.zeros(1, 5, 4))
        self.one_output = nn.Linear(4, 1)
        self.experts = nn.ParameterDict({"down_proj": nn.Parameter(torch.zeros(3, 4, 5))})
        self.lora_A = nn.ModuleDict({"default": nn.Linear(4, 2, bias=False)})
        self.lora_embedding_A = nn.ParameterDict({"default": nn.Parameter(torch.zeros(2, 7))})
        self.head = nn.Linear(4, 7, bias=False)

    def get_output_embeddings(self):
        return self.head


def test_roles_by_the_type_of_the_module():
    model = Parts()
    assert assign_roles(model) == {
        "cls_token": "scalar",
        "pos_embed": "embedding",
        "tokens.weight": "embedding",
        "conv1d.weight": "matrix",
        "conv1d.bias": "scalar",
        "conv.weight": "matrix",
        "conv.bias": "scalar",
        "one_output.weight": "matrix",
        "one_output.bias": "scalar",
        "experts.down_proj": "matrix",
        "lora_A.default.weight": "matrix",
        "lora_embedding_A.default": "embedding",
        "head.weight": "head",
    }
    model.head.weight = model.tokens.weight
    assert "head.weight" not in assign_roles(model) and assign_roles(model)["tokens.weight"] == "embedding"
    assert assign_roles(model, roles={"conv*": "scalar", "conv1d.w*": "matrix"})["conv.weight"] == "scalar"
    for roles, words in [({"nothing.*": "scalar"}, "nothing"), ({"conv.weight": "vector"}, "vector")]:
        with raises_naming(ValueError, words):
            assign_roles(model, roles=roles)
    model.conv1d.weight.requires_grad_(False)
    optimizer = build(model, matrix=MUON, scalar=ADAMW)
    names = [name for group in optimizer.param_groups for name in group["param_names"]]
    assert len(names) == len(list(model.parameters())) - 1 and "conv1d.weight" not in names
    with raises_naming(ValueError, "embedding is missing"):
        build(model, matrix=MUON)
