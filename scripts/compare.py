"""Compares training runs by their `metrics.jsonl` records: one page, one picture, one table.

    python scripts/compare.py RUN... --out speedrun --baseline adamw

RUN is a run directory, a folder of them (searched recursively) or a record file. Writes NAME.html, NAME.png,
NAME.csv and NAME.md. docs/compare.md says what is computed, and how.
"""

import argparse
import math
import shlex
import sys
from pathlib import Path
from typing import NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from speedrun import claims, groups, page, picture, records, report, table  # noqa: E402

from common import atomic_write  # noqa: E402

SUFFIXES = ("html", "png", "csv", "md")


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        print(f"error: {message}", file=sys.stderr)
        sys.exit(1)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(description="Compare training runs by their metrics.jsonl records.", allow_abbrev=False)
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN", help="run directory, folder of them, or metrics.jsonl file")
    add("--out", default="speedrun", metavar="NAME", help="write NAME.html, .png, .csv and .md (default: speedrun)")
    add("--baseline", metavar="NAME", help="the optimizer that speed-ups are measured against")
    add("--across", default="", metavar="SETTING,…", help="settings in which the models of different optimizers may "
        "differ, such as model.init where each brings its own initial weights")  # fmt: skip
    add("--target", type=_positive, metavar="LOSS", help="a target for every run in place of the recorded ones")
    add("--sigma", type=_positive, metavar="S", help="known standard deviation of the final loss over seeds: adds "
        "the speedrun's z-tests (track 3: 0.0013)")  # fmt: skip
    add("--loss-per-step", type=_positive, metavar="L", help="with --sigma: what one step of training is "
        "worth in loss, to compare runs of different lengths (track 3: 4.5e-5)")  # fmt: skip
    add("--track3", action="store_true", help="the rules of the NanoGPT speedrun's track 3: --target 3.28 "
        "--sigma 0.0013 --loss-per-step 4.5e-5, whichever is not given")  # fmt: skip
    add("--gain", type=_positive, default=table.GAIN, metavar="SHARE", help="of the steps, the smallest gain worth "
        "finding: what is undecided says how many seeds would find it (default: 0.05)")  # fmt: skip
    add("--published", action="store_true", help="lay published FineWeb results under the curves")
    add("--title", help="title of the page")
    add("--wandb", metavar="PROJECT", help="also log the four files as an artifact of this Weights & Biases project")
    options = parser.parse_args(arguments)
    options.out = options.out.removesuffix(".html")
    options.across = [key for key in options.across.split(",") if key]
    if options.track3:
        options.target, options.sigma = options.target or 3.28, options.sigma or 0.0013
        options.loss_per_step = options.loss_per_step or 4.5e-5
    options.loss_per_step = options.loss_per_step or 0.0
    if options.loss_per_step and not options.sigma:
        parser.error("--loss-per-step needs --sigma")
    if options.gain >= 1:
        parser.error(f"--gain {options.gain:g}: give a share of the steps below 1")
    if not Path(options.out).name or Path(options.out).is_dir():
        parser.error(f"--out {options.out}: is a folder; give the name of the files, without their ending")
    return options


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return value


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    try:
        runs = [records.read_run(path, shown) for path, shown in records.find_records(options.runs)]
        _print_warnings(runs)
        if not any(run.losses for run in runs):
            raise records.RecordError("none of these records holds a validation loss; there is nothing to draw")
        comparison = groups.compare(runs, options.target, options.baseline, options.across)
        rows = table.build(comparison, options.sigma, options.loss_per_step, options.gain)
        write(options, comparison, rows, runs)
    except (records.RecordError, groups.ComparisonError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"error: --out {options.out}: cannot write there ({error.strerror})", file=sys.stderr)
        return 1
    _print_summary(comparison, rows, options.out)
    if options.wandb:
        publish(options.wandb, options.out)
    return 0


def write(
    options: argparse.Namespace,
    comparison: groups.Comparison,
    rows: list[table.Row],
    runs: list[records.Run],
) -> None:
    """Make all four outputs before the first is written, so that a failure leaves no mixture of old and new."""
    sentences = claims.claims(comparison, rows, options.sigma, options.loss_per_step, options.gain)
    notes = [f"{run.shown_path}:{line}: {text}" for run in runs for line, text in run.warnings]
    model, data = comparison.setting["model"], comparison.setting["data"]
    title = options.title or f"Speedrun: {model or 'unknown model'} on {data or 'unknown data'}"
    drawn = report.published() if options.published else []
    outputs = {
        "html": page.render(title, comparison, rows, sentences, drawn, notes).encode(errors="replace"),
        "png": picture.draw(title, page.setting(comparison), comparison, rows, drawn),
        "csv": table.to_csv(comparison, rows).encode(errors="replace"),
        "md": report.to_markdown(title, comparison, rows, sentences, notes).encode(errors="replace"),
    }
    Path(options.out).parent.mkdir(parents=True, exist_ok=True)
    for suffix, content in outputs.items():
        with atomic_write(f"{options.out}.{suffix}") as file:
            file.write(content)


def publish(project: str, out: str) -> None:
    """Log the files as an artifact, and the page where the dashboard shows it; offline where there is no key."""
    import wandb

    from trainer.metrics.wandb import wandb_mode

    folder, name = Path(out).resolve().parent, Path(out).name  # W&B's process may have another working directory
    quiet = wandb.Settings(silent=True, console="off", disable_git=True, save_code=False, x_disable_meta=True)
    run = wandb.init(project=project, name=name, job_type="comparison", mode=wandb_mode()[0], dir=folder,
                     settings=quiet)  # fmt: skip
    artifact = wandb.Artifact(name, type="comparison")
    for suffix in SUFFIXES:
        artifact.add_file(f"{out}.{suffix}", name=f"{name}.{suffix}")
    run.log_artifact(artifact)
    run.log({"comparison": wandb.Html(Path(f"{out}.html"), inject=False)})
    where = f"offline, upload with: wandb sync {shlex.quote(str(Path(run.dir).parent))}" if run.offline else run.url
    run.finish()
    print(f"wandb {where}")


def _print_warnings(runs: list[records.Run]) -> None:
    for run in runs:
        for line, text in run.errors + run.warnings:
            print(f"warning: {run.path}{f':{line}' if line else ''}: {text}", file=sys.stderr)


def _print_summary(comparison: groups.Comparison, rows: list[table.Row], out: str) -> None:
    for run, reasons in comparison.aside:
        print(f"set aside: {run.name}: {'; '.join(reasons)}", file=sys.stderr)
    for row in rows:
        steps = row.interpolated["steps"]
        reached = f", {table.amount(steps, 'steps')} steps to {comparison.target:g}" if steps else ""
        print(f"{row.label}: n = {row.final.n}, final loss {table.amount(row.final, 'loss')}{reached}")
        if row.z_target is not None:
            print(f"    {claims.one_step(row, comparison.target)}")
    print(f"wrote {out}.html, {out}.png, {out}.csv, {out}.md")


if __name__ == "__main__":
    sys.exit(main())
