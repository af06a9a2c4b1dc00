"""The comparison's page in a real browser: what it shows, its buttons, themes and widths."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.scripts.chromium import NEEDS_CHROMIUM, axis, traces
from tests.scripts.compare_runs import lines, write_run

ROOT = Path(__file__).resolve().parents[2]
RECORDS = "tests/scripts/data/example"
pytestmark = NEEDS_CHROMIUM


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("page") / "speedrun"
    command = [sys.executable, "scripts/compare.py", RECORDS, "--baseline", "adamw", "--published", "--out", str(out)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=120)
    return Path(f"{out}.html")


@pytest.fixture(scope="module")
def odd_page(tmp_path_factory) -> Path:
    """Of runs some of which record "val/other" too, with values that nothing can be drawn of among them."""
    folder = tmp_path_factory.mktemp("other")
    for optim in ("a", "b"):
        for seed in (1, 2):
            found = lines((5, 4, 3.2, 2 + seed / 2), optim=optim, seed=seed, name=f"{optim}-{seed}")
            if optim == "a":
                for i, value in enumerate(["-1", "null", '"text"', "NaN", "0", "1" + "0" * 400, "0.25", "0.5"]):
                    at = f'"step": {10 * i + 10}, "tokens": {10240 * i + 10240}, "train_time_s": {i + 1}'
                    found.insert(2 + i, f'{{{at}, "val/other": {value}, "train/loss": 5}}')
            write_run(folder / "runs" / f"{optim}-{seed}", found)
    command = [sys.executable, "scripts/compare.py", str(folder / "runs"), "--published", "--out", str(folder / "odd")]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=120)
    return folder / "odd.html"


def test_page_renders_and_asks_for_nothing(browser, page):
    browser.open(page)
    assert "muon reaches 3.95 in 34% fewer steps than adamw" in browser.js("document.querySelector('.lead').innerText")
    drawn = browser.js("[...document.querySelectorAll('#chart .js-line')].filter(p => p.getBBox().width > 20).length")
    assert drawn >= 5
    assert {"muon", "adamw", "soap", "sgd", "scion"} <= set(traces(browser))
    assert browser.js("document.querySelectorAll('#results tbody tr').length") == 5
    assert "252.4 ± 2.4" in browser.js("document.getElementById('results').innerText")
    assert browser.js("[...document.querySelectorAll('#ratios .points path')].length") == 3
    assert (
        browser.js("[...document.querySelectorAll('.modebar-btn')].map(b => b.dataset.title).join()").count("hare") == 0
    )
    browser.wait("document.readyState === 'complete'")
    assert browser.requests() == [page.as_uri()]
    assert browser.complaints() == []


def test_a_load_from_elsewhere_would_be_seen(browser, page):
    """The two checks above are worth something only if they notice."""
    browser.open(page)
    browser.js("fetch('https://example.invalid/x').catch(() => 0)")
    browser.js("setTimeout(() => { throw new Error('seen') }, 0); new Promise(done => setTimeout(done, 50))")
    assert any("example.invalid" in text for text in browser.complaints())
    assert any("seen" in text for text in browser.complaints())


def test_axes_switch(browser, page):
    browser.open(page)
    assert axis(browser, "xaxis")["title"] == "training time (seconds)"
    assert not any(name.startswith("published") for name in traces(browser))
    browser.click("[data-value=steps]")
    assert axis(browser, "xaxis")["title"] == "steps" and axis(browser, "xaxis")["range"][1] == pytest.approx(515)
    assert "published: track 3, tuned Muon (3250 steps)" in traces(browser)
    browser.click("[data-value=tokens]")
    assert axis(browser, "xaxis")["title"] == "training tokens"
    assert browser.js("document.querySelector('[data-value=tokens]').getAttribute('aria-pressed')") == "true"
    browser.click("[data-flip=logX]")
    browser.click("[data-flip=logY]")
    assert (axis(browser, "xaxis")["type"], axis(browser, "yaxis")["type"]) == ("log", "log")
    at = browser.js("document.getElementById('chart').data.flatMap(trace => [...trace.x])")
    assert min(at) > 0, "plotly would draw a level line from step 0, which a logarithmic axis does not have"
    low, high = axis(browser, "yaxis")["range"]
    assert 10**low < 3.6 and 3.95 < 10**high < 7  # the target and every end are in view, the steep start is not
    browser.click("[data-value=all]")
    browser.click("[data-flip=logX]")
    assert 10 ** axis(browser, "yaxis")["range"][1] > 7
    assert browser.complaints() == []


def test_metric_switches(browser, odd_page):
    browser.open(odd_page)
    browser.click("[data-value=steps]")
    assert axis(browser, "yaxis")["title"] == "val/loss"
    assert axis(browser, "yaxis")["range"][0] < 2.5, "the lower seed's end is in view, not the mean of both alone"
    assert {"b", "a at target"} <= set(traces(browser))
    assert any(name.startswith("published") for name in traces(browser))
    assert browser.js("document.getElementById('metric').labels[0].innerText").startswith("Metric")
    offered = browser.js("[...document.getElementById('metric').options].map(option => option.text)")
    assert offered == ["val/loss", "train/loss", "val/other"]
    browser.js("document.getElementById('metric').focus()")
    for _ in range(2):
        browser.press("ArrowDown", 40)
    browser.wait("document.getElementById('chart')._fullLayout.yaxis.title.text === 'val/other'")
    assert traces(browser) == ["a band", "a"]  # b has none; neither rings, nor the target, nor what others published
    assert browser.js("document.getElementById('chart')._fullLayout.shapes.length") == 0
    assert not browser.js("[...document.querySelectorAll('[data-loss-only]')].some(e => e.getClientRects().length)")
    assert browser.js("document.getElementById('chart').data[1].y") == [-1, None, None, 0, None, 0.25, 0.5]
    assert "val/other <b>0.25</b>" in browser.js("document.getElementById('chart').data[1].text[5]")
    for control in ("[data-value=runs]", "[data-flip=logY]", "[data-value=seconds]", "[data-flip=logX]"):
        browser.click(control)
        assert axis(browser, "yaxis")["title"] == "val/other" and None not in axis(browser, "yaxis")["range"]
    assert traces(browser) == ["a-1", "a-2"]
    assert browser.js("document.getElementById('chart').data[0].y") == [None, None, None, 0.25, 0.5]
    browser.click("[data-value=mean]")
    browser.click("[data-group='0']")
    browser.click("[data-group='1']")
    assert traces(browser) == []
    assert browser.js("document.querySelector('#chart .annotation').textContent").startswith("nothing to draw here")
    assert browser.complaints() == []


def test_runs_and_groups_toggle(browser, page):
    browser.open(page)
    browser.click("[data-group='0']")
    assert "muon" not in traces(browser) and "muon band" not in traces(browser) and "adamw" in traces(browser)
    assert browser.js("document.querySelector('[data-group=\"0\"]').getAttribute('aria-pressed')") == "false"
    browser.click("[data-group='0']")
    assert "muon" in traces(browser)
    browser.click("[data-value=runs]")
    assert {"muon-1", "muon-2", "muon-3", "adamw-1"} <= set(traces(browser)) and "muon" not in traces(browser)
    browser.click("[data-run='1']")
    assert "muon-2" not in traces(browser) and "muon-1" in traces(browser)
    aside = browser.js(
        "[...document.querySelectorAll('.runs tr')].findIndex(r => r.innerText.includes('muon-stopped')) - 1"
    )
    assert "muon-stopped" not in traces(browser)
    browser.click(f"[data-run='{aside}']")
    assert "muon-stopped" in traces(browser)
    assert browser.complaints() == []


def test_hover_tells_of_the_run(browser, page):
    browser.open(page)
    browser.click("[data-value=runs]")
    browser.js("document.getElementById('chart').scrollIntoView({block: 'center'})")
    x, y = browser.js("""(() => { const chart = document.getElementById('chart'), layout = chart._fullLayout;
        const box = chart.querySelector('.nsewdrag').getBoundingClientRect();
        return [box.x + layout.xaxis.d2p(14.4), box.y + layout.yaxis.d2p(3.85)]; })()""")
    browser.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
    browser.wait("document.querySelector('#chart .hovertext') !== null")
    text = browser.js("document.querySelector('#chart .hovertext').textContent")
    for part in ("muon-1", "seed 1", "3.8500", "step 300", "14.4 s", "tiny · sample · CPU, 2 cores"):
        assert part in text


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize(("width", "mobile"), [(1280, False), (390, True)])
def test_themes_and_widths(browser, page, tmp_path, theme, width, mobile):
    browser.open(page, width=width, theme=theme, mobile=mobile)
    background = "getComputedStyle(document.querySelector('section')).backgroundColor"
    colours = {"light": "rgb(255, 255, 255)", "dark": "rgb(18, 21, 28)"}
    assert browser.js(background) == colours[theme]
    assert browser.js("document.documentElement.scrollWidth") <= width  # only the tables scroll sideways
    assert browser.js("document.querySelector('#chart .main-svg').getBoundingClientRect().right") <= width
    browser.click("#theme")
    other = "dark" if theme == "light" else "light"
    assert browser.js(background) == colours[other]
    ink = browser.js("document.getElementById('chart').layout.font.color")
    assert ink == {"light": "#1d2330", "dark": "#e8eaf0"}[other]
    browser.screenshot(tmp_path / "page.png")
    assert (tmp_path / "page.png").stat().st_size > 20_000
    assert browser.complaints() == []
