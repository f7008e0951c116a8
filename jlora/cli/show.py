"""What a training run looks like: a progress bar, a table, a picture."""

import contextlib
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from jlora.recipes.classify import Epoch, Step


class Monitor:
    """Follows a run: a live bar on a terminal, one plain line an epoch elsewhere."""

    def __init__(self, console: Console, epochs: int):
        self.console = console
        self.epochs = epochs
        self.live = console.is_terminal
        self.accuracy = "-"
        self.mark = time.perf_counter()
        self.questions, self.seconds = 0, 0.0
        self.bar = Progress(
            TextColumn("epoch {task.fields[epoch]}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}"),
            TextColumn("validation accuracy {task.fields[accuracy]}"),
            TextColumn("{task.fields[rate]} examples/s"),
            TimeRemainingColumn(),
            console=console,
            disable=not self.live,
        )
        self.task = self.bar.add_task("train", epoch=f"1/{epochs}", loss="-", accuracy="-", rate="-", total=None)

    @contextlib.contextmanager
    def running(self) -> Iterator["Monitor"]:
        """Shows the bar while inside."""
        self.mark = time.perf_counter()
        with self.bar:
            yield self

    def show(self, event: Step | Epoch) -> None:
        """Brings the bar up to date, or prints a line."""
        now = time.perf_counter()
        if isinstance(event, Step):
            self.questions, self.seconds = self.questions + event.questions, self.seconds + now - self.mark
            rate = f"{event.questions / (now - self.mark):.0f}"
            self.bar.update(
                self.task,
                completed=event.step,
                total=event.steps,
                epoch=f"{event.epoch}/{self.epochs}",
                loss=f"{event.loss:.3f}",
                rate=rate,
            )
        else:
            accuracy = f"{event.validation.accuracy:.3f}"
            self.bar.update(self.task, accuracy=accuracy)
            if not self.live:
                self.console.print(
                    f"epoch {event.epoch}/{self.epochs}  loss {event.loss:.3f}"
                    f"  validation accuracy {accuracy}  {self.questions / self.seconds:.0f} examples/s"
                    + ("  best" if event.best else ""),
                    highlight=False,
                    soft_wrap=True,
                )
            self.questions, self.seconds = 0, 0.0
        # An epoch's event comes after its evaluation, which is no training time.
        self.mark = time.perf_counter()


def result_table(rows: Sequence[tuple[str, str]]) -> Table:
    """Two columns: what, and how much."""
    table = Table(show_header=False)
    table.add_column(style="bold")
    table.add_column(justify="right")
    for row in rows:
        table.add_row(*row)
    return table


def learning_curve(path: Path, steps: Sequence[Step], epochs: Sequence[Epoch]) -> None:
    """Draws both losses, and validation accuracy, over the steps; a PNG."""
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    FigureCanvasAgg(figure)
    losses, accuracy = figure.subplots(1, 2)
    ends = [epoch.step for epoch in epochs]
    losses.plot([step.step for step in steps], [step.loss for step in steps], label="training")
    losses.plot(ends, [epoch.validation.loss for epoch in epochs], "o-", label="validation")
    losses.set(xlabel="step", ylabel="cross entropy", ylim=(0, None))
    losses.legend()
    accuracy.plot(ends, [epoch.validation.accuracy for epoch in epochs], "o-", color="C1")
    best = [epoch for epoch in epochs if epoch.best][-1]
    accuracy.annotate(
        f"best: {best.validation.accuracy:.3f}",
        (best.step, best.validation.accuracy),
        xytext=(0, -14),
        textcoords="offset points",
        ha="right",
    )
    accuracy.set(xlabel="step", ylabel="validation accuracy", ylim=(0, 1.02))
    for axes in (losses, accuracy):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def megabytes(size: float) -> str:
    """Bytes in MB, of 10^6 bytes."""
    return f"{size / 1e6:.2f} MB"
