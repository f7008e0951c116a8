"""`jlora train`: from a config to a saved adapter that was seen to work."""

import json
import resource
import sys
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console

from jlora.cli.predict import answer_text
from jlora.cli.show import Monitor, learning_curve, megabytes, result_table
from jlora.core.tree import Summary, merge, summary
from jlora.interop.huggingface import find_folder
from jlora.recipes import classify
from jlora.recipes.classify import Epoch, Scores, Step
from jlora.recipes.config import Config
from jlora.recipes.data import Corpus, load_corpus, to_rows


class Result(NamedTuple):
    """What a run came to.

    Attributes:
        accuracy_before: on the test questions, with the new head and no training.
        accuracy_after: on the test questions, with the adapter as it was read back from disk.
        best_epoch: the epoch that was kept, from 1.
        best_validation_accuracy: on the validation questions, in that epoch.
        trainable: parameters trained.
        total: parameters of the base with its head.
        adapter_bytes: size on disk of the adapter and the head.
        base_bytes: size on disk of the base's weights.
        largest_logit_difference: between adapted and merged predictions on the test questions.
        seconds: wall time from the first file read to the last check.
        peak_memory_bytes: the most memory the process held resident.
    """

    accuracy_before: float
    accuracy_after: float
    best_epoch: int
    best_validation_accuracy: float
    trainable: int
    total: int
    adapter_bytes: int
    base_bytes: int
    largest_logit_difference: float
    seconds: float
    peak_memory_bytes: int


def train(config: Config) -> Result:
    """Runs a job: checks, trains, reads the adapter back, shows and writes the result.

    Raises:
        ValueError: the config, the data or the model can't be used; nothing has been written then.
        OSError: a file is missing, or the output folder holds a run or can't be written to.
    """
    start = time.perf_counter()
    console = Console(soft_wrap=not sys.stdout.isatty())
    folder, size = config.output.folder, config.optimisation.batch_size
    data = config.data
    corpus = load_corpus(train=data.train, validation=data.validation, test=data.test, answers=data.answers)
    classify.check_folder(folder, overwrite=config.output.overwrite)
    loaded = classify.load_base(config, corpus.labels)
    params = classify.wrap_base(config, loaded)
    learn, choose, judge = (
        to_rows(loaded.tokenizer, split, corpus.labels, data.max_length)
        for split in (corpus.train, corpus.validation, corpus.test)
    )
    counts = summary(params, classify.HEAD)
    console.print(_plan(counts, corpus), highlight=False)
    cut = sum(len(row.ids) >= data.max_length for split in (learn, choose, judge) for row in split)
    if cut:
        console.print(f"{cut} questions reach max_length = {data.max_length} tokens; what is beyond is not read.")
    adapted, plain = classify.forward_of(loaded)
    shapes: dict[str, Any] = {
        "batch_size": size,
        "max_length": data.max_length,
        "pad_id": loaded.tokenizer.pad_token_id,
    }
    before = classify.evaluate(adapted, params, judge, **shapes)
    classify.begin_run(config, corpus.labels, corpus.answers)
    best = _fit(config, console, classify.fit(config, loaded, params, learn, choose, adapted))

    run = classify.load_run(folder)
    after = classify.evaluate(adapted, run.params, judge, **shapes)
    merged_params = merge(run.params)
    merged = classify.evaluate(plain, merged_params, judge, **shapes)
    difference = check_agreement(after, merged)
    result = Result(
        before.accuracy,
        after.accuracy,
        best.epoch,
        best.validation.accuracy,
        counts.trainable,
        counts.total,
        classify.bytes_on_disk(folder / classify.ADAPTER),
        sum(path.stat().st_size for path in find_folder(config.model.name, None).glob("*.safetensors")),
        difference,
        time.perf_counter() - start,
        peak_memory(),
    )
    (folder / classify.RESULT).write_text(json.dumps(result._asdict(), indent=1) + "\n", encoding="utf-8")
    console.print(result_table(_table(result, len(judge))))
    console.print(f"Written to {folder}", highlight=False)
    if data.questions:
        chances = classify.probabilities(run, plain, merged_params, data.questions, batch_size=size)
        for question, chance in zip(data.questions, chances, strict=True):
            console.print(answer_text(question, chance, run), highlight=False, markup=False)
    return result


