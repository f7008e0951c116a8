"""Data files to records: found here or on the hub, read by their suffix, checked as a whole before training."""

import csv
import glob
import io
import json
import re
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypedDict

from jlora.core.errors import complain, count, nearest, quoted

Task = Literal["sequence_classification", "token_classification", "causal_lm", "instruction"]
Unit = Literal["paragraph", "line", "file"]

SHOWN = 10
WIDEST = 80
HUB = "hub:"
OUTSIDE = "O"
ROLES = ("system", "user", "assistant", "tool")
TABLES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
# What the files of a split are called on the hub.
SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "devel"),
    "test": ("test", "testing", "eval", "evaluation"),
}


class Labelled(NamedTuple):
    """A text and its label."""

    text: str
    label: str
    at: str = ""


class Tagged(NamedTuple):
    """The words of a sentence, each with its BIO tag."""

    tokens: tuple[str, ...]
    tags: tuple[str, ...]
    at: str = ""


class Text(NamedTuple):
    """A text to go on with, token after token."""

    text: str
    at: str = ""


class Message(TypedDict):
    """A turn of a chat."""

    role: str
    content: str


class Chat(NamedTuple):
    """A chat with at least one answer; a question and its answer are a chat of two turns."""

    messages: tuple[Message, ...]
    at: str = ""


class Answer(NamedTuple):
    """What a label says."""

    label: str
    answer: str
    at: str = ""


# `at` is where a record stands: file:line, or file[place] in a list or a Parquet file.
Record = Labelled | Tagged | Text | Chat


class Corpus(NamedTuple):
    """All that a job reads.

    Attributes:
        splits: the records of every source, in its order.
        labels: labels or tags, sorted; a label's place is its class. Empty for other tasks.
        answers: what each label says; empty where no file was given.
    """

    splits: dict[str, list[Any]]
    labels: tuple[str, ...]
    answers: dict[str, str]


class Lost(Exception):
    """Why a source gives no files."""


class Wanted(NamedTuple):
    """Which fields make a record.

    Attributes:
        forms: the roles of fields that do, one form or another.
        names: what a role is called in the files.
        build: makes the record of {role: (name, value)}, or raises ValueError with the reason.
        suffixes: of the files it is read from.
    """

    forms: tuple[tuple[str, ...], ...]
    names: Mapping[str, str]
    build: Callable[[dict[str, tuple[str, Any]], str], Any]
    suffixes: tuple[str, ...]

    def __str__(self) -> str:
        return " or ".join(" and ".join(repr(self.names[role]) for role in form) for form in self.forms)

    def columns(self, found: Collection[str]) -> dict[str, str]:
        """The names of the first form that is there in full, by role."""
        forms = [{role: self.names[role] for role in form} for form in self.forms]
        present = [sum(name in found for name in form.values()) for form in forms]
        for form, number in zip(forms, present, strict=True):
            if number == len(form):
                return form
        if len(forms) > 1 and not any(present):
            raise ValueError(f"no field {self}, but {quoted(found)}")
        best = forms[present.index(max(present))]
        name = next(name for name in best.values() if name not in found)
        near = f"  nearest: {nearest(name, found, 1)[0]!r}" if found else ""
        raise ValueError(f"no field {name!r}{near}")

    def record(self, found: Any, at: str) -> Any:
        """The record of an object that was read."""
        if not isinstance(found, dict):
            raise ValueError(f"expected an object with {self}, found {type(found).__name__}")
        return self.build({role: (name, found[name]) for role, name in self.columns(found).items()}, at)


