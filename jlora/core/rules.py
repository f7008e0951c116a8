"""What each primitive does to an adapted kernel: keep the low-rank pair aligned with it, or contract with both.

A rule is `rule(context, equation, values) -> outputs`; at least one value is `Adapted`. Views (transpose, slice,
reshape, cast ...) give an `Adapted` again. Contractions (dot_general, gather of rows, convolution, ragged_dot) give
the product with the kernel, by the very equation the function had, plus the product with the pair.
"""

import itertools
import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from jlora.core import versions
from jlora.core.layouts import contract, merge_kernel, product
from jlora.core.versions import Equation

Factor = Float[Array, "*axes rank"]
Label = frozenset[int]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Adapted:
    """A view of a kernel and of its low-rank pair, the scaling folded into b.

    The view's value is kernel + sum over rank of a * b, broadcast; where an axis does not apply to a or b it is 1.

    Attributes:
      kernel: (*axes).
      pair: a and b, each (*axes, rank); None while layouts are being inferred.
      path: where the kernel stands in the tree.
      ndim: number of axes it has there.
      labels: for every axis of the view, the axes in the tree that it holds.
    """

    kernel: Float[Array, "*axes"]
    pair: tuple[Factor, Factor] | None
    path: str = field(metadata={"static": True})
    ndim: int = field(metadata={"static": True})
    labels: tuple[Label, ...] = field(metadata={"static": True})

    def view(self, kernel: Any, change: Callable[[Any], Any], labels: Sequence[Label]) -> "Adapted":
        """The same adapter under another view: `change` does to a and b what was done to the kernel."""
        pair = self.pair and (change(self.pair[0]), change(self.pair[1]))
        return replace(self, kernel=kernel, pair=pair, labels=tuple(labels))

    def dense(self) -> Float[Array, "*axes"]:
        """The kernel with its update added: what the transform exists to avoid."""
        return merge_kernel(self.kernel, *self.pair) if self.pair else self.kernel


@dataclass(frozen=True)
class Context:
    """What holds for one trace.

    Attributes:
      dropout: rate for the input of A.
      key: for dropout; None means none.
      refused: uses of a kernel that no rule covers, one line each; the trace goes on, to find them all.
      reads: how kernels were contracted: path, and one letter for every axis of the kernel in the tree.
      uses: numbers the places that draw from the key.
      where: line of the user's code that the enclosing equation came from.
    """

    dropout: float = 0.0
    key: Key[Array, ""] | None = None
    refused: list[str] = field(default_factory=list)
    reads: list[tuple[str, str]] = field(default_factory=list)
    uses: Iterator[int] = field(default_factory=itertools.count)
    where: str = "an unknown line"

    def fold(self, data: Any) -> "Context":
        return self if self.key is None else replace(self, key=jax.random.fold_in(self.key, data))

    def drop(self, x: Float[Array, "..."], path: str) -> Float[Array, "..."]:
        """Dropout on what A reads, with a key of its own for every place and kernel."""
        if self.key is None or self.dropout == 0.0:
            return x
        key = jax.random.fold_in(jax.random.fold_in(self.key, zlib.crc32(path.encode())), next(self.uses))
        kept = jax.random.bernoulli(key, 1.0 - self.dropout, x.shape)
        return jnp.where(kept, x / (1.0 - self.dropout), jnp.zeros((), x.dtype))

    def read(self, adapted: Adapted, roles: Sequence[str]) -> None:
        """Notes that a kernel was contracted, with the role of every axis of the view."""
        found: list[set[str]] = [set() for _ in range(adapted.ndim)]
        for label, role in zip(adapted.labels, roles, strict=True):
            for axis in label:
                found[axis].add(role)
        # An axis that no view holds any more was scanned or indexed away: the kernel is stacked along it.
        self.reads.append((adapted.path, "".join("s" if not f else "?" if len(f) > 1 else f.pop() for f in found)))


Rule = Callable[[Context, Equation, list[Any]], list[Any]]


def refuse(context: Context, equation: Equation, value: Any) -> Any:
    """The dense kernel in place of an adapted one, with a note that no rule covers this use of it."""
    if not isinstance(value, Adapted):
        return value
    context.refused.append(
        f"{value.path!r} in `{equation.primitive.name}`  at {versions.source(equation) or context.where}"
    )
    return value.dense()


