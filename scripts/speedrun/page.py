"""The comparison as one HTML file: plotly's own script, the figures and the table inside it; it asks the network for nothing."""

import json
import math
from html import escape
from pathlib import Path
from typing import Any

from plotly.offline import get_plotlyjs

from . import table
from .claims import Claim, scope
from .groups import UNITS, Comparison
from .records import SETTING, Run
from .style import DARK, LIGHT, SHAPES, looks
from .table import Row

HERE = Path(__file__).parent
# Nothing may be loaded: should a script here ever try, the browser refuses.
POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:; font-src data:; form-action 'none'; base-uri 'none'"


def render(
    title: str,
    comparison: Comparison,
    rows: list[Row],
    claims: list[Claim],
    published: list[dict[str, Any]],
    notes: list[str],
) -> str:
    """The whole page as text. `notes` are the warnings of the records, one line each."""
    data = _data(comparison, rows, published)
    style = (HERE / "page.css").read_text(encoding="utf-8")
    for theme, colours in (("LIGHT", LIGHT), ("DARK", DARK)):
        style = style.replace(
            f"/*{theme}*/", "".join(f"--c{i}: {colour}; " for i, colour in enumerate(colours))
        )
    payload = json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    runs = sum(len(row.group.runs) for row in rows)
    parts = [
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>',
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<style>{style}</style>",
        "<script>document.documentElement.dataset.theme = "
        'matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";</script></head><body><main>',
        f"<header><div><h1>{escape(title)}</h1><p class=setting>{escape(setting(comparison))}</p></div>"
        '<button id=theme type=button aria-label="switch between light and dark">'
        '<svg width=14 height=14 viewBox="0 0 14 14" fill=none stroke=currentColor stroke-width=1.6><circle cx=7 cy=7 r=6 />'
        '<path d="M7 1v12a6 6 0 0 0 0-12z" fill=currentColor /></svg><span></span></button></header>',
        f"<p class=lead>{escape(_lead(comparison, rows, claims))}</p>",
        _chart(data, published),
        '<section hidden><h2>Speed-up to the target, in <span id="ratio-unit"></span></h2><div id=ratios></div></section>',
        f"<section><h2>Results</h2>{_table(comparison, rows)}<p class=note>{escape(legend(comparison))}</p></section>"
        if rows
        else "",
        f"<section><h2>What may be claimed</h2>{_claims(claims)}<p class=note>{escape(scope(comparison))}</p></section>",
        f"<section>{_runs(data['runs'], runs)}{_notes(notes)}</section>",
        "<footer>Made by scripts/compare.py from the runs' metrics.jsonl records.</footer></main>",
        f"<script>{get_plotlyjs()}</script>",
        f"<script id=data type=application/json>{payload}</script>",
        f"<script>{(HERE / 'page.js').read_text(encoding='utf-8')}</script></body></html>\n",
    ]
    return "\n".join(parts)


def legend(comparison: Comparison) -> str:
    """How to read the table."""
    text = "Means over seeds ± standard error."
    if comparison.target is not None:
        text += (
            f" Costs to {comparison.target:g} are interpolated between evaluations; below them, the first evaluation at or "
            "below it. A cost is given only where every seed reached the target."
        )
    if comparison.baseline is not None:
        text += (
            " Speed-up: ratio of geometric means of the interpolated costs, with the 95% interval of Welch's t on the "
            "logarithms. p (loss ≠ baseline): Welch's t-test, two-sided; Holm: adjusted for the number of comparisons."
        )
    return text + (
        " p (loss < target): one-sample t-test, one-sided." if comparison.target is not None else ""
    )


def _data(comparison: Comparison, rows: list[Row], published: list[dict[str, Any]]) -> dict[str, Any]:
    groups = [row.group for row in rows]
    runs = [_run(run, i, []) for i, group in enumerate(groups) for run in group.runs]
    runs += [_run(run, None, reasons) for run, reasons in comparison.aside]
    return {
        "target": comparison.target,
        "baseline": comparison.baseline and comparison.baseline.label,
        "one_device": len({device for group in groups for device in group.devices}) <= 1,
        "runs": runs,
        "groups": [
            _group(row, look) for row, look in zip(rows, looks(groups, comparison.baseline), strict=True)
        ],
        "published": published,
    }


