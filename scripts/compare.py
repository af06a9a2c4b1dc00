"""Compares training runs by their `metrics.jsonl` records: one page, one picture, one table.

    python scripts/compare.py RUN... --out speedrun --baseline adamw

RUN is a run directory, a folder of them (searched recursively) or a record file. Writes NAME.html, NAME.png, NAME.csv and
NAME.md. What is computed, and how, stands in docs/compare.md.
"""

import argparse
import math
import os
import sys
import tempfile
from pathlib import Path

from speedrun import claims, groups, page, picture, records, report, table


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Compare training runs by their metrics.jsonl records.", allow_abbrev=False
    )
    parser.add_argument(
        "runs",
        nargs="+",
        type=Path,
        metavar="RUN",
        help="run directory, folder of them, or metrics.jsonl file",
    )
    parser.add_argument(
        "--out",
        default="speedrun",
        metavar="NAME",
        help="write NAME.html, .png, .csv and .md (default: speedrun)",
    )
    parser.add_argument(
        "--baseline", metavar="NAME", help="the optimizer that speed-ups are measured against"
    )
    parser.add_argument(
        "--target", type=_positive, metavar="LOSS", help="use this target for every run, not the recorded one"
    )
    parser.add_argument(
        "--sigma",
        type=_positive,
        metavar="S",
        help="known standard deviation of the final loss: adds the z-tests (speedrun track 3: 0.0013)",
    )
    parser.add_argument(
        "--loss-per-step",
        type=_positive,
        default=0.0,
        metavar="L",
        help="with --sigma: loss that one step of training is worth, to compare different lengths (track 3: 4.5e-5)",
    )
    parser.add_argument(
        "--published", action="store_true", help="lay published FineWeb results under the curves"
    )
    parser.add_argument("--title", help="title of the page")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    try:
        found = records.find_records(options.runs)
        runs = [records.read_run(path, place) for path, place in found]
        comparison = groups.compare(runs, options.target, options.baseline)
        if not any(run.losses for run in runs):
            raise records.RecordError(
                f"{runs[0].path}: {runs[0].faults[0][1]}; no run here has a validation loss to draw"
            )
        write(options, comparison, runs)
    except (records.RecordError, groups.ComparisonError) as error:
        return _fail(str(error))
    except OSError as error:
        return _fail(f"--out {options.out}: cannot write {error.filename or ''} ({error.strerror})")
    return 0


def write(options: argparse.Namespace, comparison: groups.Comparison, runs: list[records.Run]) -> None:
    """Make all four outputs before the first is written, so that a failure leaves no mixture of old and new."""
    rows = table.build(comparison, options.sigma, options.loss_per_step)
    sentences = claims.claims(comparison, rows, options.sigma, options.loss_per_step)
    notes = [f"{run.place}:{line}: {text}" for run in runs for line, text in run.warnings]
    setting = page.setting(comparison)
    title = (
        options.title
        or f"Speedrun: {comparison.setting['model'] or 'runs'} on {comparison.setting['data'] or 'unknown data'}"
    )
    drawn = report.published() if options.published else []
    outputs = {
        "html": page.render(title, comparison, rows, sentences, drawn, notes).encode(),
        "png": picture.draw(title, setting, comparison, rows, drawn),
        "csv": table.to_csv(comparison, rows).encode(),
        "md": report.to_markdown(title, setting, comparison, rows, sentences, notes).encode(),
    }
    name = options.out.removesuffix(".html")
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    for suffix, content in outputs.items():
        _replace(Path(f"{name}.{suffix}"), content)
    _say(comparison, rows, runs, name)


def _say(comparison: groups.Comparison, rows: list[table.Row], runs: list[records.Run], name: str) -> None:
    for run in runs:
        for line, text in run.faults + run.warnings:
            print(f"warning: {run.path}{f':{line}' if line else ''}: {text}", file=sys.stderr)
    for run, reasons in comparison.aside:
        print(f"set aside: {run.name}: {'; '.join(reasons)}", file=sys.stderr)
    for row in rows:
        reached = (
            f", {table.amount(row.interpolated['steps'], 'steps')} steps to {comparison.target:g}"
            if row.interpolated["steps"]
            else ""
        )
        print(f"{row.group.label}: n = {row.final.n}, final loss {table.amount(row.final, 'loss')}{reached}")
    print(f"wrote {name}.html, {name}.png, {name}.csv, {name}.md")


def _replace(path: Path, content: bytes) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _positive(text: str) -> float:
    value = float(text)
    if not (math.isfinite(value) and value > 0):
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def _fail(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