def otherwise(context: Context, equation: Equation, values: list[Any]) -> list[Any]:
    """What happens where no rule applies."""
    return versions.run(equation, [refuse(context, equation, value) for value in values])


def _present(factor: Factor, adapted: Adapted) -> list[bool]:
    """Which axes of the view apply to a factor."""
    return [size == whole for size, whole in zip(factor.shape, adapted.kernel.shape, strict=False)]


def _pick(present: Sequence[bool], yes: Sequence[int], no: int | Sequence[int]) -> list[int]:
    no = [no] * len(yes) if isinstance(no, int) else no
    return [y if here else n for here, y, n in zip(present, yes, no, strict=True)]


def _run(equation: Equation, values: Sequence[Any]) -> Any:
    return versions.run(equation, values)[0]


def _transpose(context: Context, equation: Equation, values: list[Any]) -> list[Any]:
    (w,) = values
    order = versions.permutation(equation)
    change = lambda f: jnp.transpose(f, (*order, len(order)))
    return [w.view(_run(equation, [w.kernel]), change, [w.labels[n] for n in order])]


def _cast(context: Context, equation: Equation, values: list[Any]) -> list[Any]:
    """The pair keeps its own precision until it is used."""
    (w,) = values
    kernel = _run(equation, [w.kernel])
    if not jnp.issubdtype(kernel.dtype, jnp.floating):
        return otherwise(context, equation, values)
    return [w.view(kernel, lambda f: f, w.labels)]


def _same(context: Context, equation: Equation, values: list[Any]) -> list[Any]:
    """Primitives that hand each operand through: the mark or barrier is for the kernel, the pair goes along."""
    outs = versions.run(equation, [v.kernel if isinstance(v, Adapted) else v for v in values])
    return [
        v.view(out, lambda f: f, v.labels) if isinstance(v, Adapted) else out
        for v, out in zip(values, outs, strict=True)
    ]


def _stop_gradient(context: Context, equation: Equation, values: list[Any]) -> list[Any]:
    (w,) = values
    return [w.view(_run(equation, [w.kernel]), jax.lax.stop_gradient, w.labels)]


def _scale(context: Context, equation: Equation, values: list[Any]) -> list[Any]:
    """Times or divided by a scalar, which the pair's b takes."""
    w, other = values if isinstance(values[0], Adapted) else reversed(values)
    divides = equation.primitive.name == "div"
    if isinstance(other, Adapted) or jnp.ndim(other) or (divides and w is not values[0]):
        return otherwise(context, equation, values)
    kernel = _run(equation, [v.kernel if v is w else v for v in values])
    if w.pair is None:
        return [replace(w, kernel=kernel)]
    a, b = w.pair
    other = jnp.asarray(other).astype(jnp.promote_types(b.dtype, jnp.result_type(other)))
    b = b.astype(other.dtype)
    pair = a, b / other if divides else b * other
    return [replace(w, kernel=kernel, pair=pair)]


def _negate(context: Context, equation: Equation, values: list[Any]) -> list[Any]:
    (w,) = values
    return [replace(w, kernel=_run(equation, [w.kernel]), pair=w.pair and (w.pair[0], -w.pair[1]))]


def _reverse(context: Context, equation: Equation, values: list[Any]) -> list[Any]:
    (w,) = values
    return [w.view(_run(equation, [w.kernel]), lambda f: jnp.flip(f, versions.dimensions(equation)), w.labels)]


def _squeeze(context: Context, equation: Equation, values: list[Any]) -> list[Any]:
    (w,) = values
    gone = set(versions.dimensions(equation) or ())
    labels = [label for n, label in enumerate(w.labels) if n not in gone]
    return [w.view(_run(equation, [w.kernel]), lambda f: jnp.squeeze(f, tuple(gone)), labels)]


