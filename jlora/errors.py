"""One form for every error: who, what is wrong with every offender, the fix."""

import difflib
from collections.abc import Iterable, Sequence
from typing import Any


class JloraError(Exception):
    """An error that the user can fix. It is always raised as a subclass that is also a built-in kind of error.

    >>> print(JloraValueError("wrap", "1 target matched no kernel.", ["'querry'  nearest: 'query'"], "correct it."))
    wrap: 1 target matched no kernel.
      'querry'  nearest: 'query'
    Fix: correct it.

    Args:
        who: the function or command that refuses.
        problem: what is wrong, in one sentence.
        offenders: one line for each thing that is wrong.
        fix: what to do.

    Attributes:
        who: as given.
        problem: as given.
        offenders: as given, as a tuple.
        fix: as given.
    """

    def __init__(self, who: str, problem: str, offenders: Iterable[str], fix: str) -> None:
        self.who, self.problem, self.offenders, self.fix = who, problem, tuple(offenders), fix
        super().__init__(str(self))

    def __str__(self) -> str:
        lines = [f"{self.who}: {self.problem}", *(f"  {offender}" for offender in self.offenders)]
        return "\n".join([*lines, f"Fix: {self.fix}"])

    def __reduce__(self) -> Any:
        """An error from another process is unpickled from its parts, not from its text."""
        return type(self), (self.who, self.problem, self.offenders, self.fix)


class JloraValueError(JloraError, ValueError):
    """A value that can't be used."""


class JloraTypeError(JloraError, TypeError):
    """A value of a kind that can't be used."""


class JloraImportError(JloraError, ImportError):
    """A package that an optional part of jlora needs is not installed."""


class JloraOSError(JloraError, OSError):
    """The file system refused."""


class JloraFileNotFoundError(JloraError, FileNotFoundError):
    """A file or folder is missing."""


class JloraFileExistsError(JloraError, FileExistsError):
    """A file or folder would be overwritten."""


class JloraBlockingIOError(JloraError, BlockingIOError):
    """Another process uses a file or folder."""


class JloraNotADirectoryError(JloraError, NotADirectoryError):
    """A path leads through a file."""


class JloraIsADirectoryError(JloraError, IsADirectoryError):
    """A folder stands where a file is needed."""


class JloraPermissionError(JloraError, PermissionError):
    """A file or folder may not be written to."""


def nearest(name: str, names: Iterable[str], n: int = 3) -> Sequence[str]:
    """The names most like `name`, best first; at least one if there is any name."""
    return difflib.get_close_matches(name, list(names), n=n, cutoff=0.0)


def quoted(names: Iterable[str]) -> str:
    """Names for a list in an error: "'a', 'b'"."""
    return ", ".join(map(repr, names)) or "none"


def count(number: int, noun: str, plural: str | None = None) -> str:
    """A number with its noun: "1 kernel", "3 kernels"."""
    return f"{number} {noun if number == 1 else plural or noun + 's'}"
