"""The wrapped tree: adapters put beside kernels, taken away, folded in, split off and put back."""

import functools
import math
import re
import zlib
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from jlora.errors import JloraTypeError, JloraValueError, count, nearest, quoted
from jlora.tree import layouts
from jlora.tree.layouts import AFFIXES, A, B, Layout
from jlora.tree.paths import (
    AS_DICT,
    Tree,
    TreePath,
    box,
    children,
    edit,
    flatten,
    join_path,
    map_with_path,
    partition,
    places,
    read_arrays,
    unbox,
    union,
)
from jlora.tree.targets import Pattern, Rule, Targets, check_matches, is_kernel, matcher, resolve, select

Initializer = Callable[[Key[Array, ""], tuple[int, ...], Any], Float[Array, "fan_in rank"]]

# U(-1/sqrt(fan_in), 1/sqrt(fan_in)): the init of the paper's code, there as kaiming_uniform(a=sqrt(5)).
uniform: Initializer = jax.nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def wrap(
    params: Tree,
    rank: int = 8,
    *,
    alpha: float | None = None,
    targets: Targets | None = None,
    layout: Mapping[str, Layout] | None = None,
    key: Key[Array, ""] | None = None,
    rslora: bool = False,
    init: Initializer = uniform,
    cap_rank: bool = False,
) -> Tree:
    """Puts the leaves of a low-rank adapter beside each target kernel. B is zero, so nothing changes yet.

    ::

        {"dense": {"kernel": f32[784,128], "bias": f32[128]}}

        {"dense": {"kernel": f32[784,128],
                   "kernel_lora_a": f32[784,8],
                   "kernel_lora_b": f32[8,128],
                   "kernel_lora_scaling": f32[],
                   "bias": f32[128]}}

    Args:
        params: nested mappings of arrays, concrete or abstract (`jax.eval_shape`). Lists, tuples and objects of classes
            registered with JAX may be among the containers, but a kernel to wrap must be in a mapping.
        rank: columns of A and rows of B, from 1 to the smaller of a kernel's in and out sizes.
        alpha: the update is scaled by alpha / rank. None means alpha = rank, that is a scaling of 1.
        targets: a string is a regular expression that must match a whole slash path; a list holds names of modules or
            leaves, as in PEFT's target_modules; a dict maps either (a list as a tuple) to a rank or a `Rule`, and the
            first match wins. None means every leaf named `kernel`, or with `layout` every leaf in it that a matmul or a
            convolution contracts.
        layout: what `infer_layout` gave, or layouts of your own by slash path or regular expression: one letter an
            axis, `s` stack, `i` in, `o` out, `v` the rows of a table looked up. A regular expression may mark the
            module that holds a stack, as in `(?P<stack>layers)/.*/kernel`: layer n is then drawn as the kernel of
            `layers_n` would be, so that stacked layers start as the same layers one by one do.
        key: seeds A; a kernel's draw depends on the key and its path alone. None means `jax.random.key(0)`.
        rslora: scale by alpha / sqrt(rank) instead.
        init: draws A as a (fan_in, rank) matrix for each stacked kernel, with the arguments of `jax.nn.initializers`:
            key, shape, dtype.
        cap_rank: a kernel without room for its rank gets the highest rank it can hold, instead of an error. The capped
            rank is the one that alpha is divided by. `summary` marks these kernels.

    Returns:
        The tree with the new leaves; containers and boxes keep their kinds. Leaves of a float16 or bfloat16 kernel's
        adapter are float32, else they have the kernel's dtype.

    Raises:
        ValueError: an empty tree, one already wrapped, arrays with one path, a target that matches nothing, a kernel
            that no leaf can be put beside, or whose layout is unknown, integer kernels, a rank or alpha out of range.
        TypeError: `params` is not a tree, a rank is not an int.

    Source:
        Hu et al. 2021, arXiv:2106.09685, section 4.1; rsLoRA: Kalajdzievski 2023, arXiv:2312.03732.
    """
    leaves = read_arrays("wrap", params)
    _check_unwrapped("wrap", leaves)
    check_names("wrap", leaves)
    _check_kinds(layout, init)
    given = _given(leaves, layout or {})
    told = _layouts(leaves, given)
    chosen = _choose(leaves, targets, None if layout is None else given)
    _check_kernels(leaves, chosen, told)
    _check_room(params, chosen)
    limits = {path: layouts.max_rank(tuple(leaves[path].shape), told[path]) for path in chosen}
    caps = limits if cap_rank else {}
    rules = {path: _complete(rule, rank, alpha, caps.get(path)) for path, rule in chosen.items()}
    _check_ranks(rules, leaves, limits)
    key = jax.random.key(0) if key is None else key
    stacks = _stacks(rules, {pattern: ls for pattern, ls in (layout or {}).items() if pattern not in leaves})

    def pair(path: TreePath, kernel: Any) -> tuple[Any, Any, Any]:
        rule = rules[path]
        scale = rule.alpha / (math.sqrt(rule.rank) if rslora else rule.rank)
        keys = functools.partial(_keys_of, key, path, stacks.get(path))
        make = lambda: _new_pair(kernel.shape, kernel.dtype, told[path], rule.rank, scale, keys, init)
        return jax.eval_shape(make) if isinstance(kernel, jax.ShapeDtypeStruct) else make()

    def change(path: TreePath, nodes: dict[Any, Any]) -> dict[Any, Any]:
        out: dict[Any, Any] = {}
        for name, node in nodes.items():
            out[name] = node
            where = join_path(path, name)
            if where in rules:
                axes = layouts.pair_axes(told[where])
                for affix, value, ax in zip(AFFIXES, pair(where, unbox(node)), axes, strict=True):
                    out[f"{name}{affix}"] = box(node, value, ax)
        return out

    return edit(params, change)


