"""The comparison as Markdown, and the published figures that it may be laid over."""

import json
from pathlib import Path
from typing import Any

from . import table
from .claims import NO_CLAIM, Claim, scope
from .groups import Comparison
from .page import legend, setting
from .table import Row

PUBLISHED = Path(__file__).parents[1] / "published_curves.json"


def published() -> list[dict[str, Any]]:
    """Published figures as columns: name, source, steps, tokens, loss."""
    stored = json.loads(PUBLISHED.read_text(encoding="utf-8"))
    result = []
    for entry in stored["entries"]:
        steps, losses = zip(*entry["points"], strict=True)
        tokens = [step * stored["batch_tokens"] for step in steps]
        columns = {"steps": list(steps), "tokens": tokens, "loss": list(losses)}
        result.append({"name": entry["name"], "source": entry["source"], **columns})
    return result


def to_markdown(title: str, comparison: Comparison, rows: list[Row], claims: list[Claim], notes: list[str]) -> str:
    """The table, the sentences, what was set aside and what is odd about the records."""
    parts = [f"# {_plain(title)}", _plain(setting(comparison))]
    if rows:
        parts += [_table(comparison, rows), _plain(legend(comparison, rows))]
    parts.append("## What may be claimed")
    if not claims:
        parts.append(NO_CLAIM)
    for label in dict.fromkeys(claim.label for claim in claims):
        parts.append(f"**{_plain(label)}**")
        parts.append(_list(f"{'shown' if c.shown else 'not shown'}: {c.text}" for c in claims if c.label == label))
    parts.append(_plain(scope(comparison)))
    if comparison.aside:
        aside = (f"{run.name} (`{run.shown_path}`): {'; '.join(reasons)}" for run, reasons in comparison.aside)
        parts += ["## Set aside", _list(aside)]
    if notes:
        parts += ["## Notes on the records", _list(notes)]
    return "\n\n".join(parts) + "\n"


def _table(comparison: Comparison, rows: list[Row]) -> str:
    headings, body = table.cells(comparison, rows)
    lines = [[f"{main} ({second})" if main and second else main or second for main, second in line] for line in body]
    rule = ["---"] + ["---:"] * (len(headings) - 1)
    return "\n".join(f"| {' | '.join(_plain(cell) for cell in line)} |" for line in [headings, rule, *lines])


def _list(items) -> str:
    return "\n".join(f"- {_plain(item)}" for item in items)


def _plain(text: str) -> str:
    """Text from records must not become markup."""
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")
