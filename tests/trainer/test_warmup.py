"""The warm-up leaves no trace, whatever the optimizer."""

import os
from dataclasses import asdict

import hydra
import pytest
import torch

from optim import Combined, routing
from optim.matrix import local
from tests.distributed.harness import run_workers
from trainer.config import register, validate
from trainer.launch.cli import CONFIGS
from trainer.model import GPT
from trainer.parallel import ParallelConfig, initialise, setup, unwrap
from trainer.run.warmup import dry_run_step, warm_up

PRESETS = sorted(path.stem for path in (CONFIGS / "optim").glob("*.yaml"))
SMALL = ["experiment=smoke", "model.n_layer=1", "model.n_embd=16", "model.n_head=2"]


def everything(model, optimizers):
    """This rank's weights, state and counters, as copies."""
    held = {name: local(p.detach()).clone() for name, p in model.named_parameters()}
    for role, member in optimizers.members.items():
        for number, group in enumerate(member.param_groups):
            held |= {f"{role}/{number}/{key}": value for key, value in group.items() if key != "params"}
            for i, param in enumerate(group["params"]):
                for key, value in member.state.get(param, {}).items():
                    held[f"{role}/{number}/{i}/{key}"] = (
                        local(value).clone() if isinstance(value, torch.Tensor) else value
                    )
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
    config = configure(*SMALL, f"optim={preset}")
    model = GPT(config.model, 256, 16)
    initialise(model, 0)
    optimizers = routing.build_from_config(model, asdict(config.optim))
    for trained in range(2):  # at the start, and with the state of a run that is resumed
        random, before = torch.get_rng_state(), everything(model, optimizers)
        backward(model, 10 + trained)
        dry_run_step(optimizers, torch.device("cpu"))
        optimizers.zero_grad()
        same(before, everything(model, optimizers))
        assert torch.equal(random, torch.get_rng_state())
        backward(model, trained)
        optimizers.step()
        optimizers.zero_grad()
    assert not torch.equal(before["blocks.0.mlp.fc.weight"], model.blocks[0].mlp.fc.weight), "training does move it"


class Noisy(torch.optim.SGD):
    """A step that draws random numbers, as no preset does yet."""

    def step(self, closure=None):
        torch.rand(3)
        super().step(closure)


def test_random_numbers_are_put_back():
    param = torch.nn.Parameter(torch.ones(2))
    param.grad = torch.ones(2)
    random = torch.get_rng_state()
    dry_run_step(Combined([dict(optimizer=Noisy, params=[param], lr=0.1)]), torch.device("cpu"))
    assert torch.equal(random, torch.get_rng_state()) and torch.equal(param, torch.ones(2))


def compose(*overrides):
    with hydra.initialize_config_dir(str(CONFIGS), job_name="train", version_base="1.3"):
        return validate(hydra.compose("train", overrides=[*SMALL, *overrides]), 1)


def trained(parallel, preset, warm):
    """The losses of three steps, of which a warm-up before the first and the third must change nothing."""
    config = compose(f"optim={preset}")
    model = parallel.wrap(config.model, 256, 16)
    replicas = torch.distributed.group.WORLD if parallel.mode == "ddp" else None
    optimizers = routing.build_from_config(unwrap(model), asdict(config.optim), replicas)
    losses = []
    for step in range(3):
        tokens = torch.randint(256, (2, 17), generator=torch.Generator().manual_seed(10 * step + parallel.rank))
        batch = tokens[:, :-1], tokens[:, 1:]
        if warm and step != 1:
            random, before = torch.get_rng_state(), everything(unwrap(model), optimizers)
            warm_up(model, optimizers, parallel, [batch])
            same(before, everything(unwrap(model), optimizers))
            assert torch.equal(random, torch.get_rng_state())
            assert all(p.grad is None for p in model.parameters()) and model.training
        with parallel.accumulate(model, last=True):
            loss = model(*batch) / 32
            loss.backward()
        losses.append(loss.item())
        optimizers.step()
        optimizers.zero_grad()
    return losses


def in_every_arrangement(rank, world_size):
    register()
    for mode in ("ddp", "fsdp"):
        parallel = setup(ParallelConfig(mode=mode), dtype="float32", seed=3)
        for preset in PRESETS if "NANOMUON_SOAK" in os.environ else ("adamw", "muon", "shampoo", "schedule_free"):
            cold, warm = (trained(parallel, preset, warm) for warm in (False, True))
            assert cold == warm and cold[0] != cold[2], f"{mode} {preset}"
        parallel.close()


@pytest.mark.slow
def test_nothing_stays_of_the_step_where_ranks_share_the_work(tmp_path):
    run_workers(in_every_arrangement, 2, tmp_path)