def _check_kinds(layout: Any, init: Any) -> None:
    if not isinstance(layout, Mapping | None):
        fix = "pass layout=jlora.infer_layout(fn, params, *args), or layout={path: letters}."
        raise JloraTypeError("wrap", f"layout is of type {type(layout).__name__}, not a dict.", [], fix)
    if not callable(init):
        fix = "pass an initializer, as jax.nn.initializers.orthogonal()."
        raise JloraTypeError("wrap", f"init is of type {type(init).__name__}, not a function.", [], fix)


def _check_room(params: Tree, paths: Iterable[TreePath]) -> None:
    """Raises where the leaves of an adapter can't be put beside a kernel."""
    every = places(params)
    found = {path: every.get(path, (None, path)) for path in paths}
    fixed = [f"{p!r}  in a {type(c).__name__}" for p, (c, _) in found.items() if not isinstance(c, Mapping)]
    if fixed:
        problem = f"{count(len(fixed), 'kernel')} directly in a list or tuple, or in an object with fixed fields."
        fix = f"put it in a dict, leave it out with targets=, or {AS_DICT}"
        raise JloraValueError("wrap", problem, fixed, fix)
    taken = [
        f"{path!r}  beside {f'{name}{affix}'!r}"
        for path, (container, name) in found.items()
        for affix in AFFIXES
        if f"{name}{affix}" in container
    ]
    if taken:
        problem = f"{count(len(taken), 'name')} for an adapter's leaves already in use."
        raise JloraValueError("wrap", problem, taken, "rename the module, or leave the kernel out with targets=.")
    # JAX sorts the keys of all mappings but OrderedDict, and a number has no place among strings.
    numbers = [
        f"{path!r}  under the key {name!r}"
        for path, (container, name) in found.items()
        if not isinstance(name, str) and not isinstance(container, OrderedDict)
    ]
    if numbers:
        problem = f"{count(len(numbers), 'kernel')} under a key that is not a string."
        raise JloraValueError("wrap", problem, numbers, "rename the key, or leave it out with targets=.")


def _stacks(paths: Iterable[TreePath], layout: Mapping[str, Layout]) -> dict[TreePath, int]:
    """Where the name of the module that holds a stack ends in a kernel's path, for kernels whose layout marks it."""
    patterns = [re.compile(pattern) for pattern in layout]
    found = {path: next(filter(None, (p.fullmatch(path) for p in patterns)), None) for path in paths}
    return {path: match.end("stack") for path, match in found.items() if match and match.groupdict().get("stack")}


