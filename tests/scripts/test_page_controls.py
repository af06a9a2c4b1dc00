"""The page in a real browser: any metric on either axis, links, dropped records, branches, budgets, 500 runs."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from tests.scripts.chromium import NEEDS_CHROMIUM, axis, traces
from tests.scripts.compare_runs import lines, write_run

ROOT = Path(__file__).resolve().parents[2]
pytestmark = NEEDS_CHROMIUM
HASH = "decodeURIComponent(location.hash)"


def compare(folder: Path, *words: str) -> Path:
    command = [sys.executable, "scripts/compare.py", str(folder / "runs"), *words, "--out", str(folder / "page")]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=300)
    return folder / "page.html"


def with_norms(**header) -> list[str]:
    """A record with a gradient norm at every evaluation, and once between two of them."""
    found = [json.loads(line) for line in lines(**header)]
    for i, line in enumerate(found[1:]):
        line["grad_norm"] = 8.0 / 2**i
    between = {"step": 150, "tokens": 153600, "train_time_s": 15.0, "grad_norm": 3.0}
    return [json.dumps(line) for line in [*found[:3], between, *found[3:]]]


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("controls")
    for optim, best in (("a", 2.8), ("b", 2.6)):
        for seed in (1, 2, 3):
            record = with_norms(losses=(5.0, 4.0, 3.2, best + (seed - 2) ** 2 / 10), optim=optim, seed=seed,
                                name=f"{optim}-{seed}")  # fmt: skip
            write_run(folder / "runs" / f"{optim}-{seed}", record)
    write_run(folder / "runs" / "a-4", lines(losses=(), optim="a", seed=4, name="a-4", branch="a-2@200"))
    with (folder / "runs/a-4/metrics.jsonl").open("a") as file:
        file.write('{"step": 300, "tokens": 307200, "train_time_s": 9.5, "val/loss": 2.5}\n')
    return compare(folder, "--baseline", "a")


def choose(browser, element: str, value: str) -> None:
    browser.js(f"(() => {{ const e = document.getElementById('{element}'); e.value = {json.dumps(value)}; "
               "e.dispatchEvent(new Event('change')); })()")  # fmt: skip


def test_any_metric_on_either_axis(browser, page):
    browser.open(page)
    choose(browser, "across", "grad_norm")
    assert axis(browser, "xaxis")["title"] == "grad_norm" and axis(browser, "yaxis")["title"] == "val/loss"
    x = browser.js("document.getElementById('chart').data.find(trace => trace.name === 'b').x")
    assert x == [8, 4, 2, 1], "the norm at the steps of the evaluations"
    choose(browser, "metric", "grad_norm")
    choose(browser, "across", "val/loss")
    browser.click("[data-value=runs]")
    x = browser.js("document.getElementById('chart').data.find(trace => trace.name === 'b-2').x")
    assert x == pytest.approx([5, 4, 3.6, 3.2, 2.6]), "at step 150 half way between two evaluations"
    choose(browser, "across", "")
    assert axis(browser, "xaxis")["title"] == "steps"
    assert browser.complaints() == []


def test_a_link_holds_the_view(browser, page):
    browser.open(page)
    assert browser.js(HASH) == "", "the page as it opens needs none"
    for control in ("[data-value=tokens]", "[data-value=runs]", "[data-flip=logY]", "[data-group='1']"):
        browser.click(control)
    choose(browser, "metric", "grad_norm")
    link = browser.js("location.hash")
    assert set(link[1:].split("&")) >= {"x=tokens", "curves=runs", "y=grad_norm", "logy=1"}
    shown = traces(browser)
    browser.open(page)
    assert traces(browser) != shown
    browser.js(f"location.hash = {json.dumps(link)}")
    browser.wait(f"JSON.stringify(document.getElementById('chart').data.map(t => t.name)) === "
                 f"{json.dumps(json.dumps(shown, separators=(',', ':')))}")  # fmt: skip
    browser.js("location.hash = '#x=tokens&curves=runs&runs=b-2,a-1&y=of%ZZ&part=none'")
    browser.wait("document.getElementById('chart').data.length === 2")
    assert set(traces(browser)) == {"a-1", "b-2"} and axis(browser, "yaxis")["title"] == "val/loss"
    assert browser.requests() == [page.as_uri()] * 2 and browser.complaints() == []


def drop(browser, *files: tuple[str, str]) -> None:
    """As a hand does it: files in a DataTransfer, over the page and let go."""
    made = "; ".join(f"t.items.add(new File([{json.dumps(text)}], {json.dumps(name)}))" for name, text in files)
    browser.js(f"""(() => {{ const t = new DataTransfer(); {made};
        const options = {{ dataTransfer: t, bubbles: true, cancelable: true }};
        for (const kind of ["dragover", "drop"]) document.body.dispatchEvent(new DragEvent(kind, options)); }})()""")


def test_a_record_dropped_onto_the_page_is_added(browser, page):
    record = lines(losses=(5.0, 3.5, 3.0, 2.4), optim="<i>b</i>", seed=9, name="mine <b>9</b>")
    record.append('{"step": 200, "tokens": 204800, "train_time_s": 20, "val/loss": 3.1, "val/own": 7}')
    record.append('{"step": 300, "to')
    browser.open(page)
    drop(browser, ("metrics.jsonl", "\n".join(record)), ("notes.txt", "no record"))
    browser.wait("document.getElementById('dropped').textContent.includes('added')")
    said = browser.js("document.getElementById('dropped').textContent")
    assert "added metrics.jsonl" in said and "notes.txt: no metrics in it" in said
    assert "mine <b>9</b>" in traces(browser)
    y = browser.js("document.getElementById('chart').data.find(trace => trace.name.startsWith('mine')).y")
    assert y == [5, 3.5, 3.1], "it was resumed at step 200"
    assert "val/own" in browser.js("[...document.getElementById('metric').options].map(option => option.text)")
    rows = browser.js("[...document.querySelectorAll('.runs tbody tr')].map(row => row.textContent)")
    assert "mine <b>9</b>" in rows[-1] and "dropped onto the page" in rows[-1] and "<i>b</i>" in rows[-1]
    browser.js("document.getElementById('runs').open = true")
    browser.click(f"[data-run='{len(rows) - 1}']")
    assert "mine <b>9</b>" not in traces(browser)
    assert browser.requests() == [page.as_uri()] and browser.complaints() == []


def test_a_branch_begins_at_its_trunk(browser, page):
    browser.open(page)
    browser.click("[data-value=steps]")
    browser.click("[data-value=runs]")
    drawn = browser.js("(() => { const t = document.getElementById('chart').data.find(t => t.name === 'a-4'); "
                       "return {x: t.x, y: t.y, text: t.text}; })()")  # fmt: skip
    assert (drawn["x"], drawn["y"]) == ([200, 300], [3.2, 2.5])
    assert "a-2" in drawn["text"][0] and "branched from a-2 at step 200" in drawn["text"][1]


def test_the_best_by_budget(browser, page):
    browser.open(page)
    browser.click("[data-value=steps]")
    browser.click("[data-value=budget]")
    drawn = browser.js("document.getElementById('chart').data.map(t => [t.name, t.x, t.y])")
    assert ["b", [300, 600, 900], [2.7, 2.6, 2.6]] in [[n, x, pytest.approx(y)] for n, x, y in drawn]
    assert browser.complaints() == []


def busy(browser) -> float:
    """Seconds of processor time that the page's main thread has used."""
    metrics = browser.call("Performance.getMetrics")["metrics"]
    return next(metric["value"] for metric in metrics if metric["name"] == "TaskDuration")


def test_500_runs_are_redrawn_within_a_second(browser, tmp_path):
    draw = random.Random(0)
    for i in range(500):
        found = lines(losses=(), optim=f"o{i % 10}", seed=i, name=f"r-{i}", steps=2000, target=None)
        for step in range(0, 2001, 10):
            at = f'"step": {step}, "tokens": {step * 100}, "train_time_s": {step / 10}'
            found.append(f'{{{at}, "val/loss": {2 + 3 / (1 + step / 100) + draw.gauss(0, 0.02):.4f}}}')
        write_run(tmp_path / "runs" / f"r-{i}", found)
    page = compare(tmp_path)
    browser.call("Performance.enable", timeDomain="threadTicks")  # the page's processor time, whatever else runs here
    browser.open(page)
    took = {}
    for control in ("runs", "steps", "tokens", "budget", "mean"):
        before = busy(browser)
        browser.js(f"""(async () => {{ document.querySelector("[data-value={control}]").click();
            await new Promise(done => requestAnimationFrame(() => setTimeout(done))); }})()""")
        took[control] = busy(browser) - before
    assert min(took.values()) > 0.001 and max(took.values()) < 1, took
    assert browser.js("document.querySelectorAll('[data-run]').length") == 500
