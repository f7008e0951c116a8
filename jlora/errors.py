"""The errors of jlora. All have the same parts: who reports it, what is wrong, every offender, the fix."""

import contextlib
import difflib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any


class JloraError(Exception):
    """The base class of errors that the user can fix. Every subclass is also a subclass of a built-in exception.

    >>> print(JloraValueError("wrap", "1 target matched no kernel.", ["'querry'  nearest: 'query'"], "correct it."))
    wrap: 1 target matched no kernel.
      'querry'  nearest: 'query'
    Fix: correct it.

    Args:
        who: the function or command that reports the error.
        problem: what is wrong, in one sentence.
        offenders: one line per wrong value, file or leaf.
        fix: what to do.

    Attributes:
        who: the argument.
        problem: the argument.
        offenders: the argument, as a tuple.
        fix: the argument.
    """

    def __init__(self, who: str, problem: str, offenders: Iterable[str], fix: str) -> None:
        self.who, self.problem, self.offenders, self.fix = who, problem, tuple(offenders), fix
        super().__init__(str(self))

    def __str__(self) -> str:
        lines = [f"{self.who}: {self.problem}", *(f"  {offender}" for offender in self.offenders)]
        return "\n".join([*lines, f"Fix: {self.fix}"])

    def __reduce__(self) -> Any:
        """Pickles the parts, so that an error from another process is rebuilt from them, not from its text."""
        return type(self), (self.who, self.problem, self.offenders, self.fix)


class JloraValueError(JloraError, ValueError):
    """A value that can't be used."""


class JloraTypeError(JloraError, TypeError):
    """A value of a type that can't be used."""


class JloraImportError(JloraError, ImportError):
    """A package that an optional part of jlora needs is not installed."""


class JloraOSError(JloraError, OSError):
    """An operation of the file system failed."""


class JloraFileNotFoundError(JloraError, FileNotFoundError):
    """A file or folder is missing."""


class JloraFileExistsError(JloraError, FileExistsError):
    """A file or folder would be overwritten."""


class JloraBlockingIOError(JloraError, BlockingIOError):
    """Another process uses the file or folder."""


class JloraNotADirectoryError(JloraError, NotADirectoryError):
    """A part of a path is a file, not a folder."""


class JloraIsADirectoryError(JloraError, IsADirectoryError):
    """A path is a folder, not a file."""


class JloraPermissionError(JloraError, PermissionError):
    """A file or folder is not writable."""


def nearest(name: str, names: Iterable[str], n: int = 3) -> Sequence[str]:
    """The names most similar to `name`, best first; at least one if `names` is not empty."""
    return difflib.get_close_matches(name, list(names), n=n, cutoff=0.0)


def quoted(names: Iterable[str]) -> str:
    """Quotes names for a list in an error: "'a', 'b'"; "none" if there is none."""
    return ", ".join(map(repr, names)) or "none"


def count(number: int, noun: str, plural: str | None = None) -> str:
    """A number with its noun, or with a noun and a verb: "1 kernel", "3 kernels", "3 kernels are"."""
    return f"{number} {noun if number == 1 else plural or noun + 's'}"


@contextlib.contextmanager
def name_file(file: Path) -> Iterator[None]:
    """Adds the file's name to an OSError that has none: the system names the files that it can't open, not all others.

    Raises:
        OSError: what the code inside raises.
    """
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(file)
        raise