def _keys_of(key: Key[Array, ""], path: TreePath, stack: int | None, shape: tuple[int, ...]) -> Key[Array, "*stack"]:
    """Keys for the draws of a kernel, one for each place of its stack.

    Args:
        key: of the whole tree.
        path: of the kernel.
        stack: where the name of the module that holds the stack ends in the path; None where it is not marked.
        shape: of the stack.
    """
    split = lambda path, shape: jax.random.split(jax.random.fold_in(key, zlib.crc32(path.encode())), shape)
    if stack is None or not shape:
        return split(path, shape)
    layers = (f"{path[:stack]}_{n}{path[stack:]}" for n in range(shape[0]))
    return jnp.stack([split(layer, shape[1:]) for layer in layers])


def _new_pair(
    shape: tuple[int, ...],
    dtype: Any,
    layout: Layout,
    rank: int,
    scale: float,
    keys: Callable[[tuple[int, ...]], Key[Array, "*stack"]],
    init: Initializer,
) -> tuple[Float[Array, "..."], Float[Array, "..."], Float[Array, "*stack"]]:
    dtype = jnp.promote_types(dtype, jnp.float32)
    shape_a, shape_b, shape_scaling = layouts.pair_shapes(shape, layout, rank)
    fan_in, _ = layouts.fans(shape, layout)
    draw = lambda key: init(key, (fan_in, rank), dtype)
    for _ in shape_scaling:
        draw = jax.vmap(draw)
    drawn = draw(keys(shape_scaling))
    # Aligned pairs may have stack and in axes interleaved: lay the draw out as (*stack, *in), then put axes in place.
    order = [n for kind in ("s", "iv") for n, letter in enumerate(layout) if letter in kind]
    drawn = drawn.reshape([*(shape[n] for n in order), rank])
    a = jnp.transpose(drawn, [*(order.index(n) for n in sorted(order)), len(order)]).reshape(shape_a)
    return a, jnp.zeros(shape_b, dtype), jnp.full(shape_scaling, scale, dtype)


def _given(leaves: Mapping[TreePath, Any], layout: Mapping[str, Layout]) -> dict[TreePath, Layout]:
    """What `layout` says of each leaf: by its very path, else by the first regular expression that matches it."""
    patterns = {pattern: letters for pattern, letters in layout.items() if pattern not in leaves}
    check_matches("wrap", patterns, list(leaves), "layout", "leaf")
    tests = [(matcher(pattern), letters) for pattern, letters in patterns.items()]
    first = {path: layout.get(path) or next((ls for test, ls in tests if test(path)), None) for path in leaves}
    return {path: letters for path, letters in first.items() if letters}


def _layouts(leaves: Mapping[TreePath, Any], given: Mapping[TreePath, Layout]) -> dict[TreePath, Layout]:
    """A layout for every leaf that has one: given, else known by name."""
    shapes = {path: tuple(value.shape) for path, value in leaves.items()}
    known = {path: given.get(path) or layouts.known(path, shape, shapes) for path, shape in shapes.items()}
    return {path: layout for path, layout in known.items() if layout}


def _choose(
    leaves: Mapping[TreePath, Any], targets: Targets | None, given: Mapping[TreePath, Layout] | None
) -> dict[TreePath, Rule]:
    if targets is not None:
        _check_targets(targets)
        return resolve(targets, leaves)
    if given is None:
        chosen = [path for path in leaves if path.rsplit("/", 1)[-1] == "kernel"]
    else:
        chosen = [path for path, layout in given.items() if "v" not in layout]
    if not chosen:
        found = [f"{path!r} {tuple(value.shape)}" for path, value in leaves.items() if is_kernel(path, value)]
        raise JloraValueError(
            "wrap",
            "no leaf is named 'kernel', so nothing was targeted. Leaves that could be:",
            found,
            "name them with targets=, or pass layout=jlora.infer_layout(fn, params, *args).",
        )
    return dict.fromkeys(chosen, Rule())


def _check_targets(targets: Any) -> None:
    kinds = "a regular expression, a list of names, or a dict of either to a rank or a Rule"
    if not isinstance(targets, Iterable):
        raise JloraTypeError("wrap", f"targets is {targets!r}.", [], f"pass {kinds}.")
    if isinstance(targets, Collection) and not len(targets):
        raise JloraValueError("wrap", "targets is empty, so nothing was targeted.", [], f"pass {kinds}.")


