"""Whatever an optimizer keeps returns from a checkpoint's tensors and numbers, before and after its first step."""

import pytest
import torch
from torch import nn

from optim import NorMuon
from optim.combined import Combined
from optim.named_state import init_state, load_named, named_numbers, named_tensors

KINDS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    "adamw, not fused": lambda p: torch.optim.AdamW(p, lr=0.1, amsgrad=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.1, momentum=0.5, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
    "adadelta": lambda p: torch.optim.Adadelta(p, lr=0.1),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.1),
    "asgd": lambda p: torch.optim.ASGD(p, lr=0.1),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.1),
    "rprop": lambda p: torch.optim.Rprop(p, lr=0.1),
}


def two_steps(model: nn.Module, optimizers: Combined, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(2):
        for parameter in list(model.parameters())[:-1]:  # the last is never used
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizers.step()


def built(kind: str) -> tuple[nn.Module, Combined]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    named = list(model.named_parameters())
    return model, Combined([dict(name="matrix", optimizer=KINDS[kind], params=named)])


@pytest.mark.parametrize("steps", [0, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_optimizer_state_returns(kind, steps):
    model, optimizers = built(kind)
    for seed in range(steps):
        two_steps(model, optimizers, seed)
    weights, numbers = {k: v.clone() for k, v in model.state_dict().items()}, named_numbers(optimizers)
    tensors = {k: v.clone() for k, v in named_tensors(optimizers).items()}
    other, again = built(kind)
    init_state(again, tensors)
    other.load_state_dict(weights)
    load_named(again, tensors, numbers)
    assert set(named_tensors(again)) == set(tensors)
    two_steps(model, optimizers, 9)
    two_steps(other, again, 9)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_state_of_blocks_of_unequal_sizes_returns():
    """Whose names end with a size, behind a point: row_mean_square.1 and row_mean_square.3."""

    def steps(optimizers, parameter, seed):
        parameter.grad = torch.randn(4, 3, generator=torch.Generator().manual_seed(seed))
        optimizers.step()

    parameter, other = nn.Parameter(torch.ones(4, 3)), nn.Parameter(torch.ones(4, 3))
    both = []
    for weight in (parameter, other):
        params = [{"params": [("block.0.weight", weight)], "split": (1, 3)}]
        both.append(Combined([dict(name="matrix", optimizer=NorMuon, params=params)]))
    optimizers, again = both
    steps(optimizers, parameter, 0)
    load_named(again, {k: v.clone() for k, v in named_tensors(optimizers).items()}, named_numbers(optimizers))
    with torch.no_grad():
        other.copy_(parameter)
    steps(optimizers, parameter, 1)
    steps(again, other, 1)
    assert torch.equal(parameter, other)
