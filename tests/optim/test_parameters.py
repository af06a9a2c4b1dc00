"""Parameters that are not, or no longer, what an optimizer can train: it works, or one clear error says so at once."""

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, distribute_tensor

from optim import SOAP, Combined, Lion, Muon, NorMuon
from optim.elementwise import Elementwise
from optim.routing import build_from_config
from tests.errors import raises_naming
from tests.optim.reference import relative, seeded, svd_polar
from tests.optim.rules import find_rules
from tests.optim.threads import run_threads

CLASSES = [*find_rules(), *find_rules(Elementwise)]


def pair(cls):
    weights = [nn.Parameter(seeded((4, 3), 0, i)) for i in range(2)]
    return cls(weights), weights


def step(optimizer):
    for group in optimizer.param_groups:
        for param in group["params"]:
            param.grad = torch.ones_like(param)
    optimizer.step()


@pytest.mark.parametrize("cls", CLASSES)
def test_parameters_that_changed_are_named(cls):
    def replaced(optimizer, weights):
        optimizer.param_groups[0]["params"][0] = nn.Parameter(torch.ones(4, 3))

    def cast(optimizer, weights):
        weights[0].data = weights[0].data.bfloat16()

    def cut(optimizer, weights):
        weights[0].data = weights[0].data[:2]

    def regrouped(optimizer, weights):
        optimizer.param_groups.append(
            optimizer.param_groups[0] | {"params": [optimizer.param_groups[0]["params"].pop()]}
        )

    for change in (replaced, cast, cut, regrouped):
        optimizer, weights = pair(cls)
        change(optimizer, weights)
        with raises_naming(ValueError, cls.__name__, "build the optimizer after"):
            step(optimizer)


@pytest.mark.parametrize(
    ("tensor", "mend"),
    [
        (torch.zeros(4, 3, dtype=torch.float8_e4m3fn), "floating-point"),
        (torch.zeros(4, 3, dtype=torch.int32), "floating-point"),
        (torch.zeros(4, 1).expand(4, 3), "clone()"),
        (torch.zeros(6).as_strided((4, 3), (1, 1)), "clone()"),
    ],
)
@pytest.mark.parametrize("cls", [Muon, SOAP, Lion])
def test_what_cannot_be_trained_is_named_at_once(cls, tensor, mend):
    with raises_naming(ValueError, "(4, 3)", mend):
        cls([nn.Parameter(tensor, requires_grad=False)])


def tied_by_data():
    weight = torch.ones(4, 3)
    return [nn.Parameter(weight), nn.Parameter(weight)]


def a_part_too():
    weight = nn.Parameter(torch.ones(8, 3))
    return [weight, nn.Parameter(weight.data[2:6])]


def columns_of_one(*ends):
    weight = torch.ones(4, 6)
    return [nn.Parameter(weight[:, slice(*end)]) for end in ends]


@pytest.mark.parametrize("given", [tied_by_data(), a_part_too(), columns_of_one((0, 4), (3, 6))])
@pytest.mark.parametrize("cls", CLASSES)
def test_memory_that_two_parameters_share_is_named(cls, given):
    """They were updated twice in every step."""
    a, b = given
    for params in ([("wte", a), ("head", b)], [{"params": [("wte", a)]}, {"params": [("head", b)]}]):
        with raises_naming(ValueError, "head shares memory with wte", "one parameter"):
            cls(params)
    with raises_naming(ValueError, "head shares memory with wte", "one parameter"):
        Combined([dict(optimizer=cls, params=[("wte", a)]), dict(optimizer=torch.optim.AdamW, params=[("head", b)])])


def test_parameters_that_lie_between_one_another_share_nothing():
    flat = torch.ones(24)
    for params in (columns_of_one((0, 3), (3, 6)), [nn.Parameter(flat[i : i + 12].view(4, 3)) for i in (0, 12)]):
        step(Muon(params))


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
@pytest.mark.parametrize("cls", CLASSES)
def test_a_gradient_may_have_another_dtype(cls, dtypes):
    of_param, of_grad = dtypes
    weights = [nn.Parameter(seeded((4, 3), 0).to(of_param)) for _ in range(2)]
    optimizers = [cls([weight]) for weight in weights]
    weights[0].grad_dtype = of_grad
    for t in range(3):
        weights[0].grad = seeded((4, 3), 1 + t).bfloat16().to(of_grad)
        weights[1].grad = seeded((4, 3), 1 + t).bfloat16().to(of_param)
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(*(weight.detach() for weight in weights)) and weights[0].dtype == of_param