class _Size(NamedTuple):
    """A rule with nothing left open."""

    rank: int
    alpha: float


def _complete(rule: Rule, rank: int, alpha: float | None, cap: int | None) -> _Size:
    own = rank if rule.rank is None else rule.rank
    own = min(own, cap) if cap is not None and isinstance(own, int) else own
    wide = alpha if rule.alpha is None else rule.alpha
    return _Size(own, own if wide is None else wide)


def _describe(leaves: Mapping[TreePath, Any], paths: Iterable[TreePath]) -> dict[TreePath, str]:
    return {path: f"{path!r} {leaves[path].dtype}{list(leaves[path].shape)}" for path in paths}


def _check_kernels(leaves: Mapping[TreePath, Any], rules: Iterable[TreePath], told: Mapping[TreePath, Layout]) -> None:
    shape = {path: tuple(leaves[path].shape) for path in rules}
    described = _describe(leaves, rules)
    whole = [described[p] for p in rules if not jnp.issubdtype(leaves[p].dtype, jnp.floating)]
    if whole:
        raise JloraValueError(
            "wrap",
            f"{count(len(whole), 'target')} of no floating dtype.",
            whole,
            "leave them out with targets=, or dequantise them first.",
        )
    untold = [described[p] for p in rules if p not in told]
    if untold:
        raise JloraValueError(
            "wrap",
            f"the layout of {count(len(untold), 'kernel')} can't be told from name and shape.",
            untold,
            "pass layout=jlora.infer_layout(fn, params, *args), which looks at how fn contracts them, or "
            "layout={path: letters}, one letter an axis (s stack, i in, o out), as 'iiio' for a 2-D convolution.",
        )
    misfit = [f"{described[p]}  layout {told[p]!r}" for p in rules if not layouts.valid(told[p], shape[p])]
    if misfit:
        raise JloraValueError(
            "wrap",
            f"{count(len(misfit), 'layout')} doesn't fit its kernel.",
            misfit,
            "give one letter an axis, s, i, o or v, with at least one in (i or v) and one out (o).",
        )


def _check_ranks(rules: Mapping[TreePath, _Size], leaves: Mapping[TreePath, Any], most: Mapping[TreePath, int]) -> None:
    described = _describe(leaves, rules)
    odd = [described[p] for p, r in rules.items() if not isinstance(r.rank, int) or isinstance(r.rank, bool)]
    if odd:
        raise JloraTypeError("wrap", "the rank must be an int.", odd, "pass a whole number from 1.")
    wrong = [
        f"{described[p]}  rank {r.rank}, allowed 1 to {most[p]}" for p, r in rules.items() if not 1 <= r.rank <= most[p]
    ]
    if wrong:
        raise JloraValueError(
            "wrap",
            f"the rank is out of range for {count(len(wrong), 'kernel')}.",
            wrong,
            "choose a rank from 1 to the smaller of the kernel's in and out sizes, set it by kernel with "
            "targets={pattern: rank}, or pass cap_rank=True (in a config, adapter.cap_rank = true), which gives "
            "each kernel at most the highest rank it can hold.",
        )
    odd = [f"{described[p]}  alpha {r.alpha!r}" for p, r in rules.items() if not hasattr(r.alpha, "__float__")]
    if odd:
        raise JloraTypeError("wrap", "alpha must be a number.", odd, "pass alpha=rank for a scaling of 1.")
    wrong = [f"{described[p]}  alpha {r.alpha}" for p, r in rules.items() if not 0 < r.alpha < math.inf]
    if wrong:
        raise JloraValueError("wrap", "alpha must be above 0 and finite.", wrong, "pass alpha=rank for a scaling of 1.")


def adapter_leaf(path: TreePath) -> bool:
    """Whether the path of an array is that of an adapter's leaf: A, B or scaling."""
    return path.endswith(AFFIXES)


def is_wrapped(leaves: Iterable[TreePath]) -> bool:
    """Whether any of the paths of a tree's arrays is that of an adapter's leaf."""
    return any(adapter_leaf(path) for path in leaves)


def has_adapter(node: Tree) -> bool:
    """Whether a container holds leaves of an adapter itself, not in containers inside it."""
    return any(_is_adapter_leaf(name, child) for name, child in (children(node) or {}).items())


