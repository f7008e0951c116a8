"""Data files to records: found here or on the hub, read by their suffix, checked as a whole before training."""

import codecs
import csv
import glob
import gzip
import io
import json
import re
import sys
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, NotRequired, TypedDict

from jlora.errors import JloraFileNotFoundError, JloraValueError, count, name_file, nearest, quoted

Task = Literal["sequence_classification", "token_classification", "causal_lm", "instruction"]
Unit = Literal["paragraph", "line", "file"]
Format = Literal["auto", "messages", "sharegpt", "question_answer", "alpaca", "prompt_completion"]

SHOWN = 10
WIDEST = 80
HUB = "hub:"
OUTSIDE = "O"
ROLES = ("system", "user", "assistant", "tool")
SHAREGPT_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "observation": "tool",
}
TABLES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
GZIP = ".gz"
# gzip reaches about 1000, texts 3 to 30. A file that would fill the memory is refused once it is past GZIP_MOST bytes.
GZIP_RATIO, GZIP_MOST = 200, 1 << 26
# What the files of a split are called on the hub.
SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "devel"),
    "test": ("test", "testing", "eval", "evaluation"),
}
# Names that columns of other data sets have, by the role that they play here.
USUAL_NAMES = {
    "text": ("sentence", "content", "document", "review", "utterance", "query", "question", "input", "tweet", "body"),
    "label": ("category", "class", "intent", "sentiment", "target", "labels", "topic", "coarse_label", "label_text"),
    "tokens": ("words",),
    "tags": ("ner_tags", "labels", "ner", "iob"),
    "messages": ("conversation", "conversations", "chat", "dialog", "dialogue", "turns"),
    "question": ("instruction", "prompt", "query", "input", "user", "human", "problem"),
    "answer": ("response", "output", "completion", "reply", "assistant", "solution", "target", "chosen"),
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
    """A turn of a chat: `transformers.apply_chat_template` takes every key but `weight`.

    Attributes:
        role: one of ROLES.
        content: the text; absent in a message that only calls tools.
        reasoning_content: the assistant's thoughts before its answer.
        tool_calls: {"type": "function", "function": {"name": ..., "arguments": {...}}} for each call.
        tool_call_id: the call that a tool answers.
        name: the name of the speaker or of the tool.
        weight: 0 leaves an assistant's message out of the loss; absent where it counts.
    """

    role: str
    content: NotRequired[str]
    reasoning_content: NotRequired[str]
    tool_calls: NotRequired[list[dict[str, Any]]]
    tool_call_id: NotRequired[str]
    name: NotRequired[str]
    weight: NotRequired[Literal[0]]


class Chat(NamedTuple):
    """A chat with at least one answer; a question and its answer are a chat of two turns.

    Attributes:
        messages: the turns, in order.
        at: where it stands.
        tools: JSON schemas of the tools that the assistant may call.
    """

    messages: tuple[Message, ...]
    at: str = ""
    tools: tuple[dict[str, Any], ...] = ()


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
        formats: how the files of every source were read: their format and its columns.
    """

    splits: dict[str, list[Any]]
    labels: tuple[str, ...]
    answers: dict[str, str]
    formats: Mapping[str, str] = MappingProxyType({})


class SourceError(Exception):
    """A source gives no files; the text says why."""


class ColumnError(ValueError):
    """An object or a table lacks a column.

    Attributes:
        columns: the columns that it has.
        mapping: settings that would name the missing columns, as 'data.label = "category"'.
        at: where it stands, for a table.
    """

    def __init__(self, problem: str, columns: Collection[str], mapping: Sequence[str]):
        super().__init__(problem)
        self.columns, self.mapping, self.at = tuple(columns), tuple(mapping), ""


class Form(NamedTuple):
    """A format in which files hold the records of a task.

    Attributes:
        name: of the format.
        columns: the columns that make a record, by their role.
        optional: columns that are read where they are there, by their role.
    """

    name: str
    columns: Mapping[str, str]
    optional: Mapping[str, str] = MappingProxyType({})


class Schema(NamedTuple):
    """The columns that make a record.

    Attributes:
        forms: the formats; the first whose columns are all there is read.
        build: makes the record of {role: (column, value)}, or raises ValueError with the reason.
        suffixes: of the files that are read.
        section: the config section that can name the columns; None where they have fixed names.
    """

    forms: tuple[Form, ...]
    build: Callable[[dict[str, tuple[str, Any]], str], Any]
    suffixes: tuple[str, ...]
    section: str | None = "data"

    def __str__(self) -> str:
        return " or ".join(" and ".join(map(repr, form.columns.values())) for form in self.forms)

    @property
    def names(self) -> set[str]:
        """All columns that may be read."""
        return {name for form in self.forms for name in (*form.columns.values(), *form.optional.values())}

    def match(self, columns: Collection[str]) -> Form:
        """The first format whose columns are all there, with the optional ones that are there too.

        Raises:
            ColumnError: there is none.
        """
        for form in self.forms:
            if all(name in columns for name in form.columns.values()):
                more = {role: name for role, name in form.optional.items() if name in columns}
                return form._replace(columns={**form.columns, **more})
        present = [sum(name in columns for name in form.columns.values()) for form in self.forms]
        if len(self.forms) > 1 and not any(present):
            raise ColumnError(f"no field {self}, but {quoted(columns)}", columns, self._any_mapping(columns))
        form = self.forms[present.index(max(present))]
        missing = next(name for name in form.columns.values() if name not in columns)
        near = f"  nearest: {nearest(missing, columns, 1)[0]!r}" if columns else ""
        raise ColumnError(f"no field {missing!r}{near}", columns, self._mapping(form, columns))

    def _mapping(self, form: Form, columns: Collection[str]) -> list[str]:
        """Settings that name the missing columns of a format: by a usual name, or else by the nearest one."""
        unused = [name for name in columns if name.strip() and name not in form.columns.values()]
        mapping = []
        for role, name in form.columns.items():
            if self.section is not None and name not in columns and unused:
                usual = [column for column in unused if column.lower() in USUAL_NAMES.get(role, ())]
                column = (usual or nearest(name, unused, 1))[0]
                unused.remove(column)
                mapping.append(f"{self.section}.{role} = {json.dumps(column, ensure_ascii=False)}")
        return mapping

    def _any_mapping(self, columns: Collection[str]) -> list[str]:
        """Settings that name columns for one of several formats, by their usual names alone."""
        for form in self.forms:
            usual = [[name for name in columns if name.lower() in USUAL_NAMES.get(role, ())] for role in form.columns]
            if all(usual):
                return self._mapping(form, [names[0] for names in usual])
        return [
            f'{self.section}.{role} = "..."' for role in max(self.forms, key=lambda form: len(form.columns)).columns
        ]

    def read(self, found: Any, at: str, forms: dict[tuple[str, ...], Form]) -> Any:
        """The record of an object; the format of its columns is looked up in `forms`, or added there."""
        if not isinstance(found, dict):
            raise ValueError(f"expected an object with {self}, found {type(found).__name__}")
        columns = tuple(found)
        if columns not in forms:
            forms[columns] = self.match(columns)
        return self.build({role: (name, found[name]) for role, name in forms[columns].columns.items()}, at)


def read_corpus(
    sources: Mapping[str, str | Path],
    task: Task,
    *,
    fields: Mapping[str, str] | None = None,
    format: Format = "auto",
    unit: Unit = "paragraph",
    answers: str | Path | None = None,
    labels: Sequence[str] | None = None,
    allow_overlap: bool = False,
) -> Corpus:
    """Reads the splits of a job and checks them, each and against each other.

    ==========================  ======================  ========================================================
    task                        columns                 files
    ==========================  ======================  ========================================================
    sequence_classification     text, label             .jsonl .json .csv .tsv .parquet
    token_classification        tokens, tags (BIO)      .jsonl .json .parquet, or a token and its tag a line, blank
                                                        lines between sentences: .conll .tsv .txt
    causal_lm                   text                    .jsonl .json .csv .tsv .parquet .txt
    instruction                 one of the formats      .jsonl .json .csv .tsv .parquet
                                below
    ==========================  ======================  ========================================================

    Each but .parquet may be compressed by gzip: .jsonl.gz.

    ====================  ================================  ====================================================
    format                columns                           a record
    ====================  ================================  ====================================================
    messages              messages                          messages with role and content (OpenAI), tool_calls
    sharegpt              conversations                     messages with from and value
    question_answer       question, answer                  a question and its answer
    alpaca                instruction, output               an instruction, its input (if any) and the output
    prompt_completion     prompt, completion                texts, or lists of messages; the completion is learned
    ====================  ================================  ====================================================

    More columns are read where they are there: system (a message before all others) and tools (JSON schemas for
    the chat template); beside a question or a prompt, input (a text that follows it); of alpaca, history (pairs of
    earlier questions and answers). Other columns are ignored.

    Args:
        sources: {"train": ..., "validation": ..., "test": ...}, all but the first of which may be left out. Each
            is a path, a folder, a glob, or a data set on the hub: "hub:owner/name", "hub:owner/name/start/of/path",
            "hub:owner/name@revision". Of a data set or a folder the files are read whose name, or else whose folder,
            says the split; of a folder all, if none says any. No code of a data set is ever run.
        task: what the records are for.
        fields: the names of the columns, where not as above: {"text": "question"}; those of an alpaca or a
            prompt_completion file are named as a question, its input and its answer.
        format: one of the formats above; "auto" reads the first whose columns are there.
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
        raise JloraValueError("data", f"{task} has no labels to answer for.", [str(answers)], "leave answers out.")
    schemas = dict.fromkeys(sources, find_schema(task, fields or {}, format))
    given: dict[str, str | Path] = dict(sources)
    if answers is not None:
        given["answers"] = answers
        form = Form("answers", {"label": "label", "answer": "answer"})
        schemas["answers"] = Schema((form,), _answer, TABLES, section=None)
    splits, formats = _read(given, schemas, unit)
    replies: list[Answer] = splits.pop("answers", [])
    formats.pop("answers", None)
    known: tuple[str, ...] = ()
    if task in ("sequence_classification", "token_classification"):
        known = _check_labels(splits, labels)
    if not allow_overlap:
        _check_overlap(splits)
    if answers is not None:
        _check_answers(str(answers), replies, known)
    return Corpus(splits, known, {reply.label: reply.answer for reply in replies}, formats)


def read_records(
    source: str | Path,
    task: Task,
    *,
    fields: Mapping[str, str] | None = None,
    format: Format = "auto",
    split: str = "train",
    unit: Unit = "paragraph",
) -> list[Any]:
    """The records of one source; `read_corpus` says what the arguments may be, and what can be wrong."""
    splits, _ = _read({split: source}, {split: find_schema(task, fields or {}, format)}, unit)
    return splits[split]


def read_prompt(record: Mapping[str, Any], fields: Mapping[str, str], format: Format, at: str) -> Chat:
    """The chat of an object up to the answer that a model is to give: as `read_corpus` reads it, its answer left out.

    Args:
        record: the object; the column of its answer may be missing.
        fields: the names of the columns, as for `read_corpus`.
        format: of the columns.
        at: where the object stands.

    Raises:
        ValueError: it lacks the columns, or holds nothing to answer.
    """
    forms = find_schema("instruction", fields, format).forms
    for form in forms:
        required = [name for role, name in form.columns.items() if role != "answer"]
        if all(name in record for name in required):
            columns = {**form.columns, **form.optional}
            values = {role: (name, record[name]) for role, name in columns.items() if name in record}
            messages = _messages(*values["messages"]) if "messages" in values else _asked_turns(values)
            for message in messages:
                message.pop("weight", None)
            while messages and messages[-1]["role"] == "assistant":
                messages.pop()
            if not messages:
                raise ValueError(f"{required[0]!r} has no message to answer")
            tools = _tools(*values["tools"]) if "tools" in values else ()
            return Chat(tuple(_with_system(values, messages)), at, tools)
    known = dict.fromkeys(next(iter(form.columns.values())) for form in forms)
    raise ColumnError(f"no field {' or '.join(map(repr, known))}, but {quoted(record)}", tuple(record), ())


def find_schema(task: Task, fields: Mapping[str, str], format: Format = "auto") -> Schema:
    """The columns that a task reads, under the names that the user's files have for them.

    Raises:
        ValueError: a field or a format that the task does not have, or fields of two formats.
    """
    known = SCHEMAS[task]
    roles = list(dict.fromkeys(role for form in known.forms for role in form.columns))
    optional = {role for form in known.forms for role in form.optional}
    unknown = [name for name in fields if name not in (*roles, *optional)]
    if unknown:
        problem = f"{count(len(unknown), 'field is', 'fields are')} none of {task}'s."
        offenders = [f"{name!r}  nearest: {nearest(name, roles, 1)[0]!r}" for name in unknown]
        raise JloraValueError("data", problem, offenders, f"it reads {known}.")
    forms = [form for form in known.forms if format in ("auto", form.name)]
    if not forms:
        problem = f"{task} has no format {format!r}."
        raise JloraValueError("data", problem, [], "leave data.format out.")
    forms = [form for form in forms if set(fields) <= {*form.columns, *form.optional}]
    if not forms:
        problem = f"fields of two formats are named: {quoted(fields)}."
        raise JloraValueError("data", problem, [], f"name {known}.")

    def rename(columns: Mapping[str, str]) -> dict[str, str]:
        return {role: fields.get(role, name) for role, name in columns.items()}

    renamed = [Form(form.name, rename(form.columns), rename(form.optional)) for form in forms]
    # Formats that differ in the names of their columns alone are one where the user names them.
    first = {tuple(form.columns.values()): form for form in reversed(renamed)}
    return known._replace(forms=tuple(reversed(first.values())))


def _read(
    sources: Mapping[str, str | Path], schemas: Mapping[str, Schema], unit: Unit
) -> tuple[dict[str, list[Any]], dict[str, str]]:
    """The records of all sources, and how they were read."""
    wrong: list[str] = []
    mappings: list[Sequence[str]] = []
    splits: dict[str, list[Any]] = {}
    formats = {}
    for split, paths in _find_files(sources, schemas).items():
        columns: dict[str, dict[str, None]] = {}
        splits[split] = []
        for path in paths:
            splits[split] += _records(path, schemas[split], unit, wrong, mappings, columns)
        files = f"{len(paths)} files, " if len(paths) > 1 else ""
        formats[split] = files + " and ".join(f"{name} ({quoted(names)})" for name, names in columns.items())
    if wrong:
        problem = f"{count(len(wrong), 'line')} can't be used."
        fix = _mapping_fix(mappings) if len(mappings) == len(wrong) else "correct or delete them."
        raise JloraValueError("data", problem, shown(wrong), fix)
    return splits, formats


def _mapping_fix(mappings: Sequence[Sequence[str]]) -> str:
    """The fix of files that lack columns and have no other fault."""
    settings = list(dict.fromkeys(setting for mapping in mappings for setting in mapping))
    keys = {setting.partition(" = ")[0] for setting in settings}
    if not all(mappings):
        return "add or rename the columns in the files."
    if len(keys) < len(settings):
        return "give the columns the same names in all files."
    return f"set {' and '.join(settings)}."


def _find_files(sources: Mapping[str, str | Path], schemas: Mapping[str, Schema]) -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {}
    lost, odd = [], []
    for split, source in sources.items():
        suffixes = schemas[split].suffixes
        try:
            hub = str(source).startswith(HUB)
            found[split] = (_hub_files if hub else _local_files)(str(source), split, suffixes)
        except SourceError as error:
            lost.append(f"{source}  {error}")
            continue
        odd += [f"{path}  readable: {' '.join(suffixes)}" for path in found[split] if not _is_readable(path, suffixes)]
    if lost:
        problem = f"{count(len(lost), 'source')} can't be found."
        raise JloraFileNotFoundError("data", problem, lost, "correct [data] in the config.")
    if odd:
        problem = f"{count(len(odd), 'file has', 'files have')} a suffix that the task isn't read from."
        raise JloraValueError("data", problem, shown(odd), "convert or rename them.")
    return found


def _suffix(path: Path) -> str:
    """A file's suffix, without gzip's behind it.

    >>> _suffix(Path("a.v1/train.jsonl.gz"))
    '.jsonl'
    """
    return (Path(path.stem) if path.suffix.lower() == GZIP else path).suffix.lower()


def _is_readable(path: Path, suffixes: Sequence[str]) -> bool:
    # Parquet compresses its data itself, and needs to seek.
    compressed = path.suffix.lower() == GZIP
    return _suffix(path) in suffixes and not (compressed and _suffix(path) == ".parquet")


def _local_files(source: str, split: str, suffixes: Sequence[str]) -> list[Path]:
    path = Path(source).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        return _folder_files(path, split, suffixes)
    found = [Path(name) for name in sorted(glob.glob(str(path), recursive=True)) if Path(name).is_file()]
    if not found:
        raise SourceError("matches no file" if glob.has_magic(source) else "no such file")
    return found


def _folder_files(folder: Path, split: str, suffixes: Sequence[str]) -> list[Path]:
    """The files of a folder that say a split; all of them, if none says any."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and _is_readable(path, suffixes)]
    paths = [path for path in paths if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
    said = {path: split_of(path.relative_to(folder)) for path in paths}
    found = [path for path in paths if said[path] == split] if any(said.values()) else paths
    if not paths:
        raise SourceError(f"the folder has no {' '.join(suffixes)} file")
    if not found:
        others = quoted(sorted({name for name in said.values() if name}))
        raise SourceError(f"the folder has files of {others} only, and none of {split}")
    kinds = sorted({_suffix(path) for path in found})
    if len(kinds) > 1:
        raise SourceError(f"the folder has files of several kinds, {' '.join(kinds)}: write {folder}/*{kinds[0]}")
    return found


def _hub_files(source: str, split: str, suffixes: Sequence[str]) -> list[Path]:
    """The files of a split of a data set, fetched where they aren't at hand yet."""
    from huggingface_hub import snapshot_download

    name, _, revision = source.removeprefix(HUB).partition("@")
    owner, name, start, *_ = [*name.split("/", 2), "", ""]
    split = split_of(Path(start)) or split
    words = SPLIT_WORDS.get(split, ())
    if not owner or not name or not (start or words):
        raise SourceError(f"write {HUB}owner/name" + ("" if words else "/file"))
    repo = f"{owner}/{name}"
    inside = [f"{start}*"] if start else [f"*{word}*" for word in words]
    # Data alone: no script of a data set comes here. A start may be a whole file's name, its suffix included.
    endings = [
        suffix + end for suffix in suffixes for end in ("", GZIP) if _is_readable(Path("a" + suffix + end), suffixes)
    ]
    patterns = [part + ending for part in inside for ending in endings]
    patterns += [start] if start.endswith(tuple(endings)) else []
    try:
        root = Path(snapshot_download(repo, repo_type="dataset", revision=revision or None, allow_patterns=patterns))
    except (OSError, ValueError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise SourceError(f"the hub did not give it: {reason}") from error
    sets: dict[str, list[Path]] = {}
    for path in sorted(path for path in root.rglob("*") if path.is_file() and _is_readable(path, suffixes)):
        inner = path.relative_to(root)
        if inner.as_posix().startswith(start) and (not words or split_of(inner) == split):
            # Files that differ in numbers alone are the parts of one set.
            key = (inner.parent / re.sub(r"\d+", "*", inner.name)).as_posix()
            sets.setdefault(key, []).append(path)
    if not sets:
        named = f" has {' or '.join(words)} in its name or its folder's" if words else f" begins with {start!r}"
        raise SourceError(f"no {' '.join(suffixes)} file of it{named}")
    if len(sets) > 1:
        raise SourceError(f"several sets of files fit, {quoted(sets)}: write {HUB}{repo}/ and how one's path begins")
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


def _records(
    path: Path,
    schema: Schema,
    unit: Unit,
    wrong: list[str],
    mappings: list[Sequence[str]],
    columns: dict[str, dict[str, None]],
) -> list[Any]:
    """The records of a file.

    Args:
        path: the file.
        schema: its columns.
        unit: what is one text in a .txt file.
        wrong: gets what is wrong with the file, as "file:line  reason".
        mappings: gets the settings that would name the columns, of a file without them.
        columns: gets the columns that were read, by format.
    """
    before = len(wrong)
    records = []
    forms: dict[tuple[str, ...], Form] = {}
    incomplete: list[ColumnError] = []

    def note(at: str, error: ValueError) -> None:
        wrong.append(f"{at}  {error}")
        if isinstance(error, ColumnError):
            error.at = at
            incomplete.append(error)

    try:
        for at, found in _objects(path, schema, unit, wrong):
            try:
                records.append(schema.read(found, at, forms))
            except ValueError as error:
                note(at, error)
    except ColumnError as error:
        note(error.at, error)
    for form in forms.values():
        columns.setdefault(form.name, {}).update(dict.fromkeys(form.columns.values()))
    if not records and len(incomplete) == len(wrong) - before > 0:
        # No line has the columns: their names are wrong, and not the lines.
        first = incomplete[0]
        listed = "" if str(first).endswith(quoted(first.columns)) else f"  columns: {quoted(first.columns)}"
        wrong[before:] = [f"{first.at}  {first}{listed}"]
        mappings.append(first.mapping)
    elif not records and len(wrong) == before:
        wrong.append(f"{path}  the file is empty")
    return records


def _objects(path: Path, schema: Schema, unit: Unit, wrong: list[str]) -> Iterable[tuple[str, Any]]:
    """What stands in a file and where; JSON may hold anything, all else makes objects.

    Raises:
        ColumnError: a table lacks columns.
    """
    suffix = _suffix(path)
    if suffix == ".jsonl":
        return _json_lines(path, wrong)
    if suffix == ".json":
        return _json(path, wrong)
    if suffix == ".parquet":
        return _parquet(path, schema, wrong)
    if schema.build is _tagged:
        return _sentences(path, schema, wrong)
    if suffix == ".txt":
        return _texts(path, schema, unit, wrong)
    return _table(path, schema, wrong)


def _content(path: Path, wrong: list[str]) -> bytes | None:
    """The bytes of a file, decompressed; None where they are damaged as a whole."""
    if path.suffix.lower() != GZIP:
        with name_file(path):
            data = path.read_bytes()
    else:
        parts: list[bytes] = []
        try:
            with name_file(path), open(path, "rb") as packed, gzip.GzipFile(fileobj=packed) as file:
                while part := file.read1(1 << 16):
                    parts.append(part)
                    if file.tell() > max(GZIP_MOST, GZIP_RATIO * packed.tell()):
                        wrong.append(f"{path}  the gzip data become more than {GZIP_RATIO} times as large")
                        return None
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            # What came out before the damage tells where it is.
            line = sum(part.count(b"\n") for part in parts) + 1
            wrong.append(f"{path}:{line}  the gzip data are damaged: {error}")
            return None
        data = b"".join(parts)
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        wrong.append(f"{path}:1  UTF-16, expected UTF-8")
        return None
    return data


def _lines(path: Path, wrong: list[str]) -> Iterator[tuple[str, str]]:
    """Every line, blank ones too, and where it stands."""
    for number, line in enumerate((_content(path, wrong) or b"").splitlines(), 1):
        try:
            yield f"{path}:{number}", line.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            wrong.append(f"{path}:{number}  no UTF-8 at byte {error.start + 1}")


def _whole(path: Path, wrong: list[str]) -> str | None:
    data = _content(path, wrong)
    try:
        return None if data is None else data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = error.object[: error.start].split(b"\n")
        wrong.append(f"{path}:{len(before)}  no UTF-8 at byte {len(before[-1]) + 1}")
        return None


def _json_lines(path: Path, wrong: list[str]) -> Iterator[tuple[str, Any]]:
    for at, line in _lines(path, wrong):
        if line.strip():
            try:
                yield at, json.loads(line)
            except (ValueError, RecursionError) as error:
                wrong.append(f"{at}  {_json_problem(error)}")


def _json(path: Path, wrong: list[str]) -> Iterable[tuple[str, Any]]:
    text = _whole(path, wrong)
    if text is None or not text.strip():
        return []
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        if isinstance(error, json.JSONDecodeError) and error.msg == "Extra data":
            # One object after another: JSON lines under the other name, as often on the hub.
            return _json_lines(path, wrong)
        line = error.lineno if isinstance(error, json.JSONDecodeError) else 1
        wrong.append(f"{path}:{line}  {_json_problem(error)}")
        return []
    if not isinstance(found, list):
        wrong.append(f"{path}  expected a list of objects, found {type(found).__name__}")
        return []
    return [(f"{path}[{n}]", item) for n, item in enumerate(found)]


def _json_problem(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"no JSON: {error.msg} at column {error.colno}"
    return "the JSON is nested too deep" if isinstance(error, RecursionError) else f"no JSON: {error}"


def _table(path: Path, schema: Schema, wrong: list[str]) -> Iterator[tuple[str, dict[str, str]]]:
    """The rows under a header, between commas, semicolons or tabs; a quoted cell may go over lines."""
    text = _whole(path, wrong)
    if text is None:
        return
    delimiter = _delimiter(text, "\t" if _suffix(path) == ".tsv" else ",")
    rows, stop = _rows(text, delimiter) if delimiter == "\t" else _cells(text, delimiter, csv.QUOTE_MINIMAL)
    header: list[str] = []
    for line, row in rows:
        at = f"{path}:{line}"
        if not header:
            header = [cell.strip() for cell in row]
            try:
                _check_header(header, schema)
            except ColumnError as error:
                error.at = at
                raise
            except ValueError as error:
                wrong.append(f"{at}  {error}")
                return
        elif len(row) != len(header):
            wrong.append(f"{at}  {count(len(row), 'cell')}, the header has {len(header)}")
        else:
            yield at, dict(zip(header, row, strict=True))
    if stop is not None:
        line, reason = stop
        wrong.append(f"{path}:{line}  {reason}")


def _delimiter(text: str, usual: str) -> str:
    r"""The character between cells: the usual one, or another where the header has only that.

    >>> [_delimiter(text, ",") for text in ("a,b;c", "a;b", "a\tb", "a")]
    [',', ';', '\t', ',']
    """
    header = next((line for line in io.StringIO(text) if line.strip()), "")
    return next((character for character in (usual, ",", ";", "\t") if character in header), usual)


def _rows(text: str, delimiter: str) -> tuple[list[tuple[int, list[str]]], tuple[int, str] | None]:
    """The cells of a table that may be quoted or not.

    Many write such a table without quoting, and a quotation mark that begins a cell then is a character like others:
    read as quoting, it would join lines. So where quoting joins lines, or can't be read, the cells are unquoted if
    that leaves no more rows of a wrong length. (One column says nothing by its length: what joins lines there is
    quoting.)
    """
    quoted_rows, stop = _cells(text, delimiter, csv.QUOTE_MINIMAL)
    if '"' not in text:
        return quoted_rows, stop
    plain_rows, _ = _cells(text, delimiter, csv.QUOTE_NONE)
    if stop is None and (len(quoted_rows) == len(plain_rows) or len(plain_rows[0][1]) == 1):
        return quoted_rows, None
    if _misfits(plain_rows) <= _misfits(quoted_rows) + (stop is not None):
        return plain_rows, None
    return quoted_rows, stop


def _misfits(rows: Sequence[tuple[int, list[str]]]) -> int:
    """How many rows have another number of cells than the first."""
    return sum(len(row) != len(rows[0][1]) for _, row in rows)


def _cells(
    text: str, delimiter: str, quoting: Literal[0, 3]
) -> tuple[list[tuple[int, list[str]]], tuple[int, str] | None]:
    """The rows that are not blank with the line each begins at; where reading had to stop and why, if it had to."""
    # The module's own limit, 128 KiB a cell, is less than a long text has.
    limit = csv.field_size_limit(max(len(text), 1))
    file = io.StringIO(text, newline="")
    reader: Any = csv.reader(file, delimiter=delimiter, strict=True, quoting=quoting)
    rows, line = [], 1
    try:
        for row in reader:
            if row:
                rows.append((line, row))
            line = reader.line_num + 1
    except csv.Error as error:
        return rows, (line, str(error))
    finally:
        csv.field_size_limit(limit)
    return rows, None


def _check_header(header: Sequence[str], schema: Schema) -> None:
    twice = sorted({name for name in header if header.count(name) > 1 and name in schema.names})
    if twice:
        raise ValueError(f"{count(len(twice), 'column stands', 'columns stand')} in the header twice: {quoted(twice)}")
    schema.match(header)


def _parquet(path: Path, schema: Schema, wrong: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    number = 0
    try:
        with ParquetFile(path, page_checksum_verification=True) as file:
            columns = list(schema.match(file.schema_arrow.names).columns.values())
            classes = _class_names(file.schema_arrow.metadata or {})
            for part in file.iter_batches(columns=columns):
                for row in part.to_pylist():
                    named = {
                        name: _named(value, classes[name]) if name in classes else _without_nulls(value)
                        for name, value in row.items()
                    }
                    yield f"{path}[{number}]", named
                    number += 1
    except ColumnError as error:
        error.at = str(path)
        raise
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        at = f"{path}[{number}]" if number else str(path)
        wrong.append(f"{at}  {next(iter(str(error).splitlines()), type(error).__name__)}")


def _class_names(metadata: Mapping[bytes, bytes]) -> dict[str, list[str]]:
    """The names behind the numbers of a column, which the `datasets` library leaves in a file's metadata."""
    try:
        features = json.loads(metadata.get(b"huggingface", b"{}"))["info"]["features"].items()
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}
    inner = {name: feature.get("feature") or feature for name, feature in features if isinstance(feature, dict)}
    return {name: inner["names"] for name, inner in inner.items() if isinstance(inner, dict) and "names" in inner}


def _without_nulls(value: Any) -> Any:
    """A value whose objects lack the keys that are null: Parquet gives every object of a column the keys of all."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _named(value: Any, names: Sequence[str]) -> Any:
    """A class number's name; as it is where it has none, which is then found to be wrong."""
    if isinstance(value, list):
        return [_named(item, names) for item in value]
    return names[value] if isinstance(value, int) and 0 <= value < len(names) else value


def _sentences(path: Path, schema: Schema, wrong: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Sentences of a token and its tag a line: between tabs or else spaces the first is the one, the last the other."""
    columns = schema.forms[0].columns
    pairs: list[tuple[str, str]] = []
    start = ""

    def sentence() -> dict[str, Any]:
        tokens, tags = zip(*pairs, strict=True)
        return {columns["tokens"]: list(tokens), columns["tags"]: list(tags)}

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


def _texts(path: Path, schema: Schema, unit: Unit, wrong: list[str]) -> Iterator[tuple[str, dict[str, str]]]:
    name = schema.forms[0].columns["text"]
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
    messages = _with_system(values, _turns(values))
    if not any(map(is_learned, messages)):
        name, _ = values.get("messages") or values["answer"]
        raise ValueError(f"{name!r} has no message of the assistant to learn from")
    return Chat(tuple(messages), at, _tools(*values["tools"]) if "tools" in values else ())


def _turns(values: dict[str, tuple[str, Any]]) -> list[Message]:
    """The messages of a chat without the system's own column."""
    if "messages" in values:
        return _messages(*values["messages"])
    messages, (reply, answer) = _asked_turns(values), values["answer"]
    if isinstance(answer, list):
        return messages + _messages(reply, answer)
    return [*messages, Message(role="assistant", content=_string(reply, answer).strip())]


def _asked_turns(values: dict[str, tuple[str, Any]]) -> list[Message]:
    """The messages before an answer that has its own column."""
    messages = [] if "history" not in values else _history(*values["history"])
    ask, question = values["question"]
    if not isinstance(question, list):
        return [*messages, Message(role="user", content=_question(values))]
    if not _is_blank(values.get("input", ("", None))[1]):
        raise ValueError(f"{values['input'][0]!r} can't follow {ask!r}, a list of messages")
    # The messages of a prompt are not learned, whoever wrote them.
    return messages + [_unlearned(message) for message in _messages(ask, question)]


def _with_system(values: dict[str, tuple[str, Any]], messages: list[Message]) -> list[Message]:
    """The messages after that of the system's own column, where there is one."""
    if _is_blank(values.get("system", ("", None))[1]):
        return messages
    if messages[0]["role"] == "system":
        raise ValueError(f"{values['system'][0]!r} and the first message are two system messages")
    return [Message(role="system", content=_string(*values["system"])), *messages]


def _question(values: dict[str, tuple[str, Any]]) -> str:
    """A question with its input after it; one of the two may be blank."""
    name, question = values["question"]
    input_name, given = values.get("input", ("", None))
    if _is_blank(given):
        return _string(name, question).strip()
    given = _string(input_name, given).strip()
    return given if _is_blank(question) else f"{_string(name, question).strip()}\n\n{given}"


def _history(name: str, found: Any) -> list[Message]:
    """Earlier turns, [question, answer] each."""
    if _is_blank(found):
        return []
    pairs = found if isinstance(found, list) else [found]
    messages = []
    for n, pair in enumerate(pairs):
        if not isinstance(pair, list) or len(pair) != 2:
            raise ValueError(f"'{name}[{n}]' is {_brief(pair)}, expected a question and its answer")
        for role, text in zip(("user", "assistant"), pair, strict=True):
            messages.append(Message(role=role, content=_string(f"{name}[{n}]", text).strip()))
    return messages


def _is_blank(value: Any) -> bool:
    return value is None or value == [] or (isinstance(value, str) and not value.strip())


def _messages(name: str, found: Any) -> list[Message]:
    if not isinstance(found, list) or not found:
        raise ValueError(f"{name!r} is {_brief(found)}, expected a list of messages")
    return [_message(f"{name}[{n}]", message) for n, message in enumerate(found)]


def _unlearned(message: Message) -> Message:
    return {**message, "weight": 0} if message["role"] == "assistant" else message


def is_learned(message: Message) -> bool:
    """Whether a message counts in the loss: the assistant's do, unless their weight is 0."""
    return message["role"] == "assistant" and message.get("weight") != 0


def _message(name: str, found: Any) -> Message:
    # Many writers give every message all keys, and a blank value where a message has nothing to say.
    given = {key: value for key, value in found.items() if not _is_blank(value)} if isinstance(found, dict) else {}
    given = _from_sharegpt(given)
    if "role" not in given or not {"content", "value", "tool_calls"} & set(found):
        raise ValueError(f"{name!r} is {_brief(found)}, expected an object with 'role' and 'content'")
    role = given["role"]
    if role not in ROLES:
        raise ValueError(f"{name!r} has role {_brief(role)}  nearest: {nearest(str(role), ROLES, 1)[0]!r}")
    unknown = [key for key in given if key not in Message.__annotations__]
    if unknown:
        known = quoted(sorted(Message.__annotations__))
        raise ValueError(f"{name!r} has {quoted(unknown)}, which can't be trained on; known: {known}")
    message = Message(role=role)
    if "tool_calls" in given:
        if role != "assistant":
            raise ValueError(f"{name!r} has 'tool_calls', but role {role!r}")
        message["tool_calls"] = _tool_calls(f"{name}.tool_calls", given["tool_calls"])
    # A message that calls tools may say nothing.
    if "tool_calls" not in given or "content" in given:
        message["content"] = _content_text(f"{name}.content", found.get("content", found.get("value")))
    for key in ("reasoning_content", "tool_call_id", "name"):
        if key in given:
            message[key] = _string(f"{name}.{key}", given[key])
    if _weight(name, given) == 0 and role == "assistant":
        message["weight"] = 0
    return message


def _from_sharegpt(given: dict[str, Any]) -> dict[str, Any]:
    """A message with the keys `from` and `value` of ShareGPT under the names `role` and `content`."""
    if "from" not in given or "role" in given:
        return given
    names = {"from": "role", "value": "content"}
    spoken = str(given["from"])
    return {names.get(key, key): value for key, value in given.items()} | {"role": SHAREGPT_ROLES.get(spoken, spoken)}


def _weight(name: str, given: dict[str, Any]) -> Any:
    """The weight of a message in the loss, None where it has none."""
    weight, role = given.get("weight"), given["role"]
    if weight not in (None, 0, 1) or (weight == 1 and role != "assistant"):
        expected = "0 or 1" if role == "assistant" else "0: only the assistant's messages count in the loss"
        raise ValueError(f"{name!r} has weight {_brief(weight)}, expected {expected}")
    return weight


def _content_text(name: str, found: Any) -> str:
    """The text of a message; text parts, [{"type": "text", "text": ...}], are joined as chat templates write them."""
    if not isinstance(found, list):
        return _string(name, found)
    for n, part in enumerate(found):
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise ValueError(f"'{name}[{n}]' is {_brief(part)}, expected {{'type': 'text', 'text': ...}}")
    return _string(name, "".join(part["text"] for part in found))


def _tool_calls(name: str, found: Any) -> list[dict[str, Any]]:
    """Calls of tools with their arguments as an object, as chat templates read them; OpenAI's files have a string."""
    if not isinstance(found, list):
        raise ValueError(f"{name!r} is {_brief(found)}, expected a list of calls")
    calls = []
    for n, call in enumerate(found):
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            expected = '{"type": "function", "function": {"name": ..., "arguments": {...}}}'
            raise ValueError(f"'{name}[{n}]' is {_brief(call)}, expected {expected}")
        arguments = _from_json(f"{name}[{n}].function.arguments", function.get("arguments", {}))
        if not isinstance(arguments, dict):
            raise ValueError(f"'{name}[{n}].function.arguments' is {_brief(arguments)}, expected an object")
        calls.append({**call, "function": {**function, "arguments": arguments}})
    return calls


def _tools(name: str, found: Any) -> tuple[dict[str, Any], ...]:
    """The tools of a chat: a list of JSON schemas, or the same as a string of JSON; none where the cell is empty."""
    tools = _from_json(name, found) if found not in (None, "") else []
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ValueError(f"{name!r} is {_brief(found)}, expected a list of JSON schemas")
    return tuple(tools)


def _from_json(name: str, value: Any) -> Any:
    """A value that may be written as a string of JSON."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise ValueError(f"{name!r} is {_brief(value)}, expected JSON") from None


def _answer(values: dict[str, tuple[str, Any]], at: str) -> Answer:
    return Answer(_string(*values["label"]).strip(), _string(*values["answer"]).strip(), at)


def _string(name: str, value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{name!r} is {_brief(value)}, expected a text")
    if "\0" in value:
        raise ValueError(f"{name!r} has a NUL character at {value.index(chr(0)) + 1}: the file is damaged")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name!r} has half of a surrogate pair at character {error.start + 1}") from None
    return value


def _strings(name: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not value:
        raise ValueError(f"{name!r} is {_brief(value)}, expected a list of texts")
    # A sentence's tags repeat all over the corpus: one string each.
    return tuple(sys.intern(_string(f"{name}[{n}]", item)) for n, item in enumerate(value))


def _form(name: str, *roles: str) -> Form:
    """A format whose columns are named after their roles."""
    return Form(name, {role: role for role in roles})


CHAT_COLUMNS = {name: name for name in ("system", "tools")}
QUESTION_COLUMNS = {"input": "input", **CHAT_COLUMNS}
SCHEMAS: dict[str, Schema] = {
    "sequence_classification": Schema((_form("labeled texts", "text", "label"),), _labelled, TABLES),
    "token_classification": Schema(
        (_form("tagged sentences", "tokens", "tags"),),
        _tagged,
        (".jsonl", ".json", ".parquet", ".conll", ".tsv", ".txt"),
    ),
    "causal_lm": Schema((_form("texts", "text"),), _text, (*TABLES, ".txt")),
    "instruction": Schema(
        (
            Form("messages", {"messages": "messages"}, CHAT_COLUMNS),
            Form("sharegpt", {"messages": "conversations"}, CHAT_COLUMNS),
            Form("question_answer", {"question": "question", "answer": "answer"}, QUESTION_COLUMNS),
            Form("alpaca", {"question": "instruction", "answer": "output"}, {**QUESTION_COLUMNS, "history": "history"}),
            Form("prompt_completion", {"question": "prompt", "answer": "completion"}, QUESTION_COLUMNS),
        ),
        _chat,
        TABLES,
    ),
}


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= WIDEST else f"{text[: WIDEST - 3]}..."


def shown(offenders: Sequence[str]) -> list[str]:
    """The first few, and how many more there are."""
    rest = len(offenders) - SHOWN
    return [*offenders[:SHOWN], *([f"and {rest} more"] if rest > 0 else [])]


def labels_of(record: Record) -> tuple[str, ...]:
    """A record's label or tags; none in a task without."""
    return record.tags if isinstance(record, Tagged) else (record.label,) if isinstance(record, Labelled) else ()


def _check_labels(splits: Mapping[str, list[Any]], given: Sequence[str] | None) -> tuple[str, ...]:
    first = next(iter(splits))
    labels = tuple(given or sorted({label for record in splits[first] for label in labels_of(record)}))
    known = set(labels)
    unknown = [
        f"{record.at}  {label!r}  nearest: {nearest(label, labels, 1)[0]!r}"
        for split in splits.values()
        for record in split
        for label in dict.fromkeys(labels_of(record))
        if label not in known
    ]
    if unknown:
        place = "the model" if given else first
        problem = f"{count(len(unknown), 'record has a label', 'records have a label')} that {place} lacks."
        fix = "correct the label, or train on records of it."
        raise JloraValueError("data", problem, shown(unknown), fix)
    if len(labels) < 2:
        problem = f"{first} has one label only, {labels[0]!r}."
        raise JloraValueError("data", problem, [], "add records of a second one.")
    return labels


def _check_overlap(splits: Mapping[str, list[Any]]) -> None:
    first: dict[str, tuple[str, str]] = {}
    twice = []
    for name, split in splits.items():
        for record in split:
            # A sentence without an entity gives nothing of the result away.
            if isinstance(record, Tagged) and set(record.tags) == {OUTSIDE}:
                continue
            place, at = first.setdefault(normalized_text(record), (name, record.at))
            if place != name:
                twice.append(f"{record.at}  {_brief(_text_of(record))} is in {at}")
    if twice:
        problem = f"{count(len(twice), 'text stands', 'texts stand')} in two splits."
        fix = "delete one of the two, or the result says too much; or set allow_overlap."
        raise JloraValueError("data", problem, shown(twice), fix)


def normalized_text(record: Record) -> str:
    """What tells a record's text from others: the text without its case and its spaces."""
    return " ".join(_text_of(record).casefold().split())


def _text_of(record: Record) -> str:
    if isinstance(record, Tagged):
        return " ".join(record.tokens)
    if isinstance(record, Chat):
        return "\n".join(message.get("content") or json.dumps(message["tool_calls"]) for message in record.messages)
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
        raise JloraValueError("data", problem, shown(wrong), "give every label one answer.")
