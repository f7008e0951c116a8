"""Targets: patterns and rules, matched against slash paths, that choose the kernels to adapt and their ranks."""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from jlora.errors import JloraTypeError, JloraValueError, count, nearest, quoted
from jlora.tree.paths import TreePath

Pattern = str | Iterable[str]


class Rule(NamedTuple):
    """The rank and alpha of a kernel's adapter. A field that is None has the value of `wrap`'s argument.

    Attributes:
        rank: columns of A and rows of B.
        alpha: numerator of the scaling; None means `wrap`'s alpha, or the rank if that is None too.
    """

    rank: int | None = None
    alpha: float | None = None


Targets = Pattern | Mapping[str | tuple[str, ...], int | Rule]


def is_kernel(path: TreePath, value: Any) -> bool:
    """Whether the name of a module, as a target, includes this leaf of it: two axes or more, no bias, no scale."""
    return len(value.shape) >= 2 and path.rsplit("/", 1)[-1] not in ("bias", "scale")


def make_matcher(pattern: Pattern) -> Callable[[TreePath], bool]:
    """A function that tests whether a path matches a pattern.

    A string is a regular expression that must match the whole slash path. A list holds names, each of one or more
    components. A name matches a leaf if the path of the leaf, or of the leaf's module, equals the name or ends with it.
    """
    if isinstance(pattern, str):
        expression = re.compile(pattern)
        return lambda path: expression.fullmatch(path) is not None
    names = tuple(pattern)
    return lambda path: any(
        f"/{whole}".endswith(f"/{name}") for whole in (path, path.rpartition("/")[0]) for name in names
    )


def split_pattern(pattern: Pattern) -> tuple[Pattern, ...]:
    """The parts of a pattern that must each match something: every name of a list."""
    return (pattern,) if isinstance(pattern, str) else tuple((name,) for name in pattern)


def resolve_targets(targets: Targets, leaves: Mapping[TreePath, Any]) -> dict[TreePath, Rule]:
    """The kernels that match `targets`, each with the first rule that matches it.

    Raises:
        ValueError: a pattern matches no kernel; all such patterns are listed, with the nearest paths.
    """
    rules = targets if isinstance(targets, Mapping) else {_freeze(targets): Rule()}
    kernels = [path for path, value in leaves.items() if is_kernel(path, value)]
    check_matches("wrap", [part for pattern in rules for part in split_pattern(pattern)], kernels, "target", "kernel")
    tests = [
        (make_matcher(pattern), rule if isinstance(rule, Rule) else Rule(rank=rule)) for pattern, rule in rules.items()
    ]
    first = {path: next((rule for test, rule in tests if test(path)), None) for path in kernels}
    return {path: rule for path, rule in first.items() if rule is not None}


def select_paths(who: str, patterns: Pattern, paths: Iterable[TreePath]) -> set[TreePath]:
    """The paths of the leaves to train in full, those that match `patterns`. Every pattern must match a path."""
    if not isinstance(patterns, Iterable):
        fix = "pass a regular expression, or a list of names of modules or leaves."
        raise JloraTypeError(who, f"train is {patterns!r}.", [], fix)
    paths = list(paths)
    patterns = _freeze(patterns)
    check_matches(who, split_pattern(patterns), paths, "train pattern", "leaf", "leaves")
    # A module's name includes all leaves inside the module, at any depth. In wrap's targets it means one kernel.
    names = () if isinstance(patterns, str) else patterns
    test = make_matcher(patterns)
    return {path for path in paths if test(path) or any(f"/{name}/" in f"/{path}" for name in names)}


def check_matches(
    who: str, patterns: Iterable[Pattern], paths: list[TreePath], what: str, kind: str, kinds: str | None = None
) -> None:
    """Raises one error that lists every pattern matching none of `paths`.

    Raises:
        ValueError: a pattern matches nothing, or is not a regular expression.
    """
    unmatched: list[str] = []
    for pattern in patterns:
        text = pattern if isinstance(pattern, str) else next(iter(pattern))
        try:
            test = make_matcher(pattern)
        except re.error as error:
            raise JloraValueError(
                who, f"a {what} is not a regular expression.", [f"{text!r}  {error}"], "correct the pattern."
            ) from None
        inside = not isinstance(pattern, str) and what != "target"
        if not any(test(path) or (inside and f"/{text}/" in f"/{path}") for path in paths):
            unmatched.append(f"{text!r}  nearest: {quoted(nearest(text, paths))}")
    if unmatched:
        problem = f"{count(len(unmatched), what)} matched no {kind}."
        raise JloraValueError(who, problem, unmatched, "correct the pattern, or delete it.")


def _freeze(pattern: Pattern) -> str | tuple[str, ...]:
    return pattern if isinstance(pattern, str) else tuple(pattern)