def _is_adapter_leaf(name: Any, node: Tree) -> bool:
    """Whether a named child of a container is an adapter's leaf; a module of such a name is not."""
    return adapter_leaf(str(name)) and children(node) is None


def _check_unwrapped(who: str, leaves: Mapping[TreePath, Any]) -> None:
    found = [repr(stem) for stem in _stems(leaves) if stem in leaves]
    if found:
        raise JloraValueError(
            who,
            f"the tree is already wrapped, {count(len(found), 'kernel')} of it.",
            found,
            "pass jlora.unwrap(params), or fold the adapter in first with jlora.merge(params).",
        )


def check_names(who: str, leaves: Mapping[TreePath, Any]) -> None:
    """Raises where an array of a base has the name of an adapter's leaf, without a kernel that it could belong to.

    Raises:
        ValueError: all such arrays are listed.
    """
    alone = [repr(path) for stem, paths in _stems(leaves).items() if stem not in leaves for path in paths]
    if alone:
        problem = f"{count(len(alone), 'array')} of the base with the name of an adapter's leaf, and no kernel for it."
        raise JloraValueError(who, problem, alone, f"rename what ends in {', '.join(AFFIXES)}.")


def _stems(leaves: Iterable[TreePath]) -> dict[TreePath, list[TreePath]]:
    """The paths of adapters' leaves by the path of their kernel, whether it is there or not."""
    found: dict[TreePath, list[TreePath]] = {}
    for path in leaves:
        for affix in AFFIXES:
            if path.endswith(affix):
                found.setdefault(path.removesuffix(affix), []).append(path)
    return found


def kernels(who: str, params: Tree) -> dict[TreePath, Layout]:
    """The wrapped kernels of a tree with their layouts, in the tree's order.

    Raises:
        TypeError: `params` is not a tree.
        ValueError: no adapter in the tree, one whose leaves are not complete, or whose shapes don't fit its kernel, or
            arrays with one path.
    """
    leaves = read_arrays(who, params)
    if not is_wrapped(leaves):
        raise JloraValueError(who, "the tree has no adapter.", [], "wrap it first: jlora.wrap(params).")
    stems = _stems(leaves)
    found = {stem: _layout_of(stem, leaves) for stem in (*(path for path in leaves if path in stems), *stems)}
    wrong = [_misfit(stem, leaves) for stem, layout in found.items() if layout is None]
    if wrong:
        raise JloraValueError(
            who,
            f"{count(len(wrong), 'adapter')} doesn't fit its kernel.",
            wrong,
            "an adapter belongs to the base it was wrapped on: attach or join it to that one, whole, and pass that "
            "tree alone, without an optimizer's state.",
        )
    return {stem: layout for stem, layout in found.items() if layout}


def _misfit(stem: TreePath, leaves: Mapping[TreePath, Any]) -> str:
    shape = lambda path: list(leaves[path].shape) if path in leaves else "missing"
    return f"{stem!r}  " + ", ".join(f"{(a or 'kernel').removeprefix('_')} {shape(stem + a)}" for a in ("", *AFFIXES))


def _layout_of(stem: TreePath, leaves: Mapping[TreePath, Any]) -> Layout | None:
    shapes = [tuple(leaves[stem + affix].shape) for affix in ("", *AFFIXES) if stem + affix in leaves]
    return layouts.read(*shapes) if len(shapes) == 4 else None


Replace = Callable[[TreePath, Any, Float[Array, "*axes rank"], Float[Array, "*axes rank"]], Any]


def replace_kernels(params: Tree, told: Mapping[TreePath, Layout], new: Replace) -> Tree:
    """Drops the adapters and puts `new(path, kernel, a, b)`, of the aligned pair, in each kernel's place."""

    def change(path: TreePath, nodes: dict[Any, Any]) -> dict[Any, Any]:
        out = {name: node for name, node in nodes.items() if not _is_adapter_leaf(name, node)}
        for name, node in out.items():
            where = join_path(path, name)
            if where in told:
                a, b, scaling = (unbox(nodes[f"{name}{affix}"]) for affix in AFFIXES)
                kernel = new(where, unbox(node), *layouts.align(a, b, scaling, told[where]))
                out[name] = jax.tree.unflatten(jax.tree.structure(node), [kernel])
        return out

    return edit(params, change)


