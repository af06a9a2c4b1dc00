"""scripts/compare.py as its user meets it: the committed table, the files, the mistakes."""

import csv
import importlib
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.errors import check_names
from tests.scripts.compare_runs import lines, write_run
from tests.wandb_files import read_offline_run

# As a program, and without torch, whose import takes longer than all the rest.
PROGRAM = """import runpy, sys
sys.path.insert(0, "scripts")
try:
    runpy.run_path("scripts/compare.py", run_name="__main__")
finally:
    assert "torch" not in sys.modules, "it has imported torch"
"""
ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "tests" / "scripts" / "data"


@pytest.fixture
def run_in(monkeypatch, capsys):
    """compare.py as a program in a folder, without the seconds that a new interpreter takes: (exit status, stderr)."""
    monkeypatch.syspath_prepend(ROOT / "scripts")
    compare = importlib.import_module("compare")

    def run(folder: Path, *arguments: object) -> tuple[int, str]:
        monkeypatch.chdir(folder)
        try:
            status = compare.main([str(argument) for argument in arguments])
        except SystemExit as stop:
            status = stop.code
        return status, capsys.readouterr().err

    return run


@pytest.fixture(scope="module")
def example(tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess]:
    out = tmp_path_factory.mktemp("out") / "deep" / "example"
    command = ["-c", PROGRAM, "tests/scripts/data/example", "--baseline", "adamw", "--out", str(out)]
    ran = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    return out, ran


@pytest.mark.parametrize("suffix", ["md", "csv"])
def test_committed_records_give_the_committed_table(example, suffix):
    out, _ = example
    assert Path(f"{out}.{suffix}").read_text() == (DATA / f"example.{suffix}").read_text()


def test_the_committed_table_is_what_the_records_say():
    """Muon's and AdamW's costs by hand from the records' numbers: the committed file must not be its own proof."""
    rows = {row["optimizer"]: row for row in csv.DictReader(io.StringIO((DATA / "example.csv").read_text()))}
    muon = [200 + 100 * 0.10 / 0.20, 200 + 100 * 0.12 / 0.21, 200 + 100 * 0.11 / 0.22]
    adamw = [300 + 100 * 0.15 / 0.20, 300 + 100 * 0.20 / 0.22, 300 + 100 * 0.17 / 0.21]
    for name, steps, milliseconds in (("muon", muon, (48, 49, 48.5)), ("adamw", adamw, (40, 41, 40.5))):
        seconds = [step * ms / 1000 for step, ms in zip(steps, milliseconds, strict=True)]
        assert float(rows[name]["steps_interpolated"]) == pytest.approx(sum(steps) / 3, rel=1e-9)
        assert float(rows[name]["seconds_interpolated"]) == pytest.approx(sum(seconds) / 3, rel=1e-9)
        assert float(rows[name]["tokens_interpolated"]) == pytest.approx(4096 * sum(steps) / 3, rel=1e-9)
    assert (rows["muon"]["steps_first"], rows["adamw"]["steps_first"]) == ("300", "400")
    assert rows["muon"]["n"] == "3" and rows["muon"]["set_aside"] == "3"


def test_faults_are_reported_by_file_and_line(example):
    _, ran = example
    for expected in (
        "muon-torn/metrics.jsonl:5: not valid JSON",
        "muon-2/metrics.jsonl:12: last line cut short",
        "muon-2/metrics.jsonl:8: goes back from step 300 to 250",
        "muon-3/metrics.jsonl:4: empty line",
        "set aside: muon-stopped: stopped early, at step 300 of 500",
        "set aside: muon-notarget: no target",
        "set aside: muon-small: model is micro, the others' tiny",
        "set aside: scion-2: diverged",
    ):
        assert expected in ran.stderr


def test_page_is_whole_and_asks_for_nothing(example):
    page = Path(f"{example[0]}.html").read_text()
    assert "default-src 'none'" in page and "Plotly" in page
    outside_scripts = re.sub(r"<script.*?</script>", "", page, flags=re.S)
    assert not re.search(r"(?:src|href)\s*=|https?://|@import|url\(", outside_scripts)
    assert "252.4 ± 2.4" in outside_scripts and "Reaches 3.95 in 34% fewer steps than adamw" in outside_scripts
    assert str(ROOT) not in page and str(Path.home()) not in page


