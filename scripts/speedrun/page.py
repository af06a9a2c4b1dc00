"""The comparison as one HTML file, with plotly's script, the figures and the table inside it.

It asks the network for nothing: the policy in its head makes the browser refuse, should a script ever try.
"""

import json
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from plotly.offline import get_plotlyjs

from . import page_data, table
from .claims import NO_CLAIM, Claim, scope
from .groups import Comparison
from .records import SHOWN
from .statistics import CONFIDENCE
from .style import DARK, LIGHT
from .table import Row

HERE = Path(__file__).parent
SCRIPTS = ("page_record.js", "page_view.js", "page.js", "page_traces.js", "page_controls.js")  # one scope


def render(
    title: str,
    comparison: Comparison,
    rows: list[Row],
    claims: list[Claim],
    published: list[dict[str, Any]],
    notes: list[str],
) -> str:
    """The whole page as text. `notes` are the warnings of the records, one line each."""
    data = page_data.build(comparison, rows, published)
    return Template(_asset("page.html")).substitute(
        title=escape(title),
        setting=escape(setting(comparison)),
        lead=escape(_lead(comparison, rows, claims)),
        style=Template(_asset("page.css")).substitute(light=_palette(LIGHT), dark=_palette(DARK)),
        chips=_chips(data),
        published=_published_note(comparison) if published else "",
        table=_table(comparison, rows) if rows else "<p>No run here can be compared with another.</p>",
        claims=_claims(claims),
        scope=escape(scope(comparison)),
        runs=_runs(data["runs"]),
        notes=f'<p class="note">{"<br>".join(escape(note) for note in notes)}</p>' if notes else "",
        plotly=get_plotlyjs(),
        data=json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c"),
        script="\n".join(map(_asset, SCRIPTS)),
    )


def setting(comparison: Comparison) -> str:
    """One line: model, data, batch and target that the compared runs share."""
    known = [(key, comparison.setting[key]) for key in SHOWN if comparison.setting[key] is not None]
    parts = [f"{v:,} {k.replace('_', ' ')}" if isinstance(v, int) else str(v) for k, v in known]
    return " · ".join(parts + ([] if comparison.target is None else [f"target {comparison.target:g}"]))


def legend(comparison: Comparison, rows: list[Row]) -> str:
    """How to read the table."""
    target, baseline, paired = comparison.target, comparison.baseline, any(row.pairs for row in rows)
    parts = ["Means over seeds ± standard error."]
    if target is not None:
        parts.append(
            f"Costs to {target:g} are interpolated between evaluations; “evaluated” is the first evaluation at or "
            "below it. A cost is given only where every seed reached the target. "
            f"p (loss < {target:g}): one-sample t-test, one-sided."
        )
    if target is not None and baseline:
        parts.append(
            f"Speed-up: ratio of geometric means of the interpolated costs, with the {CONFIDENCE:.0%} interval of "
            "Welch's t on the logarithms."
        )
    if baseline:
        parts.append(
            f"p (loss ≠ {baseline.label}): Welch's t-test, two-sided; Holm: adjusted for the number of comparisons."
        )
    if paired:
        parts.append(
            f"Δ loss at the same seeds: final loss less {baseline.label}'s, with the {CONFIDENCE:.0%} interval of "
            "Student's t over the pairs. Worth in steps: how long before its end the better run of a pair had reached "
            "the other's final loss."
        )
    parts += [f"The models differ in {key}: {_shared(values)}." for key, values in comparison.across.items()]
    return " ".join(parts)


def _shared(values: dict[str, Any]) -> str:
    """VALUE of these groups, VALUE of those."""
    by_value: dict[str, list[str]] = {}
    for label, value in values.items():
        by_value.setdefault(str(value), []).append(label)
    return "; ".join(f"{value} of {', '.join(labels)}" for value, labels in by_value.items())


def _asset(name: str) -> str:
    return (HERE / name).read_text(encoding="utf-8")


def _palette(colours: tuple[str, ...]) -> str:
    return " ".join(f"--c{i}: {colour};" for i, colour in enumerate(colours))