def read_corpus(
    sources: Mapping[str, str | Path],
    task: Task,
    *,
    fields: Mapping[str, str] | None = None,
    unit: Unit = "paragraph",
    answers: str | Path | None = None,
    labels: Sequence[str] | None = None,
    allow_overlap: bool = False,
) -> Corpus:
    """Reads the splits of a job and checks them, each and against each other.

    ==========================  ====================  ==========================================================
    task                        fields                files
    ==========================  ====================  ==========================================================
    sequence_classification     text, label           .jsonl .json .csv .tsv .parquet
    token_classification        tokens, tags (BIO)    .jsonl .json .parquet, or a token and its tag a line, blank
                                                      lines between sentences: .conll .tsv .txt
    causal_lm                   text                  .jsonl .json .csv .tsv .parquet .txt
    instruction                 messages, or          .jsonl .json .csv .tsv .parquet
                                question and answer
    ==========================  ====================  ==========================================================

    Args:
        sources: {"train": ..., "validation": ..., "test": ...}, all but the first of which may be left out. Each
            is a path, a glob, or a data set on the hub: "hub:owner/name", "hub:owner/name/start/of/path",
            "hub:owner/name@revision". Of a data set the files are read whose name, or else whose folder, says the
            split; no code of it is ever run.
        task: what the records are for.
        fields: what the fields are called in the files, where not as above: {"text": "question"}.
        unit: what is one text in a .txt file: a "paragraph" (blank lines end it), a "line", or the "file".
        answers: a file with "label" and "answer" of every label.
        labels: those a trained model has; None for those of the first source.
        allow_overlap: take texts that stand in two splits for what they are.

    Raises:
        FileNotFoundError: sources that give no files; all of them are listed.
        ValueError: a field, suffix or answers that the task does not have; lines that can't be used, of all files
            together; a file without records; labels that the first source lacks; a text in two splits; a label without
            an answer or with two.
    """
    if answers is not None and task != "sequence_classification":
        raise ValueError(complain("data", f"{task} has no labels to answer for.", [str(answers)], "leave answers out."))
    wanted = dict.fromkeys(sources, find_wanted(task, fields or {}))
    given: dict[str, str | Path] = dict(sources)
    if answers is not None:
        given["answers"] = answers
        wanted["answers"] = Wanted((("label", "answer"),), {"label": "label", "answer": "answer"}, _answer, TABLES)
    splits = _read(given, wanted, unit)
    replies: list[Answer] = splits.pop("answers", [])
    known: tuple[str, ...] = ()
    if task in ("sequence_classification", "token_classification"):
        known = _check_labels(splits, labels)
    if not allow_overlap:
        _check_overlap(splits)
    if answers is not None:
        _check_answers(str(answers), replies, known)
    return Corpus(splits, known, {reply.label: reply.answer for reply in replies})


def read_records(
    source: str | Path,
    task: Task,
    *,
    fields: Mapping[str, str] | None = None,
    split: str = "train",
    unit: Unit = "paragraph",
) -> list[Any]:
    """The records of one source; `read_corpus` says what the arguments may be, and what can be wrong."""
    return _read({split: source}, {split: find_wanted(task, fields or {})}, unit)[split]


def find_wanted(task: Task, fields: Mapping[str, str]) -> Wanted:
    """What a task reads, under the names that the user's files have for it.

    Raises:
        ValueError: a field that the task does not have, or fields of two forms.
    """
    known = WANTED[task]
    unknown = [name for name in fields if name not in known.names]
    if unknown:
        problem = f"{count(len(unknown), 'field is', 'fields are')} none of {task}'s."
        offenders = [f"{name!r}  nearest: {nearest(name, known.names, 1)[0]!r}" for name in unknown]
        raise ValueError(complain("data", problem, offenders, f"it reads {known}."))
    forms = [form for form in known.forms if set(form) & set(fields)]
    if len(forms) > 1:
        problem = f"fields of two forms are named: {quoted(fields)}."
        raise ValueError(complain("data", problem, [], f"name {known}."))
    return known._replace(forms=tuple(forms) or known.forms, names={**known.names, **fields})


def _read(sources: Mapping[str, str | Path], wanted: Mapping[str, Wanted], unit: Unit) -> dict[str, list[Any]]:
    wrong: list[str] = []
    files = _find_files(sources, wanted)
    splits = {
        split: [record for path in paths for record in _records(path, wanted[split], unit, wrong)]
        for split, paths in files.items()
    }
    if wrong:
        problem = f"{count(len(wrong), 'line')} can't be used."
        raise ValueError(complain("data", problem, shown(wrong), "correct or delete them."))
    return splits


