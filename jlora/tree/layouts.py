"""Layouts: which axes of a kernel are stacked, contracted and produced, and the shapes of its low-rank pair.

A layout is a string with one letter per axis: `s` stack, `i` in (contracted), `o` out (produced), and `v` for the
rows of a lookup table, which count as in. Dense is "io", a query kernel (d, heads, k) "ioo", a 2-D
convolution "iiio", a Dense stacked by scan "sio", an embedding table "vo", a torch-style kernel "oi".

The pair has one of two forms. *Ordered*, for kernels with axes in the order stack, in, out: a is (*stack, *in, rank)
and b is (*stack, rank, *out). *Aligned*, for all others: a and b keep the kernel's axes, with size 1 where an axis
does not apply, and rank last. The transform works on the aligned form only; `align_pair` computes it from the other.
"""

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Shape = tuple[int, ...]
Layout = str

ORDERED = re.compile(r"s*[iv]+o+")
AFFIXES = A, B, SCALING = ("_lora_a", "_lora_b", "_lora_scaling")


def is_valid_layout(layout: Layout, shape: Shape) -> bool:
    """Whether a layout fits a shape: one letter per axis, at least one in and one out."""
    return (
        len(layout) == len(shape) and not set(layout) - set("siov") and "o" in layout and bool(set(layout) & set("iv"))
    )


def recognize_layout(path: str, shape: Shape, siblings: Mapping[str, Shape]) -> Layout | None:
    """The layout of a kernel that follows from its name and shape: two axes, or Flax's attention; else None.

    Flax's attention is recognized by its four projections whose shapes fit each other, so a stacked Dense named `out`
    is not mistaken for one.

    Args:
        path: the kernel's slash path.
        shape: the kernel's shape.
        siblings: shapes of all leaves of the tree, by path.
    """
    if len(shape) == 2:
        return "vo" if path.rsplit("/", 1)[-1] == "embedding" else "io"
    module, _, leaf = path.rpartition("/")
    parent, _, name = module.rpartition("/")
    four = {
        n: siblings.get(f"{parent}/{n}/{leaf}" if parent else f"{n}/{leaf}") for n in ("query", "key", "value", "out")
    }
    if len(shape) != 3 or name not in four or not all(s is not None and len(s) == 3 for s in four.values()):
        return None
    heads = {s[:2] if n == "out" else s[1:] for n, s in four.items() if s}
    if len(heads) != 1:
        return None
    return "iio" if name == "out" else "ioo"


def pair_shapes(shape: Shape, layout: Layout, rank: int) -> tuple[Shape, Shape, Shape]:
    """Shapes of a, b and scaling for a kernel."""
    axes_a, axes_b, axes_scaling = pair_axes(layout)
    if ORDERED.fullmatch(layout):
        sizes = (*shape, rank)
        return tuple(tuple(sizes[-1 if n is None else n] for n in axes) for axes in (axes_a, axes_b, axes_scaling))  # type: ignore[return-value]
    a = (*(1 if letter == "o" else n for n, letter in zip(shape, layout, strict=True)), rank)
    b = (*(1 if letter in "iv" else n for n, letter in zip(shape, layout, strict=True)), rank)
    return a, b, tuple(shape[axis] for axis in axes_scaling if axis is not None)


def rank_axis(layout: Layout) -> int:
    """The axis of b that is the rank; in a it is the last axis."""
    return layout.count("s") if ORDERED.fullmatch(layout) else -1


def pair_axes(layout: Layout) -> tuple[tuple[int | None, ...], ...]:
    """For every axis of a, b and scaling the kernel's axis that it corresponds to, None for the rank or a size of 1."""
    stack, inner, outer = (tuple(n for n, letter in enumerate(layout) if letter in kind) for kind in ("s", "iv", "o"))
    if ORDERED.fullmatch(layout):
        return (*stack, *inner, None), (*stack, None, *outer), stack
    a = tuple(None if letter == "o" else n for n, letter in enumerate(layout))
    b = tuple(None if letter in "iv" else n for n, letter in enumerate(layout))
    return (*a, None), (*b, None), stack


def read_layout(shape: Shape, a: Shape, b: Shape, scaling: Shape) -> Layout | None:
    """The layout that follows from the shapes of a kernel and its pair, None if the shapes do not fit each other."""
    if len(a) == len(b) == len(shape) + 1:
        return _read_aligned_layout(shape, a, b, scaling)
    stack = len(a) + len(b) - 2 - len(shape)
    inner = len(a) - 1 - stack
    layout = "s" * stack + "i" * inner + "o" * (len(shape) - stack - inner)
    if stack < 0 or not is_valid_layout(layout, shape):
        return None
    return layout if pair_shapes(shape, layout, a[-1]) == (a, b, scaling) else None


