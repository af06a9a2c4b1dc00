"""What CONTRIBUTING.md shows is what a stranger needs: its files, and no others, in a copy of the checkout."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest

from tests.distributed import programs
from tests.runs import ROOT

PAGE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
SECTION = re.compile(r"^## ([^\n:]+): (\d) files?\n(.*?)(?=^## )", re.M | re.S)
SECTIONS = {title: (int(count), text) for title, count, text in SECTION.findall(PAGE)}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
SECONDS = ["train.steps=2", "train.seq_len=16", "train.batch_tokens=64", "eval.every=1", "eval.tokens=64",
           "logger=jsonl", "logger.every=1", "run.dir=run"]  # fmt: skip
SMALL = ["model.n_layer=1", "model.n_embd=16", "model.n_head=2"]


def blocks(title: str, *kinds: str) -> list[str]:
    return [body for kind, body in FENCE.findall(SECTIONS[title][1]) if kind in kinds]


def write_files(title: str, tree: Path) -> list[str]:
    """The section's files, each named in the first line of its block; new ones, or the changed lines of one."""
    names = []
    for body in blocks(title, "python", "yaml", "diff"):
        name = body[2 : body.index("\n")]
        path = tree / name
        changed = [line for line in body.splitlines() if line[0:1] in ("-", "+")]
        if path.exists():
            before = path.read_text(encoding="utf-8")
            old, new = ("".join(f"{line[1:]}\n" for line in changed if line[0] == sign) for sign in "-+")
            assert before.count(old) == 1, f"{name} has no such lines any more:\n{old}"
            path.write_text(before.replace(old, new), encoding="utf-8")
        else:
            path.write_text(body, encoding="utf-8")
        names.append(name)
    return names


def command_lines(title: str) -> list[list[str]]:
    return [line.split()[1:] for body in blocks(title, "") for line in body.splitlines()]


def contents(tree: Path) -> dict[str, bytes]:
    files = (path for path in tree.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {str(path.relative_to(tree)): path.read_bytes() for path in files}


@pytest.fixture
def checkout(tmp_path) -> Path:
    """A copy of what a run needs."""
    tree = tmp_path / "checkout"
    for name in ("trainer", "optim", "data", "configs"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    (tree / "scripts").mkdir()
    for name in ("train.py", "common.py", "README.md", "scripts/prepare_data.py"):
        shutil.copy(ROOT / name, tree / name)
    return tree


def run(script: Path, words: list[str], tree: Path) -> str:
    environment = {**os.environ, "PYTHONPATH": "", "NANOMUON_DATA": str(tree.parent / "data")}
    done = programs.run(script, *words, cwd=tree, environment=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_page_has_every_way():
    ways = ["An elementwise optimizer", "A rule on whole matrices", "A model", "A family of models",
            "A source of text", "A metric"]  # fmt: skip
    assert list(SECTIONS) == ways
    table = dict(re.findall(r"^\| \[(.+?)\]\(.*?\) \| (\d) \|$", PAGE, re.M))
    assert [int(count) for count in table.values()] == [count for count, _ in SECTIONS.values()]


@pytest.mark.parametrize("title", SECTIONS)
def test_files_are_as_many_as_the_heading_says(title, checkout):
    before = contents(checkout)
    names = write_files(title, checkout)
    after = contents(checkout)
    assert len(names) == SECTIONS[title][0]
    assert {name for name in after if after[name] != before.get(name)} == set(names) and before.keys() <= after.keys()


@pytest.mark.slow
@pytest.mark.parametrize("title", SECTIONS)
def test_two_steps(title, checkout):
    write_files(title, checkout)
    for words in command_lines(title):
        program, *words = words
        if program == "train.py":
            words += SECONDS + SMALL * (title != "A model")
        printed = run(checkout / program, words, checkout)
    assert "step 2/2" in printed
    lines = [json.loads(line) for line in (checkout / "run/metrics.jsonl").read_text().splitlines()]
    losses = [line["val/loss"] for line in lines]
    assert len(losses) == 3 and losses[0] != losses[1] != losses[2]
    run_is = lines[0]["run"]
    if title == "An elementwise optimizer":
        assert "optim.softsign.SoftSign" in printed and run_is["optim"] == "softsign"
    if title == "A rule on whole matrices":
        assert "optim.columns.Columns" in printed and run_is["optim"] == "columns"
    if title == "A model":
        assert run_is["model"] == "shifted"
    if title == "A family of models":
        config = (checkout / "run/config.yaml").read_text()
        assert (run_is["model"], run_is["optim"]) == ("deep_tiny", "muon_deep")
        assert re.search(r"matrix:\n    _target_: optim.Muon\n    lr: 0.005\n    scale: keller\n", config)
    if title == "A source of text":
        assert run_is["data"] == "paragraphs-byte"
    if title == "A metric":
        run(ROOT / "scripts/compare.py", ["run", "--out", "page"], checkout)
        assert "val/bits_per_token" in (checkout / "page.html").read_text(encoding="utf-8")
        assert all(line["val/bits_per_token"] == pytest.approx(line["val/loss"] / 0.693147, 1e-5) for line in lines)
