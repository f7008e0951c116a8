"""`jlora eval`: what a saved run makes of other data."""

from pathlib import Path

from jlora.cli.show import result_table
from jlora.cli.streams import Terminal, json_line
from jlora.cli.train import fields_of, print_truncation, rows_of
from jlora.core.errors import complain
from jlora.core.tree import merge
from jlora.recipes.batches import check_targets
from jlora.recipes.readers import read_corpus
from jlora.recipes.runs import load_run


def evaluate(folder: Path, data: str | None, *, as_json: bool, model: str | None) -> dict[str, float]:
    """Prints the loss and the metrics of a run on a file.

    Args:
        folder: what `jlora train` wrote.
        data: a file or data set of the run's task; None for the run's own test file.
        as_json: print one JSON object.
        model: where the base model is, if not where it was.

    Raises:
        FileNotFoundError: no run in `folder`, or no such data.
        ValueError: a run without a test file, lines that can't be used, labels that the run does not know.
    """
    run = load_run(folder, model=model)
    source = data or run.config.data.test
    if source is None:
        problem = f"{folder} was trained without a test file."
        raise ValueError(complain("eval", problem, [], "name one: jlora eval FOLDER --data FILE."))
    task = run.config.data.task
    corpus = read_corpus(
        {"test": source},
        task,
        fields=fields_of(run.config),
        format=run.config.data.format,
        unit=run.config.data.unit,
        labels=run.task.labels or None,
    )
    corpus = corpus._replace(labels=run.task.labels)
    rows = rows_of(run.config, run.task.loaded.tokenizer, corpus, "test")
    check_targets("eval", {"test": rows.rows}, run.config.data.max_length)
    run.task.check_vocabulary("eval", {"test": rows.rows})
    scores = run.task.score(merge(run.params), rows.rows, merged=True)
    found = {"loss": scores.loss, **scores.metrics}
    if as_json:
        counts = {"records": len(corpus.splits["test"]), "cut": rows.cut, "dropped": rows.dropped}
        print(json_line({"data": str(source), **counts, **found}))
    else:
        print_truncation(Terminal(), run.config.data, {"test": rows})
        table = [("data", str(source)), ("records", f"{len(corpus.splits['test']):,}")]
        Terminal().print(result_table(table + [(name, f"{value:.4f}") for name, value in found.items()]))
    return found
