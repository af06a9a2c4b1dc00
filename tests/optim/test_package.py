"""The folder is a package that can be installed under another name: it needs torch alone and never names itself."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import optim

FOLDER = Path(optim.__file__).parent
ALLOWED = set(sys.stdlib_module_names) | {"torch"}
USE = """
import sys, torch, nanomuon
from nanomuon.routing import build_from_config
model = torch.nn.Linear(4, 3)
config = {"matrix": {"_target_": "nanomuon.Muon"}, "scalar": {"_target_": "nanomuon.Lion"}}
optimizers = build_from_config(model, config)
model(torch.ones(4)).sum().backward()
optimizers.step()
print([row["optimizer"] for row in optimizers.table()], "optim" in sys.modules, nanomuon.__version__)
"""


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name.split(".")[0] for name in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module.split(".")[0]


def test_nothing_is_imported_but_torch_and_the_standard_library():
    for path in FOLDER.glob("*.py"):
        assert set(imports(path)) <= ALLOWED, path.name


def test_it_works_under_the_name_that_it_is_installed_by(tmp_path):
    (tmp_path / "nanomuon").symlink_to(FOLDER)
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "PYTHONSAFEPATH": "1"}
    result = subprocess.run([sys.executable, "-c", USE], capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert result.stdout.strip() == f"['nanomuon.Muon', 'nanomuon.Lion'] False {optim.__version__}", result.stderr


def test_types_are_published_and_files_are_short():
    assert (FOLDER / "py.typed").exists()
    assert all(len(path.read_text().splitlines()) <= 300 for path in FOLDER.glob("*.py"))
