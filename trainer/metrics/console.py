"""What rank 0 shows while it trains: a bar in a terminal, otherwise lines."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

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
            columns = ("step", MofNCompleteColumn(), BarColumn(bar_width=None), "{task.fields[text]}")
            times = TextColumn("{task.fields[times]}", style="cyan")
            self.bar = Progress(*columns, times, console=self.console, refresh_per_second=4, expand=True)
            self.task = self.bar.add_task("train", total=self.steps, completed=step, text="", times="")
            self.bar.start()

    def update(self, line: Mapping[str, Any]) -> None:
        """Show a line of the record: its keys are those of metrics.jsonl."""
        self.latest |= {key: value for key, value in line.items() if value is not None}
        step, seconds = line["step"], line["train_time_s"]
        left = f", {duration(seconds / step * (self.steps - step))} left" if step else ""
        times = f"{duration(seconds)} trained{left}"
        if self.bar:
            self.bar.update(self.task, completed=step, text=self.describe(self.latest), times=times)
        elif "val/loss" in line or step % max(1, self.steps // LINES_PER_RUN) == 0 or step == self.steps:
            self.message(f"step {step}/{self.steps}  {self.describe(line)}  {times}")
        if "sample" in line:
            self.message("  | " + line["sample"].replace("\n", "\n  | "))

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


def duration(seconds: float) -> str:
    """3.1 s, 4:05 or 2:03:04."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
