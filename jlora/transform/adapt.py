"""The function transform: a function that reads a parameter tree then computes x W + s (x A) B on a wrapped one."""

import functools
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Key

from jlora.errors import JloraValueError, count
from jlora.transform import jaxprs
from jlora.transform.kernel import AdaptedKernel
from jlora.transform.registry import Evaluation, Recorder
from jlora.transform.tracing import Structure, check_function, evaluate, take_apart
from jlora.tree.paths import Tree, TreePath, check_unique_paths
from jlora.tree.wrapping import has_adapter, read_layouts, replace_kernels

# Traces kept for one adapted function: enough for every bucket of lengths. Beyond it the oldest is dropped, and with
# it the arrays that fn closed over.
MAX_TRACES = 128
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
    of its arguments, as under `jax.jit`. The trace is then evaluated with each adapted kernel carried next to its A
    and B, which are never multiplied with each other, except for the rows of a table that are looked up. Wrapped
    trees are found in any argument, and a tree without adapters is passed unchanged. The result can be used under
    jit, grad, vmap and scan like `fn`.

    ::

        logits = jlora.adapt(model.apply)({"params": jlora.wrap(params)}, x)

    Args:
        fn: any JAX function of pytrees, to pytrees. Arguments that are not arrays, Python numbers among them, are
            static: another value is another trace, and one that can't be hashed is traced at each call.
        dropout: rate of dropout on what the adapter of a matmul, convolution or expert reads, in calls that pass
            `lora_key`. Gradients are then taken of the adapted function: one taken inside `fn` would draw new masks.
        materialize: use W + s AB where a kernel meets an operation that has no low-rank form, instead of an error.

    Returns:
        A function of the same arguments, and of `lora_key`, a PRNG key for dropout; without it nothing is dropped.

    Raises:
        TypeError: `fn` is not a function.
        ValueError: `dropout` outside [0, 1); when called: a kernel used in a way that has no low-rank form (all such
            uses are listed, with their lines), or adapter leaves without their kernel.

    Examples:
        >>> params = jlora.wrap({"kernel": jnp.ones((16, 4))}, rank=2)
        >>> forward = jlora.adapt(lambda params, x: x @ params["kernel"])
        >>> forward(params, jnp.ones((3, 16))).shape
        (3, 4)
    """
    check_function("adapt", fn)
    if not isinstance(dropout, int | float) or not 0.0 <= dropout < 1.0:
        raise JloraValueError("adapt", f"dropout is {dropout!r}.", [], "pass a rate from 0 up to, not including, 1.")
    traces: OrderedDict[Any, _Trace] = OrderedDict()

    @functools.wraps(fn)
    def adapted(*args: Any, lora_key: Key[Array, ""] | None = None, **kwargs: Any) -> Any:
        arrays, structure = take_apart((args, kwargs, lora_key if dropout else None))
        signature = _signature(structure, arrays)
        trace = traces.get(signature) if signature else None
        if trace:
            traces.move_to_end(signature)
        else:
            trace = _trace(fn, structure, arrays, dropout, materialize)
            if signature and not trace.captures_tracer:
                traces[signature] = trace
                if len(traces) > MAX_TRACES:
                    traces.popitem(last=False)
        return trace(arrays)

    return adapted


class _Trace(NamedTuple):
    """A function traced and rewritten for one signature."""

    run: Callable[..., list[Any]]
    out: Structure
    captures_tracer: bool

    def __call__(self, arrays: Sequence[Any]) -> Any:
        return self.out.build(self.run(*arrays))


def _signature(structure: Structure, arrays: Sequence[Any]) -> Any:
    """What a trace depends on; None if that can't be determined, so that the trace is not kept."""
    settings = tuple(getattr(jax.config, name) for name in SETTINGS)
    # By their text, 0.0 and -0.0 differ and nan equals itself.
    fixed = tuple((n, type(leaf), repr(leaf) if isinstance(leaf, float) else leaf) for n, leaf in structure.statics)
    key = (structure.treedef, tuple(map(jax.typeof, arrays)), fixed, settings, jax.sharding.get_abstract_mesh())
    try:
        hash(key)
    except TypeError:
        return None
    return None if jaxprs.under_named_axis() else key


def _trace(
    fn: Callable[..., Any], structure: Structure, arrays: Sequence[Any], dropout: float, materialize: bool
) -> _Trace:
    recorder = Recorder()
    out: list[Structure] = []

    def rewritten(*arrays: Any) -> list[Any]:
        args, kwargs, key = structure.build(arrays)
        inputs = _adapted_inputs((args, kwargs))
        outs, of_output = evaluate(Evaluation(recorder, dropout, key), lambda a: fn(*a[0], **a[1]), inputs)
        out[:] = [of_output]
        return outs

    closed = jax.make_jaxpr(rewritten)(*arrays)
    refusals = dict.fromkeys(recorder.refusals)
    if refusals and not materialize:
        problem = f"{count(len(refusals), 'use')} of an adapted kernel with no low-rank form."
        fix = (
            "use jlora.adapt(fn, materialize=True), which forms W + s AB there, or leave the kernel out of "
            "wrap's targets."
        )
        raise JloraValueError("adapt", problem, refusals, fix)
    captures = any(isinstance(const, jax.core.Tracer) for const in jaxprs.body(closed).consts)
    return _Trace(jaxprs.as_function(closed), out[0], captures)


def _adapted_inputs(tree: Tree) -> Tree:
    """The arguments with every wrapped kernel an `AdaptedKernel`, and without adapter leaves."""
    leaves, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=has_adapter)
    # All of them are checked as one tree, so that one error lists every adapter that does not fit.
    places = {n: _path(keys) for n, (keys, leaf) in enumerate(leaves) if has_adapter(leaf)}
    if not places:
        return tree
    ambiguous = len(set(places.values())) < len(places)
    names = {n: _path(leaves[n][0], whole=ambiguous) for n in places}
    check_unique_paths("adapt", names.values())
    nodes = {name: leaves[n][1] for n, name in names.items()}
    layouts = read_layouts("adapt", nodes)
    adapted = replace_kernels(nodes, layouts, lambda path, kernel, a, b: AdaptedKernel.whole(path, kernel, (a, b)))
    return jax.tree.unflatten(treedef, [adapted[names[n]] if n in names else x for n, (_, x) in enumerate(leaves)])


def _path(keys: Sequence[Any], *, whole: bool = False) -> TreePath:
    """A slash path inside an argument, or with the argument's own place before it."""
    return "/".join(jax.tree_util.keystr((key,), simple=True) for key in keys[0 if whole else 2 :])
