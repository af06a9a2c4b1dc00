"""Any number of the record can be drawn: what the page's script is given of it."""

import json
import math

from scripts.speedrun import groups, page, page_data, table
from tests.scripts.compare_runs import lines, write_run

# What a foreign writer may have put there; the last is too large for a float.
ODD = ("null", '"text"', "NaN", "-Infinity", "true", "[1]", "{}", "1e999", "1" + "0" * 400)


def built(found: list) -> dict:
    comparison = groups.compare(found)
    text = page.render("title", comparison, table.build(comparison), [], [], [])
    data = text.split('<script id="data" type="application/json">')[1].split("</script>")[0]
    return json.loads(data)


def other(step: int, value: str, key: str = "val/other") -> str:
    return f'{{"step": {step}, "tokens": {1024 * step}, "train_time_s": {step / 10}, {json.dumps(key)}: {value}}}'


def within(*more: str, **header) -> list[str]:
    """A record with these lines before its last."""
    *before, last = lines(**header)
    return [*before, *more, last]


def drawn(data: dict, owner: dict, metric: str) -> dict | None:
    curve = owner["curves"][data["metrics"].index(metric)]
    return curve and {**data["axes"][curve["axis"]], **curve}


def test_a_new_key_is_offered(tmp_path):
    mine = write_run(tmp_path / "a", within(other(210, "0.25"), other(220, "0.5")))
    without = write_run(tmp_path / "b", lines(optim="b", seed=2))
    data = built([mine, without])
    assert data["metrics"] == ["val/loss", "val/other"]
    for owner in (data["groups"][0], data["runs"][0]):
        curve = drawn(data, owner, "val/other")
        assert (curve["steps"], curve["seconds"], curve["values"]) == ([210, 220], [21, 22], [0.25, 0.5])
        assert drawn(data, owner, "val/loss")["values"] == [5, 4, 3.2, 2.9]
    assert drawn(data, data["groups"][1], "val/other") is None and drawn(data, data["runs"][1], "val/other") is None


def test_a_key_of_a_run_that_is_set_aside_is_offered(tmp_path):
    aside = write_run(tmp_path / "b", within(other(210, "1"), seed=2, model="big"))
    others = [write_run(tmp_path / name, lines(seed=seed)) for name, seed in (("a", 1), ("c", 3))]
    assert built([*others, aside])["metrics"][1:] == ["val/other"]


def test_odd_values_are_gaps_or_nothing(tmp_path):
    never = [other(200 + i, value, f"odd/{i}") for i, value in enumerate(ODD)]
    mixed = [other(220 + i, value) for i, value in enumerate(("1", *ODD, "2"))]
    run = write_run(tmp_path / "a", within(*never, *mixed))
    data = built([run])
    assert run.errors == [] and data["metrics"] == ["val/loss", "val/other"]
    values = drawn(data, data["runs"][0], "val/other")["values"]
    assert (values[0], values[-1]) == (1, 2) and set(values[1:-1]) == {None}


def test_names_of_keys_stay_text(tmp_path):
    for name in ("</script><img src=x>", "__proto__", "", "\ud800", "a$b"):
        assert built([write_run(tmp_path, within(other(210, "1", name)))])["metrics"] == ["val/loss", name]


def test_long_curves_are_thinned_and_keep_their_spikes(tmp_path):
    spikes = {701: "90", 1502: "-90", 2203: "null"}
    many = [other(step, spikes.get(step, str(step % 7))) for step in range(301, 3301)]
    run = write_run(tmp_path, [*lines(steps=3300), *many])
    data = built([run])
    curve = drawn(data, data["runs"][0], "val/other")
    assert page_data.MOST_POINTS / 2 < len(curve["values"]) <= page_data.MOST_POINTS
    assert (curve["steps"][0], curve["steps"][-1]) == (301, 3300) and curve["steps"] == sorted(curve["steps"])
    shown = dict(zip(curve["steps"], curve["values"], strict=True))
    assert (shown[701], shown[1502], shown[2203]) == (90, -90, None)
    assert all(shown[step] == step % 7 for step in shown if step not in spikes)


def test_thin_leaves_short_curves_alone():
    assert page_data.thin([1.0, math.nan, 2.0]) == [0, 1, 2] and page_data.thin([]) == []
    assert page_data.thin([math.nan] * 5000)[-1] == 4999


def test_metrics_of_the_same_lines_share_their_steps(tmp_path):
    both = '{"step": 210, "tokens": 1, "train_time_s": 21, "a": 1, "b": 2}'
    data = built([write_run(tmp_path, within(both))])
    assert data["metrics"] == ["val/loss", "a", "b"] and len(data["axes"]) == 2
