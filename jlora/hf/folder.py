"""The small files of a model's folder: JSON objects, and the fields that keep them from being used."""

import json
import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from jlora.errors import JloraValueError, count, name_file

# Nothing is fetched, and no code of a checkpoint is ever run.
SAFELY = {"local_files_only": True, "trust_remote_code": False}


def import_transformers() -> Any:
    """Transformers, without the advice that it logs where there is no torch: nothing here needs torch."""

    def other(record: logging.LogRecord) -> bool:
        return "PyTorch was not found" not in record.getMessage()

    logger = logging.getLogger("transformers")
    logger.addFilter(other)
    try:
        import transformers
    finally:
        logger.removeFilter(other)
    return transformers


def parse_json(file: Path, kind: type = dict) -> Any:
    """The content of a JSON file, an object or a list.

    Raises:
        ValueError: it is not JSON, or holds something else; the message is the reason alone.
    """
    try:
        with name_file(file):
            content = json.loads(file.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not text in UTF-8 (byte {error.start})") from None
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    if not isinstance(content, kind):
        raise ValueError(f"{'an object' if kind is dict else 'a list'} was expected, not a {type(content).__name__}")
    return content


def read_json(file: Path, kind: type = dict) -> Any:
    """A JSON object or list from a file of the model's folder.

    Raises:
        ValueError: the file is missing or damaged.
    """
    try:
        return parse_json(file, kind)
    except FileNotFoundError:
        problem, fix = f"{str(file.parent)!r} has no {file.name}.", "give a folder in Hugging Face form."
        raise JloraValueError("load_model", problem, (), fix) from None
    except ValueError as error:
        problem = f"{str(file)!r} is no JSON {'object' if kind is dict else 'list'}."
        raise JloraValueError("load_model", problem, [str(error)], "fetch the file again.") from error


def read_text(file: Path) -> str | None:
    """A text file of the model's folder, None where it is missing.

    Raises:
        ValueError: it is not text in UTF-8.
    """
    try:
        with name_file(file):
            return file.read_text(encoding="utf-8") if file.is_file() else None
    except UnicodeDecodeError as error:
        problem = f"{str(file)!r} is not text in UTF-8 (byte {error.start})."
        raise JloraValueError("load_model", problem, (), "fetch the file again.") from None


def check_fields(file: Path, offenders: Iterable[str]) -> None:
    """Raises an error that lists the fields of a file that can't be used, if there are any."""
    wrong = list(offenders)
    if wrong:
        problem = f"{count(len(wrong), 'field')} of {str(file)!r} can't be used."
        raise JloraValueError("load_model", problem, wrong, "correct what is listed, or fetch the file again.")


def show_field(name: str, value: Any) -> str:
    """A field with its value, cut where it is long."""
    text = repr(value)
    return f"{name} is {text if len(text) <= 60 else text[:57] + '...'}"


def find_culprits(content: Mapping[str, Any], attempt: Callable[[Mapping[str, Any]], Any]) -> list[str]:
    """The fields without which an attempt that fails on the whole content succeeds."""
    culprits = []
    for name in content:
        try:
            attempt({other: value for other, value in content.items() if other != name})
        except Exception:
            continue
        culprits.append(show_field(name, content[name]))
    return culprits


def reason_of(error: Exception) -> str:
    """An error in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text if len(text) <= 200 else text[:197] + '...'}"


def find_inside(folder: Path, name: Any) -> Path | None:
    """The file that a name in one of the folder's files means, None where that would be outside the folder.

    A folder in the cache of the hub holds links to the blobs beside its snapshots; those count as inside.
    """
    if not isinstance(name, str) or "\0" in name or Path(name).is_absolute() or ".." in Path(name).parts:
        return None
    root = folder.resolve()
    places = [root, root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [root]
    target = (root / name).resolve()
    return folder / name if any(target.is_relative_to(place.resolve()) for place in places) else None
