"""Tracing a function on the plain arrays of its arguments, and evaluating the trace with adapted kernels among them."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jlora.errors import JloraTypeError
from jlora.transform import jaxprs
from jlora.transform.kernel import AdaptedKernel
from jlora.transform.registry import Evaluation


class Structure(NamedTuple):
    """How to rebuild a pytree from its arrays: the tree definition, and the leaves that are not arrays."""

    treedef: Any
    statics: Sequence[tuple[int, Any]]

    def build(self, arrays: Sequence[Any]) -> Any:
        rest = iter(arrays)
        fixed = dict(self.statics)
        size = self.treedef.num_leaves
        return jax.tree.unflatten(self.treedef, [fixed[n] if n in fixed else next(rest) for n in range(size)])


def check_function(who: str, fn: Any) -> None:
    """Raises where a public function was not given a function.

    Raises:
        TypeError: names the type of what was given.
    """
    if not callable(fn):
        fix = "pass the function that reads the parameters, as model.apply."
        raise JloraTypeError(who, f"fn is of type {type(fn).__name__}, not a function.", [], fix)


def is_array(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray | np.generic | AdaptedKernel)


def take_apart(tree: Any, is_dynamic: Callable[[Any], bool] = is_array) -> tuple[list[Any], Structure]:
    """The arrays of a pytree, with adapted kernels as leaves, and the structure to put them back into."""
    leaves, treedef = jax.tree.flatten(tree, is_leaf=lambda x: isinstance(x, AdaptedKernel))
    statics = [(n, leaf) for n, leaf in enumerate(leaves) if not is_dynamic(leaf)]
    return [leaf for leaf in leaves if is_dynamic(leaf)], Structure(treedef, statics)


def evaluate(evaluation: Evaluation, fn: Callable[[Any], Any], inputs: Any) -> tuple[list[Any], Structure]:
    """Traces `fn` on the plain arrays of `inputs` and evaluates the trace with the adapted kernels in their places.

    Returns:
        The arrays that `fn` returns, and the structure of its output.
    """
    values, structure = take_apart(inputs)
    out: list[Structure] = []

    def plain(*arrays: Any) -> list[Any]:
        returned, of_output = take_apart(fn(structure.build(arrays)))
        out[:] = [of_output]
        return returned

    closed = jax.make_jaxpr(plain)(*(v.kernel if isinstance(v, AdaptedKernel) else v for v in values))
    outs = evaluation.run(jaxprs.body(closed), values)
    returned = [value for value in outs if isinstance(value, AdaptedKernel)]
    evaluation.recorder.refusals.extend(f"{value.path!r} returned by the function as it is" for value in returned)
    return [value.dense() if isinstance(value, AdaptedKernel) else value for value in outs], out[0]