def _broadcast(context: Context, equation: Equation, values: list[Any]) -> list[Any]:
    """Axes that come new, or grow from 1, hold neither a nor b."""
    w = values[0]
    kernel = _run(equation, [w.kernel])
    places = versions.broadcast_dimensions(equation)
    labels = [frozenset[int]()] * kernel.ndim
    for n, place in enumerate(places):
        labels[place] = w.labels[n]

    def change(factor: Factor) -> Factor:
        shape = [1] * kernel.ndim
        for n, place in enumerate(places):
            shape[place] = factor.shape[n]
        return factor.reshape(*shape, factor.shape[-1])

    return [w.view(kernel, change, labels)]


def _reshape(context: Context, equation: Equation, values: list[Any]) -> list[Any]:
    """Axes may merge or be cut where every axis of the group applies to a alike, and to b alike."""
    w = values[0]
    kernel = _run(equation, [w.kernel])
    groups = list(_groups(w.kernel.shape, kernel.shape))
    whole = versions.dimensions(equation) is None
    if not whole or any(len(set(_in_group(f, w, old))) > 1 for f in w.pair or () for old, _ in groups):
        return otherwise(context, equation, values)

    def change(factor: Factor) -> Factor:
        shape = list(kernel.shape)
        for old, new in groups:
            if not all(_in_group(factor, w, old)):
                for n in new:
                    shape[n] = 1
        return factor.reshape(*shape, factor.shape[-1])

    labels = [frozenset[int]()] * kernel.ndim
    for old, new in groups:
        for n in new:
            labels[n] = frozenset[int]().union(*(w.labels[m] for m in old))
    return [w.view(kernel, change, labels)]


def _in_group(factor: Factor, w: Adapted, axes: Sequence[int]) -> list[bool]:
    """Whether a factor has each axis of a group; axes of size 1 go with the others."""
    present = _present(factor, w)
    return [present[n] for n in axes if w.kernel.shape[n] > 1]


def _groups(old: Sequence[int], new: Sequence[int]) -> Iterator[tuple[list[int], list[int]]]:
    """The smallest groups of axes with equal products, in order, that a reshape maps onto each other."""
    i = j = 0
    while i < len(old) or j < len(new):
        left, right = [i] if i < len(old) else [], [j] if j < len(new) else []
        i, j = i + len(left), j + len(right)
        size = lambda axes, shape: math.prod(shape[n] for n in axes)
        while size(left, old) != size(right, new):
            if size(left, old) < size(right, new):
                left.append(i)
                i += 1
            else:
                right.append(j)
                j += 1
        yield left, right


def _slice(context: Context, equation: Equation, values: list[Any]) -> list[Any]:
    (w,) = values
    starts, limits, strides = versions.slice_bounds(equation)
    strides = strides or [1] * len(starts)

    def change(factor: Factor) -> Factor:
        here = _present(factor, w)
        bounds = zip(_pick(here, starts, 0), _pick(here, limits, 1), _pick(here, strides, 1), strict=True)
        return factor[tuple(slice(*bound) for bound in bounds)]

    return [w.view(_run(equation, [w.kernel]), change, w.labels)]


def _dynamic_slice(context: Context, equation: Equation, values: list[Any]) -> list[Any]:
    w, *starts = values
    sizes = versions.slice_sizes(equation)
    zero = jnp.zeros((), starts[0].dtype) if starts else 0

    def change(factor: Factor) -> Factor:
        here = _present(factor, w)
        at = [start if h else zero for h, start in zip(here, starts, strict=True)]
        return jax.lax.dynamic_slice(factor, [*at, zero], [*_pick(here, sizes, 1), factor.shape[-1]])

    return [w.view(_run(equation, [w.kernel, *starts]), change, w.labels)]


def _split(context: Context, equation: Equation, values: list[Any]) -> list[Any]:
    (w,) = values
    sizes, axis = versions.split_axis(equation)
    ends = list(itertools.accumulate(int(size) for size in sizes))
    cut = lambda f, n, end: jax.lax.slice_in_dim(f, end - int(sizes[n]), end, axis=axis)
    outs = versions.run(equation, [w.kernel])
    return [
        w.view(out, lambda f, n=n, end=end: cut(f, n, end) if _present(f, w)[axis] else f, w.labels)
        for n, (out, end) in enumerate(zip(outs, ends, strict=True))
    ]


