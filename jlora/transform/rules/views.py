"""Views: a kernel that is transposed, cast, reshaped or cut stays low rank, since the factors take the same view."""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jlora.transform import jaxprs
from jlora.transform.kernel import NO_AXES, AdaptedKernel, Factor
from jlora.transform.registry import Call, register_rule


@register_rule("transpose")
def transpose(call: Call, w: AdaptedKernel) -> AdaptedKernel:
    """The factors' axes are permuted alike; the rank stays last."""
    order = jaxprs.permutation(call.equation)
    return w.view(call(w.kernel), lambda f: jnp.transpose(f, (*order, len(order))), [w.axes[n] for n in order])


@register_rule("convert_element_type")
def cast(call: Call, w: AdaptedKernel) -> AdaptedKernel:
    """The factors keep their own precision until they are used; a cast to integers is not linear."""
    kernel = call(w.kernel)
    if not jnp.issubdtype(kernel.dtype, jnp.floating):
        call.refuse()
    return w.view(kernel, lambda f: f)


@register_rule("copy")
@register_rule("copy_p")
@register_rule("name")
@register_rule("sharding_constraint")
@register_rule("optimization_barrier")
def same(call: Call, *operands: Any) -> list[Any]:
    """Every operand passes unchanged: the name, constraint or barrier is for the kernel."""
    outputs = call.outputs(*(v.kernel if isinstance(v, AdaptedKernel) else v for v in operands))
    return [
        v.view(out, lambda f: f) if isinstance(v, AdaptedKernel) else out
        for v, out in zip(operands, outputs, strict=True)
    ]


@register_rule("stop_gradient")
def stop_gradient(call: Call, w: AdaptedKernel) -> AdaptedKernel:
    """No gradient flows to the factors either."""
    return w.view(call(w.kernel), jax.lax.stop_gradient)


@register_rule("rev")
def reverse(call: Call, w: AdaptedKernel) -> AdaptedKernel:
    """The factors are flipped along the same axes."""
    return w.view(call(w.kernel), lambda f: jnp.flip(f, jaxprs.dimensions(call.equation)))


@register_rule("squeeze")
def squeeze(call: Call, w: AdaptedKernel) -> AdaptedKernel:
    """An axis of size 1 has size 1 in the factors too."""
    gone = set(jaxprs.dimensions(call.equation) or ())
    axes = [axes for n, axes in enumerate(w.axes) if n not in gone]
    return w.view(call(w.kernel), lambda f: jnp.squeeze(f, tuple(gone)), axes)


@register_rule("broadcast_in_dim", operands=0)
def broadcast(call: Call, w: AdaptedKernel, *sizes: Any) -> AdaptedKernel:
    """Axes that are new, or grow from 1, apply to neither factor."""
    kernel = call(w.kernel, *sizes)
    places = jaxprs.broadcast_dimensions(call.equation)
    axes = [NO_AXES] * kernel.ndim
    for n, place in enumerate(places):
        axes[place] = w.axes[n]

    def change(factor: Factor) -> Factor:
        shape = [1] * kernel.ndim
        for n, place in enumerate(places):
            shape[place] = factor.shape[n]
        return factor.reshape(*shape, factor.shape[-1])

    return w.view(kernel, change, axes)


@register_rule("reshape", operands=0)
def reshape(call: Call, w: AdaptedKernel, *sizes: Any) -> AdaptedKernel:
    """Axes may be merged or cut if every axis of the group applies to a alike, and to b alike."""
    if jaxprs.dimensions(call.equation) is not None:
        call.refuse()
    kernel = call(w.kernel, *sizes)
    groups = list(_groups(w.shape, kernel.shape))

    def change(factor: Factor) -> Factor:
        applies = w.applies(factor)
        shape = list(kernel.shape)
        for old, new in groups:
            # Axes of size 1 go with the others.
            in_group = [applies[n] for n in old if w.shape[n] > 1]
            if len(set(in_group)) > 1:
                call.refuse()
            if not all(in_group):
                for n in new:
                    shape[n] = 1
        return factor.reshape(*shape, factor.shape[-1])

    axes = [NO_AXES] * kernel.ndim
    for old, new in groups:
        for n in new:
            axes[n] = NO_AXES.union(*(w.axes[m] for m in old))
    return w.view(kernel, change, axes)


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


@register_rule("slice")
def cut(call: Call, w: AdaptedKernel) -> AdaptedKernel:
    """A factor is cut along the axes that apply to it."""
    starts, limits, strides = jaxprs.slice_bounds(call.equation)
    strides = strides or [1] * len(starts)

    def change(factor: Factor) -> Factor:
        applies = w.applies(factor)
        bounds = zip(_pick(applies, starts, 0), _pick(applies, limits, 1), _pick(applies, strides, 1), strict=True)
        return factor[tuple(slice(*bound) for bound in bounds)]

    return w.view(call(w.kernel), change)


@register_rule("dynamic_slice", operands=0)
def dynamic_slice(call: Call, w: AdaptedKernel, *starts: Any) -> AdaptedKernel:
    """A factor is cut along the axes that apply to it."""
    sizes = jaxprs.slice_sizes(call.equation)
    zero = jnp.zeros((), starts[0].dtype) if starts else 0

    def change(factor: Factor) -> Factor:
        applies = w.applies(factor)
        at = [start if here else zero for here, start in zip(applies, starts, strict=True)]
        return jax.lax.dynamic_slice(factor, [*at, zero], [*_pick(applies, sizes, 1), factor.shape[-1]])

    return w.view(call(w.kernel, *starts), change)


@register_rule("split")
def split(call: Call, w: AdaptedKernel) -> list[AdaptedKernel]:
    """A factor is cut along the axis if it applies to it; else every part has the whole factor."""
    sizes, axis = jaxprs.split_axis(call.equation)
    ends = list(itertools.accumulate(int(size) for size in sizes))

    def part(out: Any, start: int, end: int) -> AdaptedKernel:
        cut = lambda f: jax.lax.slice_in_dim(f, start, end, axis=axis) if w.applies(f)[axis] else f
        return w.view(out, cut)

    bounds = zip([0, *ends], ends, strict=False)
    return [part(out, *bound) for out, bound in zip(call.outputs(w.kernel), bounds, strict=True)]


def _pick(applies: Sequence[bool], yes: Sequence[int], no: int) -> list[int]:
    return [value if here else no for here, value in zip(applies, yes, strict=True)]
