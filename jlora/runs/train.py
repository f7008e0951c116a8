"""A training job, from its config to a saved adapter that was checked against its merged model.

`train` needs no terminal. It reports what happens as events: `TrainingSetup`, then those of `jlora.runs.engine.fit`,
then `BestAdapter` and `TrainingEnd`.
"""

import contextlib
import json
import logging
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from jlora.data.batches import Row, Rows, check_targets
from jlora.data.readers import Corpus
from jlora.hf.load import find_folder
from jlora.runs import config as configs
from jlora.runs import folder as runs
from jlora.runs.agreement import coarsest_dtype, compare
from jlora.runs.card import model_card
from jlora.runs.config import Config
from jlora.runs.engine import (
    Evaluation,
    Job,
    Resumption,
    Snapshot,
    Step,
    StepMemory,
    can_be_written,
    check_training,
    fit,
    nulled,
)
from jlora.runs.folder import Run
from jlora.runs.job_data import describe_truncation, make_split_rows, read_splits
from jlora.runs.pictures import draw_learning_curve
from jlora.runs.start import choose_tokenizer, start_adapter
from jlora.runs.tensorboard import open_event_files
from jlora.tasks.tasks import Scores
from jlora.tree.paths import Tree
from jlora.tree.summary import Summary, summary
from jlora.tree.wrapping import merge

# Rows of the training data that the result is measured on if there are no other data.
MAX_MEASURED_ROWS = 1000
logger = logging.getLogger("jlora")


class TrainingResult(NamedTuple):
    """The result of a training run.

    Attributes:
        split: the data of `before` and `after`: "test", or else "validation", or else the first rows of "train".
        before: loss and metrics with a new adapter, and a new head if there is one.
        after: loss and metrics with the adapter as it was read back from disk.
        best_step: the step whose adapter was kept.
        best: validation loss and metrics at that step; empty without validation data, where the last step is kept.
        trainable: number of trained parameters.
        total: number of parameters of the base with its head.
        adapter_bytes: size on disk of the adapter and the leaves trained in full.
        base_bytes: size on disk of the base's weights.
        merged_difference: largest difference between adapted and merged logits, or between the mean losses if the
            task has no logits.
        seconds: wall time from the first file read to the last check.
        peak_memory_bytes: largest resident memory of the process so far.
        warnings: problems to look into before the adapter is used; empty if there are none.
    """

    split: str
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

    def as_dict(self) -> dict[str, Any]:
        """Returns the entries of result.json, in which `split` is named "asked"."""
        values = self._asdict()
        return {"asked": values.pop("split")} | values


class TrainingSetup(NamedTuple):
    """Event: model and data are loaded, and nothing is written yet.

    Attributes:
        job: model, data and settings.
        corpus: the records of each split.
        rows: the rows of each split.
        counts: parameters of the wrapped tree.
    """

    job: Job
    corpus: Corpus
    rows: Mapping[str, Rows]
    counts: Summary


class BestAdapter(NamedTuple):
    """Event: training is over, and the adapter to keep is on disk.

    Attributes:
        step: the step whose adapter was kept.
        metrics: its validation loss and metrics; empty without validation data.
    """

    step: int
    metrics: dict[str, float]


class TrainingEnd(NamedTuple):
    """Event: the result is written.

    Attributes:
        result: what `train` returns.
        run: the run, read back from disk.
        merged: its merged parameters.
        measured: number of rows that the result is measured on.
    """

    result: TrainingResult
    run: Run
    merged: Tree
    measured: int


Event = TrainingSetup | StepMemory | Resumption | Step | Evaluation | Snapshot | BestAdapter | TrainingEnd
Reporter = Callable[[Event], None]


class TrainingOutcome(NamedTuple):
    """The results of training that are kept in memory.

    Attributes:
        split: the split that the result is measured on.
        rows: its rows.
        before: their scores with a new adapter.
        best: the adapter that was kept.
        counts: parameters of the wrapped tree.
    """

    split: str
    rows: list[Row]
    before: Scores
    best: BestAdapter
    counts: Summary


