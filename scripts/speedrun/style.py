"""Colours and marker shapes shared by the page and the picture.

The eight colours of each theme stay at least 0.10 apart in OKLab, also as seen with protanopia, deuteranopia and
tritanopia (Machado et al. 2009), and have a contrast of 3:1 or more with the background; the shapes say the same
once more for greyscale prints.
"""

LIGHT = ("#1d2330", "#bd4c01", "#004abd", "#13896a", "#da5fa9", "#b19200", "#4599e3", "#7b327e")
DARK = ("#e8eaf0", "#ff7a1f", "#5d7eff", "#30c78b", "#bf81c2", "#f3d04e", "#aacaff", "#995cba")
BACKGROUND = {"light": "#ffffff", "dark": "#12151c"}
SHAPES = (  # plotly's name, matplotlib's, and the outline in a 16 × 16 box
    ("circle", "o", "M8 3a5 5 0 1 0 .01 0z"),
    ("square", "s", "M3.5 3.5h9v9h-9z"),
    ("diamond", "D", "M8 2l6 6-6 6-6-6z"),
    ("triangle-up", "^", "M8 3l6 10H2z"),
    ("triangle-down", "v", "M8 13l6-10H2z"),
    ("cross", "P", "M6 3h4v3h3v4h-3v3H6v-3H3V6h3z"),
    ("star", "*", "M8 1.5l2 4.3 4.7.6-3.5 3.2.9 4.7L8 12l-4.1 2.3.9-4.7L1.3 6.4 6 5.8z"),
    ("hexagon", "h", "M5 2.8h6l3 5.2-3 5.2H5L2 8z"),
)


def looks(labels: list[str], baseline: str | None) -> dict[str, tuple[int, int]]:
    """Per label the indices of its colour and shape; the baseline is drawn in ink. No pair repeats before 57."""
    others = [label for label in dict.fromkeys(labels) if label != baseline]
    pairs = {label: (i % 7 + 1, (i % 7 + 1 + i // 7) % 8) for i, label in enumerate(others)}
    return pairs if baseline is None else {baseline: (0, 0), **pairs}