def _read_aligned_layout(shape: Shape, a: Shape, b: Shape, scaling: Shape) -> Layout | None:
    # An axis of size 1 looks the same in every role, and any roles that fit give the same update.
    roles = [
        "sio" if n == 1 else "s" if in_a == in_b == n else "i" if in_a == n else "o"
        for n, in_a, in_b in zip(shape, a, b, strict=False)
    ]
    for letters in itertools.product(*roles):
        layout = "".join(letters)
        fits = is_valid_layout(layout, shape) and not ORDERED.fullmatch(layout)
        if fits and pair_shapes(shape, layout, a[-1]) == (a, b, scaling):
            return layout
    return None


def fans(shape: Shape, layout: Layout) -> tuple[int, int]:
    """Products of the sizes of the in axes and of the out axes, which the rank must not exceed."""
    inner, outer = ("iv", "o")
    return tuple(
        math.prod(n for n, letter in zip(shape, layout, strict=True) if letter in kind) for kind in (inner, outer)
    )  # type: ignore[return-value]


def max_rank(shape: Shape, layout: Layout) -> int:
    """The highest rank that a kernel can have: the smaller of its in and out sizes."""
    return min(fans(shape, layout))


def align_pair(
    a: Float[Array, "..."], b: Float[Array, "..."], scaling: Float[Array, "..."], layout: Layout
) -> tuple[Float[Array, "*axes rank"], Float[Array, "*axes rank"]]:
    """The pair in aligned form, b times the scaling: the kernel's update is the sum over rank of a * b, broadcast."""
    if ORDERED.fullmatch(layout):
        stack, inner, outer = (sum(letter in kind for letter in layout) for kind in ("s", "iv", "o"))
        a = jnp.expand_dims(a, range(stack + inner, stack + inner + outer))
        # b is scaled before its axes are moved. In the gradient the product and the transpose then follow each other
        # directly and XLA fuses them; otherwise its CPU backend transposes the activations instead.
        b = b * jnp.expand_dims(scaling, range(stack, b.ndim)).astype(b.dtype)
        return a, jnp.expand_dims(jnp.moveaxis(b, stack, -1), range(stack, stack + inner))
    scaling = jnp.expand_dims(scaling, [n for n, letter in enumerate((*layout, "rank")) if letter != "s"])
    return a, b * scaling.astype(b.dtype)


def contract(
    operands: Sequence[tuple[Float[Array, "..."], Sequence[int]]],
    out: Sequence[int],
    *,
    precision: jax.lax.PrecisionLike = None,
    dtype: Any = None,
) -> Float[Array, "..."]:
    """Einstein summation over integer labels; `dtype` is that of the result and of the accumulation.

    Axes that are adjacent in all operands are contracted as one axis. If a gradient is summed over batch and time as
    two axes, XLA's CPU backend first writes a transposed copy of the activations; over one axis it makes no copy.
    """
    lists = [list(labels) for _, labels in operands] + [list(out)]
    sizes = {label: n for array, labels in operands for label, n in zip(labels, array.shape, strict=True)}
    pairs = [list(itertools.pairwise(labels)) for labels in lists]
    joined = {
        first: second
        for pair in pairs
        for first, second in pair
        if all((first, second) in p for p, labels in zip(pairs, lists, strict=True) if {first, second} & {*labels})
    }
    heads = [[label for label in labels if label not in joined.values()] for labels in lists]

    def size(label: int) -> int:
        return sizes[label] * (size(joined[label]) if label in joined else 1)

    flat = [
        part
        for (array, _), labels in zip(operands, heads, strict=False)
        for part in (array.reshape([size(label) for label in labels]), labels)
    ]
    y = jnp.einsum(*flat, heads[-1], precision=precision, preferred_element_type=dtype)
    return y.reshape([sizes[label] for label in out])


def product(a: Float[Array, "*axes rank"], b: Float[Array, "*axes rank"]) -> Float[Array, "*axes"]:
    """The sum over rank of an aligned pair, as a matmul where possible."""
    axes = range(a.ndim - 1)
    labels = [[n for n in axes if f.shape[n] != 1] for f in (a, b)]
    parts = [
        (f.reshape([*(f.shape[n] for n in ns), f.shape[-1]]), [*ns, a.ndim])
        for f, ns in zip((a, b), labels, strict=True)
    ]
    wide = [n for n in axes if n in labels[0] or n in labels[1]]
    full = contract(parts, wide, precision=jax.lax.Precision.HIGHEST)
    return full.reshape(jnp.broadcast_shapes(a.shape[:-1], b.shape[:-1]))


def merge_kernel(
    kernel: Float[Array, "*axes"], a: Float[Array, "*axes rank"], b: Float[Array, "*axes rank"]
) -> Float[Array, "*axes"]:
    """W plus the product of an aligned pair, in W's dtype."""
    wide = jnp.promote_types(kernel.dtype, a.dtype)
    return (kernel.astype(wide) + product(a.astype(wide), b.astype(wide))).astype(kernel.dtype)
