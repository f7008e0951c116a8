"""What a training job can be told: one frozen dataclass for every section of its TOML file.

The same classes make the file's keys, the command line's flags, the defaults and `--help`, so an option is
declared once. `parse` is the only check there is; values from the command line pass through it too.
"""

import json
import math
import os
import re
import tomllib
import types
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import tyro

from jlora.data.readers import HUB, Format, Unit
from jlora.errors import JloraFileNotFoundError, JloraOSError, JloraValueError, count, nearest

TaskName = Literal["sequence_classification", "token_classification", "causal_lm", "instruction"]


@dataclass(frozen=True)
class Range:
    """The numbers a value may be; `above` leaves the lower end out."""

    low: float
    high: float = math.inf
    above: bool = False

    def __contains__(self, value: float) -> bool:
        return (value > self.low if self.above else value >= self.low) and value <= self.high

    def __str__(self) -> str:
        low = f"above {self.low:g}" if self.above else f"from {self.low:g}"
        return low if self.high == math.inf else f"{low} to {self.high:g}"


@dataclass(frozen=True, kw_only=True)
class Model:
    """The base model, and how it is computed.

    Attributes:
        name: a folder in Hugging Face form, or a name on the hub
        revision: branch, tag or commit on the hub; left out, the default branch
        pooling: what a text's classifier reads; auto takes what the checkpoint says
        dtype: what the base is stored in
        compute_dtype: what is computed in; left out, the dtype of the base
        scan: one compiled body for all layers: compiles faster, steps slower on a CPU
        remat: recompute each layer in the backward pass: less memory, a third more time
        untie: give an output head that is tied to the input embedding its own copy, so that the two can differ
        vocab_size: number of tokens to grow or cut the embedding and the output head to; new rows are the mean of the
            others; left out, the number of the checkpoint
    """

    name: str
    revision: str | None = None
    pooling: Literal["auto", "mean", "cls", "pooler"] = "auto"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    compute_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    scan: bool = False
    remat: bool = False
    untie: bool = False
    vocab_size: Annotated[int, Range(1)] | None = None


@dataclass(frozen=True, kw_only=True)
class Data:
    """What is learnt, and from which files: JSON lines, CSV, TSV, CoNLL, Parquet or plain text.

    Attributes:
        task: classes of texts, classes of tokens (BIO), a language model of texts, or answers to questions
        train: file or folder of files to train on, or hub:owner/name
        validation: file that chooses the best adapter; left out, a fraction of train is held out for it; false trains
            without, and keeps the adapter of the last step
        test: file asked once before training and once after
        holdout: that fraction; texts stay on one side, and each class gives the same fraction
        holdout_seed: seed of the draw, independent of the training seed
        format: how chats are stored; auto recognizes the columns
        unit: what is one text in a .txt file
        answers: what each class of texts says to the user, as JSON lines {"label": ..., "answer": ...}
        text: field of a text
        label: field of its class
        tokens: field of a sentence's words
        tags: field of their BIO tags
        messages: field of a conversation
        question: field of a question, where there are no conversations
        answer: field of its answer
        input: field of a text that follows the question (Alpaca), where there is one
        system: field of a system message, where there is one
        tools: field of the JSON schemas of tools, where there are any
        max_length: tokens of an example that are read: longer texts of a language model are cut into pieces, of all
            other tasks cut off
        pack: put several texts of a language model into one row
        allow_overlap: take texts that stand in two of the files for what they are
        questions: asked when all is done
    """

    task: TaskName = "sequence_classification"
    train: Path
    validation: Literal[False] | Path | None = None
    test: Path | None = None
    holdout: Annotated[float, Range(0, 0.9, above=True)] = 0.1
    holdout_seed: Annotated[int, Range(0, 2**32 - 1)] = 0
    format: Format = "auto"
    unit: Unit = "paragraph"
    answers: Path | None = None
    text: str = "text"
    label: str = "label"
    tokens: str = "tokens"
    tags: str = "tags"
    messages: str = "messages"
    question: str = "question"
    answer: str = "answer"
    input: str = "input"
    system: str = "system"
    tools: str = "tools"
    max_length: Annotated[int, Range(3)] = 128
    pack: bool = True
    allow_overlap: bool = False
    questions: tuple[str, ...] = ()


FIELDS = {
    "sequence_classification": ("text", "label"),
    "token_classification": ("tokens", "tags"),
    "causal_lm": ("text",),
    "instruction": ("messages", "question", "answer", "input", "system", "tools"),
}


