"""Which kernels get an adapter, and of what rank: patterns and rules matched against slash paths."""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from jlora.errors import JloraTypeError, JloraValueError, count, nearest, quoted
from jlora.tree.paths import TreePath

Pattern = str | Iterable[str]


class Rule(NamedTuple):
    """What a kernel's adapter is; a field left None takes wrap's own.

    Attributes:
        rank: columns of A and rows of B.
        alpha: numerator of the scaling; None means wrap's alpha, and that failing, the rule's rank.
    """

    rank: int | None = None
    alpha: float | None = None


Targets = Pattern | Mapping[str | tuple[str, ...], int | Rule]


def is_kernel(path: TreePath, value: Any) -> bool:
    """Whether a pattern that names a whole module means this leaf of it: two axes or more, no bias, no scale."""
    return len(value.shape) >= 2 and path.rsplit("/", 1)[-1] not in ("bias", "scale")


def matcher(pattern: Pattern) -> Callable[[TreePath], bool]:
    """The test that a pattern stands for.

    A string is a regular expression that must match the whole slash path. A list holds names, each of one or more
    components; a name matches a path, or the path of the module the leaf is in, that equals it or ends with it.
    """
    if isinstance(pattern, str):
        expression = re.compile(pattern)
        return lambda path: expression.fullmatch(path) is not None
    names = tuple(pattern)
    return lambda path: any(
        f"/{whole}".endswith(f"/{name}") for whole in (path, path.rpartition("/")[0]) for name in names
    )


def parts(pattern: Pattern) -> tuple[Pattern, ...]:
    """The patterns that must each match something: a list is as good as its weakest name."""
    return (pattern,) if isinstance(pattern, str) else tuple((name,) for name in pattern)


def resolve(targets: Targets, leaves: Mapping[TreePath, Any]) -> dict[TreePath, Rule]:
    """The kernels that `targets` names, each with the rule that matched it first.

    Raises:
        ValueError: a pattern matches no kernel; all such patterns are listed, with the nearest paths.
    """
    rules = targets if isinstance(targets, Mapping) else {_frozen(targets): Rule()}
    kernels = [path for path, value in leaves.items() if is_kernel(path, value)]
    check_matches("wrap", [part for pattern in rules for part in parts(pattern)], kernels, "target", "kernel")
    tests = [(matcher(pattern), rule if isinstance(rule, Rule) else Rule(rank=rule)) for pattern, rule in rules.items()]
    first = {path: next((rule for test, rule in tests if test(path)), None) for path in kernels}
    return {path: rule for path, rule in first.items() if rule is not None}


def select(who: str, patterns: Pattern, paths: Iterable[TreePath]) -> set[TreePath]:
    """The paths that `patterns` names, for leaves trained in full; every pattern must match one."""
    if not isinstance(patterns, Iterable):
        fix = "pass a regular expression, or a list of names of modules or leaves."
        raise JloraTypeError(who, f"train is {patterns!r}.", [], fix)
    paths = list(paths)
    patterns = _frozen(patterns)
    check_matches(who, parts(patterns), paths, "train pattern", "leaf", "leaves")
    # A module's name stands for all its leaves, however deep; wrap's targets mean a module's own kernel.
    names = () if isinstance(patterns, str) else patterns
    test = matcher(patterns)
    return {path for path in paths if test(path) or any(f"/{name}/" in f"/{path}" for name in names)}


def check_matches(
    who: str, patterns: Iterable[Pattern], paths: list[TreePath], what: str, kind: str, kinds: str | None = None
) -> None:
    """Raises one error that lists every pattern matching none of `paths`.

    Raises:
        ValueError: a pattern matches nothing, or is no regular expression.
    """
    lost: list[str] = []
    for pattern in patterns:
        text = pattern if isinstance(pattern, str) else next(iter(pattern))
        try:
            test = matcher(pattern)
        except re.error as error:
            raise JloraValueError(
                who, f"a {what} is no regular expression.", [f"{text!r}  {error}"], "correct the pattern."
            ) from None
        inside = not isinstance(pattern, str) and what != "target"
        if not any(test(path) or (inside and f"/{text}/" in f"/{path}") for path in paths):
            lost.append(f"{text!r}  nearest: {quoted(nearest(text, paths))}")
    if lost:
        problem = f"{count(len(lost), what)} matched no {kind}."
        raise JloraValueError(who, problem, lost, "correct the pattern, or delete it.")


def _frozen(pattern: Pattern) -> str | tuple[str, ...]:
    return pattern if isinstance(pattern, str) else tuple(pattern)
