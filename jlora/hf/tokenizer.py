"""The tokenizer of a folder: read with its chat templates, written, and taken from an adapter's folder to its base."""

import contextlib
import copy
import importlib.util
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from jlora.errors import JloraValueError
from jlora.hf.files import staged
from jlora.hf.folder import SAFELY, find_culprits, import_transformers, parse_json, read_text, reason_of

TEMPLATE, TEMPLATES = "chat_template.jinja", "additional_chat_templates"
VOCABULARIES = ("tokenizer.json", "vocab.txt", "vocab.json", "tokenizer.model", "spiece.model", "tiktoken.model")
SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
# What save_pretrained may write, and what an earlier tokenizer may have left.
FILES = (*VOCABULARIES, *SETTINGS, "merges.txt", TEMPLATE)


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds a tokenizer."""
    return any((folder / name).is_file() for name in VOCABULARIES)


def read_tokenizer(folder: Path, config: Any) -> Any:
    """Transformers' tokenizer of the folder, None where there is none.

    Args:
        folder: of a model, or of an adapter with a separate tokenizer.
        config: transformers' config of the model.

    Raises:
        ValueError: a file is damaged or needs a package that is missing.
    """
    if not has_tokenizer(folder):
        return None
    check_packages(folder)
    try:
        return open_tokenizer(folder, config)
    except Exception as error:
        problem = f"the tokenizer in {str(folder)!r} can't be read."
        offenders = list(find_damage(folder, config)) or [reason_of(error)]
        fix = "fetch the files again, or correct what is listed; code that comes with a tokenizer is never run."
        raise JloraValueError("load_model", problem, offenders, fix) from error


def open_tokenizer(folder: Path, config: Any) -> Any:
    """The tokenizer, after it has shown that it works: some wrong settings fail only in use."""
    with panics_raised():
        tokenizer = import_transformers().AutoTokenizer.from_pretrained(folder, config=config, **SAFELY)
        tokenizer.decode(tokenizer(["a", "b c"])["input_ids"][1], skip_special_tokens=True)
    return tokenizer


@contextlib.contextmanager
def panics_raised() -> Iterator[None]:
    """Raises a panic of the tokenizers library as a ValueError: it comes as a BaseException, as Ctrl-C does.

    Raises:
        ValueError: the library panicked; the message is its own.
    """
    try:
        yield
    except Exception:
        raise
    except BaseException as error:
        # The class can't be imported: each library written in Rust defines a separate one.
        if type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"the tokenizers library stopped: {error}") from error


def check_packages(folder: Path) -> None:
    """Raises where the only vocabulary is in a form that needs packages which are not installed."""
    file = next((folder / name for name in VOCABULARIES if name.endswith(".model") and (folder / name).is_file()), None)
    if file is None or any((folder / name).is_file() for name in VOCABULARIES[:3]):
        return
    # A tiktoken file is lines of base64 and a rank, a sentencepiece file is a binary protocol buffer.
    with open(file, "rb") as stream:
        first = stream.readline(1 << 12).split()
    is_tiktoken = len(first) == 2 and first[1].isdigit()
    modules = {"tiktoken": "tiktoken"} if is_tiktoken else {"sentencepiece": "sentencepiece", "google": "protobuf"}
    missing = [package for module, package in modules.items() if importlib.util.find_spec(module) is None]
    if missing:
        problem = f"{str(file)!r} needs {' and '.join(missing)}, which {'are' if missing[1:] else 'is'} not installed."
        fix = f"pip install {' '.join(missing)}, or add the tokenizer.json of the model."
        raise JloraValueError("load_model", problem, (), fix)


def find_damage(folder: Path, config: Any) -> Iterator[str]:
    """What keeps a tokenizer from being read: damaged files first, else fields."""
    damaged = [*find_damaged_json(folder), *find_damaged_templates(folder)] or find_damaged_vocabulary(folder)
    yield from damaged
    if not damaged:
        for name in SETTINGS:
            if (folder / name).is_file():
                yield from (f"{name}: {field}" for field in find_fields(folder, name, config))


def find_damaged_json(folder: Path) -> Iterator[str]:
    """The files of a tokenizer that are not JSON."""
    for name in ("tokenizer.json", "vocab.json", *SETTINGS):
        if (folder / name).is_file():
            try:
                parse_json(folder / name)
            except ValueError as error:
                yield f"{name}: {error}"


def find_damaged_templates(folder: Path) -> Iterator[str]:
    """The chat templates that are not text."""
    for file in [folder / TEMPLATE, *sorted((folder / TEMPLATES).glob("*.jinja"))]:
        try:
            file.read_text(encoding="utf-8")
        except FileNotFoundError:
            pass
        except UnicodeDecodeError as error:
            yield f"{file.relative_to(folder)}: it is not text in UTF-8 (byte {error.start})"


def find_damaged_vocabulary(folder: Path) -> list[str]:
    """The reason why a tokenizer.json is not a tokenizer, if it is not."""
    from tokenizers import Tokenizer

    if not (folder / "tokenizer.json").is_file():
        return []
    try:
        with panics_raised():
            Tokenizer.from_file(str(folder / "tokenizer.json")).encode_batch(["a", "b c"])
    except Exception as error:
        return [f"tokenizer.json: {' '.join(str(error).split())}"]
    return []


def find_fields(folder: Path, name: str, config: Any) -> list[str]:
    """The fields of one file without which the tokenizer can be read."""
    with tempfile.TemporaryDirectory() as temporary:
        trial = Path(temporary)
        for file in folder.iterdir():
            if file.name in FILES and file.is_file():
                shutil.copy(file, trial / file.name)

        def attempt(content: Mapping[str, Any]) -> None:
            (trial / name).write_text(json.dumps(content), encoding="utf-8")
            open_tokenizer(trial, config)

        return find_culprits(parse_json(folder / name), attempt)


def use_tokenizer(loaded: Any, folder: Path) -> Any:
    """A loaded model with the tokenizer or the chat template of another folder, where that has them.

    Adapters are often saved with the tokenizer that they were trained with; its template may differ from the base's.

    Args:
        loaded: a `LoadedModel`.
        folder: of an adapter.
    """
    if has_tokenizer(folder):
        return replace(loaded, tokenizer=read_tokenizer(folder, loaded.config))
    template = read_text(folder / TEMPLATE)
    if template is None or loaded.tokenizer is None:
        return loaded
    tokenizer = copy.deepcopy(loaded.tokenizer)
    tokenizer.chat_template = template
    return replace(loaded, tokenizer=tokenizer)


def save_tokenizer(folder: Path, tokenizer: Any) -> None:
    """Writes a tokenizer into a folder; files that an earlier one left there and this one does not have are deleted."""
    with staged(folder, last=SETTINGS[0]) as stage:
        names = write_tokenizer(stage, tokenizer)
    delete_tokenizer(folder, keep=names)


def write_tokenizer(folder: Path, tokenizer: Any) -> set[Path]:
    """Writes a tokenizer into a folder; gives the names of the files in that."""
    before = set(folder.rglob("*"))
    tokenizer.save_pretrained(folder)
    return {file.relative_to(folder) for file in folder.rglob("*") if file not in before}


def delete_tokenizer(folder: Path, *, keep: set[Path]) -> None:
    """Deletes the files of a tokenizer, other than those to keep, so that none of another one takes part in it."""
    for file in [*(folder / name for name in FILES), *(folder / TEMPLATES).glob("*.jinja")]:
        if file.relative_to(folder) not in keep:
            file.unlink(missing_ok=True)
