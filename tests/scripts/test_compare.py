"""scripts/compare.py as its user meets it: the committed table, the flags, the files, the mistakes."""

import csv
import importlib
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.speedrun import groups, records, statistics, table
from scripts.speedrun.claims import claims
from scripts.speedrun.style import BACKGROUND, DARK, LIGHT, looks

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "tests" / "scripts" / "data"
HEADER = {"name": "a-1", "optim": "a", "model": "tiny", "data": "sample", "seed": 1, "target": 3.0, "steps": 300,
          "batch_tokens": 1024, "device": "cpu"}  # fmt: skip


def lines(losses=(5.0, 4.0, 3.2, 2.9), seconds_per_step=0.1, **header) -> list[str]:
    found = [json.dumps({"run": {**HEADER, **header}})]
    for i, loss in enumerate(losses):
        clock = {"step": 100 * i, "tokens": 102400 * i, "train_time_s": 100 * i * seconds_per_step}
        found.append(json.dumps({**clock, "val/loss": loss}))
    return found


def read(folder: Path, content: list[str] | bytes) -> records.Run:
    folder.mkdir(parents=True, exist_ok=True)
    raw = content if isinstance(content, bytes) else ("\n".join(content) + "\n").encode()
    (folder / "metrics.jsonl").write_bytes(raw)
    return records.read_run(folder / "metrics.jsonl", "x/metrics.jsonl")


def runs(tmp_path: Path, optim: str, finals: list[float], **header) -> list[records.Run]:
    """One run per final loss; all are at 3.2 before it, so that the costs to the target 3 differ too."""
    return [
        read(tmp_path / f"{optim}-{seed}-{len(list(tmp_path.iterdir()))}",
             lines((5.0, 4.0, 3.2, final), optim=optim, seed=seed, **header))
        for seed, final in enumerate(finals, 1)
    ]  # fmt: skip


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
    command = ["scripts/compare.py", "tests/scripts/data/example", "--baseline", "adamw", "--out", str(out)]
    ran = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    return out, ran


# --- the committed example -------------------------------------------------------------------------------------------


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
    assert "/work/" not in outside_scripts and str(ROOT) not in page


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
    read(tmp_path / "runs" / "a", lines(name=hostile, optim=hostile, data="<b>"))
    assert run_in(tmp_path, "runs", "--out", "x")[0] == 0
    page = (tmp_path / "x.html").read_text()
    assert "<img" not in page.replace("\\u003c", "") and "<b>" not in re.sub(
        r"<script.*?</script>", "", page, flags=re.S
    )
    assert all("<" not in line for line in (tmp_path / "x.md").read_text().splitlines())


def test_published_figures_are_laid_under_and_labelled(tmp_path, run_in):
    read(tmp_path / "runs" / "a", lines(data="fineweb"))
    assert run_in(tmp_path, "runs", "--out", "x", "--published")[0] == 0
    page = (tmp_path / "x.html").read_text()
    data = json.loads(re.search(r'<script id="data" type="application/json">(.*?)</script>', page, re.S)[1])
    entry = next(entry for entry in data["published"] if "tuned Muon" in entry["name"])
    assert (entry["steps"][-1], entry["loss"][-1]) == (3250, 3.2772) and entry["tokens"][-1] == 3250 * 524288
    assert all(entry["source"] for entry in data["published"]) and "published figures for GPT-2 124M" in page
    assert "the two cannot be compared" not in page


# --- reading records -------------------------------------------------------------------------------------------------


def test_a_clean_record(tmp_path):
    run = read(tmp_path, [*lines()[:2], '{"event": "saved"}', '{"step": 50, "train/loss": 4.4}', *lines()[2:]])
    assert (run.faults, run.warnings) == ([], [])
    assert run.steps == [0, 100, 200, 300] and run.losses == [5.0, 4.0, 3.2, 2.9]
    assert run.seconds == [0, 10, 20, 30] and run.tokens[-1] == 307200


