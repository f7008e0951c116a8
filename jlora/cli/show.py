"""What a terminal shows of a training run: a progress bar, tables and hints."""

import contextlib
import time
from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from jlora.runs.config import Config
from jlora.runs.curves import rising, stalled
from jlora.runs.engine import Evaluation, Step


class Monitor:
    """Follows a run: a live bar on a terminal; elsewhere a plain line every `log_every` steps and at each evaluation.

    Args:
        console: where to.
        steps: steps in all.
        epochs: passes over the data there will be.
        log_every: steps to a plain line.
        measure: the metric that is shown, "loss" or one of an evaluation's.
        unit: what the rate counts, "tokens" or "examples".
    """

    def __init__(self, console: Console, *, steps: int, epochs: int, log_every: int, measure: str, unit: str):
        self.console, self.steps, self.epochs, self.log_every = console, steps, epochs, log_every
        self.measure, self.unit = measure, unit
        self.live = console.is_terminal
        self.mark = time.perf_counter()
        self.count, self.seconds, self.loss = 0, 0.0, float("nan")
        self.bar = Progress(
            TextColumn("epoch {task.fields[epoch]}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}"),
            TextColumn(f"validation {measure} {{task.fields[value]}}"),
            TextColumn(f"{{task.fields[rate]}} {unit}/s"),
            TextColumn("lr {task.fields[learning_rate]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not self.live,
        )
        fields: dict[str, Any] = {"epoch": f"1/{epochs}", "loss": "-", "value": "-", "rate": "-", "learning_rate": "-"}
        self.task = self.bar.add_task("train", total=steps, **fields)

    @contextlib.contextmanager
    def running(self) -> Iterator["Monitor"]:
        """Shows the bar while inside."""
        self.mark = time.perf_counter()
        with self.bar:
            yield self

    def show(self, event: Step | Evaluation) -> None:
        """Brings the bar up to date, or prints a line."""
        now = time.perf_counter()
        if isinstance(event, Step):
            count = event.tokens if self.unit == "tokens" else event.targets
            self.count, self.seconds, self.loss = self.count + count, self.seconds + now - self.mark, event.loss
            rate = f"{count / (now - self.mark):,.0f}"
            self.bar.update(
                self.task,
                completed=event.step,
                epoch=f"{event.epoch}/{self.epochs}",
                loss=f"{event.loss:.3f}",
                rate=rate,
                learning_rate=f"{event.learning_rate:.1e}",
            )
            if event.step % self.log_every == 0:
                self.print(
                    f"step {event.step}/{self.steps}  epoch {event.epoch}/{self.epochs}  loss {event.loss:.3f}"
                    f"  {rate} {self.unit}/s  lr {event.learning_rate:.1e}"
                )
        else:
            value = f"{event.value(self.measure):.3f}"
            self.bar.update(self.task, value=value)
            self.print(
                f"epoch {event.epoch}/{self.epochs}  step {event.step}  loss {self.loss:.3f}"
                f"  validation {self.measure} {value}  {self.count / max(self.seconds, 1e-9):,.0f} {self.unit}/s"
                + ("  best" if event.best else "")
            )
            self.count, self.seconds = 0, 0.0
        # An evaluation's event comes after it, which is no training time.
        self.mark = time.perf_counter()

    def print(self, line: str) -> None:
        """Prints a plain line where there is no bar."""
        if not self.live:
            self.console.print(line, highlight=False, markup=False, soft_wrap=True)


def result_table(rows: Sequence[tuple[str, str]]) -> Table:
    """Two columns: what, and how much."""
    table = Table(show_header=False)
    table.add_column(style="bold")
    table.add_column(justify="right")
    for row in rows:
        # A path may hold brackets, which are markup to rich.
        table.add_row(*map(escape, row))
    return table


def describe_curves(events: Sequence[Step | Evaluation], config: Config) -> list[str]:
    """Hints for the next run: a larger rank if training stalled, a smaller one if the validation loss rose."""
    rank = config.adapter.rank
    rise = rising([event.loss for event in events if isinstance(event, Evaluation)])
    if rise is not None:
        smaller = f"a smaller rank than {rank}, " if rank > 1 else ""
        return [
            f"Validation loss rose from {rise.low:.3f} to {rise.last:.3f} since evaluation {rise.place + 1} "
            f"of {rise.of}: try {smaller}more dropout, or a lower learning rate. The best adapter was kept."
        ]
    loss = stalled([event.loss for event in events if isinstance(event, Step)])
    if loss is None or rank >= 64:
        return []
    return [f"Training loss stalled at {loss:.3f} with rank {rank}: try rank {2 * rank}, or a higher learning rate."]


def megabytes(size: float) -> str:
    """Bytes in MB, of 10^6 bytes."""
    return f"{size / 1e6:.2f} MB"
