"""What the runs write into docs/lecture: the tables between <!-- NAME --> and <!-- /NAME -->. All else is by hand."""

import re
from pathlib import Path

from scripts.lecture.experiment import TOPIC_OF, Check, load, source_of, test_of
from scripts.lecture.slides import METHODS, SLIDES
from scripts.lecture.style import write
from scripts.lecture.topics import TOPICS

ANCHOR = re.compile(r'^<a id="(\w+)"></a>$', re.MULTILINE)


def write_checks(docs: Path, name: str, checks: list[Check]) -> None:
    """Put what was measured into the experiment's place in its page."""
    path = docs / f"{TOPIC_OF[name]}.md"
    rows = [(check.what.replace("|", r"\|"), check.measured, check.required) for check in checks]
    _write(path, filled(path, {name: table(("measured", "value", "required"), rows)}))


def write_maps(docs: Path) -> None:
    """Write the tables that lead from slides and methods to experiments, at the end of the index and of every page."""
    for path, text in maps(docs).items():
        _write(path, text)


def maps(docs: Path) -> dict[Path, str]:
    """The index and the pages, as they are with these tables."""
    pages = {docs / f"{topic}.md": names for topic, names in TOPICS.items()}
    return {path: filled(path, {"map": _page_map(names)}) for path, names in pages.items()} | {
        docs / "README.md": filled(
            docs / "README.md", {"slides": _slides(), "methods": _methods(), "corrections": _corrections(pages)}
        )
    }


def filled(path: Path, contents: dict[str, str]) -> str:
    """The file's text with these contents in their places. Raises ValueError where it lacks one."""
    text = path.read_text(encoding="utf-8")
    for name, content in contents.items():
        before, start, rest = text.partition(f"<!-- {name} -->\n")
        _, end, after = rest.partition(f"<!-- /{name} -->\n")
        if not end:
            raise ValueError(f"{path.name} has no place <!-- {name} --> … <!-- /{name} -->")
        text = f"{before}{start}\n{content}\n\n{end}{after}"
    return text


def sections(path: Path) -> dict[str, str]:
    """The text that follows each experiment's anchor, up to the next."""
    parts = ANCHOR.split(path.read_text(encoding="utf-8"))
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ("---",) * len(head), *rows)).replace("| --- ", "|---")


def _page_map(names: tuple[str, ...]) -> str:
    rows = []
    for name in names:
        slides = "<br>".join(f"*{russian}* ({english})" for russian, english, shown in SLIDES if name in shown)
        methods = ", ".join(f"`{method}`" for method in load(name).METHODS) or "none"
        rows.append((f"[{name}](#{name})", slides, methods, _source(name), f"`{test_of(name)}`"))
    return table(("experiment", "slides", "methods", "code", "test"), rows)


def _slides() -> str:
    rows = []
    for russian, english, names in SLIDES:
        files = "<br>".join(f"{_link(name)}: {_source(name)}" for name in names)
        rows.append((russian, english, files, _tests(names)))
    return table(("slide", "in English", "experiment: file", "test"), rows)


def _methods() -> str:
    rows = []
    for method, presets, names in METHODS:
        choices = ", ".join(f"[`{preset}`](../../configs/optim/{preset}.yaml)" for preset in presets)
        rows.append((method, choices, ", ".join(map(_link, names)), _tests(names)))
    return table(("method of the lecture", "`optim=`", "experiment", "test"), rows)


def _corrections(pages: dict[Path, tuple[str, ...]]) -> str:
    corrected = [name for path in pages for name, text in sections(path).items() if "**Correction" in text]
    return "\n".join(f"- [{load(name).TITLE}]({TOPIC_OF[name]}.md#{name})" for name in corrected)


def _link(name: str) -> str:
    return f"[{name}]({TOPIC_OF[name]}.md#{name})"


def _source(name: str) -> str:
    return f"[`{source_of(name)}`](../../{source_of(name)})"


def _tests(names: tuple[str, ...]) -> str:
    return ", ".join(f"`[{n}]`" for n in names)


def _write(path: Path, text: str) -> None:
    write(path, text.encode())