def _dot_general(context: Context, equation: Equation, values: list[Any]) -> list[Any]:
    """Source: Hu et al. 2021, arXiv:2106.09685, equation 3, for any labelling: x W + (x A) B."""
    dot = versions.dot(equation)
    side = int(isinstance(values[1], Adapted))
    w, x = values[side], values[1 - side]
    if isinstance(x, Adapted):
        return otherwise(context, equation, values)
    y = _run(equation, [w.kernel, x] if side == 0 else [x, w.kernel])
    roles = ["o"] * w.kernel.ndim
    labels = [x.ndim + n for n in range(w.kernel.ndim)]
    for letter, pairs in (("i", dot.contract), ("s", dot.batch)):
        for n, m in zip(pairs[side], pairs[1 - side], strict=True):
            roles[n], labels[n] = letter, m
    context.read(w, roles)
    if w.pair is None:
        return [y]
    free = [n for n in range(x.ndim) if n not in dot.contract[1 - side] and n not in dot.batch[1 - side]]
    free_w = [label for label, role in zip(labels, roles, strict=True) if role == "o"]
    out = [*dot.batch[1 - side], *(free_w + free if side == 0 else free + free_w)]
    return [y + _low_rank(_for_a(context, x, w, y), w.pair, labels, out, dot.precision, y.dtype)]


def _for_a(context: Context, x: Any, w: Adapted, y: Any) -> Float[Array, "..."]:
    """What A reads: x with dropout. Beside integers and float8 the pair keeps a dtype that can hold it."""
    floats = [v.dtype for v in (x, w.kernel) if jnp.issubdtype(v.dtype, jnp.floating) and v.dtype.itemsize > 1]
    return context.drop(x.astype(jnp.result_type(*floats) if floats else y.dtype), w.path)


def _low_rank(
    x: Float[Array, "..."],
    pair: tuple[Factor, Factor],
    labels: Sequence[int],
    out: Sequence[int],
    precision: Any,
    dtype: Any,
) -> Float[Array, "..."]:
    """Contracts x with one factor and the result with the other, in the cheaper order; a and b never meet.

    Args:
      x: its axes are labelled 0, 1, ...
      pair: aligned factors.
      labels: of the kernel's axes, those that x shares named as x's.
      out: labels of the result.
      precision: of the function's own product.
      dtype: of the result.
    """
    rank = max([x.ndim, *labels]) + 1
    operands = []
    for factor in pair:
        there = [n for n, size in enumerate(factor.shape[:-1]) if size != 1]
        array = factor.reshape(*(factor.shape[n] for n in there), factor.shape[-1])
        operands.append((array.astype(x.dtype), [*(labels[n] for n in there), rank]))
    sizes = {label: n for array, ls in operands for label, n in zip(ls, array.shape, strict=True)}
    sizes |= dict(enumerate(x.shape))

    def middle(first: Sequence[int], second: Sequence[int]) -> list[int]:
        reached = dict.fromkeys([*range(x.ndim), *first])
        return [label for label in reached if label in out or label in second]

    def cost(first: Sequence[int], second: Sequence[int]) -> int:
        kept = middle(first, second)
        volume = lambda *groups: math.prod(sizes[label] for label in set().union(*groups))
        return volume(range(x.ndim), first) + volume(kept, second)

    if cost(operands[1][1], operands[0][1]) < cost(operands[0][1], operands[1][1]):
        operands.reverse()
    (first, second) = operands
    kept = middle(first[1], second[1])
    narrow = contract([(x, range(x.ndim)), first], kept, precision=precision)
    held = [label for label in out if label in kept or label in second[1]]
    y = contract([(narrow, kept), second], held, precision=precision, dtype=dtype)
    return y.reshape([sizes[label] if label in held else 1 for label in out])