@pytest.mark.parametrize(
    ("edit", "line", "text"),
    [
        (lambda x: [*x[:2], x[2][:20], *x[3:]], 3, "not valid JSON"),
        (lambda x: [*x[:2], "[1, 2]", *x[2:]], 3, "list where an object"),
        (lambda x: [*x[:2], '{"loss": 1}', *x[2:]], 3, "neither step, run nor event"),
        (lambda x: [*x[:2], '{"step": "7"}', *x[2:]], 3, "step is '7'"),
        (lambda x: [*x[:2], '{"step": 1.5}', *x[2:]], 3, "step is 1.5"),
        (lambda x: [*x, '{"step": 400, "val/loss": 2, "tokens": 1e6}'], 6, "without a usable train_time_s"),
        (lambda x: [*x, '{"step": 400, "val/loss": "2", "tokens": 1e6, "train_time_s": 99}'], 6, "val/loss is '2'"),
        (lambda x: [*x, '{"step": 400, "val/loss": 2, "tokens": 1e6, "train_time_s": 3}'], 6, "falls from 30 to 3"),
        (lambda x: [*x, json.dumps({"run": {**HEADER, "seed": 2}})], 6, "second run in the same record: seed"),
        (lambda x: [json.dumps({"run": {**HEADER, "steps": "many"}}), *x[1:]], 1, "header steps is 'many'"),
        (lambda x: [json.dumps({"run": {**HEADER, "target": "low"}}), *x[1:]], 1, "header target is 'low'"),
        (lambda x: x[1:], None, "no header line"),
        (lambda x: [json.dumps({"run": {"optim": "a", "steps": 300}}), *x[1:]], None, "header lacks model, data, seed"),
        (lambda x: x[:1], None, "no validation loss"),
        (lambda x: b"", None, "no validation loss"),
        (lambda x: b"\xff\xfe\n" + "\n".join(x).encode() + b"\n", 1, "not valid JSON"),
    ],
)
def test_faults_flag_the_run_and_set_it_aside(tmp_path, edit, line, text):
    run = read(tmp_path / "bad", edit(lines()))
    assert any(number == line and text in said for number, said in run.faults), run.faults
    good = read(tmp_path / "good", lines(seed=9))
    comparison = groups.compare([run, good])
    assert [run for run, _ in comparison.aside] == [run]
    assert [group.runs for group in comparison.groups] == [[good]]


def test_torn_last_line_and_empty_lines_are_only_warnings(tmp_path):
    whole = "\n".join([*lines()[:3], "", *lines()[3:]]).encode() + b"\n"
    run = read(tmp_path, whole + b'{"step": 301, "tok')
    assert run.faults == [] and [line for line, _ in run.warnings] == [4, 7]
    assert run.steps == [0, 100, 200, 300]
    ended = read(tmp_path, whole + b'{"step": 301, "tok\n')  # with its newline it was written whole, and is broken
    assert [line for line, _ in ended.faults] == [7]


def test_a_last_line_without_newline_counts_if_it_is_whole(tmp_path):
    run = read(tmp_path, "\n".join(lines()).encode())
    assert run.steps[-1] == 300 and not run.faults and not run.warnings


def test_after_a_resume_the_later_lines_count(tmp_path):
    x = lines()
    before = json.dumps({"step": 300, "tokens": 307200, "train_time_s": 31, "val/loss": 9.9})
    again = [x[0], '{"event": "resumed"}', '{"step": 150, "train/loss": 4}', x[3], x[4]]
    run = read(tmp_path, [*x[:4], before, *again])
    assert run.losses == [5.0, 4.0, 3.2, 2.9] and not run.faults
    assert [line for line, _ in run.warnings] == [8]


def test_a_resumed_run_is_not_ahead_of_itself(tmp_path):
    """Killed after step 300, resumed from 200, now at 250: what it had measured at 300 is no longer its own."""
    run = read(tmp_path, [*lines(), '{"event": "resumed"}', '{"step": 250, "train/loss": 3}'])
    assert run.steps == [0, 100, 200] and run.last_step == 250
    assert groups.compare([run]).aside[0][1] == ["stopped early, at step 250 of 300"]


def test_records_are_found_once_and_named_without_the_machine(tmp_path):
    for name in ("sweep/b", "sweep/a/deeper"):
        read(tmp_path / name, lines())
    found = records.find_records([tmp_path / "sweep", tmp_path / "sweep/a/../b", tmp_path / "sweep/b/metrics.jsonl"])
    assert [place for _, place in found] == ["sweep/a/deeper/metrics.jsonl", "sweep/b/metrics.jsonl"]


