"""`jlora train`: from a config to a saved adapter that was seen to work."""

import contextlib
import functools
import json
import logging
import os
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from rich.console import Console

from jlora.cli import show
from jlora.cli.show import Monitor, learning_curve, megabytes, result_table
from jlora.cli.streams import Terminal
from jlora.data.batches import Row, Rows, balance_classes, check_targets, make_rows, pack
from jlora.data.holdout import hold_out
from jlora.data.readers import Corpus, read_corpus
from jlora.errors import count
from jlora.hf.chat import describe_format
from jlora.hf.load import LoadedModel, find_folder
from jlora.runs import folder as runs
from jlora.runs.agreement import coarsest_dtype, compare
from jlora.runs.config import Config, Data, fields_of
from jlora.runs.engine import (
    Compiled,
    Evaluation,
    Job,
    Resumed,
    Snapshot,
    Step,
    can_be_written,
    check_training,
    fit,
    nulled,
)
from jlora.runs.folder import Run
from jlora.runs.predict import answers
from jlora.runs.start import choose_tokenizer, start_adapter
from jlora.tasks.tasks import Classes, Scores
from jlora.tree.summary import Summary, summary
from jlora.tree.wrapping import merge

# Rows of the training data that a run without other data is measured on.
MOST_MEASURED = 1000


class Result(NamedTuple):
    """What a run came to.

    Attributes:
        asked: what `before` and `after` were measured on: "test", or else "validation", or else the first rows of
            "train".
        before: loss and metrics with a new adapter, and a new head if there is one.
        after: with the adapter as it was read back from disk.
        best_step: the step that was kept.
        best: its validation loss and metrics; empty where the last step was kept, without validation data.
        trainable: parameters trained.
        total: parameters of the base with its head.
        adapter_bytes: size on disk of the adapter and the leaves trained in full.
        base_bytes: size on disk of the base's weights.
        merged_difference: the largest difference between adapted and merged logits, or that of the mean losses where
            the task has no logits.
        seconds: wall time of this process from the first file read to the last check.
        peak_memory_bytes: the most memory the process held resident.
        warnings: what to look into before the adapter is used; empty where there is nothing.
    """

    asked: str
    before: dict[str, float]
    after: dict[str, float]
    best_step: int
    best: dict[str, float]
    trainable: int
    total: int
    adapter_bytes: int
    base_bytes: int
    merged_difference: float
    seconds: float
    peak_memory_bytes: int
    warnings: tuple[str, ...] = ()


class Learnt(NamedTuple):
    """What is left when training is over, beside the files.

    Attributes:
        asked: the split that the result is measured on.
        rows: its rows.
        before: what the model made of them with a new adapter.
        kept: the step whose adapter was kept.
        best: the validation loss and metrics then; empty without validation data.
        counts: what was trained.
    """

    asked: str
    rows: list[Row]
    before: Scores
    kept: int
    best: dict[str, float]
    counts: Summary


def train(config: Config) -> Result:
    """Runs a job, or goes on with one that was stopped: trains, reads the adapter back, shows and writes the result.

    Raises:
        ValueError: the config, the data or the model can't be used; nothing has been written then.
        OSError: a file is missing, or the output folder holds a run or can't be written to.
        Stopped: a signal stopped the run, which can be gone on with.
    """
    start = time.perf_counter()
    # Orbax logs with a traceback what it raises too, and is then told of in words.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    join_processes()
    # On several hosts one process speaks and writes.
    console, folder = Terminal(quiet=jax.process_index() != 0), config.output.folder
    check_training(config)
    runs.check_folder(config)
    with runs.FolderLock("train", folder) as lock:
        return train_locked(config, lock, console, start)


def train_locked(config: Config, lock: runs.FolderLock, console: Console, start: float) -> Result:
    """Runs a job in a folder that no other process writes to; `start` is when the process began, for the result."""
    folder, mesh = config.output.folder, runs.read_mesh(config)
    learnt = learn(config, mesh, console, lock)

    # All that trained has left the memory by now, and the base is loaded once more.
    run = runs.load_run(folder, mesh=mesh)
    after, merged_params = run.task.score(run.params, learnt.rows), merge(run.params)
    merged_scores = run.task.score(merged_params, learnt.rows, merged=True)
    agreement = compare(after, merged_scores, coarsest_dtype(config.model))
    result = Result(
        learnt.asked,
        {"loss": learnt.before.loss, **learnt.before.metrics},
        {"loss": after.loss, **after.metrics},
        learnt.kept,
        learnt.best,
        learnt.counts.trainable,
        learnt.counts.total,
        runs.bytes_on_disk(folder / runs.ADAPTER),
        sum(
            path.stat().st_size for path in find_folder(config.model.name, config.model.revision).glob("*.safetensors")
        ),
        agreement.difference,
        time.perf_counter() - start,
        peak_memory(),
        () if agreement.warning is None else (agreement.warning,),
    )
    finish(config, console, result, run, merged_params, len(learnt.rows))
    return result


