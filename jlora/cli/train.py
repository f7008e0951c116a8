"""`jlora train`: runs a training job and draws it."""

import contextlib
import logging
import os
from collections.abc import Mapping, Sequence

import jax
from rich.console import Console

from jlora.cli.show import Monitor, describe_curves, megabytes, result_table
from jlora.cli.streams import Terminal
from jlora.data.batches import Rows
from jlora.hf.chat import describe_format
from jlora.hf.load import LoadedModel
from jlora.runs.config import Config, Data
from jlora.runs.engine import Evaluation, Resumption, Snapshot, Step, StepMemory
from jlora.runs.job_data import describe_formats, describe_truncation
from jlora.runs.predict import format_answer, predict
from jlora.runs.train import BestAdapter, Event, TrainingEnd, TrainingResult, TrainingSetup
from jlora.runs.train import train as run_training
from jlora.tasks.tasks import Classes


def train(config: Config) -> TrainingResult:
    """Runs a job, or resumes an interrupted one, and prints its progress and its result.

    Raises:
        ValueError, OSError, Interrupted: as `jlora.train` does.
    """
    # Orbax and asyncio also log the errors that are raised, with tracebacks; the command prints them in one message.
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    join_processes()
    # Of several processes, only the first prints.
    with TrainingDisplay(Terminal(quiet=jax.process_index() != 0)) as display:
        return run_training(config, report=display.show)


