"""Run the lecture: every claim measured and checked, every figure and table of docs/lecture written anew.

    python scripts/lecture/run.py                     everything, some minutes on a CPU
    python scripts/lecture/run.py figure=norms        one topic
    python scripts/lecture/run.py figure=noise_ball   one experiment
    python scripts/lecture/run.py figure=speedrun records=runs/cpu_speedrun   with the CPU track of these runs

A claim that does not hold is an error: the experiment's figure and table stay as they were.
"""

import sys
import time
from pathlib import Path

import hydra
import torch
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from scripts.lecture import pages, style  # noqa: E402
from scripts.lecture.experiment import TOPIC_OF, load  # noqa: E402
from scripts.lecture.speedrun import curves  # noqa: E402
from scripts.lecture.topics import TOPICS  # noqa: E402
from scripts.speedrun.records import RecordError  # noqa: E402


def chosen(figure: str) -> list[str]:
    """The experiments that `figure=` names, in the lecture's order; exits with one line if it names none."""
    names = list(TOPIC_OF) if figure == "all" else [n for n in TOPIC_OF if figure in (n, TOPIC_OF[n])]
    if not names:
        sys.exit(f"error: figure={figure}: choose all, a topic ({', '.join(TOPICS)}) or one of {', '.join(TOPIC_OF)}")
    return names


def run(name: str, docs: Path) -> list[str]:
    """Measure, check, draw and write one experiment; returns the claims that failed."""
    experiment = load(name)
    torch.manual_seed(0)
    measured = experiment.measure(short=False)
    checks = experiment.check(measured)
    if failed := [str(check) for check in checks if not check.holds]:
        return failed
    style.write(docs / "figures" / f"{name}.png", style.picture(experiment, measured))
    if hasattr(experiment, "animate"):
        experiment.animate(measured, docs / "figures" / f"{name}.gif")
    pages.write_checks(docs, name, checks)
    return []


@hydra.main(".", "run", version_base="1.3")
def main(config: DictConfig) -> None:
    GlobalHydra.instance().clear()  # gpt.py composes the configuration of train.py
    torch.set_num_threads(1)  # sums in the same order everywhere, so that a second run writes the same numbers
    docs, console, failures = ROOT / config.docs, Console(), []
    if config.records:
        try:
            aside = curves.write_curves(ROOT / config.records)
        except RecordError as error:
            sys.exit(f"error: records={config.records}: {error}")
        console.print(f"wrote {curves.FILE.relative_to(ROOT)}; {aside} runs are not comparable and left out")
    columns = (TextColumn("{task.description:<22}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        names = chosen(config.figure)
        task = progress.add_task("", total=len(names))
        for name in names:
            progress.update(task, description=name)
            start = time.perf_counter()
            failed = run(name, docs)
            failures += [f"error: {name}: {text}" for text in failed]
            verdict = "does not hold" if failed else "holds"
            progress.console.print(f"{name:<22} {verdict} ({time.perf_counter() - start:.1f} s)", highlight=False)
            progress.advance(task)
    pages.write_maps(docs)
    if failures:
        sys.exit("\n".join(failures))


if __name__ == "__main__":
    main()
