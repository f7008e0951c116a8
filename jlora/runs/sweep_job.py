"""A training job at many ranks at once, and a page that recommends one of them.

::

    report.html           the evidence, and the recommendation
    report.png            its curves
    sweep.json            all numbers
    members/<member>/     each a run's folder with its best adapter, for `jlora predict` and its like
"""

import itertools
import json
import math
import operator
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jlora.data.batches import Row, Rows, check_targets
from jlora.data.readers import Corpus
from jlora.errors import JloraFileExistsError, JloraValueError, nearest
from jlora.hf.load import LoadedModel, shapes
from jlora.runs import folder as runs
from jlora.runs.config import Config
from jlora.runs.engine import Job, check_training, make_optimizer, prepare
from jlora.runs.job_data import make_split_rows, read_splits
from jlora.runs.sweep import Judged, Member, Progressed, SweepResult
from jlora.runs.sweep import sweep as search
from jlora.runs.sweep_report import PAGE, PICTURE, write_report
from jlora.runs.train import measure_peak_memory
from jlora.tasks.tasks import TASKS, Task
from jlora.tree.layouts import max_rank
from jlora.tree.paths import Tree, TreePath, flatten
from jlora.tree.splitting import split
from jlora.tree.targets import make_matcher
from jlora.tree.wrapping import read_layouts

MEMBERS, NUMBERS = "members", "sweep.json"
FILES = (MEMBERS, NUMBERS, PAGE, PICTURE)
FALLS = ("loss", "perplexity")  # metrics that are better when smaller
FRACTIONS = ("accuracy",)  # metrics that are a fraction of the validation rows


class SweepSetup(NamedTuple):
    """Event: model and data of a sweep are loaded, and nothing is written yet.

    Attributes:
        config: the job.
        loaded: the base.
        corpus: the records of each split.
        rows: the rows of each split.
        metric: the metric that decides.
    """

    config: Config
    loaded: LoadedModel
    corpus: Corpus
    rows: Mapping[str, Rows]
    metric: str


SweepEvent = SweepSetup | Judged | Progressed


def ignore_event(event: SweepEvent) -> None:
    """Reports nothing."""


def run_sweep(
    config: Config,
    out: Path,
    *,
    ranks: Sequence[int],
    learning_rates: Sequence[float] | None = None,
    seeds: Sequence[int] | None = None,
    metric: str | None = None,
    tolerance: float | None = None,
    memory: str | None = None,
    at_once: int | None = None,
    overwrite: bool = False,
    report: Callable[[SweepEvent], None] = ignore_event,
) -> SweepResult:
    """Trains a job at every rank, learning rate and seed of a grid, and writes the report and the adapters.

    Args:
        config: the job; the grid replaces its rank, learning rate and seed.
        out: the folder to write.
        ranks: the ranks to try.
        learning_rates: the learning rates to try; None for the job's own.
        seeds: the seeds to train each of them with; None for the job's own.
        metric: the metric that decides; None for the task's own.
        tolerance: how much worse than the best a smaller rank may be; None for one standard error.
        memory: available memory, as "24GB"; None for that of the device.
        at_once: number of members computed side by side; None for what suits the device.
        overwrite: replace an earlier sweep in `out`.
        report: called with each event.

    Raises:
        ValueError: a metric, data or a model that can't be used, or too little memory for one member; nothing is
            written then.
        OSError: a file is missing, or `out` holds something else.
    """
    options = config.optimisation
    grid = {
        "ranks": ranks,
        "learning_rates": [options.learning_rate] if learning_rates is None else learning_rates,
        "seeds": [options.seed] if seeds is None else seeds,
    }
    check_training(config)
    metric = check_metric(config, metric)
    check_folder(config, out, overwrite)
    with runs.FolderLock("sweep", out) as lock:
        return sweep_locked(config, lock, grid, metric, tolerance, memory, at_once, overwrite, report)