@pytest.mark.parametrize("cls", [Muon, NorMuon])
def test_parameters_of_two_devices(cls):
    """Stacks are of one device: here of the CPU, and of none."""
    here, alone = (nn.Parameter(seeded((4, 3), 0)) for _ in range(2))
    there = nn.Parameter(torch.empty(4, 3, device="meta"))
    for params in ([there, here], [alone]):
        optimizer = cls(params)
        step(optimizer)
    assert torch.equal(here.detach(), alone.detach())


@pytest.mark.parametrize("cls", [Muon, SOAP, Lion])
def test_a_gradient_of_partial_sums_is_added_up(cls):
    """As tensor parallelism leaves it for a replicated parameter; each rank's own part made the replicas differ."""
    alone = nn.Parameter(seeded((4, 4), 0))
    parts = [[seeded((4, 4), step, rank) for rank in range(2)] for step in range(1, 4)]
    single = cls([alone])
    for two in parts:
        alone.grad = two[0] + two[1]
        single.step()

    def on_rank(rank):
        mesh = init_device_mesh("cpu", (2,))
        weight = nn.Parameter(distribute_tensor(seeded((4, 4), 0), mesh, [Replicate()]))
        optimizer = cls([weight])
        for two in parts:
            weight.grad = DTensor.from_local(two[rank], mesh, [Partial()])
            optimizer.step()
        return weight.to_local().detach()

    for weight in run_threads(2, on_rank):
        torch.testing.assert_close(weight, alone.detach())


@pytest.mark.parametrize("cls", CLASSES)
def test_a_parameter_taken_out_of_its_group_is_frozen(cls):
    optimizer, weights = pair(cls)
    step(optimizer)
    frozen = optimizer.param_groups[0]["params"].pop(0)
    before = [w.detach().clone() for w in weights]
    step(optimizer)
    step(optimizer)
    assert frozen is weights[0] and torch.equal(weights[0].detach(), before[0])
    assert not torch.equal(weights[1].detach(), before[1])


@pytest.mark.parametrize("cls", CLASSES)
def test_an_optimizer_built_before_to_empty_says_so(cls):
    with torch.device("meta"):
        model = nn.Linear(4, 3, bias=False)
    optimizer = cls(model.parameters())
    model.to_empty(device="cpu")
    model(torch.ones(4)).sum().backward()
    with raises_naming(ValueError, cls.__name__, "no parameter", "to_empty"):
        optimizer.step()


@pytest.mark.parametrize("cls", [Muon, SOAP, Lion])
def test_an_optimizer_built_before_fully_shard_says_so(cls):
    def on_rank(rank):
        model = nn.Linear(4, 4, bias=False)
        optimizer = cls(model.parameters())
        fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
        for param in model.parameters():
            param.grad = torch.ones_like(param)
        with raises_naming(ValueError, cls.__name__, "fully_shard"):
            optimizer.step()

    run_threads(2, on_rank)


def test_a_later_step_and_frozen_parameters_may_lack_all_gradients():
    optimizer, weights = pair(Muon)
    step(optimizer)
    optimizer.zero_grad()
    optimizer.step()
    frozen, weights = pair(Lion)
    for weight in weights:
        weight.requires_grad_(False)
    frozen.step()


@pytest.mark.parametrize("cls", CLASSES)
def test_tensors_of_another_kind(cls):
    for dtype in (torch.complex64, torch.int32):
        with raises_naming(ValueError, str(dtype), "floating-point"):
            cls([nn.Parameter(torch.ones(4, 3, dtype=dtype), requires_grad=False)])
    weight = nn.Parameter(torch.ones(4, 3))
    with raises_naming(ValueError, "twice"):
        cls([weight, weight])
    table = nn.Embedding(5, 3, sparse=True)
    optimizer = cls(table.named_parameters())
    table(torch.tensor([1])).sum().backward()
    before = table.weight.detach().clone()
    with raises_naming(ValueError, "weight", "sparse=False"):
        optimizer.step()
    assert torch.equal(table.weight.detach(), before)


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 0), (0, 3, 4), (2, 0, 4)])
def test_empty_matrices_are_left_alone(cls, shape):
    weights = [nn.Parameter(torch.ones(shape)), nn.Parameter(torch.ones(4, 3))]
    optimizer = cls(weights)
    step(optimizer)
    step(optimizer)
    assert not torch.equal(weights[1].detach(), torch.ones(4, 3))
    step(cls([nn.Parameter(torch.ones(shape))]))


