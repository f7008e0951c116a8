"""Regular expressions from a file, matched within a time limit: some take longer than anyone can wait."""

import math
import re
import time

import regex

from jlora.core.errors import complain

SECONDS = 5.0
LENGTH = 200_000  # characters
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
        repeats = math.prod(max(1, *(int(n) for n in found if n)) for found in COUNT.findall(pattern) if any(found))
        try:
            if len(pattern) > LENGTH or repeats > REPEATS:
                raise TimeoutError
            return (regex.fullmatch if whole else regex.match)(pattern, text, timeout=max(self.left, 0.001))
        except TimeoutError:
            problem = f"{self.field} has a pattern that takes too long to match."
            fix = "write the pattern without a repetition inside a repetition, or name the modules."
            offenders = [f"{pattern!r} against {text!r}"]
            raise ValueError(complain("load_peft", problem, offenders, fix)) from None
        except (regex.error, RecursionError) as error:
            problem = f"{self.field} has a pattern that is no regular expression."
            offenders = [f"{pattern!r}  {error}"]
            raise ValueError(complain("load_peft", problem, offenders, "correct the pattern.")) from error
        finally:
            self.left -= time.thread_time() - start