def _fit(config: Config, console: Console, events: Any) -> Epoch:
    """Consumes the events of a fit: shows them, writes them down, keeps the best adapter on disk."""
    folder = config.output.folder
    steps: list[Step] = []
    epochs: list[Epoch] = []
    monitor = Monitor(console, config.optimisation.epochs)
    with open(folder / classify.METRICS, "w", encoding="utf-8") as metrics, monitor.running():
        for event in events:
            monitor.show(event)
            metrics.write(json.dumps(_line(event)) + "\n")
            metrics.flush()
            if isinstance(event, Step):
                steps.append(event)
                continue
            if event.best:
                # Saved at once: a run that is stopped leaves its best adapter, ready for `jlora predict`.
                classify.save_params(folder, event.params)
            epochs.append(event._replace(params=None))
    learning_curve(folder / classify.CURVE, steps, epochs)
    return [epoch for epoch in epochs if epoch.best][-1]


def _line(event: Step | Epoch) -> Mapping[str, Any]:
    """An event as a line of metrics. No clock times: two runs of one seed write the same bytes."""
    if isinstance(event, Step):
        return {
            "step": event.step,
            "epoch": event.epoch,
            "loss": event.loss,
            "learning_rate": event.learning_rate,
        }
    return {
        "step": event.step,
        "epoch": event.epoch,
        "epoch_loss": event.loss,
        "validation_loss": event.validation.loss,
        "validation_accuracy": event.validation.accuracy,
        "best": event.best,
        "skipped_steps": event.skipped,
    }


def _plan(counts: Summary, corpus: Corpus) -> str:
    """The first lines: what will be trained, on what."""
    adapted = [row for row in counts.rows if row.rank is not None]
    ranks = "/".join(str(rank) for rank in sorted({row.rank for row in adapted if row.rank is not None}))
    scalings = "/".join(sorted({f"{row.scaling:g}" for row in adapted}))
    return (
        f"Training {counts.trainable:,} of {counts.total:,} parameters ({counts.percent:.2f} %): "
        f"{len(adapted)} kernels at rank {ranks}, scaling {scalings}, and the classifier in full.\n"
        f"{len(corpus.labels)} entries, {len(corpus.train)} questions to train on, "
        f"{len(corpus.validation)} to validate, {len(corpus.test)} to test."
    )


def check_agreement(adapted: Scores, merged: Scores) -> float:
    """The largest difference between the logits of adapted and merged predictions.

    Raises:
        RuntimeError: a prediction differs.
    """
    differ = int((adapted.logits.argmax(-1) != merged.logits.argmax(-1)).sum())
    difference = float(np.abs(adapted.logits - merged.logits).max())
    if differ:
        raise RuntimeError(f"{differ} adapted and merged predictions differ, logits by up to {difference:g}")
    return difference


def peak_memory() -> int:
    """The most bytes the process held resident so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _table(result: Result, questions: int) -> list[tuple[str, str]]:
    share = 100 * result.trainable / result.total
    size = f"{megabytes(result.adapter_bytes)} of {megabytes(result.base_bytes)}"
    return [
        ("test accuracy before", f"{result.accuracy_before:.3f}"),
        ("test accuracy after", f"{result.accuracy_after:.3f}"),
        ("best epoch", f"{result.best_epoch} (validation accuracy {result.best_validation_accuracy:.3f})"),
        ("parameters trained", f"{result.trainable:,} of {result.total:,} ({share:.2f} %)"),
        (
            "adapter on disk, of the base's",
            f"{size} ({100 * result.adapter_bytes / result.base_bytes:.1f} %)",
        ),
        (
            "read back: adapted = merged",
            f"{questions} of {questions} (logits within {result.largest_logit_difference:.1e})",
        ),
        ("seconds", f"{result.seconds:.1f}"),
        ("peak memory of the process", f"{result.peak_memory_bytes / 2**20:.0f} MiB"),
    ]