def fields_of(data: Data) -> dict[str, str]:
    """The task's fields that the config names otherwise than they are by default."""
    names = {name: getattr(data, name) for name in FIELDS[data.task]}
    return {name: value for name, value in names.items() if value != name}


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """The low-rank adapter.

    Attributes:
        rank: columns of A and rows of B
        alpha: numerator of the scaling alpha / rank; left out, it is the rank
        targets: a regular expression for the paths of kernels, or a list of names of modules, as PEFT's target_modules;
            left out, all but the head
        ranks: ranks by regular expression of a kernel's path; the first match wins, all others have `rank`
        dropout: share of an adapter's input that is dropped while training
        rslora: scale by alpha / sqrt(rank) instead
        cap_rank: give a kernel without room for its rank the highest rank it can hold, instead of an error
        init: how A is drawn
        from_: folder of an adapter to start from, a run's, jlora's or PEFT's, in place of a new one
    """

    rank: Annotated[int, Range(1)] = 8
    alpha: Annotated[float, Range(0, above=True)] | None = None
    targets: str | tuple[str, ...] | None = None
    ranks: dict[str, int] = field(default_factory=dict)
    dropout: Annotated[float, Range(0, 0.9)] = 0.0
    rslora: bool = False
    cap_rank: bool = False
    init: Literal["uniform", "normal", "orthogonal"] = "uniform"
    # "from" is a word of Python's own.
    from_: Annotated[Path | None, tyro.conf.arg(name="from")] = None


@dataclass(frozen=True, kw_only=True)
class Optimisation:
    """The optimizer and its schedule.

    Attributes:
        optimizer: any optimizer of optax, by name
        learning_rate: peak rate, that of every A
        b_ratio: rate of every B over that of A (LoRA+)
        head_ratio: rate of a new head over that of A
        schedule: how the rate goes on after the warm-up
        warmup: share of all steps in which the rate rises from 0
        epochs: passes over the training data
        steps: steps in all, instead of epochs
        batch_size: rows to a step
        accumulate: parts a batch is taken in, one after the other
        weight_decay: decoupled decay, where the optimizer has one
        clip: largest global norm of the gradient; left out, it is never clipped
        class_weights: balanced gives every class of texts the same weight in the training loss; left out, every text
        max_skipped: steps with a loss or gradient that is not finite, after which the run stops
        seed: fixes the new head, the adapter, the order of the data, and dropout
    """

    optimizer: str = "adamw"
    learning_rate: Annotated[float, Range(0, above=True)] = 1e-3
    b_ratio: Annotated[float, Range(0, above=True)] = 4.0
    head_ratio: Annotated[float, Range(0, above=True)] = 10.0
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup: Annotated[float, Range(0, 1)] = 0.1
    epochs: Annotated[int, Range(1)] = 5
    steps: Annotated[int, Range(1)] | None = None
    batch_size: Annotated[int, Range(1)] = 32
    accumulate: Annotated[int, Range(1)] = 1
    weight_decay: Annotated[float, Range(0)] = 0.0
    clip: Annotated[float, Range(0, above=True)] | None = None
    class_weights: Literal["balanced"] | None = None
    max_skipped: Annotated[int, Range(1)] = 20
    seed: Annotated[int, Range(0, 2**32 - 1)] = 0


@dataclass(frozen=True, kw_only=True)
class Run:
    """How a run goes on.

    Attributes:
        evaluate_every: steps to an evaluation; left out, one an epoch
        patience: evaluations without a better one, after which the run stops; left out, it never does
        save_every: steps to a checkpoint, beside the one at each evaluation
        keep: checkpoints that are kept
        mesh: devices by axis, as "data=4,model=2"; left out, one device
    """

    evaluate_every: Annotated[int, Range(1)] | None = None
    patience: Annotated[int, Range(1)] | None = None
    save_every: Annotated[int, Range(1)] | None = None
    keep: Annotated[int, Range(1)] = 2
    mesh: str | None = None


@dataclass(frozen=True, kw_only=True)
class Output:
    """What is left behind.

    Attributes:
        folder: where the run is written; an unfinished run of the same config that is there goes on
        overwrite: replace a run that is already there
        log_every: steps to a line of metrics, in metrics.jsonl and, without a terminal, in the output
        tensorboard: write the metrics as TensorBoard events too
    """

    folder: Path
    overwrite: bool = False
    log_every: Annotated[int, Range(1)] = 10
    tensorboard: bool = False


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a language model continues a text.

    Attributes:
        max_new_tokens: tokens to add to each prompt, at most
        temperature: 0 takes the likeliest token each time, more draws
        top_k: draw from the k likeliest tokens only
        top_p: then from the fewest of them whose probabilities reach this
        seed: seed of what is drawn
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Config:
    """A whole training job."""

    model: Model
    data: Data
    output: Output
    adapter: Adapter = field(default_factory=Adapter)
    optimisation: Optimisation = field(default_factory=Optimisation)
    run: Run = field(default_factory=Run)


