"""Every configs/optim/*.yaml builds, trains and is documented."""

from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from optim.routing import ROLES, build
from trainer.config import by_family

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = {path.stem: OmegaConf.to_container(OmegaConf.load(path)) for path in (ROOT / "configs/optim").glob("*.yaml")}
FAMILIES = {OmegaConf.load(path).get("family") for path in (ROOT / "configs/model").glob("*.yaml")} - {None}
ISSUED = (
    "sgd sgd_momentum nesterov adagrad adagrad_inside rmsprop rmsprop_inside adadelta adam amsgrad adamw lion signum"
)
ISSUED += " muon torch_muon normuon scion scion_unconstrained steepest shampoo soap"


class Language(nn.Module):
    """Next-token prediction with every role in it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.wte = nn.Embedding(12, 8)
        self.body = nn.Sequential(nn.Linear(8, 16, bias=False), nn.ReLU(), nn.Linear(16, 8))
        self.norm = nn.LayerNorm(8)
        self.lm_head = nn.Linear(8, 12, bias=False)

    def loss(self):
        tokens = torch.arange(12)
        x = self.wte(tokens)
        return nn.functional.cross_entropy(self.lm_head(self.norm(x + self.body(x))), tokens.roll(-1))


def test_all_names_exist():
    assert set(CONFIGS) == set(ISSUED.split())


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_trains(name):
    """The loss of a toy falls with the settings of ``tiny``, and the config names itself."""
    assert CONFIGS[name]["name"] == name
    model = Language()
    optimizers = build(model, {role: by_family(CONFIGS[name][role], "tiny", role) for role in ROLES})
    first = model.loss().item()
    for _ in range(15):
        optimizers.zero_grad()
        model.loss().backward()
        optimizers.step()
    assert model.loss().item() < first - 0.05


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_builds_for_every_family(name, family):
    optimizers = build(Language(), {role: by_family(CONFIGS[name][role], family, role) for role in ROLES})
    assert set(optimizers.members) == set(ROLES)
    for member in optimizers.members.values():
        assert isinstance(member.param_groups[0]["lr"], float)


def test_documented():
    table = (ROOT / "docs/optimizers.md").read_text()
    missing = [name for name in CONFIGS if f"\n| `{name}` |" not in table]
    assert not missing, f"docs/optimizers.md has no row for {missing}"
