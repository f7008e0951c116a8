"""Regular expressions from a file, matched within a time limit: some take longer than anyone can wait."""

import math
import re
import time

import regex

from jlora.errors import JloraValueError

SECONDS = 5.0
LENGTH = 200_000  # characters
SHOWN = 200  # characters of a pattern in an error
REPEATS = 1000  # the product of all counts, as {8}: each is a copy of what it repeats
COUNT = re.compile(r"\{(\d*),?(\d*)\}")


class PatternMatcher:
    """Matches the patterns of one field of adapter_config.json; all its matches together have `SECONDS` of CPU time."""

    def __init__(self, field: str) -> None:
        self.field = field
        self.left = SECONDS

    def match(self, pattern: str, text: str, *, whole: bool = False) -> "regex.Match[str] | None":
        """`re.match`, or `re.fullmatch` of the whole text, within the time that is left.

        Raises:
            ValueError: the pattern is no regular expression, or takes too long.
        """
        start = time.thread_time()
        try:
            if len(pattern) > LENGTH or count_copies(pattern) > REPEATS:
                raise TimeoutError
            return (regex.fullmatch if whole else regex.match)(pattern, text, timeout=max(self.left, 0.001))
        except TimeoutError:
            problem = f"{self.field} has a pattern that takes too long to match."
            fix = "write the pattern without a repetition inside a repetition, or name the modules."
            offenders = [f"{pattern[:SHOWN]!r} against {text!r}"]
            raise JloraValueError("load_peft", problem, offenders, fix) from None
        except (regex.error, RecursionError) as error:
            problem = f"{self.field} has a pattern that is no regular expression."
            offenders = [f"{pattern[:SHOWN]!r}  {error}"]
            raise JloraValueError("load_peft", problem, offenders, "correct the pattern.") from error
        finally:
            self.left -= time.thread_time() - start


def count_copies(pattern: str) -> float:
    """How many copies of a character the counts of a pattern can make, at most."""
    return math.prod(max([1.0, *(float(n) for n in found if n)]) for found in COUNT.findall(pattern))
