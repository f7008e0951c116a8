"""`jlora eval`: prints the loss and metrics of a saved run, or of a merged model, on other data."""

from pathlib import Path

from jlora.cli.show import result_table
from jlora.cli.streams import Terminal, json_line
from jlora.cli.train import print_truncation
from jlora.runs.config import TaskName
from jlora.runs.evaluate import evaluate as measure


def evaluate(
    folder: Path,
    data: str | None,
    *,
    task: TaskName | None,
    config: Path | None,
    max_length: int | None,
    as_json: bool,
    model: str | None,
) -> None:
    """Prints the loss and the metrics of a run, or of a merged model, on a file.

    Args:
        folder: what `jlora train` or `jlora merge` wrote.
        data: a file or data set of the task; None for the run's own test file.
        task: the task of a merged model; None for a run, or for that of `config`.
        config: a job's TOML file, whose [data] section specifies how the data of a merged model are read.
        max_length: number of tokens of an example that are read, for a merged model; None for the default.
        as_json: print one JSON object.
        model: folder or hub name of the base model of a run, if it was moved.

    Raises:
        FileNotFoundError, ValueError: as `jlora.runs.evaluate.evaluate` does.
    """
    result = measure(folder, data, task=task, config=config, max_length=max_length, model=model)
    if as_json:
        counts = {"records": result.records, "cut": result.rows.cut, "dropped": result.rows.dropped}
        print(json_line({"data": result.source, **counts, **result.metrics}))
    else:
        print_truncation(Terminal(), result.config.data, {"test": result.rows})
        table = [("data", result.source), ("records", f"{result.records:,}")]
        Terminal().print(result_table(table + [(name, f"{value:.4f}") for name, value in result.metrics.items()]))