def unwrap(params: Tree) -> Tree:
    """The tree as it was before `wrap`; kernels are the same arrays.

    Raises:
        ValueError: the tree has no adapter.
    """
    kernels("unwrap", params)
    return drop_adapters(params)


def drop_adapters(params: Tree) -> Tree:
    """The tree without adapter leaves, whether it has any or not."""
    return edit(params, lambda _, nodes: {n: node for n, node in nodes.items() if not _is_adapter_leaf(n, node)})


def merge(params: Tree) -> Tree:
    """Folds every adapter into its kernel, W + s AB, and drops it: the tree the model had before, free at inference.

    The sum is taken in the wider of the kernel's and the adapter's dtypes and rounded once, to the kernel's dtype.

    Raises:
        ValueError: the tree has no adapter, or one that doesn't fit its kernel.
    """
    told = kernels("merge", params)
    return replace_kernels(params, told, lambda _, kernel, a, b: layouts.merge_kernel(kernel, a, b))


def with_ranks(params: Tree, ranks: Mapping[TreePath, int]) -> Tree:
    """A wrapped tree whose pairs have other ranks: filled up with zeros, or with the last columns cut off.

    What is filled up trains as it did: gradients of both halves of the padding are zero, and stay so. Scalings stay.

    Args:
        params: a wrapped tree.
        ranks: the new rank of every kernel, by its path; a kernel that isn't in it keeps its own.

    Raises:
        ValueError: the tree has no adapter.
    """
    told = kernels("with_ranks", params)
    axes = {path + A: -1 for path in told} | {path + B: layouts.rank_axis(layout) for path, layout in told.items()}

    def change(path: TreePath, leaf: Any) -> Any:
        stem = next((path[: -len(affix)] for affix in (A, B) if path.endswith(affix)), None)
        if stem is None or stem not in ranks:
            return leaf
        axis = axes[path] % leaf.ndim
        more = max(ranks[stem] - leaf.shape[axis], 0)
        filled = jnp.pad(leaf, [(0, more if n == axis else 0) for n in range(leaf.ndim)])
        return jax.lax.slice_in_dim(filled, 0, ranks[stem], axis=axis)

    return map_with_path(change, params)


def _trains(who: str, params: Tree, train: Pattern) -> Callable[[TreePath, Any], bool]:
    """The test for leaves that train: every A and B, and what `train` names."""
    paths = [path for path in flatten(params) if not adapter_leaf(path)]
    full = select(who, train, paths) if train else set()
    return lambda path, _: path.endswith((A, B)) or path in full


def split(params: Tree, train: Pattern = ()) -> tuple[Tree, Tree]:
    """Splits a wrapped tree into what trains and all the rest, to differentiate the first alone.

    ::

        adapters {"dense": {"kernel_lora_a": ..., "kernel_lora_b": ...}}
        base     {"dense": {"kernel": ..., "kernel_lora_scaling": ..., "bias": ...}}

    Args:
        params: a wrapped tree.
        train: leaves trained in full beside the adapters: a regular expression for whole slash paths, or names of
            modules or leaves.

    Raises:
        ValueError: the tree has no adapter, or a name in `train` matches nothing.
    """
    kernels("split", params)
    return partition(params, _trains("split", params, train))


def join(adapters: Tree, base: Tree) -> Tree:
    """Joins the two halves of a `split` again.

    Raises:
        TypeError: a half is not a tree.
        ValueError: a leaf is on both sides.
    """
    for name, half in (("adapters", adapters), ("base", base)):
        if children(half) is None:
            raise JloraTypeError("join", f"{name} is not a tree of arrays.", [], "pass jlora.split(params).")
    return union(adapters, base)


def extract(params: Tree) -> Tree:
    """All leaves of the adapters, scaling included: what a file holds, and what is swapped over one base.

    Raises:
        ValueError: the tree has no adapter.
    """
    kernels("extract", params)
    return partition(params, lambda path, _: adapter_leaf(path))[0]