@pytest.mark.parametrize(
    ("shape", "settings", "flat"),
    [
        ((6, 4, 3, 3), {}, (6, 36)),
        ((6, 4, 2, 3, 3), {}, (6, 72)),
        ((6, 4, 3), {"stack": False}, (6, 12)),
        ((6, 4, 3, 3), {"stack": False, "conv1d": True}, (6, 36)),
        ((6, 4, 3, 3), {"split": 2}, (6, 36)),
    ],
)
@pytest.mark.parametrize("cls", find_rules())
def test_a_kernel_is_one_matrix(cls, shape, settings, flat):
    kernel = nn.Parameter(seeded(shape, 0, dtype=torch.float64))
    matrix = nn.Parameter(kernel.detach().reshape(flat).clone())
    matrix_settings = {key: value for key, value in settings.items() if key != "stack"}
    optimizers = cls([{"params": [kernel], **settings}]), cls([{"params": [matrix], **matrix_settings}])
    for t in range(3):
        kernel.grad = seeded(shape, 1 + t, dtype=torch.float64)
        matrix.grad = kernel.grad.reshape(flat)
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(kernel.detach().reshape(flat), matrix.detach())


def test_stacks_stay_stacks():
    """[E, m, n] always, four dimensions where the group says so: a polar factor for each matrix."""
    for shape, settings in [((5, 4, 3), {}), ((2, 5, 4, 3), {"stack": True})]:
        weight = nn.Parameter(torch.zeros(shape, dtype=torch.float64))
        weight.grad = seeded(shape, 1, dtype=torch.float64)
        Muon([{"params": [weight], **settings}], lr=1.0, momentum=0.0, scale="rms_to_rms", polar="svd").step()
        assert relative(-weight.detach(), svd_polar(weight.grad) * (4 / 3) ** 0.5) < 1e-12


class Conv1D(nn.Module):
    """As Hugging Face's: weight (fan_in, fan_out)."""

    def __init__(self, fan_out, fan_in):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(fan_in, fan_out))


Conv1D.__module__ = "transformers.pytorch_utils"


def test_build_sees_how_a_module_stores_its_weight():
    class Sub(Conv1D):  # as fully_shard makes one
        pass

    model = nn.ModuleDict(
        dict(hf=Conv1D(6, 4), sub=Sub(6, 4), plain=nn.Linear(4, 6, bias=False), conv=nn.Conv1d(4, 6, 3, bias=False))
        | dict(up=nn.ConvTranspose2d(4, 6, 3, bias=False))
    )
    member = build_from_config(model, {"matrix": {"_target_": "optim.Muon"}}).members["matrix"]
    found = {name: (g["conv1d"], g["stack"]) for g in member.param_groups for name in g["param_names"]}
    assert found == {
        "hf.weight": (True, None),
        "sub.weight": (True, None),
        "plain.weight": (False, None),
        "conv.weight": (False, False),
        "up.weight": (True, False),
    }
    from transformers.pytorch_utils import Conv1D as Real

    (group,) = (
        build_from_config(Real(6, 4), {"matrix": {"_target_": "optim.Muon"}, "scalar": {"_target_": "optim.Lion"}})
        .members["matrix"]
        .param_groups
    )
    assert group["conv1d"]


@pytest.mark.parametrize("cls", CLASSES)
def test_loading_does_not_hide_a_replaced_parameter(cls):
    optimizer, weights = pair(cls)
    optimizer.param_groups[0]["params"][0] = nn.Parameter(torch.ones(4, 3))
    optimizer.load_state_dict(pair(cls)[0].state_dict())
    with raises_naming(ValueError, cls.__name__, "was not there"):
        step(optimizer)
