"""`jlora sweep`: trains a job at many ranks at once, and prints which of them to use."""

import contextlib
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from jlora.cli.streams import Terminal
from jlora.cli.train import print_format, print_truncation
from jlora.errors import JloraValueError, count
from jlora.runs.config import Config, Range
from jlora.runs.job_data import describe_formats
from jlora.runs.sweep import Judged, Progressed, SweepResult
from jlora.runs.sweep_job import FALLS, MEMBERS, SweepEvent, SweepSetup, name_of, run_sweep
from jlora.runs.sweep_report import PAGE


def sweep(
    config: Config,
    out: Path,
    *,
    ranks: str,
    learning_rates: str | None,
    seeds: str | None,
    metric: str | None,
    tolerance: float | None,
    memory: str | None,
    at_once: int | None,
    overwrite: bool,
) -> SweepResult:
    """Trains a job's grid, writes the report and prints the recommendation.

    Args:
        config: the job; the grid replaces its rank, learning rate and seed.
        out: the folder to write.
        ranks: the ranks to try, separated by commas.
        learning_rates: the learning rates to try; None for the job's own.
        seeds: the seeds to train each of them with; None for the job's own.
        metric: the metric that decides; None for the task's own.
        tolerance: how much worse than the best a smaller rank may be; None for one standard error.
        memory: available memory, as "24GB"; None for that of the device.
        at_once: number of members computed side by side; None for what suits the device.
        overwrite: replace an earlier sweep in `out`.

    Raises:
        ValueError: a flag holds something else than numbers, or as `run_sweep` does.
        OSError: as `run_sweep` does.
    """
    options, console = config.optimisation, Terminal()
    grid: dict[str, Any] = {
        "ranks": numbers("ranks", ranks, int, config.adapter.rank, Range(1)),
        "learning_rates": numbers("lr", learning_rates, float, options.learning_rate, Range(0, above=True)),
        "seeds": numbers("seeds", seeds, int, options.seed, Range(0, 2**32 - 1)),
    }
    with SweepDisplay(console) as display:
        result = run_sweep(
            config,
            out,
            **grid,
            metric=metric,
            tolerance=tolerance,
            memory=memory,
            at_once=at_once,
            overwrite=overwrite,
            report=display.show,
        )
    console.print(str(result), highlight=False, markup=False, soft_wrap=True)
    chosen = out / MEMBERS / name_of(result.chosen.member)
    console.print(f"Written to {out / PAGE}; the adapter: {chosen}", highlight=False, markup=False, soft_wrap=True)
    return result


class SweepDisplay:
    """Draws the events of a sweep on a console. As a context manager, it ends the progress bar.

    Args:
        console: the console.
    """

    def __init__(self, console: Console):
        self.console = console
        self._bar = contextlib.ExitStack()
        self._show_progress: Callable[[Judged | Progressed], None] | None = None

    def __enter__(self) -> "SweepDisplay":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def show(self, event: SweepEvent) -> None:
        """Draws an event."""
        if isinstance(event, SweepSetup):
            print_format(self.console, event.config, event.loaded)
            self.console.print(describe_formats(event.corpus), highlight=False, markup=False, soft_wrap=True)
            print_truncation(self.console, event.config.data, event.rows)
            self._show_progress = self._bar.enter_context(progress(self.console, event.metric))
        else:
            assert self._show_progress is not None
            self._show_progress(event)


def numbers(name: str, text: str | None, kind: Callable[[str], Any], own: Any, limits: Range) -> list[Any]:
    """The numbers of a flag, or the job's own.

    Raises:
        ValueError: some are not numbers, or out of range; they are listed.
    """
    if text is None:
        return [own]
    found, wrong = [], []
    expected = "a whole number" if kind is int else "a number"
    for part in text.split(","):
        try:
            value = kind(part.strip())
        except ValueError:
            wrong.append(f"{part.strip()!r}  expected: {expected}")
            continue
        if math.isfinite(value) and value in limits:
            found.append(value)
        else:
            wrong.append(f"{part.strip()!r}  expected: {expected} {limits}")
    if wrong:
        what = "whole numbers" if kind is int else "numbers"
        fix = f"give {what} with commas between them, as in --{name} {'4,8,16' if kind is int else '1e-3,2e-3'}."
        problem = f"--{name} {text!r} has {count(len(wrong), 'value')} that can't be used."
        raise JloraValueError("sweep", problem, wrong, fix)
    return found


@contextlib.contextmanager
def progress(console: Console, metric: str) -> Iterator[Callable[[Judged | Progressed], None]]:
    """Shows the progress of a sweep: a bar on a terminal, a line per evaluation elsewhere."""
    best: dict[int, float] = {}
    better = min if metric in FALLS else max
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[state]}"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )
    task = bar.add_task("sweep", total=None, state="")

    def show(event: Judged | Progressed) -> None:
        if isinstance(event, Judged):
            value = event.metrics[metric]
            if event.best and not math.isnan(value):
                best[event.member.rank] = better(value, best.get(event.member.rank, value))
            if not console.is_terminal:
                mark = "  best" if event.best else ""
                line = f"step {event.step}  {event.member}  validation {metric} {value:.4f}{mark}"
                console.print(line, highlight=False, soft_wrap=True)
            return
        number, groups = event.group
        name = "sweep" if groups == 1 else f"group {number} of {groups}"
        leader = f"  best {metric} {', '.join(f'{rank}: {value:.3f}' for rank, value in best.items())}" if best else ""
        bar.update(
            task,
            description=name,
            completed=event.step,
            total=event.steps,
            state=f"{len(event.losses)} members{leader}",
        )

    with bar:
        yield show
