"""The NanoGPT speedrun: published losses against steps and time, and this repository's own runs on a CPU below them."""

from scripts.lecture.experiment import Check
from scripts.lecture.speedrun.curves import Curve, read_curves
from scripts.lecture.style import COLOURS, guide, note
from scripts.speedrun.report import published
from scripts.speedrun.style import LIGHT, SHAPES, looks

TITLE = "The NanoGPT speedrun"
METHODS = ("adam", "adamw", "muon", "shampoo", "soap")
SIZE = (10.4, 4.6)

# Milliseconds a step of the 2024-10 logs, and (minutes, final loss) of track 1's first records, from the README there.
STEP_MS = {"Adam": 139, "Shampoo": 179, "SOAP": 301, "Muon": 142}
TRACK_1 = (
    ("#1 AdamW (llm.c)", 45.0, 3.2722),
    ("#2 AdamW + RoPE", 31.4, 3.2760),
    ("#4 Muon, tuned", 22.3, 3.2785),
    ("#5 ReLU², QK-norm", 15.2, 3.2760),
    ("#8 untied head", 10.8, 3.2762),
)
CURVES = {
    "track 3, tuned Muon (3250 steps)": "Muon, tuned (track 3)",
    "llm.c GPT-2 124M, AdamW (19560 steps)": "AdamW (llm.c)",
    "track 3, Adam (5625 steps; most likely undertuned, say its authors)": "Adam, undertuned (track 3)",
}
TARGET = 3.28
COLOURED = ("muon", "adamw", "adam", "normuon", "shampoo", "soap")  # in this order, above and below


def measure(short: bool) -> dict:
    entries = {entry["name"]: list(zip(entry["steps"], entry["loss"], strict=True)) for entry in published()}
    same = {name: entries[f"5100 steps, {name}"][0] for name in STEP_MS}
    return dict(
        curves={label: entries[name] for name, label in CURVES.items()},
        same=same,
        own=read_curves(),
        spectral=entries["track 3 #22, spectral descent without momentum"][-1][0],
    )


def check(measured: dict) -> list[Check]:
    same, curves = measured["same"], measured["curves"]
    last = {label: points[-1][0] for label, points in curves.items()}
    muon, adam = (STEP_MS[name] * same[name][0] / 60e3 for name in ("Muon", "Adam"))
    return [
        Check("published, 5100 steps: loss of Adam − of Muon", same["Adam"][1] - same["Muon"][1], low=0.02),
        Check("published, 5100 steps: loss of Shampoo − of Muon", same["Shampoo"][1] - same["Muon"][1], low=0.0),
        Check("published, 5100 steps: time of Muon / of Adam", muon / adam, high=1.05),
        Check(
            "published, track 3: steps of Adam / of Muon to 3.28",
            last["Adam, undertuned (track 3)"] / last["Muon, tuned (track 3)"],
            low=1.4,
        ),
        Check(
            "published, track 3: steps of spectral descent without momentum / of Muon",
            measured["spectral"] / last["Muon, tuned (track 3)"],
            low=2,
        ),
        Check(
            "largest loss at the end of the published curves",
            max(points[-1][1] for points in curves.values()),
            high=TARGET,
        ),
        # Reported without a bound: the claim is about GPT-2.
        *[
            Check(
                f"our CPU track: loss of {curve.optimizer} after {curve.steps[-1]} steps, nats a byte",
                curve.losses[-1],
                digits=4,
            )
            for curve in measured["own"]
        ],
    ]


def draw(measured: dict, figure) -> None:
    figure.set_size_inches(SIZE[0], 2 * SIZE[1])
    above, below = figure.subfigures(2, 1)
    draw_published(measured, *above.subplots(1, 2))
    draw_own(measured["own"], *below.subplots(1, 2, sharey=True))


def draw_published(measured: dict, left, right) -> None:
    for (label, points), colour in zip(measured["curves"].items(), COLOURS, strict=False):
        left.plot(*zip(*points, strict=True), "o-", markersize=3.5, color=colour, label=label)
    steps, losses = zip(*measured["curves"]["AdamW (llm.c)"], strict=True)
    right.plot([45 * k / steps[-1] for k in steps], losses, color=COLOURS[1], label="AdamW (llm.c)")
    for (name, (step, loss)), colour in zip(
        measured["same"].items(), (COLOURS[2], COLOURS[4], COLOURS[5], COLOURS[0]), strict=True
    ):
        right.plot(
            STEP_MS[name] * step / 60e3, loss, "^", color=colour, label=f"{name}, 5100 steps, {STEP_MS[name]} ms each"
        )
        left.plot(step, loss, "^", color=colour)
    for label, minutes, loss in TRACK_1:
        right.plot(minutes, loss, "o", color="black", markersize=4)
        right.annotate(label.split()[0], (minutes, loss), (0, -12), textcoords="offset points", fontsize=8, ha="center")
    for axes in (left, right):
        axes.axhline(TARGET, color="black", linewidth=0.8, linestyle=":")
    left.set(
        xlabel="steps of 524,288 tokens",
        ylabel="validation loss, nats per token",
        ylim=(3.22, 4.2),
        title="published: 8×H100",
    )
    right.set(xlabel="training time, minutes", xlim=(5, 50), ylim=(3.24, 3.56), title="published: 8×H100")
    guide(left)
    note(right, "records of track 1:\n" + "\n".join(label for label, _, _ in TRACK_1), 0.55, 0.75, va="top")
    guide(right, loc="upper right", fontsize=7.5)


def draw_own(own: list[Curve], left, right) -> None:
    look = looks([*COLOURED, *(curve.optimizer for curve in own)], None)
    for curve in own:
        colour, shape = LIGHT[look[curve.optimizer][0]], SHAPES[look[curve.optimizer][1]][1]
        label = f"{curve.optimizer} {curve.losses[-1]:.3f} ({curve.seeds} seeds)"
        for axes, xs in ((left, curve.steps), (right, curve.seconds)):
            every = max(1, len(xs) // 8)
            axes.plot(xs, curve.losses, color=colour, marker=shape, markersize=4, markevery=every, label=label)
    left.set(xlabel="steps", ylabel="validation loss, nats per byte", title="our own: a small model, one CPU core")
    right.set(xlabel="training time, seconds", title="our own: a small model, one CPU core")
    if own:  # from below the best end to above the worst
        ends = [curve.losses[-1] for curve in own]
        left.set(ylim=(ends[0] - 0.05, ends[-1] + 0.4))
        right.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=7.5, title="loss in the end")
    for axes in (left, right) if not own else ():
        axes.set(xticks=[], yticks=[])
        note(axes, "not measured yet:\ndocs/results/cpu_curves.csv is missing", 0.5, 0.5, ha="center", va="center")
