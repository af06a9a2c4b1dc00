"""The pages: every slide and method can be traced, and what is committed is what the code would write."""

import re
import shutil
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
    assert sum(len(names) for names in TOPICS.values()) == len(TOPIC_OF)


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


def test_the_maps_of_slides_and_methods_are_up_to_date():
    for path, text in pages.maps(DOCS).items():
        assert path.read_text(encoding="utf-8") == text, path.name


@pytest.mark.parametrize("name", TOPIC_OF)
def test_the_page_shows_the_experiment(name):
    section = pages.sections(DOCS / f"{TOPIC_OF[name]}.md")[name]
    images = re.findall(r"\((figures/[^)]+)\)", section)
    assert f"figures/{name}.png" in images and f"<!-- {name} -->" in section
    assert (f"figures/{name}.gif" in images) == hasattr(load(name), "animate")
    assert all(1000 < (DOCS / image).stat().st_size < 600_000 for image in images)


def test_formulas_are_shielded_from_markdown():
    """GitHub takes a plain dollar's underscores and asterisks for its own markup."""
    for page in [DOCS / "README.md", *(DOCS / f"{topic}.md" for topic in TOPICS)]:
        prose = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
        assert "$" not in re.sub(r"\$`[^`\n]+`\$|`[^`\n]+`", "", prose), page.name


def test_a_place_is_filled_again_and_the_rest_stays(tmp_path):
    page = tmp_path / "adaptive.md"
    page.write_text("before\n\n<!-- rmsprop -->\n<!-- /rmsprop -->\n\nafter\n")
    for value in (1.0, 2.0):
        pages.write_checks(tmp_path, "rmsprop", [Check("the |measured| thing", value, low=0)])
    start, row, end = (
        "before\n\n<!-- rmsprop -->\n\n",
        "| the \\|measured\\| thing | 2 | at least 0 |",
        "<!-- /rmsprop -->",
    )
    assert page.read_text() == f"{start}| measured | value | required |\n|---|---|---|\n{row}\n\n{end}\n\nafter\n"
    with pytest.raises(ValueError, match="adaptive.md has no place <!-- adagrad -->"):
        pages.write_checks(tmp_path, "adagrad", [])


def test_a_number_that_is_none_does_not_hold():
    assert not Check("x", float("nan"), low=0).holds
    assert Check("x", 1.0, 1.0, 1.0).holds
    assert not Check("x", 1.1, high=1.0).holds


@pytest.mark.slow
def test_the_program_writes_one_experiment_and_refuses_another(tmp_path):
    def run(*words):
        command = [sys.executable, "scripts/lecture/run.py", *words]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)

    for page in DOCS.glob("*.md"):
        shutil.copy(page, tmp_path)
    done = run("figure=epsilon", f"docs={tmp_path}")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "figures" / "epsilon.png").read_bytes() == (DOCS / "figures" / "epsilon.png").read_bytes()
    assert all((tmp_path / page.name).read_text() == page.read_text() for page in DOCS.glob("*.md"))
    wrong = run("figure=nothing", f"docs={tmp_path}")
    assert wrong.returncode == 1
    check_names(wrong.stderr, "error: ", "figure=nothing", "choose all", "sgd")
