"""The notebooks run as they are, from an empty namespace; they are kept without output.

Their code cells run here in this process. A kernel of its own would start Python and torch anew for each of them, which
takes longer than the cells, and would show nothing more: they use no magic and no widget.
"""

import json
import os
import sys
from pathlib import Path

import matplotlib
import pytest
import torch

from scripts.lecture.topics import TOPICS

ROOT = Path(__file__).resolve().parents[2]


def cells(topic: str) -> list[dict]:
    return json.loads((ROOT / f"docs/lecture/{topic}.ipynb").read_text(encoding="utf-8"))["cells"]


@pytest.mark.parametrize("topic", TOPICS)
def test_notebook(topic, monkeypatch):
    monkeypatch.chdir(ROOT / "docs" / "lecture")  # where Jupyter starts it
    monkeypatch.setattr(sys, "path", list(sys.path))
    matplotlib.use("Agg")
    torch.manual_seed(0)
    names: dict = {"__name__": "__main__"}
    for number, cell in enumerate(cells(topic)):
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"{topic}.ipynb, cell {number}", "exec"), names)
    assert Path(os.getcwd()) == ROOT
    matplotlib.pyplot.close("all")


@pytest.mark.parametrize("topic", TOPICS)
def test_a_notebook_is_kept_small_and_without_output(topic):
    kept = cells(topic)
    code = [cell for cell in kept if cell["cell_type"] == "code"]
    assert 8 <= len(kept) <= 15 and len({cell["id"] for cell in kept}) == len(kept)
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
    assert "pip install" in "".join(kept[0]["source"]) and f"]({topic}.md)" in "".join(kept[0]["source"])
