"""The wheel holds nanomuon and nothing else, and works beside a user's own packages optim and data."""

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from email import message_from_string
from pathlib import Path
from zipfile import ZipFile

import pytest

import optim

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[1]
USER = """
import sys
import torch
import data, optim, nanomuon
from nanomuon import SOAP, Muon, NorMuon, Scion, Shampoo

assert optim.MINE and data.MINE, "the user's own packages come first"
assert nanomuon.__file__.startswith(sys.argv[1]), nanomuon.__file__
torch.manual_seed(0)
for rule in (Muon, NorMuon, Shampoo, SOAP, Scion):
    layer = torch.nn.Linear(6, 8, bias=False)
    inputs, targets = torch.randn(32, 6), torch.randn(32, 8)
    optimizer = rule(layer.parameters(), lr=0.01)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = (layer(inputs) - targets).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0], (rule, losses)
    print(rule.__name__, rule.__module__)
"""


def run(*command: str | Path, cwd: Path, path: Path) -> str:
    environment = {**os.environ, "PYTHONPATH": str(path), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, *map(str, command)]
    done = subprocess.run(words, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Iterator[ZipFile]:
    """Built from a copy, so that no earlier build is in it, and where importing torch fails."""
    folder = tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT / "optim", folder / "source/optim", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "source")
    (folder / "poison").mkdir()
    (folder / "poison/torch.py").write_text("raise ImportError('a build needs no torch')\n")
    isolation = ["--no-build-isolation"] if importlib.util.find_spec("setuptools") else []
    run("-m", "pip", "wheel", ".", "--no-deps", *isolation, "--quiet", "--wheel-dir", folder, cwd=folder / "source",
        path=folder / "poison")  # fmt: skip
    with ZipFile(next(folder.glob("*.whl"))) as opened:
        yield opened


def test_wheel_holds_nanomuon_alone(wheel):
    information = f"nanomuon-{optim.__version__}.dist-info"
    assert {name.partition("/")[0] for name in wheel.namelist()} == {"nanomuon", information}
    modules = {path.name for path in (ROOT / "optim").glob("*.py")} | {"py.typed"}
    assert {name.partition("/")[2] for name in wheel.namelist() if name.startswith("nanomuon/")} == modules
    metadata = message_from_string(wheel.read(f"{information}/METADATA").decode())
    needed = [line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]
    assert [line.partition(">")[0] for line in needed] == ["torch"]


def test_works_beside_packages_of_the_same_names(wheel, tmp_path):
    site, project = tmp_path / "site", tmp_path / "project"
    wheel.extractall(site)
    for name in ("optim", "data"):
        (project / name).mkdir(parents=True)
        (project / name / "__init__.py").write_text("MINE = True\n")
    printed = run("-c", USER, str(site), cwd=project, path=site)
    assert [line.split()[0] for line in printed.splitlines()] == ["Muon", "NorMuon", "Shampoo", "SOAP", "Scion"]
    assert all(line.split()[1].startswith("nanomuon.") for line in printed.splitlines())
