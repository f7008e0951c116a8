"""The data of a job: its files are read, tokenized, and cut into rows."""

from pathlib import Path
from typing import Any

from jlora.data.batches import Rows, balance_classes, make_rows, pack
from jlora.data.holdout import hold_out
from jlora.data.readers import Corpus, read_corpus
from jlora.errors import count
from jlora.runs.config import Config, Data, fields_of


def read_splits(config: Config) -> Corpus:
    """Reads the files of a job; without a validation file, some training records are held out.

    Raises:
        ValueError: a file can't be used.
        OSError: a file can't be read.
    """
    data = config.data
    sources = {"train": data.train, "validation": data.validation, "test": data.test}
    corpus = read_corpus(
        {name: source for name, source in sources.items() if isinstance(source, Path)},
        data.task,
        fields=fields_of(data),
        format=data.format,
        unit=data.unit,
        answers=data.answers,
        allow_overlap=data.allow_overlap,
    )
    return corpus if data.validation is not None else hold_out(corpus, data.holdout, data.holdout_seed)


def make_split_rows(config: Config, tokenizer: Any, corpus: Corpus, split: str) -> Rows:
    """Tokenizes a split; the rows are packed and weighted as the config specifies."""
    data = config.data
    rows = make_rows(tokenizer, corpus.splits[split], max_length=data.max_length, labels=corpus.labels)
    if split == "train" and config.optimisation.class_weights is not None:
        rows = rows._replace(rows=balance_classes(rows.rows))
    packs = data.pack and data.task in ("causal_lm", "instruction")
    return rows._replace(rows=pack(rows.rows, data.max_length)) if packs else rows


def describe_truncation(data: Data, split: str, rows: Rows) -> list[str]:
    """Describes what `max_length` cuts off or drops from a split, one line each; empty if nothing is lost."""
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


def describe_formats(corpus: Corpus) -> str:
    """Describes the format that each split was read as, in one part if all splits have the same."""
    if len(set(corpus.formats.values())) == 1:
        return f"Read as {next(iter(corpus.formats.values()))}."
    return "Read as " + "; ".join(f"{split}: {form}" for split, form in corpus.formats.items()) + "."
