"""The product of an array with a low-rank pair, in the cheaper order, without forming the pair's product."""

import math
from collections.abc import Sequence
from typing import Any

from jaxtyping import Array, Float

from jlora.errors import JloraValueError
from jlora.transform.kernel import Factor
from jlora.tree.layouts import contract


def contract_factors(
    x: Float[Array, "..."],
    factors: tuple[Factor, Factor],
    labels: Sequence[int],
    out: Sequence[int],
    precision: Any,
    dtype: Any,
) -> Float[Array, "..."]:
    """Contracts x with one factor and the result with the other; the two factors are never multiplied.

    Args:
        x: its axes are labeled 0, 1, ...
        factors: a and b, aligned with the kernel.
        labels: of the kernel's axes; an axis shared with x has the label of x's axis.
        out: labels of the result.
        precision: of the products.
        dtype: of the result.
    """
    rank = max([x.ndim - 1, *labels]) + 1
    operands = []
    for factor in factors:
        wide = [n for n, size in enumerate(factor.shape[:-1]) if size != 1]
        array = factor.reshape(*(factor.shape[n] for n in wide), factor.shape[-1])
        operands.append((array.astype(x.dtype), [*(labels[n] for n in wide), rank]))
    sizes = {label: n for array, names in operands for label, n in zip(names, array.shape, strict=True)}
    sizes |= dict(enumerate(x.shape))

    def middle(first: Sequence[int], second: Sequence[int]) -> list[int]:
        """Labels of x times the first factor: those that are contracted there are gone."""
        reached = dict.fromkeys([*range(x.ndim), *first])
        return [label for label in reached if label in out or label in second]

    def cost(first: Sequence[int], second: Sequence[int]) -> int:
        volume = lambda *groups: math.prod(sizes[label] for label in set().union(*groups))
        return volume(range(x.ndim), first) + volume(middle(first, second), second)

    if cost(operands[1][1], operands[0][1]) < cost(operands[0][1], operands[1][1]):
        operands.reverse()
    first, second = operands
    kept = middle(first[1], second[1])
    narrow = contract([(x, range(x.ndim)), first], kept, precision=precision)
    present = [label for label in out if label in kept or label in second[1]]
    y = contract([(narrow, kept), second], present, precision=precision, dtype=dtype)
    return y.reshape([sizes[label] if label in present else 1 for label in out])


def parse_einsum(subscripts: str, x_ndim: int, w_ndim: int) -> tuple[list[int], list[int]]:
    """Labels of w's axes and of the result, for `jnp.einsum(subscripts, x, w)` whose x has the labels 0, 1, ...

    >>> parse_einsum("bi,io->bo", 2, 2)
    ([1, 2], [0, 2])
    >>> parse_einsum("...i,io->...o", 3, 2)
    ([2, 3], [0, 1, 3])

    Raises:
        ValueError: not two operands and an output, or labels that do not fit the numbers of axes.
    """
    inputs, arrow, output = subscripts.replace(" ", "").partition("->")
    x_names, comma, w_names = inputs.partition(",")
    if not arrow or not comma or "," in w_names:
        problem = f"{subscripts!r} is not of the form 'x,w->out'."
        raise JloraValueError("einsum", problem, [], "name both operands and the output.")
    more = "".join(chr(0x2460 + n) for n in range(x_ndim - len(x_names.replace("...", ""))))
    x_names, output = (names.replace("...", more) for names in (x_names, output))
    if len(x_names) != x_ndim or len(w_names) != w_ndim:
        problem = f"{subscripts!r} does not fit operands of {x_ndim} and {w_ndim} axes."
        raise JloraValueError("einsum", problem, [], "give one letter per axis.")
    labels = {name: n for n, name in enumerate(x_names)}
    for name in w_names:
        labels.setdefault(name, len(labels))
    return [labels[name] for name in w_names], [labels[name] for name in output]
