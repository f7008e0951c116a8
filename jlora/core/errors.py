"""One form for every error: who, what was wrong with every offender, the fix."""

import difflib
from collections.abc import Iterable, Sequence


def complain(who: str, problem: str, offenders: Iterable[str], fix: str) -> str:
    """Builds the text of an error.

    >>> print(complain("wrap", "1 target matched no kernel.", ["'querry'  nearest: 'query'"], "correct it."))
    wrap: 1 target matched no kernel.
      'querry'  nearest: 'query'
    Fix: correct it.
    """
    return "\n".join([f"{who}: {problem}", *(f"  {offender}" for offender in offenders), f"Fix: {fix}"])


def nearest(name: str, names: Iterable[str], n: int = 3) -> Sequence[str]:
    """The names most like `name`, best first; at least one whenever there is any name."""
    return difflib.get_close_matches(name, list(names), n=n, cutoff=0.0)


def quoted(names: Iterable[str]) -> str:
    """Names for a list in an error: "'a', 'b'"."""
    return ", ".join(map(repr, names)) or "none"


def count(number: int, noun: str, plural: str | None = None) -> str:
    """A number with its noun: "1 kernel", "3 kernels"."""
    return f"{number} {noun if number == 1 else plural or noun + 's'}"
