"""The function transform: a function that reads a parameter tree, made to compute x W + s (x A) B on a wrapped one."""

import functools
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Key

from jlora.core import layouts, versions
from jlora.core.control import evaluate
from jlora.core.errors import complain, count
from jlora.core.layouts import Layout
from jlora.core.paths import Path, Tree, map_with_path, read_arrays, refuse_same_paths
from jlora.core.rules import Adapted, Context
from jlora.core.tree import check_names, drop_adapters, has_adapter, kernels, replace_kernels

# Traces kept for one adapted function: enough for every bucket of lengths, and an end to the arrays fn closed over.
TRACES = 128
SETTINGS = (
    "jax_enable_x64",
    "jax_default_matmul_precision",
    "jax_default_prng_impl",
    "jax_threefry_partitionable",
    "jax_numpy_dtype_promotion",
    "jax_numpy_rank_promotion",
)


def adapt(fn: Callable[..., Any], *, dropout: float = 0.0, materialize: bool = False) -> Callable[..., Any]:
    """Makes a function compute with adapters wherever it reads a wrapped kernel: y = x W + s (x A) B.

    `fn` sees exactly the tree it was written for. It is traced once for every structure, shapes and static values
    of its arguments, as under `jax.jit`, and what it computes is then evaluated with each adapted kernel carried
    next to its A and B, which are never multiplied with each other, save for the rows of a table that are looked
    up. Wrapped trees are found in any argument, and a tree without adapters passes as it is. The result can be used
    under jit, grad, vmap and scan like `fn`.

    ::

        logits = jlora.adapt(model.apply)({"params": jlora.wrap(params)}, x)

    Args:
      fn: any JAX function of pytrees, to pytrees. Arguments that are not arrays, Python numbers among them, stay as
        they are and are static: another value is another trace, and one that can't be hashed is traced each time.
      dropout: rate of dropout on what the adapter of a matmul, convolution or expert reads, where a call passes
        `lora_key`. Gradients are taken of the adapted function then: one taken inside `fn` would drop anew.
      materialize: use W + s AB where a kernel meets an operation that has no low-rank form, instead of an error.

    Returns:
      A function of the same arguments, and of `lora_key`, a PRNG key for dropout; without it nothing is dropped.

    Raises:
      ValueError: `dropout` outside [0, 1); when called: a kernel used in a way that has no low-rank form (all such
        uses are listed, with their lines), or adapter leaves without their kernel.
    """
    if not 0.0 <= dropout < 1.0:
        raise ValueError(complain("adapt", f"dropout is {dropout}.", [], "pass a rate from 0 up to, not including, 1."))
    traces: OrderedDict[Any, _Trace] = OrderedDict()

    @functools.wraps(fn)
    def adapted(*args: Any, lora_key: Key[Array, ""] | None = None, **kwargs: Any) -> Any:
        leaves, treedef = jax.tree.flatten((args, kwargs, lora_key if dropout else None))
        arrays = [leaf for leaf in leaves if _is_array(leaf)]
        statics = [(n, leaf) for n, leaf in enumerate(leaves) if not _is_array(leaf)]
        signature = _signature(treedef, arrays, statics)
        trace = traces.get(signature) if signature else None
        if trace:
            traces.move_to_end(signature)
        else:
            trace = _trace(fn, treedef, statics, arrays, dropout, materialize)
            if signature and not trace.captures_tracer:
                traces[signature] = trace
                if len(traces) > TRACES:
                    traces.popitem(last=False)
        return trace(arrays)

    return adapted


class _Trace(NamedTuple):
    """A function traced and rewritten for one signature."""

    run: Callable[..., list[Any]]
    out: "_Leaves"
    captures_tracer: bool

    def __call__(self, arrays: Sequence[Any]) -> Any:
        return self.out.tree(self.run(*arrays))


class _Leaves(NamedTuple):
    """How to put a pytree together from its arrays: the structure, and the leaves that are no arrays."""

    treedef: Any
    statics: Sequence[tuple[int, Any]]

    def tree(self, arrays: Sequence[Any]) -> Any:
        rest = iter(arrays)
        fixed = dict(self.statics)
        size = self.treedef.num_leaves
        return jax.tree.unflatten(self.treedef, [fixed[n] if n in fixed else next(rest) for n in range(size)])


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray | np.generic | Adapted)


def _signature(treedef: Any, arrays: Sequence[Any], statics: Sequence[tuple[int, Any]]) -> Any:
    """What a trace depends on; None if it can't be told, so nothing is kept."""
    settings = tuple(getattr(jax.config, name) for name in SETTINGS)
    # By their text, 0.0 and -0.0 differ and nan equals itself.
    fixed = tuple((n, type(leaf), repr(leaf) if isinstance(leaf, float) else leaf) for n, leaf in statics)
    key = (treedef, tuple(map(jax.typeof, arrays)), fixed, settings, jax.sharding.get_abstract_mesh())
    try:
        hash(key)
    except TypeError:
        return None
    return None if versions.under_named_axis() else key