# --- what may stand beside each other --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"target": None}, "no target"),
        ({"target": 3.5}, "target is 3.5, the others' 3"),
        ({"model": "big"}, "model is big, the others' tiny"),
        ({"data": "other"}, "data is other, the others' sample"),
        ({"batch_tokens": 2048}, "batch_tokens is 2,048, the others' 1,024"),
        ({"seq_len": 64}, "seq_len is 64, the others' unknown"),
        ({"steps": 301}, "stopped early, at step 300 of 301"),
        ({"seed": 1}, "seed 1 of a is there already"),
        ({"losses": (5.0, 4.0, float("nan"), 2.9)}, "diverged: the validation loss at step 200"),
        ({"losses": (5.0, 4.0, None, 2.9)}, "diverged: the validation loss at step 200"),
    ],
)
def test_what_differs_is_set_aside_not_mixed(tmp_path, change, reason):
    whole = runs(tmp_path, "a", [2.9, 2.8])
    odd = read(tmp_path / "odd", lines(**{"optim": "a", "seed": 3, **change}))
    comparison = groups.compare([*whole, odd])
    assert [run.seed for group in comparison.groups for run in group.runs] == [1, 2]
    assert len(comparison.aside) == 1 and reason in "; ".join(comparison.aside[0][1])


def test_end_without_evaluation_is_set_aside(tmp_path):
    run = read(tmp_path, [*lines()[:4], '{"step": 300, "tokens": 307200, "train_time_s": 30, "train/loss": 2.8}'])
    assert groups.compare([run]).aside[0][1] == ["not evaluated at its end: last at step 200 of 300"]


def test_the_baseline_decides_which_setting_is_compared(tmp_path):
    found = [*runs(tmp_path, "a", [2.9, 2.8, 2.7]), *runs(tmp_path, "b", [2.9], model="big")]
    assert groups.compare(found).setting["model"] == "tiny"
    assert groups.compare(found, baseline="b").setting["model"] == "big"
    with pytest.raises(groups.ComparisonError, match="groups here: a$"):
        groups.compare(found, baseline="c")


def test_a_target_on_the_command_line_replaces_the_recorded_ones(tmp_path):
    found = [*runs(tmp_path, "a", [2.9]), *runs(tmp_path, "b", [2.9], target=None)]
    assert len(groups.compare(found).aside) == 1
    comparison = groups.compare(found, target=3.5)
    assert comparison.target == 3.5 and comparison.aside == []


def test_different_lengths_are_different_groups(tmp_path):
    found = [*runs(tmp_path, "a", [2.9]), read(tmp_path / "long", lines((5, 4, 3, 2.9, 2.8), seed=2, steps=400))]
    assert [group.label for group in groups.compare(found).groups] == ["a (300 steps)", "a (400 steps)"]


def test_a_group_in_the_header_goes_before_the_optimizer(tmp_path):
    found = [*runs(tmp_path, "a", [2.9], group="g"), read(tmp_path / "b", lines(optim="b", seed=2, group="g"))]
    assert [(group.label, len(group.runs)) for group in groups.compare(found).groups] == [("g", 2)]


def test_the_mean_curve_uses_the_steps_that_all_seeds_share(tmp_path):
    dense = lines(seed=2)
    dense.insert(2, '{"step": 50, "tokens": 51200, "train_time_s": 6, "val/loss": 4.5}')
    curve = (
        groups.compare([read(tmp_path / "a", lines((7, 5, 3.4, 2.7))), read(tmp_path / "b", dense)]).groups[0].curve()
    )
    assert curve["steps"] == [0, 100, 200, 300]
    assert curve["loss"] == [6, 4.5, pytest.approx(3.3), pytest.approx(2.8)]
    assert (curve["low"], curve["high"]) == ([5, 4, 3.2, 2.7], [7, 5, 3.4, 2.9])


# --- what may be claimed ---------------------------------------------------------------------------------------------


def said(found: list[records.Run], label: str, sigma=None, loss_per_step=0.0, **options) -> list[tuple[bool, str]]:
    comparison = groups.compare(found, **options)
    rows = table.build(comparison, sigma, loss_per_step)
    return [(c.shown, c.text) for c in claims(comparison, rows, sigma, loss_per_step) if c.label == label]


def test_one_seed_claims_nothing(tmp_path):
    found = [*runs(tmp_path, "a", [2.7]), *runs(tmp_path, "b", [2.9])]
    sentences = said(found, "a", baseline="b")
    assert len(sentences) == 4 and not any(shown for shown, _ in sentences)
    assert "One seed says nothing about the next" in sentences[0][1]