def log_event(event: Event) -> None:
    """Reports an event to the logger "jlora": progress at level INFO, problems at level WARNING."""
    if isinstance(event, TrainingSetup):
        for split, rows in event.rows.items():
            for note in describe_truncation(event.job.config.data, split, rows):
                logger.warning(note)
    elif isinstance(event, Resumption):
        for damage in event.damaged:
            logger.warning("A damaged checkpoint was deleted: %s.", damage)
        logger.info("resumed after step %d", event.step)
    elif isinstance(event, Step):
        logger.info("step %d/%d  loss %.3f", event.step, event.steps, event.loss)
    elif isinstance(event, Evaluation):
        logger.info("step %d  validation loss %.3f  %s", event.step, event.loss, event.metrics)
    elif isinstance(event, TrainingEnd):
        for warning in event.result.warnings:
            logger.warning(warning)


def train(config: Config, *, report: Reporter = log_event) -> TrainingResult:
    """Runs a training job, or resumes an interrupted one, and writes the run's folder.

    The folder, `config.output.folder`, is the same as that of `jlora train`: the best adapter, checkpoints, metrics,
    learning curve, model card and result. If the folder holds an unfinished run of the same job, training resumes from
    its last checkpoint. While steps are computed, the first SIGTERM or Ctrl-C saves a checkpoint and raises
    `Interrupted`; the second ends the process.

    Args:
        config: the job; relative paths are relative to the working directory.
        report: called with each event. By default, events go to the logger "jlora": warnings are printed, progress is
            at level INFO.

    Returns:
        Scores before and after training, sizes, and warnings.

    Raises:
        ValueError: the config, the data or the model can't be used; nothing is written then.
        OSError: a file is missing, or the output folder holds another run or can't be written to.
        Interrupted: a signal stopped the run; call `train` again with the same config to resume.

    Example:
        ```python
        import jlora
        from jlora.runs.config import Adapter, Config, Data, Model, Optimisation, Output
        from jlora.runs.predict import predict

        config = Config(
            model=Model(name="model", pooling="mean"),
            data=Data(train="train.jsonl", validation="validation.jsonl", max_length=32),
            adapter=Adapter(rank=4),
            optimisation=Optimisation(learning_rate=0.02, epochs=2, batch_size=8),
            output=Output(folder="run"),
        )
        result = jlora.train(config)
        print(result.after["accuracy"])

        run = jlora.load_run("run")
        for prediction in predict(run, ["where is my parcel"]):
            print(prediction["entries"][0]["label"])
        ```
    """
    start = time.perf_counter()
    config = configs.check(config, source="the config")
    check_training(config)
    runs.check_folder(config)
    with runs.FolderLock("train", config.output.folder) as lock:
        return train_locked(config, lock, report, start)


def train_locked(config: Config, lock: runs.FolderLock, report: Reporter, start: float) -> TrainingResult:
    """Runs a job in a folder that no other process writes to; `start` is the clock's time at the start of the job."""
    folder, mesh = config.output.folder, runs.read_mesh(config)
    outcome = fit_adapter(config, mesh, report, lock)

    # The trained arrays are freed by now, and the base is loaded again.
    run = runs.load_run(folder, mesh=mesh)
    after, merged = run.task.score(run.params, outcome.rows), merge(run.params)
    merged_scores = run.task.score(merged, outcome.rows, merged=True)
    agreement = compare(after, merged_scores, coarsest_dtype(config.model))
    weights = find_folder(config.model.name, config.model.revision).glob("*.safetensors")
    result = TrainingResult(
        split=outcome.split,
        before={"loss": outcome.before.loss, **outcome.before.metrics},
        after={"loss": after.loss, **after.metrics},
        best_step=outcome.best.step,
        best=outcome.best.metrics,
        trainable=outcome.counts.trainable,
        total=outcome.counts.total,
        adapter_bytes=runs.bytes_on_disk(folder / runs.ADAPTER),
        base_bytes=sum(path.stat().st_size for path in weights),
        merged_difference=agreement.difference,
        seconds=time.perf_counter() - start,
        peak_memory_bytes=measure_peak_memory(),
        warnings=() if agreement.warning is None else (agreement.warning,),
    )
    if jax.process_index() == 0:
        write_end(config, result)
    report(TrainingEnd(result, run, merged, len(outcome.rows)))
    return result