def _lead(comparison: Comparison, rows: list[Row], claims: list[Claim]) -> str:
    runs = sum(row.final.n for row in rows)
    if not rows:
        return "None of these runs can be compared yet; the reasons are listed with the runs below."
    faster = [claim for claim in claims if claim.faster]
    if faster:
        first, *rest = [c.text[0].lower() + c.text[1:] for c in faster if c.label == faster[0].label]
        return f"{faster[0].label} {first}" + "".join(f" It {text}" for text in rest)
    if comparison.target is None:
        return f"{runs} runs of {len(rows)} optimizer settings, without a target (eval.target) to compare the cost of."
    if comparison.baseline:
        return f"These {runs} runs show no speed-up over {comparison.baseline.label}."
    return f"{runs} runs of {len(rows)} optimizer settings. Speed-ups need a baseline to be named (--baseline)."


def _chips(data: dict[str, Any]) -> str:
    chips = [
        f'<button type="button" class="chip" data-group="{i}"><svg width="16" height="16" viewBox="0 0 16 16" '
        f'fill="var(--c{group["colour"]})" aria-hidden="true"><path d="{group["outline"]}"/></svg>'
        f"{escape(group['label'])}<small>n = {group['seeds']}</small></button>"
        for i, group in enumerate(data["groups"])
    ]
    if data["published"]:
        chips.append('<button type="button" class="chip" data-flip="published" data-loss-only>- - published</button>')
    return "".join(chips)


def _published_note(comparison: Comparison) -> str:
    data = str(comparison.setting["data"])
    other = "" if "fineweb" in data.lower() else f"The runs here are on {escape(data)}: the two cannot be compared. "
    return (
        '<p class="note" data-loss-only>Dashed and hollow: published figures for GPT-2 124M on FineWeb at '
        f"524,288 tokens a step on 8×H100, not run here. {other}"
        '<span id="published-note">They carry no time for this machine and are drawn '
        "against steps and tokens only.</span></p>"
    )


def _table(comparison: Comparison, rows: list[Row]) -> str:
    headings, body = table.cells(comparison, rows)
    head = "".join(f'<th scope="col">{escape(heading)}</th>' for heading in headings)
    lines = []
    for line in body:
        first, *rest = [escape(main) + (f"<small>{escape(small)}</small>" if small else "") for main, small in line]
        lines.append(f'<tr><th scope="row">{first}</th>{"".join(f"<td>{cell}</td>" for cell in rest)}</tr>')
    return (
        f'<div class="scroll"><table id="results"><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody>'
        f'</table></div><p class="note">{escape(legend(comparison, rows))}</p>'
    )


def _claims(claims: list[Claim]) -> str:
    if not claims:
        return f"<p>{NO_CLAIM}</p>"
    marks = {True: '<span class="mark shown">shown</span>', False: '<span class="mark">not shown</span>'}
    parts = []
    for label in dict.fromkeys(claim.label for claim in claims):
        items = [f"<li>{marks[claim.shown]}{escape(claim.text)}</li>" for claim in claims if claim.label == label]
        parts.append(f"<div><h3>{escape(label)}</h3><ul>{''.join(items)}</ul></div>")
    return f'<div class="claims">{"".join(parts)}</div>'


def _runs(runs: list[dict[str, Any]]) -> str:
    lines = []
    for i, run in enumerate(runs):
        loss = run["curves"][0]
        last = loss["values"][-1] if loss else None
        status = "compared" if run["group"] is not None else f"set aside: {'; '.join(run['reasons'])}"
        texts = [status, run["label"], run["seed"], "–" if last is None else f"{last:.4f}", run["shown_path"]]
        box = f'<label><input type="checkbox" data-run="{i}">{escape(run["name"])}</label>'
        lines.append(f"<tr><td>{box}</td>{''.join(f'<td>{escape(text)}</td>' for text in texts)}</tr>")
    names = ("run", "status", "optimizer", "seed", "last loss", "record")
    head = "".join(f'<th scope="col">{name}</th>' for name in names)
    aside = sum(run["group"] is None for run in runs)
    summary = f"{len(runs) - aside} runs compared" + (f", {aside} set aside" if aside else "")
    return (
        f'<details id="runs"{" open" if aside else ""}><summary>{summary}</summary><div class="scroll">'
        f'<table class="runs"><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div></details>'
    )
