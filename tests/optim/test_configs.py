"""Every configs/optim/*.yaml composes to the settings it is known for, builds, trains and is documented."""

import json
from functools import cache
from pathlib import Path

import hydra
import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from optim.routing import ROLES, build_from_config
from trainer.config import by_family, register

ROOT = Path(__file__).resolve().parents[2]
MODELS = [OmegaConf.load(path) for path in (ROOT / "configs/model").glob("*.yaml")]
FAMILIES = {model.get("family") for model in MODELS if not model.get("presets")} - {None}  # others take these values
NAMES = sorted(path.stem for path in (ROOT / "configs/optim").glob("*.yaml"))


@cache
def composed(name):
    """What ``optim=name`` gives every family, as Hydra merges it."""
    register()
    with hydra.initialize_config_dir(str(ROOT / "configs"), job_name="train", version_base="1.3"):
        return OmegaConf.to_container(hydra.compose("train", overrides=[f"optim={name}"]).optim, resolve=True)


def settings(name, family):
    return {role: by_family(composed(name)[role], family, role) for role in ROLES}


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


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_settings_are_these(family):
    """A value in a shared file changes several optimizers: presets.jsonl says what each, by its name, is to have."""
    lines = map(json.loads, (Path(__file__).parent / "data/presets.jsonl").read_text().splitlines())
    expected = {line["optim"]: {role: line[role] for role in ROLES} for line in lines if line["family"] == family}
    assert expected == {name: settings(name, family) for name in expected}
    assert {"sgd", "adamw", "muon", "soap"} <= set(expected)


@pytest.mark.parametrize("name", NAMES)
def test_trains(name):
    """The loss of a toy falls with the settings of ``tiny``, and the config names itself."""
    assert composed(name)["name"] == name
    model = Language()
    optimizers = build_from_config(model, settings(name, "tiny"))
    first = model.loss().item()
    for _ in range(15):
        optimizers.zero_grad()
        model.loss().backward()
        optimizers.step()
    assert model.loss().item() < first - 0.05


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("name", NAMES)
def test_builds_for_every_family(name, family):
    optimizers = build_from_config(Language(), settings(name, family))
    assert set(optimizers.members) == set(ROLES)
    for member in optimizers.members.values():
        assert isinstance(member.param_groups[0]["lr"], float)


def test_documented():
    table = (ROOT / "docs/optimizers.md").read_text()
    missing = [name for name in NAMES if f"\n| `{name}` |" not in table]
    assert not missing, f"docs/optimizers.md has no row for {missing}"