def test_one_seed_may_pass_with_a_known_sigma(tmp_path):
    sentences = said(runs(tmp_path, "a", [2.995]), "a", sigma=0.0013)
    assert sentences == [(True, "Final loss below 3 if σ is 0.0013: z = 3.85 ≥ 3.08 (one-sided p < 0.0001), n = 1.")]


def test_a_seed_that_misses_the_target_leaves_its_cost_unknown(tmp_path):
    found = [*runs(tmp_path, "a", [2.7, 2.71, 3.1]), *runs(tmp_path, "b", [2.9, 2.91, 2.92])]
    comparison = groups.compare(found, baseline="b")
    row = next(row for row in table.build(comparison) if row.label == "a")
    assert row.reached == 2 and row.interpolated["steps"] is None and row.speedup["steps"] is None
    assert (False, "Speed-up over b: 2 of 3 seeds of a reached 3, so its cost to the target is not known.") in said(
        found, "a", baseline="b"
    )


def test_diverged_seeds_withhold_every_claim(tmp_path):
    found = [*runs(tmp_path, "a", [2.7, 2.71, float("nan")]), *runs(tmp_path, "b", [2.9, 2.91, 2.92])]
    text = "Nothing may be claimed: 1 of 3 seeds of a diverged, and the others do not stand for it."
    assert said(found, "a", baseline="b") == [(False, text)]
    assert (False, text) in said(found, "b", baseline="a")


def test_seconds_are_not_compared_between_devices(tmp_path):
    found = [*runs(tmp_path, "a", [2.7, 2.71], device="H100"), *runs(tmp_path, "b", [2.9, 2.91])]
    row = next(row for row in table.build(groups.compare(found, baseline="b")) if row.label == "a")
    assert row.speedup["seconds"] is None and row.speedup["steps"].low is not None
    assert (False, "Training time against b: the runs used different devices (H100, cpu).") in said(
        found, "a", baseline="b"
    )


def test_final_losses_of_different_lengths_need_a_price_of_a_step(tmp_path):
    short = [read(tmp_path / f"s{i}", lines((5, 4, 2.90 + i / 100), optim="a", seed=i, steps=200)) for i in (1, 2)]
    found = [*short, *runs(tmp_path, "b", [2.91, 2.92])]
    texts = [text for _, text in said(found, "a", baseline="b")]
    assert "Final loss against b: 200 and 300 steps of training are not the same budget." in texts
    assert not any("Welch" in text for text in texts)
    priced = [text for _, text in said(found, "a", 0.01, 4.5e-5, baseline="b")]
    assert any("Better than b if σ is 0.01: z = 0.45 <" in text for text in priced)


def test_seeds_without_spread_are_suspected_not_tested(tmp_path):
    found = [*runs(tmp_path, "a", [2.7, 2.7, 2.7]), *runs(tmp_path, "b", [2.9, 2.9, 2.9])]
    sentences = said(found, "a", baseline="b")
    assert not any(shown for shown, _ in sentences)
    assert "Does the seed reach the run?" in sentences[0][1]


def test_an_interval_that_holds_one_shows_nothing(tmp_path):
    found = [*runs(tmp_path, "a", [2.7, 2.9, 2.8]), *runs(tmp_path, "b", [2.71, 2.88, 2.8])]
    steps = next(s for s in said(found, "a", baseline="b") if "in steps" in s[1])
    assert not steps[0] and steps[1].endswith("the interval contains 1.")


