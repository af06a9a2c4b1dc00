"""What rank 0 shows while it trains: a bar in a terminal, otherwise lines."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn
from rich.table import Table
from rich.text import Text

LINES_PER_RUN = 20  # beside those of evaluations


class Display:
    """Shows the latest losses and speed.

    Args:
        steps: length of the run.
        console: where to; its ``is_terminal`` decides between bar and lines.
    """

    def __init__(self, steps: int, console: Console | None = None):
        self.steps = steps
        self.console = console or Console(soft_wrap=True, highlight=False)
        self.latest: dict[str, float] = {}
        self.bar: Progress | None = None

    def start(self, step: int = 0) -> None:
        if self.console.is_terminal:
            columns = [
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(bar_width=None),
                TextColumn("{task.fields[text]}"),
            ]
            self.bar = Progress(*columns, _Times(), console=self.console, refresh_per_second=4, expand=True)
            self.task = self.bar.add_task("train", total=self.steps, completed=step, text="", seconds=0.0, eta=None)
            self.bar.start()

    def update(self, line: Mapping[str, Any]) -> None:
        """Show a line of the record: its keys are those of metrics.jsonl."""
        self.latest |= {key: value for key, value in line.items() if value is not None}
        step, seconds = line["step"], line["train_time_s"]
        eta = seconds / step * (self.steps - step) if step else None
        if self.bar:
            self.bar.update(self.task, completed=step, text=self.describe(self.latest), seconds=seconds, eta=eta)
        elif "val/loss" in line or step % max(1, self.steps // LINES_PER_RUN) == 0 or step == self.steps:
            times = f"{duration(seconds)} trained" + (f", {duration(eta)} left" if eta is not None else "")
            self.message(f"step {step}/{self.steps}  {self.describe(line)}  {times}")

    def describe(self, line: Mapping[str, Any]) -> str:
        """Losses, tokens/s and MFU, those that there are."""
        shown = [("train/loss", "train {:.4f}"), ("val/loss", "val {:.4f}"), ("perf/tokens_per_s", "{:,.0f} tokens/s")]
        words = [form.format(line[key]) for key, form in shown if line.get(key) is not None]
        if line.get("perf/mfu") is not None:
            words.append(f"MFU {100 * line['perf/mfu']:.1f}%")
        return "  ".join(words)

    def message(self, text: str) -> None:
        """Print above the bar."""
        self.console.print(text, markup=False)

    def table(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Which tensors go to which optimizer: one row per role."""
        table = Table(*rows[0], box=None, pad_edge=False, header_style="bold")
        for row in rows:
            table.add_row(*(f"{value:,}" if isinstance(value, int) else str(value) for value in row.values()))
        self.console.print(table)

    def stop(self) -> None:
        if self.bar:
            self.bar.stop()
            self.bar = None


class _Times(ProgressColumn):
    """Training time so far and what is left of it."""

    def render(self, task: Task) -> Text:
        eta = "" if task.fields["eta"] is None else f" < {duration(task.fields['eta'])}"
        return Text(f"{duration(task.fields['seconds'])}{eta}", style="cyan")


def duration(seconds: float) -> str:
    """3.1 s, 4:05 or 2:03:04."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
