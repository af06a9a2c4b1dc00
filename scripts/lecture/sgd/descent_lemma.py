"""A mini-batch step is a gradient step with an error, and the error says how much progress is certain."""

import torch

from scripts.lecture.descend import descend, optimizer
from scripts.lecture.experiment import Check
from scripts.lecture.problems import logistic, sampler
from scripts.lecture.style import COLOURS, guide, note

TITLE = "A mini-batch as a gradient with an error"
METHODS = ("sgd",)
SIZE = (9.2, 3.9)

SIZES = (1, 5, 25, 100)


def measure(short: bool) -> dict:
    problem, steps = logistic(), 60 if short else 200
    generator, found = torch.Generator().manual_seed(9), {}
    starts = 2 * torch.randn(32, 10, generator=generator, dtype=torch.float64)
    for size in SIZES:
        x, last, rows = torch.nn.Parameter(starts.clone()), None, []
        draw_batch = sampler(problem, size, seed=10)
        for _, point in descend(optimizer("sgd", x, lr=1 / problem.smooth), x, draw_batch, steps):
            if last is not None:
                gradient = problem.full(last)
                error = x.grad - gradient
                allowed = (error.square().sum(-1) - gradient.square().sum(-1)) / (2 * problem.smooth)
                longer = error.norm(dim=-1) > gradient.norm(dim=-1)
                rows.append(torch.stack([problem.value(point) - problem.value(last), allowed, longer.double()]))
            last = point.clone()
        found[size] = torch.cat(rows, dim=1)
    return found


def check(measured: dict) -> list[Check]:
    change, allowed, longer = torch.cat(list(measured.values()), dim=1)
    ascends, longer = change > 1e-12, longer.bool()
    return [
        Check("steps checked", float(len(change)), low=1000),
        Check(
            "largest excess of a change over what the inequality allows", (change - allowed).max().item(), high=1e-12
        ),
        Check("ascending steps where ‖e‖ ≤ ‖∇f‖", ascends[~longer].double().sum().item(), high=0),
        Check("share of ascending steps where ‖e‖ > ‖∇f‖", ascends[longer].double().mean().item(), low=0.1),
    ]


def draw(measured: dict, figure) -> None:
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    for (size, (change, allowed, _)), colour in zip(measured.items(), COLOURS, strict=False):
        left.scatter(allowed[::7], change[::7], s=5, color=colour, alpha=0.6, label=f"batch {size}")
    left.axline((0, 0), slope=1, color="black", linewidth=1)
    left.set(
        xlabel=r"$(\|e\|^2 - \|\nabla f\|^2)\,/\,2L$",
        ylabel=r"$f(x_{k+1}) - f(x_k)$",
        xlim=(-1.2, 1.2),
        ylim=(-1.2, 1.2),
    )
    note(left, "forbidden", 0.2, 0.8, rotation=38)
    guide(left, markerscale=2, loc="lower right")
    for offset, wanted, label, colour in ((-0.2, 0, "‖e‖ ≤ ‖∇f‖", COLOURS[1]), (0.2, 1, "‖e‖ > ‖∇f‖", COLOURS[0])):
        shares = []
        for change, _, longer in measured.values():
            there = change[longer == wanted]
            shares.append(100 * (there > 1e-12).double().mean().item() if len(there) else 0)
        bars = right.bar([i + offset for i in range(len(SIZES))], shares, 0.38, color=colour, label=label)
        right.bar_label(bars, fmt="%.0f", fontsize=8)
    right.set(
        xticks=range(len(SIZES)), xticklabels=SIZES, xlabel="batch size", ylabel="steps that ascend, %", ylim=(0, 125)
    )
    guide(right, loc="upper left", ncols=2)