def _group(row: Row, look: tuple[int, int]) -> dict[str, Any]:
    hit = {
        unit: {"value": cost.mean, "error": cost.error, "text": f"{unit}: {table.amount(cost, unit)}"}
        for unit, cost in row.interpolated.items()
        if cost
    }
    ratio = {unit: [value.value, value.low, value.high] for unit, value in row.speedup.items() if value}
    return {
        "label": row.group.label,
        "seeds": len(row.group.runs),
        "colour": look[0],
        "shape": SHAPES[look[1]][0],
        "curve": {key: _rounded(values) for key, values in row.group.curve().items()},
        "hit": hit or None,
        "ratio": ratio or None,
    }


def _run(run: Run, group: int | None, reasons: list[str]) -> dict[str, Any]:
    return {
        "name": run.name,
        "label": run.label or "unknown optimizer",
        "group": group,
        "seed": run.seed,
        "model": run.header.get("model"),
        "data": run.header.get("data"),
        "device": run.device,
        "place": run.place,
        "reasons": reasons,
        "steps": run.steps,
        "tokens": _rounded(run.tokens),
        "seconds": _rounded(run.seconds),
        "loss": _rounded(run.losses),
    }


def _rounded(values: list[float]) -> list[float | None]:
    return [float(f"{value:.7g}") if math.isfinite(value) else None for value in values]


def setting(comparison: Comparison) -> str:
    """One line: model, data, batch and target that the compared runs share."""
    parts = [
        f"{value:,} {key.replace('_', ' ')}" if isinstance(value, int) else str(value)
        for key in SETTING
        if (value := comparison.setting[key]) is not None
    ]
    if comparison.target is not None:
        parts.append(f"target {comparison.target:g}")
    return " · ".join(parts)


def _lead(comparison: Comparison, rows: list[Row], claims: list[Claim]) -> str:
    runs = sum(len(row.group.runs) for row in rows)
    if not rows:
        return "None of these runs can be compared yet; the reasons are listed with the runs below."
    fast = [claim for claim in claims if claim.shown and claim.text.startswith("Reaches")]
    if fast:
        both = [claim.text.rstrip(".") for claim in fast if claim.label == fast[0].label]
        return (
            f"{fast[0].label} {both[0][0].lower()}{both[0][1:]}"
            + "".join(f". It {text[0].lower()}{text[1:]}" for text in both[1:])
            + "."
        )
    if comparison.baseline is not None:
        return f"These {runs} runs show no speed-up over {comparison.baseline.label}."
    several = f"{len(rows)} optimizers" if len(rows) > 1 else "1 optimizer"
    return f"{several}, {runs} runs. Speed-ups need a baseline to be named."


def _chart(data: dict[str, Any], published: list[dict[str, Any]]) -> str:
    def choice(name: str, options: dict[str, str], what: str) -> str:
        buttons = "".join(
            f"<button type=button data-set={name} data-value={value}>{text}</button>"
            for value, text in options.items()
        )
        return f'<div class=choice role=group aria-label="{what}">{buttons}</div>'

    names = {"seconds": "Time", "steps": "Steps", "tokens": "Tokens"}
    controls = [
        choice("unit", {unit: names[unit] for unit in UNITS}, "horizontal axis"),
        choice("mode", {"mean": "Mean and range", "runs": "Single runs"}, "curves"),
        choice("view", {"end": "Finish", "all": "All"}, "part shown"),
        '<div class=choice role=group aria-label="logarithmic axes"><button type=button data-flip=logX>log x</button>'
        "<button type=button data-flip=logY>log y</button></div>",
    ]
    chips = "".join(
        f"<button type=button class=chip data-group={i}>{_swatch(group)}{escape(group['label'])}"
        f"<small>n = {group['seeds']}</small></button>"
        for i, group in enumerate(data["groups"])
    )
    note = "Lines: means over seeds at the steps that all were evaluated at; bands: lowest to highest seed."
    extra = ""
    if published:
        chips += "<button type=button class=chip data-flip=published>- - published</button>"
        extra = (
            "<p class=note>Dashed and hollow: figures published for GPT-2 124M on FineWeb at 524,288 tokens a step on "
            "8×H100, not run here. <span id=published-note>They carry no time for this machine, so they are drawn against "
            "steps and tokens only.</span></p>"
        )
    return (
        f"<section><div class=controls>{''.join(controls)}</div><div id=chart></div><div class=legend>{chips}</div>"
        f"<p class=note>{note}</p>{extra}</section>"
    )


