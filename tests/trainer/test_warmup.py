"""The warm-up leaves no trace, whatever the optimizer."""

from dataclasses import asdict

import pytest
import torch

from optim import routing
from trainer.model import GPT
from trainer.parallel import initialise
from trainer.warmup import untraced_step

PRESETS = ["adamw", "muon", "normuon", "rmsprop", "shampoo", "soap"]


def everything(model, optimizers):
    """Weights, state and counters, as copies."""
    held = {name: p.detach().clone() for name, p in model.named_parameters()}
    for role, member in optimizers.members.items():
        for number, group in enumerate(member.param_groups):
            held |= {f"{role}/{number}/{key}": value for key, value in group.items() if key != "params"}
            for i, param in enumerate(group["params"]):
                for key, value in member.state.get(param, {}).items():
                    held[f"{role}/{number}/{i}/{key}"] = value.clone() if isinstance(value, torch.Tensor) else value
    return held


def same(a, b):
    assert a.keys() == b.keys()
    for key, value in a.items():
        assert torch.equal(value, b[key]) if isinstance(value, torch.Tensor) else value == b[key], key


def backward(model, seed):
    tokens = torch.randint(256, (2, 17), generator=torch.Generator().manual_seed(seed))
    model(tokens[:, :-1], tokens[:, 1:]).backward()


@pytest.mark.parametrize("preset", PRESETS)
def test_nothing_stays_of_the_step(configure, preset):
    config = configure("experiment=smoke", f"optim={preset}", "model.n_layer=1", "model.n_embd=16", "model.n_head=2")
    model = GPT(config.model, 256, 16)
    initialise(model, 0)
    optimizers = routing.build(model, asdict(config.optim))
    for trained in range(2):  # at the start, and with the state of a run that is resumed
        random, before = torch.get_rng_state(), everything(model, optimizers)
        backward(model, 10 + trained)
        untraced_step(optimizers, torch.device("cpu"))
        optimizers.zero_grad()
        same(before, everything(model, optimizers))
        assert torch.equal(random, torch.get_rng_state())
        backward(model, trained)
        optimizers.step()
        optimizers.zero_grad()
    assert not torch.equal(before["blocks.0.mlp.fc.weight"], model.blocks[0].mlp.fc.weight), "training does move it"
