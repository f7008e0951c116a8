"""Questions with their labels: read, checked, tokenised once and batched by length."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import grain
import numpy as np
from jaxtyping import Float, Int

from jlora.core.errors import complain, count, nearest

SHORTEST_BUCKET = 16
SHOWN = 10


class Example(NamedTuple):
    """One question and the entry it belongs to."""

    text: str
    label: str


class Corpus(NamedTuple):
    """All a job reads.

    Attributes:
        train: questions to train on.
        validation: questions that choose the best epoch.
        test: questions for the result.
        labels: the entries, sorted; a label's place is its class.
        answers: what each entry says; empty where no file was given.
    """

    train: list[Example]
    validation: list[Example]
    test: list[Example]
    labels: tuple[str, ...]
    answers: dict[str, str]


class Row(NamedTuple):
    """A tokenised question."""

    ids: list[int]
    label: int


class Batch(TypedDict):
    """Arrays of one static shape; rows that only fill it up have weight 0."""

    input_ids: Int[np.ndarray, "rows time"]
    attention_mask: Int[np.ndarray, "rows time"]
    labels: Int[np.ndarray, " rows"]
    weights: Float[np.ndarray, " rows"]


def load_corpus(*, train: Path, validation: Path, test: Path, answers: Path | None = None) -> Corpus:
    """Reads the three splits and the answers.

    Args:
        train: JSON lines with "text" and "label".
        validation: the same.
        test: the same.
        answers: JSON lines with "label" and "answer".

    Raises:
        FileNotFoundError: a file is missing; all that are get listed.
        ValueError: lines are malformed, a file is empty, a label of another file is not in train, a question
            stands in two files, an entry has no answer or two.
    """
    paths = {"train": train, "validation": validation, "test": test}
    given = [*paths.values(), *([answers] if answers else [])]
    missing = [str(path) for path in given if not path.is_file()]
    if missing:
        problem = f"{count(len(missing), 'file does', 'files do')} not exist."
        raise FileNotFoundError(complain("data", problem, missing, "correct [data] in the config."))
    wrong: list[str] = []
    splits = {
        name: {line: Example(*texts) for line, texts in read_lines(path, Example._fields, wrong).items()}
        for name, path in paths.items()
    }
    replies = read_lines(answers, ("label", "answer"), wrong) if answers else {}
    if wrong:
        problem = f"{count(len(wrong), 'line')} can't be used."
        raise ValueError(complain("data", problem, _shown(wrong), "correct or delete them."))
    labels = tuple(sorted({example.label for example in splits["train"].values()}))
    _check_labels(paths, splits, labels)
    _check_overlap(paths, splits)
    if answers:
        _check_answers(answers, replies, labels)
    train_set, validation_set, test_set = (list(split.values()) for split in splits.values())
    said: Any = replies.values()
    return Corpus(train_set, validation_set, test_set, labels, dict(said))


def read_lines(path: Path, names: Sequence[str], wrong: list[str]) -> dict[int, tuple[str, ...]]:
    """The named fields of a JSON lines file, stripped, by line number; blank lines are passed over.

    What is wrong with a line is added to `wrong` as "file:line  reason".
    """
    found: dict[int, tuple[str, ...]] = {}
    before = len(wrong)
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if line.strip():
            try:
                found[number] = _fields(line, names)
            except ValueError as error:
                wrong.append(f"{path}:{number}  {error}")
    if not found and len(wrong) == before:
        wrong.append(f"{path}  the file is empty")
    return found


def _fields(line: bytes, names: Sequence[str]) -> tuple[str, ...]:
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"no UTF-8 at byte {error.start + 1}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"no JSON: {error.msg} at column {error.colno}") from None
    if not isinstance(record, dict):
        raise ValueError(f"expected an object with {' and '.join(map(repr, names))}, found {type(record).__name__}")
    for name in names:
        if name not in record:
            near = f"  nearest: {nearest(name, record, 1)[0]!r}" if record else ""
            raise ValueError(f"no field {name!r}{near}")
        if not isinstance(record[name], str) or not record[name].strip():
            raise ValueError(f"{name!r} is {record[name]!r}, expected a text")
    return tuple(record[name].strip() for name in names)


def _shown(offenders: Sequence[str]) -> list[str]:
    """The first few, and how many more there are."""
    rest = len(offenders) - SHOWN
    return [*offenders[:SHOWN], *([f"and {rest} more"] if rest > 0 else [])]


def _check_labels(paths: Mapping[str, Path], splits: Mapping[str, dict[int, Example]], labels: Sequence[str]) -> None:
    unknown = [
        f"{paths[name]}:{line}  {example.label!r}  nearest: {nearest(example.label, labels, 1)[0]!r}"
        for name, split in splits.items()
        for line, example in split.items()
        if example.label not in labels
    ]
    if unknown:
        problem = f"{count(len(unknown), 'line has a label', 'lines have a label')} that {paths['train']} lacks."
        fix = "correct the label, or add questions of it to train."
        raise ValueError(complain("data", problem, _shown(unknown), fix))
    if len(labels) < 2:
        problem = f"{paths['train']} has one label only, {labels[0]!r}."
        raise ValueError(complain("data", problem, [], "add questions of a second one."))


def _check_overlap(paths: Mapping[str, Path], splits: Mapping[str, dict[int, Example]]) -> None:
    first: dict[str, tuple[str, int]] = {}
    twice = []
    for name, split in splits.items():
        for line, example in split.items():
            place, at = first.setdefault(_same(example.text), (name, line))
            if place != name:
                twice.append(f"{paths[name]}:{line}  {example.text!r} is in {paths[place]}:{at}")
    if twice:
        problem = f"{count(len(twice), 'question stands', 'questions stand')} in two files."
        fix = "delete one of the two, or the result means nothing."
        raise ValueError(complain("data", problem, _shown(twice), fix))


def _same(text: str) -> str:
    return " ".join(text.casefold().split())


def _check_answers(path: Path, replies: Mapping[int, tuple[str, ...]], labels: Sequence[str]) -> None:
    have = [label for label, _ in replies.values()]
    wrong = [f"{path}  no answer for {label!r}" for label in labels if label not in have]
    for at, (line, (label, _)) in enumerate(replies.items()):
        if label not in labels:
            wrong.append(f"{path}:{line}  {label!r} is no label in train  nearest: {nearest(label, labels, 1)[0]!r}")
        elif label in have[:at]:
            wrong.append(f"{path}:{line}  a second answer for {label!r}")
    if wrong:
        problem = "the answers don't match the labels."
        raise ValueError(complain("data", problem, _shown(wrong), "give every label one answer."))


def tokenise(tokenizer: Any, texts: Sequence[str], max_length: int) -> list[list[int]]:
    """Token ids of every text, cut to `max_length` tokens."""
    return tokenizer(list(texts), truncation=True, max_length=max_length)["input_ids"]


def to_rows(tokenizer: Any, examples: Sequence[Example], labels: Sequence[str], max_length: int) -> list[Row]:
    """Tokenised questions with their classes."""
    ids = tokenise(tokenizer, [example.text for example in examples], max_length)
    classes = {label: n for n, label in enumerate(labels)}
    return [Row(tokens, classes[example.label]) for tokens, example in zip(ids, examples, strict=True)]


def bucket(tokens: int, max_length: int) -> int:
    """The length a question is padded to: powers of two, so few shapes are compiled.

    >>> [bucket(n, 100) for n in (3, 16, 17, 70)]
    [16, 16, 32, 100]
    """
    length = SHORTEST_BUCKET
    while length < tokens:
        length *= 2
    return min(length, max_length)


def buckets(rows: Sequence[Row], max_length: int) -> dict[int, list[int]]:
    """The places of all rows by padded length, shortest first."""
    found: dict[int, list[int]] = {}
    for n, row in enumerate(rows):
        found.setdefault(bucket(len(row.ids), max_length), []).append(n)
    return dict(sorted(found.items()))


def pad(rows: Sequence[Row], *, size: int, length: int, pad_id: int) -> Batch:
    """A batch of `size` rows and `length` tokens; rows added have weight 0."""
    batch = Batch(
        input_ids=np.full((size, length), pad_id, np.int32),
        attention_mask=np.zeros((size, length), np.int32),
        labels=np.zeros(size, np.int32),
        weights=np.zeros(size, np.float32),
    )
    for n, row in enumerate(rows):
        batch["input_ids"][n, : len(row.ids)] = row.ids
        batch["attention_mask"][n, : len(row.ids)] = 1
        batch["labels"][n] = row.label
        batch["weights"][n] = 1
    # A row without a single token to attend to is a softmax over nothing.
    batch["attention_mask"][len(rows) :, 0] = 1
    return batch


def training_batches(
    rows: Sequence[Row], *, batch_size: int, max_length: int, pad_id: int, seed: int
) -> grain.MapDataset[Batch]:
    """One epoch; `.repeat(n)` gives n of them, each in an order of its own that the seed fixes.

    Questions of one padded length are shuffled and batched, then the batches of all lengths are shuffled.
    """
    parts = []
    for length, places in buckets(rows, max_length).items():
        part: Any = grain.MapDataset.source([rows[n] for n in places]).seed(seed + length).shuffle()
        fill = _Fill(batch_size, length, pad_id)
        parts.append(part.batch(batch_size, drop_remainder=False, batch_fn=fill))
    return grain.MapDataset.concatenate(parts).seed(seed).shuffle()


class _Fill(NamedTuple):
    """`pad` with all but the rows given; a tuple, so grain can send it to another process."""

    size: int
    length: int
    pad_id: int

    def __call__(self, rows: Sequence[Row]) -> Batch:
        return pad(rows, size=self.size, length=self.length, pad_id=self.pad_id)


def ordered_batches(
    rows: Sequence[Row], *, batch_size: int, max_length: int, pad_id: int
) -> Iterator[tuple[list[int], Batch]]:
    """Every row once, with the places they had; the last batch of a length is filled up."""
    for length, places in buckets(rows, max_length).items():
        for start in range(0, len(places), batch_size):
            chosen = places[start : start + batch_size]
            yield chosen, pad([rows[n] for n in chosen], size=batch_size, length=length, pad_id=pad_id)
