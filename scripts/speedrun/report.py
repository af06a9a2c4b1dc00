"""The comparison as Markdown, and the published figures that it may be laid over."""

import json
from pathlib import Path
from typing import Any

from . import table
from .claims import Claim, scope
from .groups import Comparison
from .page import legend
from .table import Row

PUBLISHED = Path(__file__).parents[1] / "published_curves.json"


def published() -> list[dict[str, Any]]:
    """Published figures as columns: name, source, steps, tokens, loss."""
    stored = json.loads(PUBLISHED.read_text(encoding="utf-8"))
    batch = stored["batch_tokens"]
    return [
        {
            "name": entry["name"],
            "source": entry["source"],
            "steps": [step for step, _ in entry["points"]],
            "tokens": [step * batch for step, _ in entry["points"]],
            "loss": [loss for _, loss in entry["points"]],
        }
        for entry in stored["entries"]
    ]


def to_markdown(
    title: str, setting: str, comparison: Comparison, rows: list[Row], claims: list[Claim], notes: list[str]
) -> str:
    parts = [f"# {_plain(title)}", _plain(setting)]
    if rows:
        headings, body = table.cells(comparison, rows)
        lines = [[f"{main} ({second})" if second else main for main, second in line] for line in body]
        rule = ["---"] + ["---:"] * (len(headings) - 1)
        parts += [
            "\n".join(
                f"| {' | '.join(_plain(cell) for cell in line)} |" for line in [headings, rule, *lines]
            ),
            legend(comparison),
        ]
    parts.append("## What may be claimed")
    for label in dict.fromkeys(claim.label for claim in claims):
        sentences = [
            f"- {'shown' if claim.shown else 'not shown'}: {_plain(claim.text)}"
            for claim in claims
            if claim.label == label
        ]
        parts.append(f"**{_plain(label)}**\n\n" + "\n".join(sentences))
    parts.append(_plain(scope(comparison)))
    if comparison.aside:
        parts.append("## Set aside")
        parts.append(
            "\n".join(
                f"- {_plain(run.name)} (`{run.place}`): {_plain('; '.join(reasons))}"
                for run, reasons in comparison.aside
            )
        )
    if notes:
        parts.append("## Notes on the records")
        parts.append("\n".join(f"- {_plain(note)}" for note in notes))
    return "\n\n".join(parts) + "\n"


def _plain(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")
