"""The pages: every slide and method can be traced, and what is committed is what the code would write."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.lecture import descend, pages
from scripts.lecture.experiment import TOPIC_OF, Check, load, source_of
from scripts.lecture.slides import METHODS, SLIDES
from scripts.lecture.topics import TOPICS
from tests.errors import check_names

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs" / "lecture"


def test_every_slide_leads_to_an_experiment_and_back():
    shown = {name for _, _, names in SLIDES for name in names}
    assert shown == set(TOPIC_OF)
    assert all((ROOT / source_of(name)).exists() for name in TOPIC_OF)
    assert sum(len(names) for _, _, names in TOPICS.values()) == len(TOPIC_OF)


@pytest.mark.parametrize(("method", "presets", "names"), METHODS)
def test_every_method_leads_to_a_preset_and_experiments(method, presets, names):
    assert all((descend.PRESETS / f"{preset}.yaml").exists() for preset in presets)
    assert names and all(set(presets) & set(load(name).METHODS) for name in names)


def test_every_preset_that_an_experiment_runs_is_in_the_index():
    listed = {preset for _, presets, _ in METHODS for preset in presets}
    named = {
        m for name in TOPIC_OF if name != "speedrun" for m in load(name).METHODS if not m.startswith("torch.optim.")
    }
    assert named == listed


def test_the_index_is_up_to_date():
    assert (DOCS / "README.md").read_text() == pages.index()


@pytest.mark.parametrize("name", TOPIC_OF)
def test_the_page_states_the_claim_of_the_code(name):
    page = (DOCS / f"{TOPIC_OF[name]}.md").read_text()
    section = next(part for part in pages.ANCHOR.split(page) if part.startswith(f'<a id="{name}">')).strip()
    rows = re.findall(r"^\| (.+) \| .+ \| .+ \|$", section, re.MULTILINE)[2:]
    assert rows and f"## {load(name).TITLE}\n" in section
    for text in (load(name).CLAIM, load(name).CORRECTION):
        assert pages.formulas(text).strip() in section
    for image in re.findall(r"\((figures/[^)]+)\)", section):
        assert 1000 < (DOCS / image).stat().st_size < 600_000
    assert all((ROOT / file).exists() for file in re.findall(r"\(\.\./\.\./([^)#]+)\)", section))


def test_a_section_is_replaced_in_its_place(tmp_path):
    for value in (1.0, 2.0):
        for name in ("rmsprop", "adagrad"):
            pages.write_section(tmp_path, name, [Check("the measured thing", value, low=0)])
    text = (tmp_path / "adaptive.md").read_text()
    assert text.index('id="adagrad"') < text.index('id="rmsprop"')
    assert text.count("| the measured thing | 2 | at least 0 |") == 2
    assert "| the measured thing | 1 |" not in text


def test_a_number_that_is_none_does_not_hold():
    assert not Check("x", float("nan"), low=0).holds
    assert Check("x", 1.0, 1.0, 1.0).holds
    assert not Check("x", 1.1, high=1.0).holds


@pytest.mark.slow
def test_the_program_writes_one_experiment_and_refuses_another(tmp_path):
    def run(*words):
        command = [sys.executable, "scripts/lecture/run.py", *words]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)

    done = run("figure=epsilon", f"docs={tmp_path}")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "figures" / "epsilon.png").read_bytes() == (DOCS / "figures" / "epsilon.png").read_bytes()
    wrong = run("figure=nothing", f"docs={tmp_path}")
    assert wrong.returncode == 1
    check_names(wrong.stderr, "error: ", "figure=nothing", "choose all", "sgd")