def _gather(context: Context, equation: Equation, values: list[Any]) -> list[Any]:
    """Rows looked up (Embed): the same gather on the factor that has the rows. A stack indexed: on both."""
    w, indices = values
    if not isinstance(w, Adapted) or isinstance(indices, Adapted):
        return otherwise(context, equation, values)
    how = versions.gather(equation)
    y = _run(equation, [w.kernel, indices])
    dims = how.dimensions
    indexed = {*dims.start_index_map, *dims.operand_batching_dims}
    kept = [n for n in range(w.kernel.ndim) if n not in (*dims.collapsed_slice_dims, *dims.operand_batching_dims)]
    # A choice along a later axis is a view of a kernel; along the first it is rows of a table, or one of a stack.
    column = 0 not in indexed
    chosen = frozenset[int]().union(*(w.labels[n] for n in indexed)) if column else frozenset[int]()
    labels = [chosen] * y.ndim
    for n, place in zip(kept, dims.offset_dims, strict=True):
        labels[place] = chosen if n in indexed else w.labels[n]
    if w.pair is None:
        if column or len(kept) > 1:
            return [replace(w, kernel=y, labels=tuple(labels))]
        context.read(w, ["v" if n in indexed else "o" for n in range(w.kernel.ndim)])
        return [y]
    has = [{_present(f, w)[n] for n in indexed if w.kernel.shape[n] != 1} for f in w.pair]
    if any(len(found) > 1 for found in has):
        return otherwise(context, equation, values)
    a, b = (_gather_factor(f, w, how, indices, y.ndim, all(found)) for f, found in zip(w.pair, has, strict=True))
    of_stack = all(all(found) for found in has) and (len(kept) > 1 or bool(has[0]))
    if column or of_stack:
        return [replace(w, kernel=y, pair=(a, b), labels=tuple(labels))]
    return [y + jnp.broadcast_to(product(a.astype(y.dtype), b.astype(y.dtype)), y.shape)]


def _gather_factor(factor: Factor, w: Adapted, how: versions.Gather, indices: Any, ndim: int, indexed: bool) -> Factor:
    """A factor aligned with what the gather gives, itself gathered if it has the indexed axes."""
    dims = how.dimensions
    if indexed:
        sizes = [*_pick(_present(factor, w), how.slice_sizes, 1), factor.shape[-1]]
        dims = dims._replace(offset_dims=(*dims.offset_dims, ndim))
        # Where an index is out of bounds the kernel's fill value is the whole answer.
        return jax.lax.gather(factor, indices, dims, sizes, **how.options | {"fill_value": 0})
    kept = [n for n in range(w.kernel.ndim) if n not in (*dims.collapsed_slice_dims, *dims.operand_batching_dims)]
    factor = factor[tuple(slice(0, min(n, size)) for n, size in zip(factor.shape, how.slice_sizes, strict=False))]
    shape = [1] * ndim
    for n, place in zip(kept, dims.offset_dims, strict=True):
        shape[place] = factor.shape[n]
    return factor.reshape(*shape, factor.shape[-1])


def _conv(context: Context, equation: Equation, values: list[Any]) -> list[Any]:
    """Convolve with A, then a 1x1 with B; where a gradient turned the kernel round, B first and then A."""
    x, w = values
    if isinstance(x, Adapted) or not isinstance(w, Adapted):
        return otherwise(context, equation, values)
    how = versions.conv(equation)
    out, inner = how.rhs_spec[:2]
    y = _run(equation, [x, w.kernel])
    context.read(w, ["o" if n == out else "i" for n in range(w.kernel.ndim)])
    if w.pair is None:
        return [y]
    wide = [n for n in range(w.kernel.ndim) if w.kernel.shape[n] != 1]
    axes = [{n for n in wide if _present(f, w)[n]} for f in w.pair]
    x = _for_a(context, x, w, y)
    for (a, in_a), (b, in_b) in itertools.permutations(zip(w.pair, axes, strict=True)):
        if how.batch_groups == 1 and in_b <= {out} and out not in in_a:
            a, b = _split_axis(a, b, out, w, x.dtype)
            return [y + _conv_then_mix(x, a, b, how).astype(y.dtype)]
        if how.batch_groups == how.groups == 1 and in_b <= {inner} and inner not in in_a:
            a, b = _split_axis(a, b, inner, w, x.dtype)
            return [y + _mix_then_conv(x, a, b, how).astype(y.dtype)]
    return otherwise(context, equation, values)