def fit_adapter(config: Config, mesh: Mesh | None, report: Reporter, lock: runs.FolderLock) -> TrainingOutcome:
    """Trains, or resumes training, until the best adapter is on disk."""
    corpus = read_splits(config)
    loaded = runs.place_base(runs.load_base(config, corpus.labels), mesh)
    loaded = choose_tokenizer(config, loaded, resume=runs.check_folder(config))
    task = runs.make_task(config, loaded, corpus.labels, mesh)
    params = runs.place_params(start_adapter(config, loaded, task.trained, corpus.labels), loaded.model, mesh)
    counts = summary(params, task.trained)
    # Adapter and optimizer moments, for every checkpoint that is kept and the two that are being written.
    runs.check_folder(config, needed=3 * 4 * counts.trainable * (config.run.keep + 2))
    splits = {name: make_split_rows(config, loaded.tokenizer, corpus, name) for name in corpus.splits}
    rows = {name: split.rows for name, split in splits.items()}
    check_targets("train", rows, config.data.max_length)
    task.check_vocabulary("train", rows)
    job = Job(config=config, task=task, params=params, rows=rows["train"], validation=rows.get("validation"), mesh=mesh)
    report(TrainingSetup(job, corpus, splits, counts))
    split = next(name for name in ("test", "validation", "train") if name in rows)
    measured = rows[split][: MAX_MEASURED_ROWS if split == "train" else None]
    before = task.score(params, measured)

    def write() -> None:
        # Checked again: until the lock was acquired, another run may have written here.
        resume = runs.check_folder(config)
        with can_be_written(config.output.folder):
            runs.begin_run(config, corpus.labels, corpus.answers, tokenizer=loaded.tokenizer, resume=resume)

    def begin() -> None:
        # No process may find what another one has begun to write.
        wait_for_processes("folder checked")
        lock.acquire()
        runs.on_first_process("train", write)

    best = keep_best(job, report, begin)
    wait_for_processes("run written")
    return TrainingOutcome(split, measured, before, best, counts)


def keep_best(job: Job, report: Reporter, begin: Callable[[], None]) -> BestAdapter:
    """Consumes the events of a fit: reports them, keeps the best adapter on disk, and draws the learning curve.

    Args:
        job: what to train.
        report: called with each event.
        begin: called when the step is known to compile, before anything is written.
    """
    config, folder = job.config, job.config.output.folder
    history: list[Step | Evaluation] = []
    with (
        catch_signals() as received_signal,
        open_event_files(config) as write,
        contextlib.closing(fit(job, folder, should_stop=received_signal)) as events,
    ):
        for event in events:
            report(event)
            if isinstance(event, StepMemory):
                begin()
            elif isinstance(event, Resumption):
                if any(isinstance(past, Evaluation) and past.best for past in event.past):
                    runs.check_best(folder, job.task)
                history = list(event.past)
                for past in history:
                    write(past)
            elif isinstance(event, Snapshot):
                # Without validation data the last adapter is kept.
                runs.save_best(folder, event.params, job.task)
            else:
                write(event)
                if isinstance(event, Evaluation):
                    if event.best:
                        # Saved at once, so that an interrupted run leaves its best adapter ready for use.
                        runs.save_best(folder, event.params, job.task)
                    event = event._replace(params=None)
                history.append(event)
    if jax.process_index() == 0:
        with can_be_written(folder):
            draw_learning_curve(folder / runs.CURVE, history, job.task.measure)
    best = find_best(job, history)
    report(best)
    return best


def find_best(job: Job, history: list[Step | Evaluation]) -> BestAdapter:
    """Returns the adapter that was kept: that of the best evaluation, or of the last step without validation data."""
    if job.validation is None:
        return BestAdapter(job.steps, {})
    best = [event for event in history if isinstance(event, Evaluation) and event.best][-1]
    return BestAdapter(best.step, {"loss": best.loss, **best.metrics})


def wait_for_processes(name: str) -> None:
    """Waits until all processes of the run are here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


@contextlib.contextmanager
def catch_signals() -> Iterator[Callable[[], int]]:
    """Catches the first SIGTERM or Ctrl-C and gives a function that returns its number, or 0; a second one kills."""
    received: list[int] = []

    def receive(number: int, _: Any) -> None:
        received.append(number)
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)

    try:
        before = {number: signal.signal(number, receive) for number in (signal.SIGTERM, signal.SIGINT)}
    except ValueError:  # only the main thread receives signals
        before = {}
    try:
        yield lambda: received[0] if received else 0
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def measure_peak_memory() -> int:
    """Returns the largest resident memory of the process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def write_end(config: Config, result: TrainingResult) -> None:
    """Writes the model card, then the result, which finishes the run."""
    folder, values = config.output.folder, result.as_dict()
    with can_be_written(folder):
        (folder / runs.CARD).write_text(model_card(config, values), encoding="utf-8")
        runs.write_result(folder, json.dumps(nulled(values), indent=1) + "\n")