def test_picture_is_a_png_of_the_promised_size(example):
    raw = Path(f"{example[0]}.png").read_bytes()
    assert raw[:8] == b"\x89PNG\r\n\x1a\n"
    assert (int.from_bytes(raw[16:20]), int.from_bytes(raw[20:24])) == (2000, 900)


def test_same_records_give_the_same_files(example, tmp_path, run_in):
    assert run_in(tmp_path, DATA / "example", "--baseline", "adamw", "--out", "x")[0] == 0
    for suffix in ("html", "csv", "md", "png"):
        assert (tmp_path / f"x.{suffix}").read_bytes() == Path(f"{example[0]}.{suffix}").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.csv", "x.html", "x.md", "x.png"]


def test_text_from_records_stays_text(tmp_path, run_in):
    hostile = "</script><img src=x onerror=alert(1)>|"
    write_run(tmp_path / "runs" / "a", lines(name=hostile, optim=hostile, data="<b>"))
    assert run_in(tmp_path, "runs", "--out", "x")[0] == 0
    page = (tmp_path / "x.html").read_text()
    assert "<img" not in page.replace("\\u003c", "") and "<b>" not in re.sub(
        r"<script.*?</script>", "", page, flags=re.S
    )
    assert all("<" not in line for line in (tmp_path / "x.md").read_text().splitlines())


def test_published_figures_are_laid_under_and_labelled(tmp_path, run_in):
    write_run(tmp_path / "runs" / "a", lines(data="fineweb"))
    assert run_in(tmp_path, "runs", "--out", "x", "--published")[0] == 0
    page = (tmp_path / "x.html").read_text()
    data = json.loads(re.search(r'<script id="data" type="application/json">(.*?)</script>', page, re.S)[1])
    entry = next(entry for entry in data["published"] if "tuned Muon" in entry["name"])
    assert (entry["steps"][-1], entry["loss"][-1]) == (3250, 3.2772) and entry["tokens"][-1] == 3250 * 524288
    assert all(entry["source"] for entry in data["published"]) and "published figures for GPT-2 124M" in page
    assert "the two cannot be compared" not in page


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere"], ["nowhere", "no such file"]),
        (["empty"], ["empty", "no metrics.jsonl"]),
        (["runs", "--baseline", "b"], ["--baseline b", "groups here: a"]),
        (["runs", "--target", "low"], ["--target", "'low'", "positive"]),
        (["runs", "--target", "nan"], ["--target", "'nan'", "positive"]),
        (["runs", "--loss-per-step", "1e-5"], ["--loss-per-step", "--sigma"]),
        (["runs", "--out", "runs"], ["--out runs", "folder"]),
        (["runs", "--out", "file/x"], ["--out file/x", "write"]),
        (["blank"], ["none of these records", "validation loss"]),
        ([], ["required", "RUN"]),
    ],
)
def test_mistakes_give_one_line_and_no_files(tmp_path, run_in, arguments, words):
    write_run(tmp_path / "runs" / "a", lines())
    write_run(tmp_path / "blank", b"")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    status, said = run_in(tmp_path, *arguments)
    errors = [line for line in said.splitlines() if not line.startswith("warning:")]
    assert status == 1 and len(errors) == 1
    check_names(errors[0], "error: ", *words)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["blank", "empty", "file", "runs"]


def test_unfinished_runs_can_be_watched(tmp_path, run_in):
    write_run(tmp_path / "runs" / "a", lines(steps=1000))
    status, said = run_in(tmp_path, "runs", "--out", "x")
    assert status == 0 and "stopped early, at step 300 of 1000" in said
    assert "None of these runs can be compared yet" in (tmp_path / "x.html").read_text()


def test_the_four_files_become_an_artifact(tmp_path, run_in, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    write_run(tmp_path / "runs" / "a", lines())
    assert run_in(tmp_path, "runs", "--out", "deep/page", "--wandb", "mine")[0] == 0
    (path,) = tmp_path.glob("deep/wandb/offline-run-*/run-*.wandb")
    entries = read_offline_run(path)
    (run,) = [entry.run for entry in entries if entry.HasField("run")]
    assert (run.project, run.job_type, run.display_name) == ("mine", "comparison", "page")
    (artifact,) = [
        entry.artifact for entry in entries if entry.HasField("artifact") and entry.artifact.type == "comparison"
    ]
    assert artifact.name == "page"
    assert sorted(file.path for file in artifact.manifest.contents) == ["page.csv", "page.html", "page.md", "page.png"]
