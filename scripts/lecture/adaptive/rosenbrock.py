"""Every adaptive method on Rosenbrock's function with one learning rate."""

import io
import math

import torch
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from scripts.lecture.descend import descend, optimizer, parameter
from scripts.lecture.experiment import Check
from scripts.lecture.style import COLOURS, RC, guide, write

TITLE = "Rosenbrock's function, learning rate 0.003"
METHODS = (
    "sgd",
    "sgd_momentum",
    "nesterov",
    "adagrad",
    "rmsprop",
    "adadelta",
    "adam",
    "amsgrad",
    "adamw",
    "torch.optim.Adamax",
    "torch.optim.NAdam",
)
SIZE = (10.0, 4.4)

BETAS = dict(betas=(0.9, 0.999))
SETTINGS = {
    "adam": ("Adam", BETAS),
    "torch.optim.Adamax": ("Adamax", {}),
    "torch.optim.NAdam": ("NAdam", {}),
    "adamw": ("AdamW", BETAS | dict(weight_decay=0.01)),
    "rmsprop": ("RMSProp", dict(alpha=0.99)),
    "amsgrad": ("AMSGrad", BETAS),
    "adagrad": ("AdaGrad", {}),
    "adadelta": ("AdaDelta", dict(eps=1e-6)),
    "sgd": ("SGD", {}),
    "sgd_momentum": ("momentum", {}),
    "nesterov": ("Nesterov", {}),
}
STYLES = dict(zip(SETTINGS, [(c, s) for s in ("-", "--") for c in COLOURS], strict=False))


def value(p: torch.Tensor) -> torch.Tensor:
    return (1 - p[..., 0]).square() + 100 * (p[..., 1] - p[..., 0].square()).square()


def gradient(p: torch.Tensor, k: int) -> torch.Tensor:
    x, y = p.tolist()
    return torch.tensor([-2 * (1 - x) - 400 * x * (y - x * x), 200 * (y - x * x)], dtype=torch.float64)


def measure(short: bool) -> dict:
    steps, paths = 5000 if short else 10_000, {}
    for name, (_, settings) in SETTINGS.items():
        x, path = parameter(torch.tensor([-1.5, 2.0], dtype=torch.float64)), []
        for _, point in descend(optimizer(name, x, lr=0.003, **settings), x, gradient, steps):
            path.append(point.clone())
            if not point.abs().max() < 1e3:
                break
        paths[name] = torch.stack(path)
    return paths


def check(measured: dict) -> list[Check]:
    longest = max(map(len, measured.values()))
    lowest = {name: value(path).min().item() for name, path in measured.items()}
    limits = {  # after the 10,000 steps of the figure, and after the 5000 of the short form
        "adam": (1e-9, 0.05),
        "torch.optim.Adamax": (1e-9, 0.05),
        "torch.optim.NAdam": (1e-4, 0.05),
        "adamw": (1e-4, 0.05),
        "rmsprop": (0.1, 0.1),
        "amsgrad": (0.3, 2.0),
    }
    checks = [
        Check(f"{SETTINGS[name][0]}: smallest f on the way", lowest[name], high=high[longest < 10_000])
        for name, high in limits.items()
    ]
    checks += [
        Check(f"{SETTINGS[name][0]}: smallest f on the way", lowest[name], 3, 12) for name in ("adagrad", "adadelta")
    ]
    diverged = [len(measured[name]) for name in ("sgd", "sgd_momentum", "nesterov")]
    return checks + [Check("SGD, momentum, Nesterov: steps to |x| > 1000, largest", max(diverged), high=50)]


def landscape(axes) -> None:
    grid = torch.meshgrid(torch.linspace(-2, 1.6, 160), torch.linspace(-0.8, 2.6, 160), indexing="ij")
    levels = [10**e for e in (-1, -0.3, 0.4, 1, 1.6, 2.2, 2.8)]
    axes.contour(*grid, value(torch.stack(grid, -1)), levels=levels, colors="#c3c9d4", linewidths=0.6)
    axes.plot(1, 1, "*", color="black", markersize=11)
    axes.set(xlabel="x", ylabel="y", xlim=(-2, 1.6), ylim=(-0.8, 2.6))


def draw(measured: dict, figure) -> None:
    left, right = figure.subplots(1, 2, width_ratios=(5, 4))
    landscape(left)
    for name, path in measured.items():
        colour, style = STYLES[name]
        label = SETTINGS[name][0]
        if len(path) < 50:
            label += " (diverges)"
        left.plot(*path[:3000].clamp(-5, 5).T, style, color=colour, linewidth=1.3, label=label)
        if len(path) > 50:
            left.plot(*path[:3000][-1], "o", color=colour, markersize=5, markeredgecolor="white", zorder=3)
        right.plot(value(path[::10]).clamp(1e-16, 1e6) if len(path) > 50 else [], style, color=colour, linewidth=1.3)
    count = max(map(len, measured.values()))
    right.set(yscale="log", xlabel="step", ylabel="f", ylim=(1e-16, 100))
    right.set_xticks(
        [0, count // 40, count // 20, count // 10 * 3 // 4, count // 10],
        [f"{k:,}" for k in (0, count // 4, count // 2, count * 3 // 4, count - 1)],
    )
    guide(left, fontsize=7.5, loc="lower left", ncols=2)


def animate(measured: dict, path) -> None:
    """60 frames: the first 8000 steps, the time running as the square of the frame's number."""
    moving = {name: points for name, points in measured.items() if len(points) > 50}
    with rc_context(RC):
        figure = Figure(figsize=(5.2, 3.9), dpi=90, layout="constrained")
        canvas, axes = FigureCanvasAgg(figure), figure.subplots()
        landscape(axes)
        lines = {
            name: axes.plot([], [], STYLES[name][1], color=STYLES[name][0], label=SETTINGS[name][0])[0]
            for name in moving
        }
        dots = {name: axes.plot([], [], "o", color=STYLES[name][0], markersize=4)[0] for name in moving}
        guide(axes, fontsize=7, loc="lower left", ncols=2)
        frames = []
        for frame in range(1, 61):
            last = math.ceil(8000 * (frame / 60) ** 2)
            for name, points in moving.items():
                lines[name].set_data(*points[: last + 1].T)
                dots[name].set_data(*points[last : last + 1].T)
            axes.set_title(f"step {last}", loc="right")
            canvas.draw()
            frames.append(Image.frombytes("RGBA", canvas.get_width_height(), canvas.buffer_rgba()).convert("RGB"))
    palette = frames[-1].quantize(64, Image.Quantize.MAXCOVERAGE)
    still = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    out = io.BytesIO()
    still[0].save(out, "gif", save_all=True, append_images=still[1:], duration=[90] * 59 + [2500], loop=0)
    write(path, out.getvalue())