def join_processes() -> None:
    """Joins the processes of one run, where JAX's variables in the environment name the first one's address."""
    if "JAX_COORDINATOR_ADDRESS" in os.environ and not jax.distributed.is_initialized():
        processes, own = (os.environ.get(name) for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID"))
        # What is left out JAX finds for itself on the clusters it knows.
        jax.distributed.initialize(
            num_processes=None if processes is None else int(processes), process_id=None if own is None else int(own)
        )


def learn(config: Config, mesh: Mesh | None, console: Console, lock: runs.FolderLock) -> Learnt:
    """Trains, or goes on with it, until the best adapter is on the disk."""
    data = config.data
    corpus = read(config)
    loaded = runs.place_base(runs.load_base(config, corpus.labels), mesh)
    loaded = choose_tokenizer(config, loaded, resume=runs.check_folder(config))
    task = runs.make_task(config, loaded, corpus.labels, mesh)
    started = start_adapter(config, loaded, task.trained, corpus.labels)
    params = runs.place_params(started, loaded.model, mesh)
    counts = summary(params, task.trained)
    # State and moments of what trains, for every checkpoint that is kept and the two being written.
    runs.check_folder(config, needed=3 * 4 * counts.trainable * (config.run.keep + 2))
    rows = {name: rows_of(config, loaded.tokenizer, corpus, name) for name in corpus.splits}
    check_targets("train", {name: found.rows for name, found in rows.items()}, data.max_length)
    task.check_vocabulary("train", {name: found.rows for name, found in rows.items()})
    validation = rows["validation"].rows if "validation" in rows else None
    job = Job(config=config, task=task, params=params, rows=rows["train"].rows, validation=validation, mesh=mesh)
    console.print(opening(counts, corpus, task, job), highlight=False, soft_wrap=True)
    print_format(console, config, loaded)
    print_truncation(console, data, rows)
    if validation is None:
        console.print("No validation data: the adapter of the last step is kept.", highlight=False)
    asked = next(name for name in ("test", "validation", "train") if name in rows)
    measured = rows[asked].rows[: MOST_MEASURED if asked == "train" else None]
    before = task.score(params, measured)

    def write() -> None:
        # Checked again: until the lock was acquired, another run may have written here.
        resume = runs.check_folder(config)
        with can_be_written(config.output.folder):
            runs.begin_run(config, corpus.labels, corpus.answers, tokenizer=loaded.tokenizer, resume=resume)

    def begin() -> None:
        # No process may find what another has begun to write.
        wait_for_all("folder checked")
        lock.acquire()
        runs.on_first_process("train", write)

    kept, best = follow(job, console, begin)
    wait_for_all("run written")
    return Learnt(asked, measured, before, kept, best, counts)


def print_format(console: Console, config: Config, loaded: LoadedModel) -> None:
    """Prints how chats are written where that is not the common case."""
    note = describe_format(loaded.tokenizer) if config.data.task == "instruction" else None
    if note is not None:
        console.print(note, highlight=False, markup=False, soft_wrap=True)


def wait_for_all(what: str) -> None:
    """Waits until all processes are here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


def read(config: Config) -> Corpus:
    """All that the job reads."""
    data = config.data
    sources = {"train": data.train, "validation": data.validation, "test": data.test}
    corpus = read_corpus(
        {name: source for name, source in sources.items() if isinstance(source, Path)},
        data.task,
        fields=fields_of(config.data),
        format=data.format,
        unit=data.unit,
        answers=data.answers,
        allow_overlap=data.allow_overlap,
    )
    return corpus if data.validation is not None else hold_out(corpus, data.holdout, data.holdout_seed)


def rows_of(config: Config, tokenizer: Any, corpus: Corpus, split: str) -> Rows:
    """A split's rows, packed and weighed where the config says so."""
    data = config.data
    found = make_rows(tokenizer, corpus.splits[split], max_length=data.max_length, labels=corpus.labels)
    if split == "train" and config.optimisation.class_weights is not None:
        found = found._replace(rows=balance_classes(found.rows))
    packs = data.pack and data.task in ("causal_lm", "instruction")
    return found._replace(rows=pack(found.rows, data.max_length)) if packs else found


def print_truncation(console: Console, data: Data, splits: Mapping[str, Rows]) -> None:
    """Prints what `max_length` leaves out of each split, and what to do."""
    for split, rows in splits.items():
        for note in truncation_notes(data, split, rows):
            console.print(note, highlight=False, markup=False, soft_wrap=True)


def truncation_notes(data: Data, split: str, rows: Rows) -> list[str]:
    """Lines that say what `max_length` leaves out of a split; none where it leaves out nothing."""
    names = {"token_classification": ("word is", "words are"), "instruction": ("chat is", "chats are")}
    limit = f"max_length = {data.max_length} tokens: raise data.max_length."
    notes = []
    if rows.cut:
        notes.append(f"{split}: {count(rows.cut, *names.get(data.task, ('text is', 'texts are')))} cut off at {limit}")
    if rows.dropped and data.task == "token_classification":
        notes.append(f"{split}: {count(rows.dropped, 'entity counts', 'entities count')} as missed, beyond {limit}")
    elif rows.dropped:
        chats = count(rows.dropped, "chat is", "chats are")
        notes.append(f"{split}: {chats} dropped, since the prompt alone fills {limit}")
    return notes


def follow(job: Job, console: Console, begin: Callable[[], None]) -> tuple[int, dict[str, float]]:
    """Consumes the events of a fit: shows them, keeps the best adapter on disk, draws the curves.

    `begin` is called when the step is known to compile, and before anything is written.

    Returns:
        The step whose adapter was kept, and its validation loss and metrics, if there are validation data.
    """
    config, folder = job.config, job.config.output.folder
    unit = "examples" if type(job.task) is Classes else "tokens"
    epochs = -(-job.steps // len(job.batches))
    log_every, measure = config.output.log_every, job.task.measure
    monitor = Monitor(console, steps=job.steps, epochs=epochs, log_every=log_every, measure=measure, unit=unit)
    events: list[Step | Evaluation] = []
    with (
        signals() as asked,
        monitor.running(),
        board(config) as write,
        contextlib.closing(fit(job, folder, should_stop=asked)) as told,
    ):
        for event in told:
            if isinstance(event, Compiled):
                console.print(
                    f"A step takes {megabytes(event.held + event.temporary)}: {megabytes(event.held)} of parameters, "
                    f"optimizer state and batch, {megabytes(event.temporary)} while it runs (the compiler's count).",
                    highlight=False,
                )
                begin()
                continue
            if isinstance(event, Resumed):
                for damage in event.damaged:
                    console.print(f"A damaged checkpoint was deleted: {damage}.", highlight=False, markup=False)
                console.print(f"Going on after step {event.step}.", highlight=False)
                if any(isinstance(past, Evaluation) and past.best for past in event.past):
                    runs.check_best(folder, job.task)
                events = list(event.past)
                for past in events:
                    write(past)
                continue
            if isinstance(event, Snapshot):
                # The last one stays.
                runs.save_best(folder, event.params, job.task)
                continue
            monitor.show(event)
            write(event)
            if isinstance(event, Evaluation):
                if event.best:
                    # Saved at once: a run that is stopped leaves its best adapter, ready for use.
                    runs.save_best(folder, event.params, job.task)
                event = event._replace(params=None)
            events.append(event)
    if jax.process_index() == 0:
        with can_be_written(folder):
            learning_curve(folder / runs.CURVE, events, job.task.measure)
    for hint in show.hints(events, config):
        console.print(hint, highlight=False)
    if job.validation is None:
        return job.steps, {}
    best = [event for event in events if isinstance(event, Evaluation) and event.best][-1]
    return best.step, {"loss": best.loss, **best.metrics}


@contextlib.contextmanager
def signals() -> Iterator[Any]:
    """Turns the first SIGTERM or Ctrl-C into a wish to stop, asked for by calling what this gives; a second kills."""
    received: list[int] = []

    def receive(number: int, _: Any) -> None:
        received.append(number)
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)

    try:
        before = {number: signal.signal(number, receive) for number in (signal.SIGTERM, signal.SIGINT)}
    except ValueError:  # not in the main thread, which alone gets signals
        before = {}
    try:
        yield lambda: received[0] if received else 0
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def board(config: Config) -> Iterator[Any]:
    """Writes events for TensorBoard, where the config says so; a run that goes on writes those of its past again."""
    if not config.output.tensorboard or jax.process_index() != 0:
        yield lambda event: None
        return
    # Its SummaryWriter writes in a thread of its own, which a full disk ends without a word.
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.summary import scalar

    folder = config.output.folder / runs.EVENTS

    @functools.cache
    def writer() -> EventsWriter:
        # Not before there is something to write: until then the folder is an earlier run's.
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        return EventsWriter(str(folder / "events"))

    def write(event: Step | Evaluation) -> None:
        values: dict[str, float] = {"validation/loss": event.loss}
        if isinstance(event, Step):
            names = ("loss", "learning_rate", "grad_norm")
            values = {f"train/{name}": getattr(event, name) for name in names}
        else:
            values |= {f"validation/{name}": value for name, value in event.metrics.items()}
        with can_be_written(folder):
            for name, value in values.items():
                writer().write_event(Event(wall_time=time.time(), step=event.step, summary=scalar(name, value)))
            writer().flush()

    try:
        yield write
    finally:
        if writer.cache_info().currsize:
            with can_be_written(folder):
                writer().close()


def opening(counts: Summary, corpus: Corpus, task: Any, job: Job) -> str:
    """The first lines: what will be trained, on what."""
    adapted = [row for row in counts.rows if row.rank is not None]
    ranks = "/".join(str(rank) for rank in sorted({row.rank for row in adapted if row.rank is not None}))
    scalings = "/".join(sorted({f"{row.scaling:g}" for row in adapted}))
    whole = f", and {', '.join(task.trained)} in full" if task.trained else ""
    sizes = ", ".join(f"{len(records):,} {name}" for name, records in corpus.splits.items())
    classes = f"{len(corpus.labels)} classes. " if corpus.labels else ""
    return (
        f"Training {counts.trainable:,} of {counts.total:,} parameters ({counts.percent:.2f} %): "
        f"{len(adapted)} kernels at rank {ranks}, scaling {scalings}{whole}.\n"
        f"{classes}Records: {sizes}. {job.steps:,} steps, {len(job.batches):,} to an epoch.\n"
        f"{read_as(corpus)}"
    )


def read_as(corpus: Corpus) -> str:
    """How the files were read, for all splits at once where it is the same."""
    if len(set(corpus.formats.values())) == 1:
        return f"Read as {next(iter(corpus.formats.values()))}."
    return "Read as " + "; ".join(f"{split}: {form}" for split, form in corpus.formats.items()) + "."


def peak_memory() -> int:
    """The most bytes the process held resident so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def finish(config: Config, console: Console, result: Result, run: Run, merged: Any, rows: int) -> None:
    """Writes the result and the card, shows the table, and answers the config's questions."""
    folder = config.output.folder
    if jax.process_index() == 0:
        with can_be_written(folder):
            (folder / runs.CARD).write_text(show.model_card(config, result._asdict()), encoding="utf-8")
            # Last: a run that has its result is finished.
            runs.write_result(folder, json.dumps(nulled(result._asdict()), indent=1) + "\n")
    console.print(result_table(table(result, rows, run.task)))
    for warning in result.warnings:
        console.print(f"Warning: {warning}", highlight=False, markup=False, soft_wrap=True)
    console.print(f"Written to {folder}", highlight=False, markup=False, soft_wrap=True)
    if config.data.questions:
        for text in answers(run, merged, config.data.questions):
            console.print(text, highlight=False, markup=False, soft_wrap=True)


def percent(part: int, whole: int, digits: int = 1) -> str:
    """A fraction in percent; "-" of nothing."""
    return f"{100 * part / whole:.{digits}f} %" if whole else "-"


def table(result: Result, rows: int, task: Any) -> Sequence[tuple[str, str]]:
    """The result as names and values."""
    share = percent(result.trainable, result.total, digits=2)
    size = f"{megabytes(result.adapter_bytes)} of {megabytes(result.base_bytes)}"
    measures = [name for name in result.after if name != "loss" or not isinstance(task, Classes)]
    scores = []
    for name in measures:
        scores.append((f"{result.asked} {name} before", f"{result.before[name]:.3f}"))
        scores.append((f"{result.asked} {name} after", f"{result.after[name]:.3f}"))
    what = "logits" if type(task) is Classes else "loss"
    agreement = "differ" if result.warnings else "adapted = merged"
    kept = str(result.best_step)
    if result.best:
        kept += f" (validation {task.measure} {result.best[task.measure]:.3f})"
    return [
        *scores,
        ("best step" if result.best else "last step", kept),
        ("parameters trained", f"{result.trainable:,} of {result.total:,} ({share})"),
        ("adapter on disk, of the base's", f"{size} ({percent(result.adapter_bytes, result.base_bytes)})"),
        (f"read back: {agreement}", f"on {rows} rows ({what} within {result.merged_difference:.1e})"),
        ("seconds", f"{result.seconds:.1f}"),
        ("peak memory of the process", f"{result.peak_memory_bytes / 2**20:.0f} MiB"),
    ]
