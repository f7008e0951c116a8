"""Layouts read off from a function: how it contracts each of its kernels."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jlora.transform.kernel import AdaptedKernel
from jlora.transform.registry import Evaluation
from jlora.transform.tracing import check_function, evaluate, is_array, take_apart
from jlora.tree import layouts
from jlora.tree.layouts import Layout
from jlora.tree.paths import Tree, TreePath, map_with_path, read_arrays
from jlora.tree.wrapping import check_names, drop_adapters


def infer_layout(fn: Callable[..., Any], params: Tree, *args: Any) -> dict[TreePath, Layout]:
    """Infers the layout of every kernel from how a function contracts it.

    The function is traced once, abstractly; nothing is computed.

    Args:
        fn: called as `fn(params, *args)`.
        params: the tree, concrete or abstract, without adapters.
        *args: example arguments; only shapes and dtypes matter.

    Returns:
        For every leaf that a matmul, a convolution or a lookup reads, one letter per axis: `s` stack, `i` in, `o` out,
        `v` the rows of a table that is looked up. A leaf read in several ways has the layout of the first, and is a
        table if any of them is a lookup; one whose axes can't be distinguished is left out.

    Raises:
        TypeError: `fn` is not a function, or `params` is not a tree.
        ValueError: no arrays, arrays with one slash path, or one with the name of an adapter's leaf.

    Examples:
        >>> params = {"kernel": jnp.ones((4, 5, 16))}
        >>> mix = lambda params, x: jnp.einsum("bc,ghc->bgh", x, params["kernel"])
        >>> jlora.infer_layout(mix, params, jnp.ones((2, 16)))
        {'kernel': 'ooi'}
    """
    check_function("infer_layout", fn)
    given = read_arrays("infer_layout", params)
    check_names("infer_layout", given)
    shapes = {path: tuple(value.shape) for path, value in given.items()}
    evaluation = Evaluation()

    def look(params: Tree, args: Any) -> list[Any]:
        # Kernels without factors: every contraction is recorded, and nothing is added to its result.
        kernels = map_with_path(
            lambda path, value: AdaptedKernel.whole(path, value) if np.ndim(value) else value,
            drop_adapters(params),
        )
        return evaluate(evaluation, lambda inputs: fn(inputs[0], *inputs[1]), (kernels, args))[0]

    dynamic = lambda leaf: is_array(leaf) or isinstance(leaf, jax.ShapeDtypeStruct)
    arrays, structure = take_apart((params, args), dynamic)
    jax.eval_shape(lambda *arrays: look(*structure.build(arrays)), *arrays)
    reads = [
        (path, layout) for path, layout in evaluation.recorder.reads if layouts.is_valid_layout(layout, shapes[path])
    ]
    # The first read counts, but a lookup determines more than any product does: a tied table is a table.
    reads.sort(key=lambda read: "v" not in read[1])
    first = dict(reversed(reads))
    return {path: first[path] for path in shapes if path in first}
