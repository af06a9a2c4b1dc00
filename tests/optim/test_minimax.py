"""Polar Express's coefficients: the published lists, and the optimality of every polynomial."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optim.minimax import evaluate, minimax_quintic, polar_express_coefficients

# Printed in arXiv 2505.16932 for l = 1e-3, before the safety factor 1.01.
PAPER = [
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
]
# In modded-nanogpt, dion and nanochat.
SPEEDRUN = [
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
]


def distance(ours, published):
    return (torch.tensor(ours, dtype=torch.float64) - torch.tensor(published, dtype=torch.float64)).abs().max()


def test_the_list_of_the_paper():
    ours = polar_express_coefficients(9, lower=1e-3, cushion=0.02407327424182761, safety=0.0)
    assert distance(ours[:7], PAPER) < 1e-9
    assert distance(ours[7:], [(1.875, -1.25, 0.375)] * 2) < 1e-8  # where the paper's list stays


def test_the_list_of_the_speedrun():
    assert distance(polar_express_coefficients(5), SPEEDRUN) < 1e-12


def test_more_steps_continue_the_list():
    longer = polar_express_coefficients(8)
    assert longer[:4] == polar_express_coefficients(5)[:4]
    shrunk = [x / 1.02**power for x, power in zip(SPEEDRUN[4], (1, 3, 5), strict=True)]  # no longer the last
    assert longer[4] == pytest.approx(shrunk, abs=1e-12)


@settings(deadline=None, max_examples=40)
@given(st.floats(-8, -0.005), st.floats(0.1, 3))
def test_a_minimax_polynomial_equioscillates(log_ratio, upper):
    """Four extrema of p - 1 of equal size and alternating sign: no odd quintic has a smaller maximum (Chebyshev)."""
    lower = upper * 10**log_ratio
    a, b, c = p = minimax_quintic(lower, upper)
    root = math.sqrt(9 * b * b - 20 * a * c)
    inner = [math.sqrt((-3 * b + sign * root) / (10 * c)) for sign in (-1, 1)]
    assert lower < inner[0] < inner[1] < upper
    errors = [evaluate(p, x) - 1 for x in (lower, *inner, upper)]
    size = abs(errors[0])
    assert errors == pytest.approx([-size, size, -size, size], abs=1e-13 + 1e-6 * size)


@settings(deadline=None, max_examples=20)
@given(st.floats(-6, -0.1), st.integers(1, 20))
def test_the_composition_maps_its_interval_near_1(log_lower, steps):
    """Without cushion and safety the image of [l, 1] is centred on 1, and a longer list shrinks it."""
    lower = 10**log_lower

    def worst(count):
        values = [lower ** (i / 200) for i in range(201)]
        for p in polar_express_coefficients(count, lower, cushion=0.0, safety=0.0):
            values = [evaluate(p, x) for x in values]
        assert min(values) > 0
        return max(abs(x - 1) for x in values)

    assert worst(steps + 1) <= worst(steps) + 1e-12


@pytest.mark.parametrize("lower", [1e-3, 1e-7])
@pytest.mark.parametrize("cushion", [0.0, 0.02, 0.1])
@pytest.mark.parametrize("safety", [0.0, 0.02, 0.05])
def test_every_setting_converges(lower, cushion, safety):
    x = lower
    for p in polar_express_coefficients(40, lower, cushion, safety):
        x = evaluate(p, x)
    assert x == pytest.approx(1, abs=5 * safety**3 + 1e-12)  # the last step cancels the shrinking to third order


@pytest.mark.parametrize("arguments", [(0,), (5, 0.0), (5, 1.5), (5, 1e-3, 1.0), (5, 1e-3, -0.1), (5, 1e-3, 0.02, -1)])
def test_impossible_settings_are_refused(arguments):
    with pytest.raises(ValueError, match="polar_express_coefficients needs"):
        polar_express_coefficients(*arguments)


def test_an_empty_interval_is_refused():
    with pytest.raises(ValueError, match="0 < lower <= upper"):
        minimax_quintic(2.0, 1.0)
