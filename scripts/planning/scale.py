"""The same run on 1 to 1,024 ranks: a table and a picture."""

from collections.abc import Sequence
from pathlib import Path

from planning.costs import Costs, compose
from planning.step import projected, step_time
from planning.text import size

from common import UserError, atomic_write

RANKS = [2**n for n in range(11)]


def scaled(overrides: Sequence[str], device: str) -> tuple[list[Costs], dict[int, str]]:
    """The costs on as many ranks as can share the batch, and why others cannot.

    Raises UserError: none can.
    """
    found, faults = [], {}
    for ranks in RANKS:
        try:
            found.append(Costs(compose(overrides, device, ranks), device))
        except UserError as error:
            faults[ranks] = str(error)
    if not found:
        raise UserError(faults[RANKS[0]])
    return found, faults


def table(every: Sequence[Costs], efficiency: float) -> list[str]:
    """A line per number of ranks, under a line of names."""
    lines = ["ranks   mode   passes       peak      state  matrix rules   exchange    weights  collectives"]
    if projected(every[0]):
        lines[0] += "     an update     tokens/s  GPU-hours"
    for costs in every:
        memory, (_, _, busiest) = costs.memory(costs.train.micro_batch), costs.flops()
        (sent, exchanges), (in_rings, calls) = costs.exchange_traffic(), costs.model_traffic()
        line = f"{costs.ranks:5} {costs.mode:>6} {costs.passes:>3} x {costs.train.micro_batch:<3}"
        line += f"{size(memory['peak']):>10} {size(memory['optimizer state']):>10} {busiest / 1e12:>7,.3f} TFLOP"
        line += f" {size(max(sent)):>10} {size(in_rings):>10} {(exchanges + calls).total():>12}"
        if projected(costs):
            seconds = sum(step_time(costs, efficiency).values())
            hours = seconds * costs.train.steps / 3600 * costs.ranks
            line += f" {seconds * 1e3:>10,.1f} ms {costs.train.batch_tokens / seconds:>12,.0f} {hours:>10,.2f}"
        lines.append(line)
    return lines


def draw(every: Sequence[Costs], efficiency: float, path: Path) -> None:
    """PNG: memory of the fullest rank, bytes that the busiest rank sends, and, where it is projected, an update's time,
    each by part."""
    from matplotlib.figure import Figure

    ranks = [costs.ranks for costs in every]
    memory = [costs.memory(costs.train.micro_batch) for costs in every]
    sent = [(max(costs.exchange_traffic()[0]), costs.model_traffic()[0]) for costs in every]
    panels = {
        "memory of the fullest rank (GB)": {
            part: [of.get(part, 0) / 1e9 for of in memory]
            for part in ("peak", "activations", "optimizer state", "weights", "gathered weights", "exchange buckets")
        },
        "sent in an update (GB)": {
            "matrix exchange": [exchanged / 1e9 for exchanged, _ in sent],
            "weights, gradients": [moved / 1e9 for _, moved in sent],
        },
    }
    if projected(every[0]):
        times = [step_time(costs, efficiency) for costs in every]
        whole = {"an update": [sum(parts.values()) * 1e3 for parts in times]}
        panels["projected time (ms)"] = whole | {part: [of[part] * 1e3 for of in times] for part in times[0]}
    figure = Figure(figsize=(5 * len(panels), 4.5), dpi=120, layout="constrained")
    for axes, (title, curves) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        for name, values in curves.items():
            axes.plot(ranks, [value or None for value in values], marker="o", markersize=3, label=name)
        axes.set(xscale="log", yscale="log", xlabel="ranks", title=title)
        axes.set_xticks(ranks, ranks, fontsize=8)
        axes.minorticks_off()
        axes.grid(alpha=0.25)
        axes.legend(fontsize=7, frameon=False)
    name, tokens = every[0].config.run.name, every[0].train.batch_tokens
    figure.suptitle(f"{name} on {every[0].device}, {tokens:,} tokens an update")
    with atomic_write(path) as file:
        figure.savefig(file, format="png")