def _split_axis(a: Factor, b: Factor, axis: int, w: Adapted, dtype: Any) -> tuple[Factor, Float[Array, "size rank"]]:
    """The pair with every axis of the kernel but one in a, and that one alone in b; broadcast axes are laid out."""
    sizes = w.kernel.shape
    a = jnp.broadcast_to(a, [*(1 if n == axis else size for n, size in enumerate(sizes)), a.shape[-1]])
    b = jnp.broadcast_to(b.reshape(b.shape[axis], b.shape[-1]), (sizes[axis], b.shape[-1]))
    return a.astype(dtype), b.astype(dtype)


def _conv_then_mix(x: Any, a: Factor, b: Float[Array, "out rank"], how: versions.Conv) -> Any:
    out, features, groups = how.rhs_spec[0], how.out_spec[1], how.groups
    kernel = jnp.moveaxis(jnp.squeeze(a, out), -1, out)
    # Every group reads its own channels through the same A.
    kernel = jnp.tile(kernel, [groups if n == out else 1 for n in range(kernel.ndim)])
    narrow = jax.lax.conv_general_dilated(x, kernel, feature_group_count=groups, **how.options)
    narrow = jnp.moveaxis(narrow, features, -1)
    # All sizes are written out: -1 has no meaning where the batch is empty.
    narrow = narrow.reshape(*narrow.shape[:-1], groups, a.shape[-1])
    per_group = b.reshape(groups, len(b) // groups, b.shape[-1])
    y = jnp.einsum("...gr,gor->...go", narrow, per_group, precision=how.options["precision"])
    return jnp.moveaxis(y.reshape(*y.shape[:-2], len(b)), -1, features)


def _mix_then_conv(x: Any, a: Factor, b: Float[Array, "inner rank"], how: versions.Conv) -> Any:
    inner, features = how.rhs_spec[1], how.lhs_spec[1]
    narrow = jnp.tensordot(x, b, axes=([features], [0]), precision=how.options["precision"])
    kernel = jnp.moveaxis(jnp.squeeze(a, inner), -1, inner)
    return jax.lax.conv_general_dilated(jnp.moveaxis(narrow, -1, features), kernel, **how.options)


def _ragged_dot(context: Context, equation: Equation, values: list[Any]) -> list[Any]:
    """Experts: each group's rows go through its own A and B."""
    x, w, sizes = values[:3]
    how = versions.ragged_dot(equation)
    if not isinstance(w, Adapted) or isinstance(x, Adapted) or not how.plain:
        return otherwise(context, equation, values)
    y = _run(equation, [x, w.kernel, sizes])
    (inner,) = how.contract[1]
    (out,) = {0, 1, 2} - {inner, how.group_axis}
    context.read(w, ["s" if n == how.group_axis else "i" if n == inner else "o" for n in range(3)])
    if w.pair is None:
        return [y]
    a, b = w.pair if w.pair[0].shape[out] == 1 else reversed(w.pair)
    if a.shape[out] != 1 or b.shape[inner] != 1 or {f.shape[how.group_axis] for f in (a, b)} != {sizes.shape[0]}:
        return otherwise(context, equation, values)
    a = jnp.einsum(a, [0, 1, 2, 3], [how.group_axis, inner, 3])
    b = jnp.einsum(b, [0, 1, 2, 3], [how.group_axis, 3, out])
    x = _for_a(context, x, w, y)
    narrow = jax.lax.ragged_dot(x, a.astype(x.dtype), sizes, precision=how.precision)
    return [y + jax.lax.ragged_dot(narrow, b.astype(x.dtype), sizes, precision=how.precision).astype(y.dtype)]


RULES: dict[str, Rule] = {
    "transpose": _transpose,
    "convert_element_type": _cast,
    "copy": _same,
    "copy_p": _same,
    "name": _same,
    "sharding_constraint": _same,
    "optimization_barrier": _same,
    "stop_gradient": _stop_gradient,
    "mul": _scale,
    "div": _scale,
    "neg": _negate,
    "rev": _reverse,
    "squeeze": _squeeze,
    "broadcast_in_dim": _broadcast,
    "reshape": _reshape,
    "slice": _slice,
    "dynamic_slice": _dynamic_slice,
    "split": _split,
    "dot_general": _dot_general,
    "gather": _gather,
    "conv_general_dilated": _conv,
    "ragged_dot_general": _ragged_dot,
}