def _swatch(group: dict[str, Any]) -> str:
    shape = {
        "circle": "<circle cx=8 cy=8 r=5 />",
        "square": "<rect x=3.5 y=3.5 width=9 height=9 />",
        "diamond": '<path d="M8 2l6 6-6 6-6-6z"/>',
        "triangle-up": '<path d="M8 3l6 10H2z"/>',
        "triangle-down": '<path d="M8 13l6-10H2z"/>',
        "cross": '<path d="M6 3h4v3h3v4h-3v3H6v-3H3V6h3z"/>',
        "star": '<path d="M8 1.5l2 4.3 4.7.6-3.5 3.2.9 4.7L8 12l-4.1 2.3.9-4.7L1.3 6.4 6 5.8z"/>',
        "hexagon": '<path d="M5 2.8h6l3 5.2-3 5.2H5L2 8z"/>',
    }[group["shape"]]
    return f'<svg width=16 height=16 viewBox="0 0 16 16" fill="var(--c{group["colour"]})" aria-hidden=true>{shape}</svg>'


def _table(comparison: Comparison, rows: list[Row]) -> str:
    headings, body = table.cells(comparison, rows)
    head = "".join(f"<th scope=col>{escape(heading)}</th>" for heading in headings)
    lines = []
    for line in body:
        cells = [
            f"{escape(main)}{f'<small>{escape(second)}</small>' if second else ''}" for main, second in line
        ]
        lines.append(
            f"<tr><th scope=row>{cells[0]}</th>{''.join(f'<td>{cell}</td>' for cell in cells[1:])}</tr>"
        )
    return f"<div class=scroll><table id=results><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"


def _claims(claims: list[Claim]) -> str:
    parts = []
    for label in dict.fromkeys(claim.label for claim in claims):
        items = "".join(
            f'<li><span class="mark{" shown" if claim.shown else ""}">{"shown" if claim.shown else "not shown"}</span>'
            f"{escape(claim.text)}</li>"
            for claim in claims
            if claim.label == label
        )
        parts.append(f"<div><h3>{escape(label)}</h3><ul>{items}</ul></div>")
    if not parts:
        return "<p>Nothing: there is neither a target nor a baseline to compare with.</p>"
    return f"<div class=claims>{''.join(parts)}</div>"


def _runs(runs: list[dict[str, Any]], used: int) -> str:
    lines = []
    for i, run in enumerate(runs):
        last = f"{run['loss'][-1]:.4f}" if run["loss"] and run["loss"][-1] is not None else "–"
        cells = [
            f"<label><input type=checkbox data-run={i}>{escape(run['name'])}</label>",
            escape(run["label"]),
            escape(str(run["seed"] if run["seed"] is not None else "–")),
            last,
            escape("; ".join(run["reasons"])) if run["reasons"] else "compared",
            f"<small>{escape(run['place'])}</small>",
        ]
        lines.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    head = "".join(
        f"<th scope=col>{text}</th>" for text in ("run", "optimizer", "seed", "last loss", "status", "record")
    )
    aside = len(runs) - used
    return (
        f"<details id=runs{' open' if aside else ''}><summary>{used} runs compared{f', {aside} set aside' if aside else ''}</summary>"
        f"<div class=scroll><table class=runs><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table></div></details>"
    )


def _notes(notes: list[str]) -> str:
    return f"<p class=note>{'<br>'.join(escape(note) for note in notes)}</p>" if notes else ""
