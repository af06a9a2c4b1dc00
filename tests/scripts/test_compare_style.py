"""The colours, seen with every kind of eye."""

import pytest

from scripts.speedrun.style import BACKGROUND, DARK, LIGHT, looks


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