def read(path: str | Path) -> Config:
    """Reads a job from a TOML file; its paths are relative to the file.

    Raises:
        OSError: the file can't be read.
        ValueError: it is no TOML, or entries of it are unknown, missing or wrong: all of them are listed.
    """
    path = Path(path)
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise JloraFileNotFoundError("config", f"{path} does not exist.", [], "pass the path of a TOML file.") from None
    except OSError as error:
        problem = f"{path} can't be read: {error.strerror}."
        raise JloraOSError("config", problem, [], "pass the path of a TOML file that you may read.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise JloraValueError("config", f"{path} is no TOML.", [str(error)], "correct that line.") from None
    return parse(values, source=str(path), folder=path.parent)


def parse(values: Mapping[str, Any], *, source: str, folder: Path) -> Config:
    """Builds a job from the values of a TOML file.

    Args:
        values: a dict of sections.
        source: where they stand, for the error.
        folder: what paths are relative to.

    Raises:
        ValueError: entries are unknown, missing or wrong: all of them are listed.
    """
    wrong: list[str] = []
    config = _section(Config, values, "", folder.absolute(), wrong)
    wrong += [] if config is None else _conflicts(config)
    if wrong:
        problem = f"{count(len(wrong), 'entry', 'entries')} of {source} can't be used."
        fix = "correct them; `jlora train --help` lists every key."
        raise JloraValueError("config", problem, wrong, fix)
    return config


def check(config: Config, source: str = "the command line") -> Config:
    """The same job with its paths made absolute and its values checked.

    Args:
        config: the job; its paths are relative to the working directory.
        source: where the values come from, for the error.

    Raises:
        ValueError: values are out of range: all of them are listed.
    """
    return parse(_plain(config), source=source, folder=Path.cwd())


def with_model(config: Config, name: str) -> Config:
    """The same job on a base model from elsewhere."""
    return check(replace(config, model=replace(config.model, name=name, revision=None)))


def to_toml(config: Config) -> str:
    """A job as the text of a TOML file that `read` gives back."""
    lines: list[str] = []
    for name, section in _plain(config).items():
        lines += [f"[{name}]", *(f"{key} = {_toml(value)}" for key, value in section.items()), ""]
    return "\n".join(lines)


def _section(kind: type, values: Any, where: str, folder: Path, wrong: list[str]) -> Any:
    """One dataclass from a dict; what is wrong with it is added to `wrong`."""
    if not isinstance(values, Mapping):
        wrong.append(f"{where} = {values!r}  expected: a section [{where}]")
        return None
    hints = {_key(name): _bare(hint) for name, hint in get_type_hints(kind, include_extras=True).items()}
    known = {_key(item.name): item for item in fields(kind)}
    prefix = f"{where}." if where else ""
    for key in values:
        if key not in known:
            wrong.append(f"{prefix}{key} is unknown  nearest: {prefix}{nearest(key, known, 1)[0]}")
    arguments = {}
    for name, item in known.items():
        if name in values or is_dataclass(hints[name]):
            arguments[item.name] = _entry(hints[name], values.get(name, {}), prefix + name, folder, wrong)
        elif _required(item):
            wrong.append(f"{prefix}{name} is missing  expected: {_expected(hints[name])}")
    return None if wrong else kind(**arguments)


def _conflicts(config: Config) -> list[str]:
    """Values that are right alone and wrong together."""
    data, run = config.data, config.run
    conflicts = []
    if config.optimisation.class_weights is not None and data.task != "sequence_classification":
        conflicts.append(f"optimisation.class_weights  expected: no class weights for task {data.task}")
    if data.validation is False:
        evaluating = {"run.patience": run.patience, "run.evaluate_every": run.evaluate_every}
        conflicts += [
            f"{name} = {value}  expected: left out, since data.validation = false leaves nothing to evaluate"
            for name, value in evaluating.items()
            if value is not None
        ]
    return conflicts


def _key(name: str) -> str:
    """The key of a field: its name, without the underscore that tells it from a word of Python's own."""
    return name.removesuffix("_")


def _bare(hint: Any) -> Any:
    """A field's type without what only the command line reads."""
    named = get_origin(hint) is Annotated and not any(isinstance(extra, Range) for extra in hint.__metadata__)
    return get_args(hint)[0] if named else hint


def _required(item: Field) -> bool:
    return item.default is MISSING and item.default_factory is MISSING


def _entry(hint: Any, value: Any, where: str, folder: Path, wrong: list[str]) -> Any:
    if is_dataclass(hint):
        return _section(hint, value, where, folder, wrong)  # type: ignore[arg-type]
    if not _fits(hint, value):
        wrong.append(f"{where} = {value!r}  expected: {_expected(hint)}")
        return None
    found = _converted(hint, value, where, folder)
    if any(re.search("[\ud800-\udfff]", text) for text in _texts(found)):
        wrong.append(f"{where} = {found!r}  expected: Unicode text; this holds bytes or surrogates that are none")
    return found


def _converted(hint: Any, value: Any, where: str, folder: Path) -> Any:
    """A value of TOML's as the config holds it."""
    kinds = _kinds(hint)
    if value is False or (Literal[False] in kinds and value in ("false", "False")):
        return False
    if where == "model.name":
        return _model_name(value, folder)
    if Path in kinds and value.startswith(HUB):
        return Path(value)
    if Path in kinds:
        return Path(os.path.normpath(folder / os.path.expanduser(value)))
    return tuple(value) if isinstance(value, list) else float(value) if float in kinds else value


def _texts(value: Any) -> list[str]:
    """The texts of a value, which is one, several, or a table of them."""
    return [str(entry) for entry in (value if isinstance(value, tuple | Mapping) else [value])]


def _model_name(name: str, folder: Path) -> str:
    """A folder's absolute path, or a name on the hub as it is."""
    # Unlike Path.expanduser, this leaves the name of an unknown user as it is.
    local = folder / os.path.expanduser(name)
    return os.path.normpath(local) if local.is_dir() or name.startswith((".", "~")) else name


def _kinds(hint: Any) -> tuple[Any, ...]:
    """What may stand there: the members of a union without None, without their ranges."""
    members = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    bare = (get_args(m)[0] if get_origin(m) is Annotated else m for m in members)
    return tuple(kind for kind in bare if kind is not types.NoneType)


def _ranges(hint: Any) -> list[Range]:
    members = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    return [extra for m in members if get_origin(m) is Annotated for extra in m.__metadata__]


def _fits(hint: Any, value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    tests = {
        str: lambda: isinstance(value, str) and value.strip() != "",
        Path: lambda: isinstance(value, str) and value.strip() != "" and "\0" not in value,
        bool: lambda: isinstance(value, bool),
        int: lambda: isinstance(value, int) and not isinstance(value, bool),
        float: lambda: number and math.isfinite(value),
        tuple[str, ...]: lambda: (
            isinstance(value, list) and all(isinstance(text, str) and text.strip() for text in value)
        ),
        dict[str, int]: lambda: isinstance(value, Mapping) and all(type(rank) is int for rank in value.values()),
    }
    fits = any(
        any(type(value) is type(choice) and value == choice for choice in get_args(kind))
        if get_origin(kind) is Literal
        else tests[kind]()
        for kind in _kinds(hint)
    )
    return fits and all(value in limits for limits in _ranges(hint))


def _expected(hint: Any) -> str:
    words = {
        str: "a string",
        Path: "a path",
        bool: "true or false",
        int: "a whole number",
        float: "a number",
        tuple[str, ...]: "a list of strings",
        dict[str, int]: "a table of whole numbers",
    }
    found = []
    for kind in _kinds(hint):
        choices = [choice for choice in get_args(kind) if get_origin(kind) is Literal]
        one = "one of " if len(choices) > 1 else ""
        found.append(one + ", ".join(map(json.dumps, choices)) if choices else words[kind])
    # What is written first in a hint is what the command line tries first, not what most want.
    return " ".join([" or ".join(reversed(found)), *map(str, _ranges(hint))])


def _plain(config: Any) -> dict[str, Any]:
    """A dataclass as TOML's own kinds; what is None is left out."""
    values = {_key(item.name): getattr(config, item.name) for item in fields(config)}
    return {name: _plain_value(value) for name, value in values.items() if value is not None}


def _plain_value(value: Any) -> Any:
    if is_dataclass(value):
        return _plain(value)
    return str(value) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_toml(key)} = {_toml(entry)}" for key, entry in value.items()) + "}"
    # JSON's strings, numbers, booleans and lists are TOML's, but for DEL, which TOML wants escaped.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
