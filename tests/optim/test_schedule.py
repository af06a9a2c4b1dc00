"""Laws that every schedule obeys, and values worked out by hand."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from optim.schedule import SCHEDULES, build, in_steps, line


@st.composite
def schedules(draw):
    """(function, name, steps, warmup, decay, final) with lengths that fit."""
    name = draw(st.sampled_from(sorted(SCHEDULES.keys() - {"nanogpt", "power"})))  # which have tests of their own
    steps = draw(st.integers(2, 400))
    warmup = draw(st.integers(2, steps)) if draw(st.booleans()) else 0
    decay = 0
    if name in ("warmdown", "wsd") and steps - warmup >= 2 and draw(st.booleans()):
        decay = draw(st.integers(2, steps - warmup))
    final = 0.0 if name == "constant" else draw(st.sampled_from([0.0, 0.1, 1.0]))
    return build(name, steps=steps, warmup=warmup, decay=decay, final=final), name, steps, warmup, decay, final


@given(schedules())
def test_bounds(drawn):
    multiplier, _, steps, *_ = drawn
    values = [multiplier(step) for step in range(steps + 1)]
    assert all(0 <= value <= 1 for value in values)
    assert all(value > 0 for value in values[:-1]), "no update of the run is wasted"


@given(schedules())
def test_end_value(drawn):
    multiplier, name, steps, warmup, decay, final = drawn
    falls = decay > 0 or (name == "cosine" and steps > warmup)
    assert multiplier(steps) == pytest.approx(final if falls else 1.0, abs=1e-12)


@given(schedules())
def test_rises_then_falls_without_jumps(drawn):
    multiplier, name, steps, warmup, decay, _ = drawn
    values = [multiplier(step) for step in range(steps + 1)]
    top = values.index(max(values))
    assert values[:top] == sorted(values[:top]) and values[top:] == sorted(values[top:], reverse=True)
    fall = decay if name != "cosine" else steps - warmup
    steepest = {"wsd": math.sqrt(1 / fall) if fall else 0, "cosine": math.pi / 2 / fall if fall else 0}
    allowed = max(1 / warmup if warmup else 0, steepest.get(name, 1 / fall if fall else 0))
    assert all(abs(b - a) <= allowed + 1e-12 for a, b in zip(values, values[1:], strict=False))


@given(schedules())
def test_warm_up_is_linear_and_complete(drawn):
    multiplier, _, _, warmup, *_ = drawn
    for step in range(warmup):
        assert multiplier(step) == pytest.approx((step + 1) / warmup)


def test_by_hand():
    warmdown = build("warmdown", steps=10, warmup=2, decay=4, final=0.2)
    assert [round(warmdown(s), 12) for s in range(11)] == [0.5, 1, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2]
    assert build("cosine", steps=8, final=0.5)(4) == pytest.approx(0.75)
    assert build("wsd", steps=8, decay=0.5)(5) == pytest.approx(0.5)
    assert build("constant", steps=8, warmup=4)(1) == 0.5


def test_fractions_and_steps():
    assert in_steps(0.25, 400) == 100 and in_steps(100, 400) == 100 and in_steps(1, 400) == 400
    fraction, steps = build("warmdown", steps=50, decay=0.4), build("warmdown", steps=50, decay=20)
    assert [fraction(s) for s in range(51)] == [steps(s) for s in range(51)]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"name": "cosin"}, ["cosin", "cosine"]),
        ({"name": "cosine", "decay": 0.5}, ["decay=0.5", "no such setting"]),
        ({"name": "constant", "final": 0.5}, ["final=0.5", "no such setting"]),
        ({"name": "warmdown", "decay": 2.5}, ["decay=2.5", "whole number"]),
        ({"name": "warmdown", "warmup": -1}, ["warmup=-1"]),
        ({"name": "warmdown", "final": 1.5}, ["final=1.5"]),
        ({"name": "wsd", "warmup": 6, "decay": 0.5}, ["warmup of 6", "decay of 5", "train.steps=10"]),
    ],
)
def test_wrong_settings(settings, words):
    with pytest.raises(ValueError) as caught:
        build(**settings, steps=10)
    assert all(word in str(caught.value) for word in words) and "\n" not in str(caught.value)


def test_nanogpt_is_its_formula():
    """nanoGPT's train.py: (it + 1) / (warmup_iters + 1), then half a cosine to min_lr at lr_decay_iters."""
    multiplier = build("nanogpt", steps=100, warmup=20, final=0.1)
    expected = [1 / 21, 20 / 21, 1, 0.55, 0.1, 0.1]
    assert [multiplier(step) for step in (0, 19, 20, 60, 100, 130)] == pytest.approx(expected)


def test_power_is_powercool():
    """min(lr, c (T - t)^1.2) with track 3's #44: matrices fall from step 514 on, others from 1,487."""
    for rate, c, first in ((0.0375, 3.3169534699576625e-06, 513), (0.3, 4.976805410800738e-05, 1487)):
        decay = (rate / c) ** (1 / 1.2)
        multiplier = build("power", steps=2900, decay=decay, power=1.2)
        for step in (0, first, first + 1, 2000, 2899, 2900):
            assert rate * multiplier(step) == pytest.approx(min(rate, c * (2900 - step) ** 1.2), rel=1e-12)
        assert multiplier(first) == 1 > multiplier(first + 1)


def test_a_line_joins_its_points():
    momentum = line("momentum", [[0, 0.85], [300, 0.95], [2700, 0.95], [2900, 0.85]], 2900)
    expected = [0.85, 0.9, 0.95, 0.95, 0.9, 0.85, 0.85]
    assert [momentum(t) for t in (0, 150, 300, 2700, 2800, 2900, 3000)] == pytest.approx(expected)
    cap = line("cap", [[0.5, 0.85], [0.5, 1.0]], 10)
    assert [cap(t) for t in (0, 4, 5, 9)] == [0.85, 0.85, 1.0, 1.0]
    for wrong in ([], 3, [[0, 1, 2]], [[5, 1], [2, 1]], [["a", 1]]):
        with pytest.raises(ValueError, match="momentum="):
            line("momentum", wrong, 10)
