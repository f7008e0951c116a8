"""Distributes ranks among kernels, by the spectra of their adapters or the norms of their gradients."""

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from jlora.adapters.spectrum import Spectrum
from jlora.errors import JloraTypeError, JloraValueError, nearest, quoted
from jlora.tree.layouts import SCALING, A, B, fans
from jlora.tree.paths import Tree, TreePath, flatten, read_arrays
from jlora.tree.wrapping import read_layouts


def gradient_norms(grads: Tree) -> dict[TreePath, float]:
    """The norm of each adapter's gradient, over A and B together, by the kernel's path.

    B starts at zero, so at the first step the gradient of A is zero and the norm is that of B's gradient.

    Args:
        grads: the gradient with respect to the first result of `split`; leaves trained in full are ignored.

    Raises:
        ValueError: the tree has no gradient of an adapter.

    Examples:
        >>> jlora.gradient_norms({"kernel_lora_a": jnp.zeros((4, 1)), "kernel_lora_b": jnp.array([[3.0, 4.0]])})
        {'kernel': 5.0}
    """
    squares: dict[TreePath, float] = {}
    for path, leaf in read_arrays("gradient_norms", grads, "grads").items():
        kernel = next((path[: -len(affix)] for affix in (A, B) if path.endswith(affix)), None)
        if kernel is not None:
            squares[kernel] = squares.get(kernel, 0.0) + float(np.square(np.asarray(leaf).astype(np.float64)).sum())
    if not squares:
        fix = "pass the gradient with respect to jlora.split(params)[0]."
        raise JloraValueError("gradient_norms", "the tree has no gradient of an adapter.", [], fix)
    return {kernel: math.sqrt(square) for kernel, square in squares.items()}


def allocate(
    importance: Mapping[TreePath, Spectrum] | Mapping[TreePath, float],
    params: Tree,
    *,
    budget: float,
    low: int = 1,
    high: int | None = None,
) -> dict[str, int]:
    """Distributes ranks among kernels, with at most the trainable parameters of one common rank.

    With spectra, ranks are assigned one by one to the kernel where a rank keeps the largest part of the squared norm
    per parameter. This is optimal if all kernels have the same size. No kernel gets a higher rank than its adapter has,
    because the spectrum ends there. With numbers, such as `gradient_norms`, ranks are proportional to the numbers,
    rounded by the Sainte-Lague method.

    ::

        ranks = jlora.allocate(jlora.spectrum(params), params, budget=8)
        params = jlora.wrap(jlora.unwrap(params), targets=ranks)

    Args:
        importance: a spectrum or a number from 0 for each wrapped kernel, by its path.
        params: the wrapped tree.
        budget: the common rank whose number of trainable parameters is the limit.
        low: the lowest rank of a kernel; a kernel whose sizes allow less gets the highest rank that it can have.
        high: the highest rank of a kernel; None means that only the kernel's sizes limit it.

    Returns:
        A rank for each kernel, by a pattern that matches its path alone, as `wrap` and `resize` take it.

    Raises:
        ValueError: `importance` lacks kernels or has unknown ones, or its numbers are negative, not finite or all zero;
            the limits are out of range; or the budget is less than the lowest ranks need.

    Examples:
        >>> layer = lambda: {"kernel": jnp.ones((16, 16))}
        >>> params = jlora.wrap({"first": layer(), "last": layer()}, rank=4)
        >>> jlora.allocate({"first/kernel": 1.0, "last/kernel": 3.0}, params, budget=4)
        {'first/kernel': 2, 'last/kernel': 6}
    """
    layouts, leaves = read_layouts("allocate", params), flatten(params)
    _check_importance(importance, list(layouts))
    whole = all(isinstance(n, int) and not isinstance(n, bool) for n in (low, low if high is None else high))
    if not whole or not 1 <= low <= (low if high is None else high):
        fix = "pass whole numbers, 1 <= low <= high."
        raise JloraValueError("allocate", "low and high are out of range.", [f"low {low}, high {high}"], fix)
    sizes = {path: fans(tuple(leaves[path].shape), layout) for path, layout in layouts.items()}
    # Trainable parameters of one rank, and the highest rank.
    cost = {path: sum(sizes[path]) * math.prod(leaves[path + SCALING].shape) for path in layouts}
    limits = {path: min(*sizes[path], high or math.inf) for path in layouts}
    ranks = {path: int(min(low, limits[path])) for path in layouts}
    remaining = budget * sum(cost.values()) - sum(cost[path] * n for path, n in ranks.items())
    if not (math.isfinite(budget) and remaining >= 0):
        problem = f"a budget of {budget} is less than rank {low} for every kernel, or not finite."
        raise JloraValueError("allocate", problem, [], "raise budget, or lower low.")
    gains = {path: _rank_gains(importance[path], cost[path], int(limits[path])) for path in layouts}
    # One pass is enough: the gains of a kernel fall with the rank, and a rank that exceeds the budget once always does.
    steps = [(-gain, n, path) for path, falling in gains.items() for n, gain in enumerate(falling) if gain > 0]
    for _, n, path in sorted(steps):
        if n >= ranks[path] and cost[path] <= remaining:
            ranks[path] += 1
            remaining -= cost[path]
    return {re.escape(path): n for path, n in ranks.items()}


def _rank_gains(importance: Any, cost: int, limit: int) -> list[float]:
    """The gain of each rank of a kernel, from the first to the limit, in falling order."""
    if isinstance(importance, Spectrum):
        values = importance.singular_values
        energies = np.square(values.reshape(-1, values.shape[-1])).sum(0)
        return [float(gain) / cost for gain in energies[:limit]]
    return [float(importance) / (n + 0.5) for n in range(limit)]


def _check_importance(importance: Mapping[TreePath, Any], paths: list[TreePath]) -> None:
    if not isinstance(importance, Mapping):
        problem = f"importance is of type {type(importance).__name__}, not a dict by the kernels' paths."
        raise JloraTypeError("allocate", problem, [], "pass spectrum(params), or gradient_norms(grads).")
    misfits = [f"{path!r}  missing" for path in paths if path not in importance]
    misfits += [f"{p!r}  not wrapped, nearest: {quoted(nearest(p, paths))}" for p in importance if p not in paths]
    if misfits:
        fix = "pass spectrum(params), or gradient_norms of the same tree's adapters."
        raise JloraValueError("allocate", "the kernels of importance and of the tree differ.", misfits, fix)
    if len({isinstance(value, Spectrum) for value in importance.values()}) > 1:
        fix = "pass spectra for all kernels, or numbers for all."
        raise JloraTypeError("allocate", "importance mixes spectra and numbers, which can't be compared.", [], fix)
    numbers = {p: float(np.sum(v.norm)) if isinstance(v, Spectrum) else float(v) for p, v in importance.items()}
    wrong = [f"{path!r}  {number}" for path, number in numbers.items() if not 0 <= number < math.inf]
    if wrong:
        raise JloraValueError("allocate", "importance is negative or not finite.", wrong, "pass numbers from 0.")
    if not any(numbers.values()):
        fix = "train for some steps first, or pass gradient norms."
        raise JloraValueError("allocate", "the importance of every kernel is zero.", [], fix)