def _find_files(sources: Mapping[str, str | Path], wanted: Mapping[str, Wanted]) -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {}
    lost, odd = [], []
    for split, source in sources.items():
        suffixes = wanted[split].suffixes
        try:
            hub = str(source).startswith(HUB)
            found[split] = _hub_files(str(source), split, suffixes) if hub else _local_files(str(source))
        except Lost as error:
            lost.append(f"{source}  {error}")
            continue
        odd += [f"{p}  readable: {' '.join(suffixes)}" for p in found[split] if p.suffix.lower() not in suffixes]
    if lost:
        problem = f"{count(len(lost), 'source')} can't be found."
        raise FileNotFoundError(complain("data", problem, lost, "correct [data] in the config."))
    if odd:
        problem = f"{count(len(odd), 'file has', 'files have')} a suffix that the task isn't read from."
        raise ValueError(complain("data", problem, shown(odd), "convert or rename them."))
    return found


def _local_files(source: str) -> list[Path]:
    path = Path(source).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        raise Lost(f"is a folder: name its files, {source.rstrip('/')}/*.jsonl")
    found = [Path(name) for name in sorted(glob.glob(str(path), recursive=True)) if Path(name).is_file()]
    if not found:
        raise Lost("matches no file" if glob.has_magic(source) else "no such file")
    return found


