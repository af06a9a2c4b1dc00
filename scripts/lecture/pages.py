"""The Markdown of docs/lecture: a page per topic, made of its experiments' sections, and the index."""

import re
from pathlib import Path

from scripts.lecture.experiment import TOPIC_OF, Check, load, source_of, test_of
from scripts.lecture.slides import METHODS, SLIDES
from scripts.lecture.style import write
from scripts.lecture.topics import TOPICS

ANCHOR = re.compile(r'^(?=<a id="\w+"></a>$)', re.MULTILINE)


def write_section(docs: Path, name: str, checks: list[Check]) -> None:
    """Put the experiment's section into its topic's page; sections of the others stay as they are."""
    path = docs / f"{TOPIC_OF[name]}.md"
    sections = {}
    for part in ANCHOR.split(path.read_text())[1:] if path.exists() else []:
        sections[part.split('"')[1]] = part.strip()
    sections[name] = section(name, checks)
    title, introduction, names = TOPICS[TOPIC_OF[name]]
    number = list(TOPICS).index(TOPIC_OF[name]) + 1
    head = f"# {number}. {title}\n\n{introduction} [Index](README.md)\n\nWritten by `python scripts/lecture/run.py`."
    body = [sections[n] for n in names if n in sections]
    write(path, ("\n\n".join([head, *body]) + "\n").encode())


def section(name: str, checks: list[Check]) -> str:
    experiment = load(name)
    rows = [f"| {check.what} | {check.measured} | {check.required} |" for check in checks]
    slides = [f"*{russian}* ({english})" for russian, english, names in SLIDES if name in names]
    parts = [
        f'<a id="{name}"></a>\n\n## {experiment.TITLE}',
        f"Slides: {'; '.join(slides)}.",
        formulas(f"**Claim.** {experiment.CLAIM}"),
        f"![{experiment.TITLE}](figures/{name}.png)",
        formulas(experiment.CAPTION),
        *([f"![{experiment.TITLE}, animated](figures/{name}.gif)"] if hasattr(experiment, "animate") else []),
        "\n".join(["| measured | value | required |", "|---|---|---|", *rows]),
        *([formulas(f"**Correction.** {experiment.CORRECTION}")] if experiment.CORRECTION else []),
        f"Methods: {', '.join(f'`{m}`' for m in experiment.METHODS) or 'none'}. "
        f"Code: [`{source_of(name)}`](../../{source_of(name)}). Test: `{test_of(name)}`.",
    ]
    return "\n\n".join(part.strip() for part in parts)


def formulas(text: str) -> str:
    """One line of Markdown a paragraph, with $…$ and $$…$$ in the form that GitHub shields from its own markup."""
    text = " ".join(text.split())
    text = re.sub(r"\s*\$\$(.+?)\$\$\s*", r"\n\n```math\n\1\n```\n\n", text)
    return re.sub(r"\$([^$`]+)\$", r"$`\1`$", text).strip()


def write_index(docs: Path) -> None:
    write(docs / "README.md", index().encode())


def index() -> str:
    lines = [
        "# The lecture, executable",
        'The lecture is "Стохастический градиентный спуск. Адаптивные методы. Оптимизация нейронных сетей" '
        '("Stochastic gradient descent. Adaptive methods. Optimization of neural networks", week 14 of a course on '
        "convex optimization by D. Merkulov and P. Ostroukhov). Every claim of it is an experiment here: a small file "
        "that states the claim, runs it with this repository's optimizers, checks it and draws it. "
        "`python scripts/lecture/run.py` writes these pages and figures; a claim that does not hold is an error. "
        "`tests/lecture` runs every experiment in a shorter form.",
        "\n".join(f"{i}. [{title}]({topic}.md)" for i, (topic, (title, _, _)) in enumerate(TOPICS.items(), 1)),
        "## From slide to experiment to test",
        "A test `[NAME]` is `pytest 'tests/lecture/test_claims.py::test_claim[NAME]'`.",
        "\n".join(
            ["| slide | in English | experiment: file | test |", "|---|---|---|---|"]
            + [_slide_row(russian, english, names) for russian, english, names in SLIDES]
        ),
        "## From method to experiment to test",
        "\n".join(
            ["| method of the lecture | `optim=` | experiment | test |", "|---|---|---|---|"]
            + [_method_row(*entry) for entry in METHODS]
        ),
        "Named on one slide, without a formula, and not run here: quasi-Newton methods, of which it says, as of "
        "momentum, that they do not improve the rate of SGD.",
        "## Corrections of the slides",
        "\n".join(f"- [{load(n).TITLE}]({TOPIC_OF[n]}.md#{n})" for n in TOPIC_OF if load(n).CORRECTION),
    ]
    return "\n\n".join(lines) + "\n"


def _slide_row(russian: str, english: str, names: tuple[str, ...]) -> str:
    files = "<br>".join(f"[{n}]({TOPIC_OF[n]}.md#{n}): [`{source_of(n)}`](../../{source_of(n)})" for n in names)
    return f"| {russian} | {english} | {files} | {_tests(names)} |"


def _method_row(method: str, presets: tuple[str, ...], names: tuple[str, ...]) -> str:
    choices = ", ".join(f"[`{preset}`](../../configs/optim/{preset}.yaml)" for preset in presets)
    links = ", ".join(f"[{n}]({TOPIC_OF[n]}.md#{n})" for n in names)
    return f"| {method} | {choices} | {links} | {_tests(names)} |"


def _tests(names: tuple[str, ...]) -> str:
    return ", ".join(f"`[{n}]`" for n in names)