def _trace(
    fn: Callable[..., Any],
    treedef: Any,
    statics: Sequence[tuple[int, Any]],
    arrays: Sequence[Any],
    dropout: float,
    materialize: bool,
) -> _Trace:
    context = Context(dropout=dropout)
    out: list[_Leaves] = []

    def rewritten(*arrays: Any) -> list[Any]:
        args, kwargs, key = _Leaves(treedef, statics).tree(arrays)
        inputs = _adapted_inputs((args, kwargs))
        keyed = Context(dropout, key, context.refused)
        outs, leaves = _evaluate(keyed, lambda a: fn(*a[0], **a[1]), inputs)
        out[:] = [leaves]
        return outs

    closed = jax.make_jaxpr(rewritten)(*arrays)
    if context.refused and not materialize:
        raise ValueError(
            complain(
                "adapt",
                f"{count(len(context.refused), 'use')} of an adapted kernel with no low-rank form.",
                dict.fromkeys(context.refused),
                "use jlora.adapt(fn, materialize=True), which forms W + s AB there, or leave the kernel out of "
                "wrap's targets.",
            )
        )
    captures = any(isinstance(const, jax.core.Tracer) for const in versions.body(closed).consts)
    return _Trace(versions.as_function(closed), out[0], captures)


def _evaluate(context: Context, fn: Callable[[Any], Any], inputs: Any) -> tuple[list[Any], _Leaves]:
    """Traces `fn` on the plain arrays of `inputs` and evaluates the trace with the adapted kernels in their places."""
    leaves, treedef = jax.tree.flatten(inputs, is_leaf=lambda x: isinstance(x, Adapted))
    statics = [(n, leaf) for n, leaf in enumerate(leaves) if not _is_array(leaf)]
    values = [leaf for leaf in leaves if _is_array(leaf)]
    out: list[_Leaves] = []

    def plain(*arrays: Any) -> list[Any]:
        outs, outdef = jax.tree.flatten(fn(_Leaves(treedef, statics).tree(arrays)))
        out[:] = [_Leaves(outdef, [(n, leaf) for n, leaf in enumerate(outs) if not _is_array(leaf)])]
        return [leaf for leaf in outs if _is_array(leaf)]

    closed = jax.make_jaxpr(plain)(*(v.kernel if isinstance(v, Adapted) else v for v in values))
    outs = evaluate(context, versions.body(closed), values)
    returned = [value for value in outs if isinstance(value, Adapted)]
    context.refused.extend(f"{value.path!r} returned by the function as it is" for value in returned)
    return [value.dense() if isinstance(value, Adapted) else value for value in outs], out[0]


def _adapted_inputs(tree: Tree) -> Tree:
    """The arguments with every wrapped kernel an `Adapted`, and no adapter leaves."""
    leaves, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=has_adapter)
    # All of them are checked as one tree, so that one error lists every adapter that does not fit.
    places = {n: _path(keys) for n, (keys, leaf) in enumerate(leaves) if has_adapter(leaf)}
    if not places:
        return tree
    twice = len(set(places.values())) < len(places)
    names = {n: _path(leaves[n][0], whole=twice) for n in places}
    refuse_same_paths("adapt", names.values())
    nodes = {name: leaves[n][1] for n, name in names.items()}
    told = kernels("adapt", nodes)
    adapted = replace_kernels(nodes, told, lambda path, kernel, a, b: _adapted(kernel, (a, b), path))
    return jax.tree.unflatten(treedef, [adapted[names[n]] if n in names else x for n, (_, x) in enumerate(leaves)])


def _path(keys: Sequence[Any], *, whole: bool = False) -> Path:
    """A slash path inside an argument, or with the argument's own place before it."""
    return "/".join(jax.tree_util.keystr((key,), simple=True) for key in keys[0 if whole else 2 :])


def _adapted(kernel: Any, pair: Any, path: Path) -> Adapted:
    return Adapted(kernel, pair, path, kernel.ndim, tuple(frozenset([n]) for n in range(kernel.ndim)))


def infer_layout(fn: Callable[..., Any], params: Tree, *args: Any) -> dict[Path, Layout]:
    """Looks at how a function contracts its parameters.

    The function is traced once, abstractly; nothing is computed.

    Args:
      fn: called as `fn(params, *args)`.
      params: the tree, concrete or abstract, without adapters.
      *args: example arguments; only shapes and dtypes matter.

    Returns:
      For every leaf that a matmul, a convolution or a lookup reads, one letter an axis: `s` stack, `i` in, `o` out,
      `v` the rows of a table that is looked up. A leaf read in several ways has the layout of the first, and is a
      table if any of them is a lookup; one whose axes can't be told apart is left out.
    """
    given = read_arrays("infer_layout", params)
    check_names("infer_layout", given)
    shapes = {path: tuple(value.shape) for path, value in given.items()}
    context = Context()

    def look(params: Tree, args: Any) -> list[Any]:
        marked = map_with_path(
            lambda path, value: _adapted(value, None, path) if np.ndim(value) else value,
            drop_adapters(params),
        )
        return _evaluate(context, lambda inputs: fn(inputs[0], *inputs[1]), (marked, args))[0]

    leaves, treedef = jax.tree.flatten((params, args))
    statics = [(n, x) for n, x in enumerate(leaves) if not (_is_array(x) or isinstance(x, jax.ShapeDtypeStruct))]
    fixed = {n for n, _ in statics}
    arrays = [x for n, x in enumerate(leaves) if n not in fixed]
    jax.eval_shape(lambda *arrays: look(*_Leaves(treedef, statics).tree(arrays)), *arrays)
    usable = [(path, layout) for path, layout in context.reads if layouts.valid(layout, shapes[path])]
    # The first read counts, but a lookup tells more than any product does: a tied table is a table.
    usable.sort(key=lambda read: "v" not in read[1])
    first = dict(reversed(usable))
    return {path: first[path] for path in shapes if path in first}