def sweep_locked(
    config: Config,
    lock: runs.FolderLock,
    grid: Mapping[str, Sequence[Any]],
    metric: str,
    tolerance: float | None,
    memory: str | None,
    at_once: int | None,
    overwrite: bool,
    report: Callable[[SweepEvent], None],
) -> SweepResult:
    """Trains a job's grid in a folder that no other process writes to."""
    out = lock.folder

    def begin() -> None:
        lock.acquire()
        # Checked again: until the lock was acquired, another sweep may have written here.
        check_folder(config, out, overwrite)
        clear(out)

    corpus = read_splits(config)
    loaded = runs.load_base(config, corpus.labels)
    task = runs.make_task(config, loaded, corpus.labels)
    splits = {name: make_split_rows(config, loaded.tokenizer, corpus, name) for name in ("train", "validation")}
    report(SweepSetup(config, loaded, corpus, splits, metric))
    rows = {name: split.rows for name, split in splits.items()}
    check_targets("sweep", rows, config.data.max_length)
    task.check_vocabulary("sweep", rows)
    jobs = {seed: job_of(config, task, rows, seed) for seed in grid["seeds"]}
    # Seeds change the order of the batches, but not their number and shapes.
    first = next(iter(jobs.values()))
    steps, per_epoch = first.steps, len(first.batches)
    members = Members(config, out, begin, corpus, task, limits(config, loaded))

    def handle(event: Judged | Progressed) -> None:
        report(event)
        if isinstance(event, Judged) and event.best:
            members.save(event)

    result = search(
        task.loss_fn(config.adapter.dropout),
        members.start,
        lockstep(jobs),
        lambda params: scores(task, params, rows["validation"]),
        steps=steps,
        metric=metric,
        maximize=metric not in FALLS,
        ranks=grid["ranks"],
        learning_rates=grid["learning_rates"],
        seeds=grid["seeds"],
        optimizer=members.optimizer(steps),
        key=lambda seed: jax.random.fold_in(jax.random.key(seed), 2),
        train=task.trained,
        accumulate=config.optimisation.accumulate,
        clip=config.optimisation.clip,
        evaluate_every=config.run.evaluate_every or per_epoch,
        fetch_every=config.output.log_every,
        patience=config.run.patience,
        max_skipped=config.optimisation.max_skipped,
        tolerance=tolerance,
        noise=spread(metric, len(rows["validation"])),
        at_once=at_once,
        memory=memory,
        example=prepare(first.largest).batch,
        tell=handle,
    )
    capped = members.capped(grid["ranks"])
    values = result.as_dict() | {"peak_memory_bytes": measure_peak_memory(), "capped": capped}
    runs.write_whole(out / NUMBERS, json.dumps(values, indent=1) + "\n")
    write_report(out, values, title=f"{config.model.name}: {config.data.task}")
    return result


def check_metric(config: Config, metric: str | None) -> str:
    """The metric that decides.

    Raises:
        ValueError: the task has no such metric.
    """
    task = TASKS[config.data.task]
    if metric is None:
        return task.measure
    known = ("loss", *task.metrics)
    if metric not in known:
        offenders = [f"{metric!r}  there are: {', '.join(known)}; nearest: {nearest(metric, known, 1)[0]}"]
        raise JloraValueError("sweep", f"{config.data.task} has no such metric.", offenders, "name one it has.")
    return metric


def check_folder(config: Config, out: Path, overwrite: bool) -> None:
    """Finds out before training whether a sweep can be written.

    Raises:
        ValueError: the job asks for a mesh, starts from an adapter, or has no validation data.
        OSError: there is something in the folder, or it can't be written to.
    """
    if config.adapter.from_ is not None:
        problem = f"a sweep draws new adapters of every rank, and adapter.from = {str(config.adapter.from_)!r}."
        raise JloraValueError("sweep", problem, [], "leave adapter.from out.")
    if config.run.mesh is not None or jax.process_count() > 1:
        fix = "leave run.mesh out, or train the ranks one by one."
        raise JloraValueError(
            "sweep",
            "a sweep runs on one device.",
            [f"run.mesh = {config.run.mesh!r}, processes: {jax.process_count()}"],
            fix,
        )
    if config.data.validation is False:
        problem = "a sweep compares its members on validation data, and data.validation = false."
        raise JloraValueError("sweep", problem, [], "name a file, or leave data.validation out to hold some out.")
    runs.check_writable("sweep", out, "--out")
    there = sorted(path.name for path in out.iterdir() if path.name != runs.LOCK) if out.exists() else []
    foreign = [name for name in there if name.removesuffix(".tmp") not in FILES]
    if foreign or (there and not overwrite):
        fix = "choose another --out" + ("." if foreign else ", or pass --overwrite.")
        raise JloraFileExistsError("sweep", f"{out} is not empty.", (foreign or there)[:5], fix)


def job_of(config: Config, task: Task, rows: Mapping[str, Sequence[Row]], seed: int) -> Job:
    """A member's job, as far as its data go."""
    config = replace(config, optimisation=replace(config.optimisation, seed=seed))
    return Job(config=config, task=task, params=None, rows=rows["train"], validation=rows["validation"])


