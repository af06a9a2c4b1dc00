"""Programs in forks: processes of their own, with exit codes and output, that need not import torch and others anew.

    done = train("experiment=smoke", ranks=2, cwd=tmp_path)             # as tests.runs.train, without torchrun itself
    done = run(copy / "scripts/prepare_data.py", "data=mine", cwd=copy)     # with that copy's modules
"""

import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from tests.distributed.forks import Ranks
from tests.runs import ROOT


def train(*overrides: str, ranks: int = 0, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """train.py in the folder ``cwd``; with torchrun's environment if ``ranks`` is above 0."""
    return run(ROOT / "train.py", *overrides, ranks=ranks, cwd=cwd)


def run(
    script: Path, *words: str, ranks: int = 0, cwd: Path = ROOT, environment: Mapping[str, str] = os.environ
) -> subprocess.CompletedProcess[str]:
    """What all ranks print is in one text; the exit code is the largest."""
    request = {"script": str(script), "words": words, "cwd": str(cwd), "environment": dict(environment)}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        job = Ranks(__name__, request, max(ranks, 1), out, launched=ranks > 0)
        code = max(map(abs, job.wait(timeout=400)))
        printed, errors = ("".join(path.read_text() for path in out.glob(names)) for names in ("[0-9]", "*.error"))
    return subprocess.CompletedProcess([str(script), *words], code, printed, errors)


def prepare(request: dict) -> None:
    """Nothing that forks could share."""


def child(request: dict, prepared: None) -> int:
    """In the fork, which forgets what the server has imported of the checkout."""
    os.dup2(os.open(f"{request['fork']['log']}.error", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), 2)
    os.environ.update(request["environment"])
    os.chdir(request["cwd"])
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None) or ""
        if file.startswith(f"{ROOT}/") and "site-packages" not in file and not name.startswith(("tests.", "__main__")):
            del sys.modules[name]
    sys.path[:] = [str(Path(request["script"]).parent), *(path for path in sys.path if path not in ("", str(ROOT)))]
    sys.argv = [request["script"], *request["words"]]
    try:
        runpy.run_path(request["script"], run_name="__main__")
    except SystemExit as end:
        return end.code or 0
    return 0
