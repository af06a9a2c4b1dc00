"""What the documents name exists: links, anchors, files, programs, and the keys of every command shown."""

import re
import shlex
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

import optim
from trainer.launch import load_config

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES += sorted((ROOT / "docs" / "lecture").glob("*.md"))
FOLDERS = "trainer|optim|data|configs|scripts|tests|docs|examples"
# Files that a page tells the reader to write; CONTRIBUTING.md's are named in the first line of their blocks.
TO_WRITE = {"optim/normalised.py", "configs/optim/mine.yaml", "configs/data/squares.yaml", "data/squares.yaml"}
FENCE = re.compile(r"^```\w*\n(.*?)^```$", re.M | re.S)
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def code(page: Path) -> list[str]:
    """The lines of the page's code blocks, continued ones joined, and what stands between backticks."""
    text = page.read_text(encoding="utf-8")
    lines = "".join(FENCE.findall(text)).replace("\\\n", " ").splitlines()
    return lines + re.findall(r"`([^`\n]+)`", FENCE.sub("", text))


def anchors(page: Path) -> set[str]:
    text = page.read_text(encoding="utf-8")
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", text), re.M)
    slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    return slugs | set(re.findall(r'(?:id|name)="([^"]+)"', text))


@each_page
def test_links(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", page.read_text(encoding="utf-8"))):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


@each_page
def test_files(page):
    text = page.read_text(encoding="utf-8")
    named = set(re.findall(rf"(?<![\w./-])((?:\.\./)?(?:{FOLDERS})/[\w./-]*\w)", text))
    named |= {word for word in re.findall(r"`([\w.-]+\.(?:md|cff|toml|txt))`", text) if word[0].isupper()}
    written = TO_WRITE | set(re.findall(r"^```\w+\n# (\S+)$", text, re.M))
    files = {name for name in named - written if re.search(r"\.\w+$", name)}  # `optim/<role>/<key>` is none
    assert not {name for name in files if not any((folder / name).exists() for folder in (ROOT, page.parent))}


@each_page
def test_programs(page):
    for line in code(page):
        for program in re.findall(r"(?:python|torchrun)\b[^|`]*?([\w./-]+\.py)\b", line):
            assert (ROOT / program).exists(), line


def commands(page: Path) -> set[tuple[int, tuple[str, ...]]]:
    """(number of processes, overrides) of the runs of train.py that a page shows; of a sweep, each value once."""
    found = set()
    for line in code(page) if page.name != "CONTRIBUTING.md" else ():  # tests/test_contributing.py runs them
        start = re.match(r"(?:\$ )?(?:\w+=\S+ )*(?:torchrun --nproc-per-node (\w+)|python) train\.py ?(.*)", line)
        if not start:
            continue
        processes = int(start[1]) if (start[1] or "").isdigit() else 2 if start[1] else 1
        words = [word for word in shlex.split(start[2], comments=True) if "=" in word and "…" not in word]
        none = r"=[A-Z]+$|hydra|run\.processes|^plan[.=]"
        words = [word for word in words if not re.search(none, word) or "dir=" in word]
        if any(f"configs/{word.replace('=', '/')}.yaml" in TO_WRITE for word in words):
            continue
        parts = [(word.partition("=")[0], split(word.partition("=")[2])) for word in words]
        plain = [f"{key}={values[0]}" for key, values in parts]
        found.add((processes, tuple(plain)))
        for i, (key, values) in enumerate(parts):
            found |= {(processes, (*plain[:i], f"{key}={value}", *plain[i + 1 :])) for value in values[1:]}
    return found


def split(value: str) -> list[str]:
    return re.findall(r"(?:\[[^\]]*\]|[^,\[])+", value) or [value]


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)], ids=lambda page: page.name)
def test_commands_compose(page):
    for processes, overrides in sorted(commands(page)):
        load_config(overrides, world_size=processes)


def test_the_readme_shows_commands():
    assert len(commands(ROOT / "README.md")) > 15


def test_the_core_of_the_example_is_that_of_the_example():
    example = {line.strip() for line in (ROOT / "examples/minimal.py").read_text().splitlines()}
    (core,) = [block for block in FENCE.findall((ROOT / "README.md").read_text()) if "(BATCH,)" in block]
    assert {line.strip() for line in core.splitlines()} - example <= {"…"}


def test_muon_in_your_own_code():
    (block,) = [block for block in FENCE.findall((ROOT / "README.md").read_text()) if "from nanomuon" in block]
    block = "\n".join(line for line in block.splitlines() if "process_group" not in line)
    model = nn.Module()
    model.blocks = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 4))
    weights = {"fused_qkv": nn.Parameter(torch.ones(6, 2)), "hf_conv1d": nn.Parameter(torch.ones(2, 3))}
    names = {"torch": torch, "model": model, **weights}
    exec(block.replace("nanomuon", "optim"), names)
    assert len(names["matrices"]) == 2 and isinstance(names["muon"], torch.optim.Optimizer)
    assert [row["role"] for row in names["both"].table()] == ["matrix", "scalar"]


def test_the_prompt_of_the_readme():
    (block,) = [block for block in FENCE.findall((ROOT / "README.md").read_text()) if "Trainer(config).run()" in block]
    names: dict = {}
    exec(block.replace("val_loss = Trainer(config).run()", ""), names)
    assert names["config"].train.steps == 100 and names["Trainer"].run


def test_every_page_is_in_the_index():
    linked = set(re.findall(r"\]\((\w+\.md)", (ROOT / "docs/README.md").read_text()))
    assert {page.name for page in (ROOT / "docs").glob("*.md")} - {"README.md"} <= linked


def test_citation():
    citation = OmegaConf.load(ROOT / "CITATION.cff")
    assert (citation.title, citation.license, citation.version) == ("nanoMuon", "MIT", optim.__version__)
    assert citation["cff-version"] == "1.2.0" and citation.message and citation.authors[0].name