# --- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere"], "nowhere: no such file or directory"),
        (["empty"], "empty: no metrics.jsonl in it or below it"),
        (["runs", "--baseline", "b"], "--baseline b: no group of that name has a comparable run; groups here: a"),
        (["runs", "--target", "low"], "argument --target: 'low' is not a positive number"),
        (["runs", "--target", "nan"], "argument --target: 'nan' is not a positive number"),
        (["runs", "--loss-per-step", "1e-5"], "--loss-per-step needs --sigma"),
        (["runs", "--out", "runs"], "--out runs: is a folder"),
        (["runs", "--out", "file/x"], "--out file/x: cannot write there"),
        (["blank"], "none of these records holds a validation loss"),
        ([], "the following arguments are required: RUN"),
    ],
)
def test_mistakes_give_one_line_and_no_files(tmp_path, run_in, arguments, words):
    read(tmp_path / "runs" / "a", lines())
    read(tmp_path / "blank", b"")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    status, said = run_in(tmp_path, *arguments)
    errors = [line for line in said.splitlines() if not line.startswith("warning:")]
    assert status == 1 and len(errors) == 1 and errors[0].startswith("error: ") and words in errors[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["blank", "empty", "file", "runs"]


def test_unfinished_runs_can_be_watched(tmp_path, run_in):
    read(tmp_path / "runs" / "a", lines(steps=1000))
    status, said = run_in(tmp_path, "runs", "--out", "x")
    assert status == 0 and "stopped early, at step 300 of 1000" in said
    assert "None of these runs can be compared yet" in (tmp_path / "x.html").read_text()


# --- looks -----------------------------------------------------------------------------------------------------------


def _linear(colour: str) -> list[float]:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    return [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]


def _times(matrix, vector) -> list[float]:
    return [sum(a * b for a, b in zip(row, vector, strict=True)) for row in matrix]


# Machado, Oliveira, Fernandes (2009), severity 1, for linear RGB; then Ottosson's OKLab.
VISION = {
    "normal": ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    "protanopia": ((0.152286, 1.052583, -0.204868), (0.114503, 0.786281, 0.099216), (-0.003882, -0.048116, 1.051998)),
    "deuteranopia": ((0.367322, 0.860646, -0.227968), (0.280085, 0.672501, 0.047413), (-0.01182, 0.04294, 0.968881)),
    "tritanopia": ((1.255528, -0.076749, -0.178779), (-0.078411, 0.930809, 0.147602), (0.004733, 0.691367, 0.3039)),
}
CONES = ((0.4122214708, 0.5363325363, 0.0514459929), (0.2119034982, 0.6806995451, 0.1073969566),
         (0.0883024619, 0.2817188376, 0.6299787005))  # fmt: skip
OKLAB = ((0.2104542553, 0.793617785, -0.0040720468), (1.9779984951, -2.428592205, 0.4505937099),
         (0.0259040371, 0.7827717662, -0.808675766))  # fmt: skip


@pytest.mark.parametrize("vision", VISION)
@pytest.mark.parametrize(("theme", "colours"), [("light", LIGHT), ("dark", DARK)])
def test_colours_stay_apart_for_every_eye(theme, colours, vision):
    seen = []
    for colour in colours:
        rgb = [min(max(c, 0), 1) for c in _times(VISION[vision], _linear(colour))]
        seen.append(_times(OKLAB, [c ** (1 / 3) for c in _times(CONES, rgb)]))
    apart = [sum((a - b) ** 2 for a, b in zip(p, q, strict=True)) ** 0.5 for i, p in enumerate(seen) for q in seen[:i]]
    assert min(apart) >= 0.1
    light = [sum(a * b for a, b in zip((0.2126, 0.7152, 0.0722), _linear(c), strict=True)) + 0.05
             for c in (*colours, BACKGROUND[theme])]  # fmt: skip
    assert min(max(c, light[-1]) / min(c, light[-1]) for c in light[:-1]) >= 3


def test_no_two_groups_look_alike():
    pairs = looks([f"o{i}" for i in range(56)] + ["base"], "base")
    assert pairs["base"] == (0, 0) and len(set(pairs.values())) == 57


def test_statistics_reach_the_table(tmp_path):
    found = [
        *runs(tmp_path, "a", [2.7, 2.72, 2.75]),
        *runs(tmp_path, "b", [2.9, 2.91, 2.93]),
        *runs(tmp_path, "c", [2.8, 2.9]),
    ]
    rows = {row.label: row for row in table.build(groups.compare(found, baseline="b"))}
    assert rows["a"].p_baseline == statistics.differ([2.7, 2.72, 2.75], [2.9, 2.91, 2.93])
    assert rows["a"].p_holm == 2 * rows["a"].p_baseline and rows["c"].p_holm == rows["c"].p_baseline
    assert rows["a"].p_target == statistics.below_target([2.7, 2.72, 2.75], 3.0)
    costs = {label: [200 + 100 * 0.2 / (3.2 - final) for final in finals]
             for label, finals in (("a", (2.7, 2.72, 2.75)), ("b", (2.9, 2.91, 2.93)))}  # fmt: skip
    expected = statistics.speedup(costs["b"], costs["a"])
    assert rows["a"].speedup["steps"].low == pytest.approx(expected.low, rel=1e-9)
