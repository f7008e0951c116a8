"""The loss and metrics of a saved run, or of a merged model, on other data."""

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, get_args

from jlora.data.batches import Rows, check_targets
from jlora.data.readers import read_corpus
from jlora.errors import JloraValueError
from jlora.hf.load import load_model
from jlora.runs import config as configs
from jlora.runs.config import Config, TaskName, fields_of
from jlora.runs.folder import CONFIG, Run, load_run, make_task
from jlora.runs.inspection import stored_dtype
from jlora.runs.job_data import make_split_rows
from jlora.tasks.tasks import TASKS, Classes
from jlora.tree.wrapping import merge


class EvaluationResult(NamedTuple):
    """The result of an evaluation.

    Attributes:
        source: the file or data set.
        records: number of its records.
        rows: its rows, with the numbers of records that were cut off and dropped.
        metrics: the loss and the task's metrics, by name.
        config: the job of the run, or the one made up for a merged model.
    """

    source: str
    records: int
    rows: Rows
    metrics: dict[str, float]
    config: Config


def evaluate(
    folder: Path,
    data: str | None = None,
    *,
    task: TaskName | None = None,
    config: Path | None = None,
    max_length: int | None = None,
    model: str | None = None,
) -> EvaluationResult:
    """Measures the loss and the metrics of a run, or of a merged model, on a file.

    Args:
        folder: what `jlora train` or `jlora merge` wrote.
        data: a file or data set of the task; None for the run's own test file.
        task: the task of a merged model; None for a run, or for that of `config`.
        config: a job's TOML file, whose [data] section specifies how the data of a merged model are read; None for a
            run, or for the default names of the columns.
        max_length: number of tokens of an example that are read, for a merged model; None for that of `config`, or
            the default.
        model: folder or hub name of the base model of a run, if it was moved.

    Raises:
        FileNotFoundError: there is no run or model in `folder`, or no such data.
        ValueError: a run without a test file, a merged model without a task or data, lines that can't be used, or
            labels that the run or model does not have.
    """
    if is_model(folder):
        run = load_merged(folder, data, task, config, max_length, model)
        params = run.params
    else:
        options = {"--task": task, "--config": config, "--max-length": max_length}
        given = [name for name, value in options.items() if value is not None]
        if given and (folder / CONFIG).is_file():
            problem = f"{folder} is a run, which has its own config."
            raise JloraValueError("eval", problem, given, "leave these options out.")
        run = load_run(folder, model=model)
        params = merge(run.params)
    source = data or run.config.data.test
    if source is None:
        problem = f"{folder} was trained without a test file."
        raise JloraValueError("eval", problem, [], "name one: jlora eval FOLDER --data FILE.")
    corpus = read_corpus(
        {"test": source},
        run.config.data.task,
        fields=fields_of(run.config.data),
        format=run.config.data.format,
        unit=run.config.data.unit,
        labels=run.task.labels or None,
    )
    corpus = corpus._replace(labels=run.task.labels)
    rows = make_split_rows(run.config, run.task.loaded.tokenizer, corpus, "test")
    check_targets("eval", {"test": rows.rows}, run.config.data.max_length)
    run.task.check_vocabulary("eval", {"test": rows.rows})
    scores = run.task.score(params, rows.rows, merged=True)
    metrics = {"loss": scores.loss, **scores.metrics}
    return EvaluationResult(str(source), len(corpus.splits["test"]), rows, metrics, run.config)


def is_model(folder: Path) -> bool:
    """Whether a folder holds a model in Hugging Face form, and not a run."""
    return (folder / "config.json").is_file() and not (folder / CONFIG).is_file()


def load_merged(
    folder: Path,
    data: str | None,
    task: TaskName | None,
    job: Path | None,
    max_length: int | None,
    model: str | None,
) -> Run:
    """Loads a merged model as a run without an adapter, with the labels of its config.

    Raises:
        ValueError: the task or the data are missing, an option of runs is given, or the model does not fit the task.
    """
    config = merged_config(folder, data, task, job, max_length, model)
    loaded = load_model(folder, dtype=config.model.dtype, head=TASKS[config.data.task].head)
    if loaded.tokenizer is None:
        fix = "merge again with the base's tokenizer beside it."
        raise JloraValueError("eval", f"{folder} has no tokenizer.", [], fix)
    most = loaded.config.max_position_embeddings
    if max_length is not None and max_length > most:
        problem = f"--max-length is {max_length}, the model reads {most} tokens."
        raise JloraValueError("eval", problem, [], f"set it to {most} or less.")
    config = replace(config, data=replace(config.data, max_length=min(config.data.max_length, most)))
    labels = (
        tuple(label for _, label in sorted(loaded.config.id2label.items()))
        if issubclass(TASKS[config.data.task], Classes)
        else ()
    )
    return Run(task=make_task(config, loaded, labels), params=loaded.params, answers={}, config=config)


def merged_config(
    folder: Path,
    data: str | None,
    task: TaskName | None,
    job: Path | None,
    max_length: int | None,
    model: str | None,
) -> Config:
    """The config of a merged model: its data are read as a job says, or with the default names of the columns.

    Raises:
        ValueError: no task or data, or a base.
    """
    if job is not None:
        config = configs.read(job)
        data = data or (None if config.data.test is None else str(config.data.test))
        task = task or config.data.task
    wrong = [f"--task is missing  expected: one of {', '.join(get_args(TaskName))}"] if task is None else []
    wrong += ["--data is missing  expected: a file of the task, or hub:owner/name"] if data is None else []
    wrong += ["--model names the base of a run, and a merged model has none"] if model is not None else []
    if wrong:
        fix = "evaluate as in: jlora eval FOLDER --task causal_lm --data FILE."
        raise JloraValueError("eval", f"{folder} holds a merged model.", wrong, fix)
    length = {} if max_length is None else {"max_length": max_length}
    stated = {
        "model": {"name": str(folder), "dtype": stored_dtype(folder)},
        "data": {"task": task, "train": data, **length},
        "output": {"folder": str(folder)},
    }
    parsed = configs.parse(stated, source="the command line", folder=Path.cwd())
    if job is None:
        return parsed
    changes: dict[str, Any] = {"task": parsed.data.task, "test": parsed.data.train, **length}
    return replace(parsed, data=replace(config.data, **changes), optimisation=config.optimisation)