def lockstep(jobs: Mapping[int, Job]) -> Callable[[int], Iterator[Any]]:
    """The batches of every seed; in each step those of all seeds are filled up to the longest of them.

    The training is the same, except for dropout: a longer row draws other masks than in a separate run.
    """

    def all_of() -> Iterator[tuple[Any, ...]]:
        streams = [
            iter(job.batches.map(prepare).repeat(math.ceil(job.steps / len(job.batches))).to_iter_dataset())
            for job in jobs.values()
        ]
        for found in zip(*streams, strict=True):
            length = max(prepared.batch["input_ids"].shape[1] for prepared in found)
            yield tuple(as_long(prepared.batch, length) for prepared in found)

    def fresh() -> dict[int, Iterator[Any]]:
        return dict(zip(jobs, itertools.tee(all_of(), len(jobs)), strict=True))

    places = {seed: n for n, seed in enumerate(jobs)}
    given: dict[int, Iterator[Any]] = {}

    def of(seed: int) -> Iterator[Any]:
        if seed not in given:
            given.update(fresh())
        return map(operator.itemgetter(places[seed]), given.pop(seed))

    return of


def as_long(batch: Mapping[str, np.ndarray], length: int) -> dict[str, np.ndarray]:
    """A batch filled up with tokens that nobody attends to."""
    return {
        name: np.pad(leaf, [(0, 0), (0, length - leaf.shape[1])]) if leaf.ndim == 2 else leaf
        for name, leaf in batch.items()
    }


def scores(task: Task, params: Tree, rows: Sequence[Row]) -> dict[str, float]:
    found = task.score(params, rows)
    return {"loss": found.loss, **found.metrics}


def spread(metric: str, rows: int) -> Callable[[float], float] | None:
    """The standard error of a fraction p of n rows, sqrt(p (1 - p) / n); None for other metrics."""
    if metric not in FRACTIONS:
        return None
    return lambda fraction: math.sqrt(fraction * (1 - fraction) / rows)


def limits(config: Config, loaded: LoadedModel) -> dict[TreePath, int]:
    """The highest rank that every kernel without a separate rank has room for."""
    tree = runs.wrap_base(lowest(config), replace(loaded, params=shapes(loaded.model, config.model.dtype)))
    leaves, own = flatten(tree), [make_matcher(pattern) for pattern in config.adapter.ranks]
    return {
        path: max_rank(leaves[path].shape, layout)
        for path, layout in read_layouts("sweep", tree).items()
        if not any(matches(path) for matches in own)
    }


def lowest(config: Config) -> Config:
    """The job at rank 1, which every kernel has room for."""
    return replace(config, adapter=replace(config.adapter, rank=1, alpha=None))


def name_of(member: Member) -> str:
    """The folder of a member."""
    return f"rank-{member.rank}_lr-{member.learning_rate}_seed-{member.seed}"


class Members:
    """The runs that a sweep stands for."""

    def __init__(
        self,
        config: Config,
        out: Path,
        begin: Callable[[], None],
        corpus: Corpus,
        task: Task,
        most: Mapping[TreePath, int],
    ):
        self.config, self.out, self.begin, self.corpus, self.task, self.most = config, out, begin, corpus, task, most
        self.begun = False

    def job(self, member: Member) -> Config:
        """The job that would train this member alone: kernels without room for its rank have the highest they can."""
        return replace(
            self.config,
            adapter=replace(self.config.adapter, rank=member.rank, cap_rank=True),
            optimisation=replace(self.config.optimisation, learning_rate=member.learning_rate, seed=member.seed),
            output=replace(self.config.output, folder=self.out / MEMBERS / name_of(member)),
        )

    def start(self, member: Member) -> Tree:
        """Its wrapped tree before the first step."""
        return runs.wrap_base(self.job(member), runs.with_seed(self.task.loaded, member.seed))

    def optimizer(self, steps: int) -> Callable[[Any], Any]:
        """The job's optimizer at a learning rate."""
        options = self.config.optimisation
        adapters, _ = split(runs.wrap_base(lowest(self.config), self.task.loaded), self.task.trained)
        return lambda rate: make_optimizer(replace(options, learning_rate=rate), steps, adapters)

    def save(self, event: Judged) -> None:
        """Writes a member's best adapter, as a run's folder."""
        if not self.begun:
            # Not before there is something to put in its place.
            self.begin()
            self.begun = True
        job = self.job(event.member)
        if not (job.output.folder / runs.CONFIG).exists():
            tokenizer = self.task.loaded.tokenizer
            runs.begin_run(job, self.corpus.labels, self.corpus.answers, tokenizer=tokenizer)
        runs.save_best(job.output.folder, event.params, self.task)

    def capped(self, ranks: Sequence[int]) -> dict[TreePath, int]:
        """The kernels that have no room for the largest rank, with what they have room for."""
        return {path: most for path, most in self.most.items() if most < max(ranks)}


def clear(out: Path) -> None:
    """Removes an earlier sweep."""
    for path in (out / name for name in FILES):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