def attach(adapter: Tree, base_params: Tree) -> Tree:
    """Puts an extracted adapter on a base.

    Raises:
        ValueError: the base already has an adapter, or lacks a kernel that the adapter was made for, or has it in
            another shape; all such kernels are listed.
    """
    base = read_arrays("attach", base_params, "base_params")
    _check_unwrapped("attach", base)
    check_names("attach", base)
    stems = {path[: -len(A)] for path in read_arrays("attach", adapter, "adapter") if path.endswith(A)}
    lost = [f"{stem!r}  nearest: {quoted(nearest(stem, base, 1))}" for stem in sorted(stems - set(base))]
    if lost:
        raise JloraValueError(
            "attach",
            f"the base lacks {count(len(lost), 'kernel')} that the adapter is for.",
            lost,
            "attach the adapter to the base it was made on.",
        )
    params = union(adapter, base_params)
    kernels("attach", params)
    return params


def mask(params: Tree, train: Pattern = ()) -> Tree:
    """A tree of bool for optax: True for leaves that train, which are every A and B and what `train` names.

    Raises:
        ValueError: the tree has no adapter, or a name in `train` matches nothing.
    """
    kernels("mask", params)
    return map_with_path(_trains("mask", params, train), params)


class Row(NamedTuple):
    """One kernel with an adapter, or one leaf trained in full (rank and scaling None).

    Attributes:
        path: slash path of the kernel or leaf.
        shape: its shape.
        rank: columns of A.
        scaling: alpha / rank, the first one of a stack; None where the tree is abstract.
        trainable: parameters trained for it.
        total: parameters it has itself.
        max_rank: the highest rank that the kernel can hold, the smaller of its in and out sizes; None where rank is.
    """

    path: TreePath
    shape: tuple[int, ...]
    rank: int | None
    scaling: float | None
    trainable: int
    total: int
    max_rank: int | None = None


class Summary(NamedTuple):
    """What trains in a wrapped tree; `str()` is a table, in which "(max)" marks the highest rank a kernel can hold.

    Attributes:
        rows: one for every kernel with an adapter and every leaf trained in full.
        trainable: parameters trained.
        total: parameters of the base, without adapters.
    """

    rows: tuple[Row, ...]
    trainable: int
    total: int

    @property
    def percent(self) -> float:
        """Trainable parameters in percent of the base's."""
        return 100 * self.trainable / self.total

    def __str__(self) -> str:
        cells = [("path", "shape", "rank", "scaling", "parameters", "trained")]
        for row in self.rows:
            rank = "full" if row.rank is None else f"{row.rank} (max)" if row.rank == row.max_rank else str(row.rank)
            scaling = "" if row.scaling is None else f"{row.scaling:g}"
            share = f"{100 * row.trainable / row.total:.2f} %"
            cells.append((row.path, " x ".join(map(str, row.shape)), rank, scaling, f"{row.trainable:,}", share))
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = [
            "  ".join(
                text.ljust(w) if n < 2 else text.rjust(w) for n, (text, w) in enumerate(zip(line, widths, strict=True))
            )
            for line in cells
        ]
        last = f"trainable {self.trainable:,} / total {self.total:,} ({self.percent:.2f} %)"
        return "\n".join([*(line.rstrip() for line in lines), last])


def summary(params: Tree, train: Pattern = ()) -> Summary:
    """Counts what trains: path, shape, rank, scaling, parameters, and their share of the kernel's own.

    Raises:
        ValueError: the tree has no adapter, or a name in `train` matches nothing.
    """
    told = kernels("summary", params)
    leaves = flatten(params)
    chosen = _trains("summary", params, train)
    rows = [
        _row(path, leaves, told.get(path))
        for path in leaves
        if path in told or (chosen(path, None) and not adapter_leaf(path))
    ]
    total = sum(math.prod(value.shape) for path, value in leaves.items() if not adapter_leaf(path))
    return Summary(tuple(rows), sum(row.trainable for row in rows), total)


def _row(path: TreePath, leaves: Mapping[TreePath, Any], layout: Layout | None) -> Row:
    shape = tuple(leaves[path].shape)
    size = math.prod(shape)
    if layout is None:
        return Row(path, shape, None, None, size, size)
    a, b, scaling = (leaves[path + affix] for affix in AFFIXES)
    known = None if isinstance(scaling, jax.ShapeDtypeStruct) else float(jnp.ravel(scaling)[0])
    trained = math.prod(a.shape) + math.prod(b.shape)
    return Row(path, shape, a.shape[-1], known, trained, size, layouts.max_rank(shape, layout))