def join_processes() -> None:
    """Joins the processes of one run if JAX's environment variables name the address of the first one."""
    if "JAX_COORDINATOR_ADDRESS" in os.environ and not jax.distributed.is_initialized():
        processes, index = (os.environ.get(name) for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID"))
        # On the clusters that JAX knows, it finds the missing numbers itself.
        jax.distributed.initialize(
            num_processes=None if processes is None else int(processes),
            process_id=None if index is None else int(index),
        )


class TrainingDisplay:
    """Draws the events of a training run on a console. As a context manager, it ends the progress bar on an error.

    Args:
        console: the console.
    """

    def __init__(self, console: Console):
        self.console = console
        self._bar = contextlib.ExitStack()
        self._monitor: Monitor | None = None
        self._config: Config | None = None
        self._history: list[Step | Evaluation] = []

    def __enter__(self) -> "TrainingDisplay":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def show(self, event: Event) -> None:
        """Draws an event."""
        match event:
            case TrainingSetup():
                self._show_setup(event)
            case StepMemory():
                self._show_memory(event)
            case Resumption():
                self._show_resumption(event)
            case Step() | Evaluation():
                assert self._monitor is not None
                self._monitor.show(event)
                self._history.append(event._replace(params=None) if isinstance(event, Evaluation) else event)
            case BestAdapter():
                self._show_hints()
            case TrainingEnd():
                self._show_end(event)
            case Snapshot():
                pass

    def _print(self, text: str) -> None:
        """Prints a text as it is: paths and data may hold characters that are markup to rich."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def _show_setup(self, event: TrainingSetup) -> None:
        self._config, job = event.job.config, event.job
        self._print(describe_setup(event))
        print_format(self.console, self._config, job.task.loaded)
        print_truncation(self.console, self._config.data, event.rows)
        if job.validation is None:
            self._print("No validation data: the adapter of the last step is kept.")
        self._monitor = Monitor(
            self.console,
            steps=job.steps,
            epochs=-(-job.steps // len(job.batches)),
            log_every=self._config.output.log_every,
            measure=job.task.measure,
            unit="examples" if type(job.task) is Classes else "tokens",
        )

    def _show_memory(self, event: StepMemory) -> None:
        total, held = megabytes(event.argument_bytes + event.temporary_bytes), megabytes(event.argument_bytes)
        self._print(
            f"A step takes {total}: {held} of parameters, optimizer state and batch, "
            f"{megabytes(event.temporary_bytes)} while it runs (the compiler's count)."
        )
        assert self._monitor is not None
        self._bar.enter_context(self._monitor.running())

    def _show_resumption(self, event: Resumption) -> None:
        for damage in event.damaged:
            self._print(f"A damaged checkpoint was deleted: {damage}.")
        self._print(f"Going on after step {event.step}.")
        self._history = list(event.past)

    def _show_hints(self) -> None:
        self._bar.close()
        assert self._config is not None
        for hint in describe_curves(self._history, self._config):
            self._print(hint)

    def _show_end(self, event: TrainingEnd) -> None:
        config = event.run.config
        self.console.print(result_table(make_table(event)))
        for warning in event.result.warnings:
            self._print(f"Warning: {warning}")
        self._print(f"Written to {config.output.folder}")
        if config.data.questions:
            for prediction in predict(event.run, config.data.questions, params=event.merged):
                self._print(format_answer(prediction))


def print_format(console: Console, config: Config, loaded: LoadedModel) -> None:
    """Prints how chats are formatted if that is not the common case."""
    note = describe_format(loaded.tokenizer) if config.data.task == "instruction" else None
    if note is not None:
        console.print(note, highlight=False, markup=False, soft_wrap=True)


def print_truncation(console: Console, data: Data, splits: Mapping[str, Rows]) -> None:
    """Prints what `max_length` cuts off or drops from each split, and how to keep it."""
    for split, rows in splits.items():
        for note in describe_truncation(data, split, rows):
            console.print(note, highlight=False, markup=False, soft_wrap=True)


def describe_setup(event: TrainingSetup) -> str:
    """Describes what will be trained, and on which data, in three lines."""
    job, counts, corpus = event.job, event.counts, event.corpus
    adapted = [row for row in counts.rows if row.rank is not None]
    ranks = "/".join(str(rank) for rank in sorted({row.rank for row in adapted if row.rank is not None}))
    scalings = "/".join(sorted({f"{row.scaling:g}" for row in adapted}))
    whole = f", and {', '.join(job.task.trained)} in full" if job.task.trained else ""
    sizes = ", ".join(f"{len(records):,} {name}" for name, records in corpus.splits.items())
    classes = f"{len(corpus.labels)} classes. " if corpus.labels else ""
    return (
        f"Training {counts.trainable:,} of {counts.total:,} parameters ({counts.percent:.2f} %): "
        f"{len(adapted)} kernels at rank {ranks}, scaling {scalings}{whole}.\n"
        f"{classes}Records: {sizes}. {job.steps:,} steps, {len(job.batches):,} to an epoch.\n"
        f"{describe_formats(corpus)}"
    )


def percent(part: int, whole: int, digits: int = 1) -> str:
    """Formats a fraction in percent; "-" if the whole is 0."""
    return f"{100 * part / whole:.{digits}f} %" if whole else "-"


def make_table(event: TrainingEnd) -> Sequence[tuple[str, str]]:
    """Returns the result as names and values."""
    result, task = event.result, event.run.task
    fraction = percent(result.trainable, result.total, digits=2)
    size = f"{megabytes(result.adapter_bytes)} of {megabytes(result.base_bytes)}"
    measures = [name for name in result.after if name != "loss" or not isinstance(task, Classes)]
    scores = []
    for name in measures:
        scores.append((f"{result.split} {name} before", f"{result.before[name]:.3f}"))
        scores.append((f"{result.split} {name} after", f"{result.after[name]:.3f}"))
    output = "logits" if type(task) is Classes else "loss"
    agreement = "differ" if result.warnings else "adapted = merged"
    best_step = str(result.best_step)
    if result.best:
        best_step += f" (validation {task.measure} {result.best[task.measure]:.3f})"
    return [
        *scores,
        ("best step" if result.best else "last step", best_step),
        ("parameters trained", f"{result.trainable:,} of {result.total:,} ({fraction})"),
        ("adapter on disk, of the base's", f"{size} ({percent(result.adapter_bytes, result.base_bytes)})"),
        (f"read back: {agreement}", f"on {event.measured} rows ({output} within {result.merged_difference:.1e})"),
        ("seconds", f"{result.seconds:.1f}"),
        ("peak memory of the process", f"{result.peak_memory_bytes / 2**20:.0f} MiB"),
    ]