def _hub_files(source: str, split: str, suffixes: Sequence[str]) -> list[Path]:
    """The files of a split of a data set, fetched where they aren't at hand yet."""
    from huggingface_hub import snapshot_download

    name, _, revision = source.removeprefix(HUB).partition("@")
    owner, name, start, *_ = [*name.split("/", 2), "", ""]
    split = split_of(Path(start)) or split
    words = SPLIT_WORDS.get(split, ())
    if not owner or not name or not (start or words):
        raise Lost(f"write {HUB}owner/name" + ("" if words else "/file"))
    repo = f"{owner}/{name}"
    inside = [f"{start}*"] if start else [f"*{word}*" for word in words]
    # Data alone: no script of a data set comes here. A start may be a whole file's name, its suffix included.
    patterns = [part + suffix for part in inside for suffix in suffixes]
    patterns += [start] if start.endswith(tuple(suffixes)) else []
    try:
        root = Path(snapshot_download(repo, repo_type="dataset", revision=revision or None, allow_patterns=patterns))
    except (OSError, ValueError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise Lost(f"the hub did not give it: {reason}") from error
    sets: dict[str, list[Path]] = {}
    for path in sorted(path for path in root.rglob("*") if path.is_file() and path.suffix in suffixes):
        inner = path.relative_to(root)
        if inner.as_posix().startswith(start) and (not words or split_of(inner) == split):
            # Files that differ in numbers alone are the parts of one set.
            key = (inner.parent / re.sub(r"\d+", "*", inner.name)).as_posix()
            sets.setdefault(key, []).append(path)
    if not sets:
        named = f" has {' or '.join(words)} in its name or its folder's" if words else f" begins with {start!r}"
        raise Lost(f"no {' '.join(suffixes)} file of it{named}")
    if len(sets) > 1:
        raise Lost(f"several sets of files fit, {quoted(sets)}: write {HUB}{repo}/ and how one's path begins")
    return next(iter(sets.values()))


def split_of(path: Path) -> str | None:
    """The split that a path says: the file's name, or else the nearest folder's that says any.

    >>> [split_of(Path(p)) for p in ("data/train-00000-of-00002.parquet", "test/dev.csv", "en/test/0.parquet", "a.csv")]
    ['train', 'validation', 'test', None]
    """
    for part in (path.stem, *reversed(path.parts[:-1])):
        for word in re.split(r"[^a-z]+", part.lower()):
            for split, words in SPLIT_WORDS.items():
                if word in words:
                    return split
    return None


def _records(path: Path, wanted: Wanted, unit: Unit, wrong: list[str]) -> list[Any]:
    """The records of a file; what is wrong with it is added to `wrong` as "file:line  reason"."""
    before = len(wrong)
    records = []
    for at, found in _objects(path, wanted, unit, wrong):
        try:
            records.append(wanted.record(found, at))
        except ValueError as error:
            wrong.append(f"{at}  {error}")
    if not records and len(wrong) == before:
        wrong.append(f"{path}  the file is empty")
    return records


def _objects(path: Path, wanted: Wanted, unit: Unit, wrong: list[str]) -> Iterable[tuple[str, Any]]:
    """What stands in a file and where; JSON may hold anything, all else makes objects."""
    suffix = path.suffix.lower()
    if suffix == ".jsonl":
        return _json_lines(path, wrong)
    if suffix == ".json":
        return _json(path, wrong)
    if suffix == ".parquet":
        return _parquet(path, wanted, wrong)
    if wanted.build is _tagged:
        return _sentences(path, wanted, wrong)
    if suffix == ".txt":
        return _texts(path, wanted, unit, wrong)
    return _table(path, wanted, wrong)


def _lines(path: Path, wrong: list[str]) -> Iterator[tuple[str, str]]:
    """Every line, blank ones too, and where it stands."""
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            yield f"{path}:{number}", line.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            wrong.append(f"{path}:{number}  no UTF-8 at byte {error.start + 1}")


def _whole(path: Path, wrong: list[str]) -> str | None:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = error.object[: error.start].split(b"\n")
        wrong.append(f"{path}:{len(before)}  no UTF-8 at byte {len(before[-1]) + 1}")
        return None


def _json_lines(path: Path, wrong: list[str]) -> Iterator[tuple[str, Any]]:
    for at, line in _lines(path, wrong):
        if line.strip():
            try:
                yield at, json.loads(line)
            except json.JSONDecodeError as error:
                wrong.append(f"{at}  no JSON: {error.msg} at column {error.colno}")


def _json(path: Path, wrong: list[str]) -> Iterable[tuple[str, Any]]:
    text = _whole(path, wrong)
    if text is None or not text.strip():
        return []
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            # One object after another: JSON lines under the other name, as often on the hub.
            return _json_lines(path, wrong)
        wrong.append(f"{path}:{error.lineno}  no JSON: {error.msg} at column {error.colno}")
        return []
    if not isinstance(found, list):
        wrong.append(f"{path}  expected a list of objects, found {type(found).__name__}")
        return []
    return [(f"{path}[{n}]", item) for n, item in enumerate(found)]


def _table(path: Path, wanted: Wanted, wrong: list[str]) -> list[tuple[str, dict[str, str]]]:
    """The rows under a header, in commas or tabs; a quoted cell may go over lines."""
    text = _whole(path, wrong)
    if text is None:
        return []
    # The module's own limit, 128 KiB a cell, is less than a long text has.
    limit = csv.field_size_limit(max(len(text), 1))
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header: list[str] = []
    found = []
    at = f"{path}:1"
    try:
        for row in rows:
            if row and not header:
                header = [cell.strip() for cell in row]
                _check_header(header, wanted)
            elif row and len(row) != len(header):
                wrong.append(f"{at}  {count(len(row), 'cell')}, the header has {len(header)}")
            elif row:
                found.append((at, dict(zip(header, row, strict=True))))
            at = f"{path}:{rows.line_num + 1}"
    except (csv.Error, ValueError) as error:
        wrong.append(f"{at}  {error}")
        return []
    finally:
        csv.field_size_limit(limit)
    return found


def _check_header(header: Sequence[str], wanted: Wanted) -> None:
    twice = sorted({name for name in header if header.count(name) > 1 and name in wanted.names.values()})
    if twice:
        raise ValueError(f"{count(len(twice), 'column stands', 'columns stand')} in the header twice: {quoted(twice)}")
    wanted.columns(header)


def _parquet(path: Path, wanted: Wanted, wrong: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        file = ParquetFile(path)
        columns = list(wanted.columns(file.schema_arrow.names).values())
        classes = _class_names(file.schema_arrow.metadata or {})
        number = 0
        for part in file.iter_batches(columns=columns):
            for row in part.to_pylist():
                named = {
                    name: _named(value, classes[name]) if name in classes else value for name, value in row.items()
                }
                yield f"{path}[{number}]", named
                number += 1
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        wrong.append(f"{path}  {next(iter(str(error).splitlines()), type(error).__name__)}")


def _class_names(metadata: Mapping[bytes, bytes]) -> dict[str, list[str]]:
    """The names behind the numbers of a column, which the `datasets` library leaves in a file's metadata."""
    try:
        features = json.loads(metadata.get(b"huggingface", b"{}")).get("info", {}).get("features", {})
    except ValueError:
        return {}
    inner = {name: feature.get("feature") or feature for name, feature in features.items() if isinstance(feature, dict)}
    return {name: inner["names"] for name, inner in inner.items() if isinstance(inner, dict) and "names" in inner}


def _named(value: Any, names: Sequence[str]) -> Any:
    """A class number's name; as it is where it has none, which is then found to be wrong."""
    if isinstance(value, list):
        return [_named(item, names) for item in value]
    return names[value] if isinstance(value, int) and 0 <= value < len(names) else value


def _sentences(path: Path, wanted: Wanted, wrong: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Sentences of a token and its tag a line: between tabs or else spaces the first is the one, the last the other."""
    pairs: list[tuple[str, str]] = []
    start = ""

    def sentence() -> dict[str, Any]:
        tokens, tags = zip(*pairs, strict=True)
        return {wanted.names["tokens"]: list(tokens), wanted.names["tags"]: list(tags)}

    for at, line in _lines(path, wrong):
        cells = line.split("\t") if "\t" in line else line.split()
        if not line.strip() or cells[0] == "-DOCSTART-":
            if pairs:
                yield start, sentence()
            pairs = []
        else:
            start = start if pairs else at
            try:
                pairs.append(_pair(cells))
            except ValueError as error:
                wrong.append(f"{at}  {error}")
    if pairs:
        yield start, sentence()


def _pair(cells: Sequence[str]) -> tuple[str, str]:
    if len(cells) < 2:
        raise ValueError(f"{_brief(cells[0])} has no tag")
    return _string("token", cells[0]), _bio(cells[-1].strip())


def _texts(path: Path, wanted: Wanted, unit: Unit, wrong: list[str]) -> Iterator[tuple[str, dict[str, str]]]:
    name = wanted.names["text"]
    if unit == "file":
        text = _whole(path, wrong)
        if text and text.strip():
            yield str(path), {name: text}
        return
    texts: list[tuple[str, list[str]]] = []
    apart = True
    for at, line in _lines(path, wrong):
        if line.strip():
            if apart or unit == "line":
                texts.append((at, []))
            texts[-1][1].append(line)
        apart = not line.strip()
    yield from ((at, {name: "\n".join(lines)}) for at, lines in texts)


def _labelled(values: dict[str, tuple[str, Any]], at: str) -> Labelled:
    name, label = values["label"]
    label = str(label) if isinstance(label, int) and not isinstance(label, bool) else label
    return Labelled(_string(*values["text"]).strip(), _string(name, label).strip(), at)


def _tagged(values: dict[str, tuple[str, Any]], at: str) -> Tagged:
    tokens, tags = _strings(*values["tokens"]), _strings(*values["tags"])
    if len(tokens) != len(tags):
        raise ValueError(f"{count(len(tokens), 'token')} and {count(len(tags), 'tag')}")
    return Tagged(tokens, tuple(map(_bio, tags)), at)


def _bio(tag: str) -> str:
    if tag not in (OUTSIDE, "B", "I") and not (tag.startswith(("B-", "I-")) and tag[2:]):
        raise ValueError(f"tag {_brief(tag)} is no O, B-TYPE or I-TYPE")
    return tag


def _text(values: dict[str, tuple[str, Any]], at: str) -> Text:
    name, value = values["text"]
    if isinstance(value, list) and all(isinstance(line, str) for line in value):
        value = "\n".join(value)
    return Text(_string(name, value), at)


def _chat(values: dict[str, tuple[str, Any]], at: str) -> Chat:
    if "messages" not in values:
        question, answer = (_string(*values[role]).strip() for role in ("question", "answer"))
        return Chat((Message(role="user", content=question), Message(role="assistant", content=answer)), at)
    name, found = values["messages"]
    if not isinstance(found, list) or not found:
        raise ValueError(f"{name!r} is {_brief(found)}, expected a list of messages")
    messages = tuple(_message(f"{name}[{n}]", message) for n, message in enumerate(found))
    if all(message["role"] != "assistant" for message in messages):
        raise ValueError(f"{name!r} has no message of the assistant to learn from")
    return Chat(messages, at)


def _message(name: str, found: Any) -> Message:
    if not isinstance(found, dict) or not {"role", "content"} <= set(found):
        raise ValueError(f"{name!r} is {_brief(found)}, expected an object with 'role' and 'content'")
    if found["role"] not in ROLES:
        near = nearest(str(found["role"]), ROLES, 1)[0]
        raise ValueError(f"{name!r} has role {_brief(found['role'])}  nearest: {near!r}")
    return Message(role=found["role"], content=_string(f"{name}.content", found["content"]))


def _answer(values: dict[str, tuple[str, Any]], at: str) -> Answer:
    return Answer(_string(*values["label"]).strip(), _string(*values["answer"]).strip(), at)


def _string(name: str, value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{name!r} is {_brief(value)}, expected a text")
    return value


def _strings(name: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not value:
        raise ValueError(f"{name!r} is {_brief(value)}, expected a list of texts")
    # A sentence's tags repeat all over the corpus: one string each.
    return tuple(sys.intern(_string(f"{name}[{n}]", item)) for n, item in enumerate(value))


WANTED = {
    task: Wanted(forms, {role: role for form in forms for role in form}, build, suffixes)
    for task, forms, build, suffixes in (
        ("sequence_classification", (("text", "label"),), _labelled, TABLES),
        (
            "token_classification",
            (("tokens", "tags"),),
            _tagged,
            (".jsonl", ".json", ".parquet", ".conll", ".tsv", ".txt"),
        ),
        ("causal_lm", (("text",),), _text, (*TABLES, ".txt")),
        ("instruction", (("messages",), ("question", "answer")), _chat, TABLES),
    )
}


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= WIDEST else f"{text[: WIDEST - 3]}..."


def shown(offenders: Sequence[str]) -> list[str]:
    """The first few, and how many more there are."""
    rest = len(offenders) - SHOWN
    return [*offenders[:SHOWN], *([f"and {rest} more"] if rest > 0 else [])]


def _labels(record: Labelled | Tagged) -> tuple[str, ...]:
    return record.tags if isinstance(record, Tagged) else (record.label,)


def _check_labels(splits: Mapping[str, list[Any]], given: Sequence[str] | None) -> tuple[str, ...]:
    first = next(iter(splits))
    labels = tuple(given or sorted({label for record in splits[first] for label in _labels(record)}))
    known = set(labels)
    unknown = [
        f"{record.at}  {label!r}  nearest: {nearest(label, labels, 1)[0]!r}"
        for split in splits.values()
        for record in split
        for label in dict.fromkeys(_labels(record))
        if label not in known
    ]
    if unknown:
        place = "the model" if given else first
        problem = f"{count(len(unknown), 'record has a label', 'records have a label')} that {place} lacks."
        fix = "correct the label, or train on records of it."
        raise ValueError(complain("data", problem, shown(unknown), fix))
    if len(labels) < 2:
        problem = f"{first} has one label only, {labels[0]!r}."
        raise ValueError(complain("data", problem, [], "add records of a second one."))
    return labels


def _check_overlap(splits: Mapping[str, list[Any]]) -> None:
    first: dict[str, tuple[str, str]] = {}
    twice = []
    for name, split in splits.items():
        for record in split:
            text = _text_of(record)
            place, at = first.setdefault(" ".join(text.casefold().split()), (name, record.at)) if text else (name, "")
            if place != name:
                twice.append(f"{record.at}  {_brief(text)} is in {at}")
    if twice:
        problem = f"{count(len(twice), 'text stands', 'texts stand')} in two splits."
        fix = "delete one of the two, or the result says too much; or set allow_overlap."
        raise ValueError(complain("data", problem, shown(twice), fix))


def _text_of(record: Record) -> str:
    """What gives the result away if it was trained on; nothing in a sentence without an entity."""
    if isinstance(record, Tagged):
        return " ".join(record.tokens) if set(record.tags) != {OUTSIDE} else ""
    if isinstance(record, Chat):
        return "\n".join(message["content"] for message in record.messages)
    return record.text


def _check_answers(path: str, replies: Sequence[Answer], labels: Sequence[str]) -> None:
    have = {reply.label for reply in replies}
    wrong = [f"{path}  no answer for {label!r}" for label in labels if label not in have]
    seen: set[str] = set()
    for label, _, at in replies:
        if label not in labels:
            wrong.append(f"{at}  {label!r} is no label  nearest: {nearest(label, labels, 1)[0]!r}")
        elif label in seen:
            wrong.append(f"{at}  a second answer for {label!r}")
        seen.add(label)
    if wrong:
        problem = "the answers don't match the labels."
        raise ValueError(complain("data", problem, shown(wrong), "give every label one answer."))
