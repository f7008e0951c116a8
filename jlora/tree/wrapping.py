"""Adds adapters to a tree of parameters, removes them, and merges them into their kernels."""

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

from jlora.errors import JloraTypeError, JloraValueError, count
from jlora.tree.layouts import (
    AFFIXES,
    A,
    B,
    Layout,
    align_pair,
    fans,
    is_valid_layout,
    max_rank,
    merge_kernel,
    pair_axes,
    pair_shapes,
    rank_axis,
    read_layout,
    recognize_layout,
)
from jlora.tree.paths import (
    AS_DICT,
    Tree,
    TreePath,
    box,
    children,
    edit,
    find_containers,
    join_path,
    map_with_path,
    read_arrays,
    unbox,
)
from jlora.tree.targets import Rule, Targets, check_matches, is_kernel, make_matcher, resolve_targets

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
    """Adds the leaves of a low-rank adapter beside each target kernel. B is zero, so the model's output is unchanged.

    ::

        {"dense": {"kernel": f32[784,128], "bias": f32[128]}}

        {"dense": {"kernel": f32[784,128],
                   "kernel_lora_a": f32[784,8],
                   "kernel_lora_b": f32[8,128],
                   "kernel_lora_scaling": f32[],
                   "bias": f32[128]}}

    Args:
        params: nested mappings of arrays, concrete or abstract (`jax.eval_shape`). The containers may include lists,
            tuples and objects of classes registered with JAX, but a target kernel must be in a mapping.
        rank: columns of A and rows of B, from 1 to the smaller of a kernel's in and out sizes.
        alpha: the update is scaled by alpha / rank. None means alpha = rank, which is a scaling of 1.
        targets: a string is a regular expression that must match a whole slash path; a list holds names of modules or
            leaves, as in PEFT's target_modules; a dict maps either (a list as a tuple) to a rank or a `Rule`, and the
            first match wins. None means every leaf named `kernel`, or with `layout` every leaf in it that a matmul or a
            convolution contracts.
        layout: the result of `infer_layout`, or layouts by slash path or regular expression: one letter per axis, `s`
            stack, `i` in, `o` out, `v` the rows of a lookup table. A regular expression may mark the module that holds
            a stack, as in `(?P<stack>layers)/.*/kernel`: layer n of the stack is then initialized like the kernel of a
            module `layers_n`, so that stacked and separate layers start with equal adapters.
        key: PRNG key for A. The values of a kernel's A depend only on the key and the kernel's path. None means
            `jax.random.key(0)`.
        rslora: scale by alpha / sqrt(rank) instead.
        init: initializes A as a (fan_in, rank) matrix for each stacked kernel, with the arguments of
            `jax.nn.initializers`: key, shape, dtype.
        cap_rank: lower the rank of a kernel to the highest rank that it can have, instead of raising an error. Alpha
            is divided by the lowered rank. `summary` marks these kernels.

    Returns:
        The tree with the new leaves, in containers and boxes of the same kinds. An adapter has the dtype of its kernel,
        or float32 for a float16 or bfloat16 kernel.

    Raises:
        ValueError: the tree is empty or already wrapped; several arrays have one path; a target matches nothing; a
            kernel is in a container that can't take new leaves, has an unknown layout or an integer dtype; a rank or
            alpha is out of range.
        TypeError: `params` is not a tree, or a rank is not an int.

    Source:
        Hu et al. 2021, arXiv:2106.09685, section 4.1; rsLoRA: Kalajdzievski 2023, arXiv:2312.03732.

    Examples:
        >>> params = jlora.wrap({"dense": {"kernel": jnp.ones((784, 128))}}, rank=8)
        >>> {name: leaf.shape for name, leaf in params["dense"].items()}
        {'kernel': (784, 128), 'kernel_lora_a': (784, 8), 'kernel_lora_b': (8, 128), 'kernel_lora_scaling': ()}
    """
    leaves = read_arrays("wrap", params)
    check_unwrapped("wrap", leaves)
    check_names("wrap", leaves)
    _check_types(layout, init)
    given = _match_layouts(leaves, layout or {})
    layouts = _complete_layouts(leaves, given)
    chosen = _choose_kernels(leaves, targets, None if layout is None else given)
    _check_kernels(leaves, chosen, layouts)
    _check_containers(params, chosen)
    limits = {path: max_rank(tuple(leaves[path].shape), layouts[path]) for path in chosen}
    caps = limits if cap_rank else {}
    rules = {path: _complete_rule(rule, rank, alpha, caps.get(path)) for path, rule in chosen.items()}
    _check_ranks(rules, leaves, limits)
    key = jax.random.key(0) if key is None else key
    stacks = _find_stacks(rules, {pattern: ls for pattern, ls in (layout or {}).items() if pattern not in leaves})

    def make_pair(path: TreePath, kernel: Any) -> tuple[Any, Any, Any]:
        rule = rules[path]
        scale = rule.alpha / (math.sqrt(rule.rank) if rslora else rule.rank)
        keys = functools.partial(_make_keys, key, path, stacks.get(path))
        make = lambda: _make_pair(kernel.shape, kernel.dtype, layouts[path], rule.rank, scale, keys, init)
        return jax.eval_shape(make) if isinstance(kernel, jax.ShapeDtypeStruct) else make()

    def add_pairs(parent: TreePath, nodes: dict[Any, Any]) -> dict[Any, Any]:
        new: dict[Any, Any] = {}
        for name, node in nodes.items():
            new[name] = node
            path = join_path(parent, name)
            if path in rules:
                axes = pair_axes(layouts[path])
                for affix, value, ax in zip(AFFIXES, make_pair(path, unbox(node)), axes, strict=True):
                    new[f"{name}{affix}"] = box(node, value, ax)
        return new

    return edit(params, add_pairs)


def unwrap(params: Tree) -> Tree:
    """Removes all adapters: the tree before `wrap`, with the same kernel arrays.

    Raises:
        ValueError: the tree has no adapter.

    Examples:
        >>> params = jlora.wrap({"kernel": jnp.ones((4, 4))}, rank=2)
        >>> list(jlora.unwrap(params))
        ['kernel']
    """
    read_layouts("unwrap", params)
    return drop_adapters(params)


def merge(params: Tree) -> Tree:
    """Adds the update of every adapter to its kernel, W + s AB, and removes the adapters.

    The result has the structure of the tree before `wrap`, so inference costs nothing extra. The sum is computed in
    the wider of the kernel's and the adapter's dtypes and rounded once, to the kernel's dtype.

    Raises:
        ValueError: the tree has no adapter, or one that doesn't fit its kernel.

    Examples:
        >>> params = jlora.wrap({"kernel": jnp.zeros((2, 2))}, rank=1, alpha=3)
        >>> params["kernel_lora_a"], params["kernel_lora_b"] = jnp.array([[1.0], [2.0]]), jnp.array([[1.0, 10.0]])
        >>> print(jlora.merge(params)["kernel"])
        [[ 3. 30.]
         [ 6. 60.]]
    """
    layouts = read_layouts("merge", params)
    return replace_kernels(params, layouts, lambda _, kernel, a, b: merge_kernel(kernel, a, b))


def drop_adapters(params: Tree) -> Tree:
    """The tree without adapter leaves; a tree that has none is returned as it is."""
    return edit(params, lambda _, nodes: {n: node for n, node in nodes.items() if not _is_adapter_child(n, node)})


Replace = Callable[[TreePath, Any, Float[Array, "*axes rank"], Float[Array, "*axes rank"]], Any]


def replace_kernels(params: Tree, layouts: Mapping[TreePath, Layout], new_kernel: Replace) -> Tree:
    """Removes the adapters and replaces each kernel by `new_kernel(path, kernel, a, b)`, of the aligned pair."""

    def change(parent: TreePath, nodes: dict[Any, Any]) -> dict[Any, Any]:
        new = {name: node for name, node in nodes.items() if not _is_adapter_child(name, node)}
        for name, node in new.items():
            path = join_path(parent, name)
            if path in layouts:
                a, b, scaling = (unbox(nodes[f"{name}{affix}"]) for affix in AFFIXES)
                kernel = new_kernel(path, unbox(node), *align_pair(a, b, scaling, layouts[path]))
                new[name] = jax.tree.unflatten(jax.tree.structure(node), [kernel])
        return new

    return edit(params, change)


def with_ranks(params: Tree, ranks: Mapping[TreePath, int]) -> Tree:
    """A wrapped tree with other ranks: pairs are padded with zeros, or lose their last columns. Scalings stay.

    A padded pair trains exactly as before: the gradients of both halves of the padding are zero, and stay zero.

    Args:
        params: a wrapped tree.
        ranks: the new rank of every kernel, by its path; a kernel that is missing here keeps its rank.

    Raises:
        ValueError: the tree has no adapter.
    """
    layouts = read_layouts("with_ranks", params)
    axes = {path + A: -1 for path in layouts} | {path + B: rank_axis(layout) for path, layout in layouts.items()}

    def change(path: TreePath, leaf: Any) -> Any:
        kernel = next((path[: -len(affix)] for affix in (A, B) if path.endswith(affix)), None)
        if kernel is None or kernel not in ranks:
            return leaf
        axis = axes[path] % leaf.ndim
        padding = max(ranks[kernel] - leaf.shape[axis], 0)
        padded = jnp.pad(leaf, [(0, padding if n == axis else 0) for n in range(leaf.ndim)])
        return jax.lax.slice_in_dim(padded, 0, ranks[kernel], axis=axis)

    return map_with_path(change, params)


def is_adapter_leaf(path: TreePath) -> bool:
    """Whether an array with this path is a leaf of an adapter: A, B or scaling."""
    return path.endswith(AFFIXES)


def is_wrapped(leaves: Iterable[TreePath]) -> bool:
    """Whether any of these paths of arrays is a leaf of an adapter."""
    return any(is_adapter_leaf(path) for path in leaves)


def has_adapter(node: Tree) -> bool:
    """Whether a container itself holds leaves of an adapter. Containers inside it don't count."""
    return any(_is_adapter_child(name, child) for name, child in (children(node) or {}).items())


def _is_adapter_child(name: Any, node: Tree) -> bool:
    """Whether a named child of a container is a leaf of an adapter; a module of such a name is not."""
    return is_adapter_leaf(str(name)) and children(node) is None


def read_layouts(who: str, params: Tree) -> dict[TreePath, Layout]:
    """The wrapped kernels of a tree with their layouts, in the tree's order.

    Raises:
        TypeError: `params` is not a tree.
        ValueError: the tree has no adapter, an adapter is incomplete or doesn't fit its kernel, or several arrays have
            one path.
    """
    leaves = read_arrays(who, params)
    if not is_wrapped(leaves):
        raise JloraValueError(who, "the tree has no adapter.", [], "wrap it first: jlora.wrap(params).")
    groups = _group_adapter_leaves(leaves)
    kernels = dict.fromkeys([*(path for path in leaves if path in groups), *groups])
    layouts = {kernel: _read_kernel_layout(kernel, leaves) for kernel in kernels}
    misfits = [_describe_misfit(kernel, leaves) for kernel, layout in layouts.items() if layout is None]
    if misfits:
        raise JloraValueError(
            who,
            count(len(misfits), "adapter doesn't fit its kernel", "adapters don't fit their kernels") + ".",
            misfits,
            "an adapter fits only the base that it was created for: attach or join all of its leaves to that base, "
            "and pass that tree alone, without an optimizer's state.",
        )
    return {kernel: layout for kernel, layout in layouts.items() if layout}


def _read_kernel_layout(kernel: TreePath, leaves: Mapping[TreePath, Any]) -> Layout | None:
    shapes = [tuple(leaves[kernel + affix].shape) for affix in ("", *AFFIXES) if kernel + affix in leaves]
    return read_layout(*shapes) if len(shapes) == 4 else None


def _describe_misfit(kernel: TreePath, leaves: Mapping[TreePath, Any]) -> str:
    shape = lambda path: list(leaves[path].shape) if path in leaves else "missing"
    parts = [f"{(affix or 'kernel').removeprefix('_')} {shape(kernel + affix)}" for affix in ("", *AFFIXES)]
    return f"{kernel!r}  {', '.join(parts)}"


def check_unwrapped(who: str, leaves: Mapping[TreePath, Any]) -> None:
    """Raises an error if a tree already has an adapter.

    Raises:
        ValueError: all kernels with an adapter are listed.
    """
    wrapped = [repr(kernel) for kernel in _group_adapter_leaves(leaves) if kernel in leaves]
    if wrapped:
        problem = f"the tree is already wrapped: {count(len(wrapped), 'kernel has', 'kernels have')} an adapter."
        fix = "pass jlora.unwrap(params), or merge the adapter into its base first with jlora.merge(params)."
        raise JloraValueError(who, problem, wrapped, fix)


def check_names(who: str, leaves: Mapping[TreePath, Any]) -> None:
    """Raises an error if an array of a base is named like a leaf of an adapter, but has no kernel beside it.

    Raises:
        ValueError: all such arrays are listed.
    """
    groups = _group_adapter_leaves(leaves)
    orphans = [repr(path) for kernel, paths in groups.items() if kernel not in leaves for path in paths]
    if orphans:
        arrays = count(len(orphans), "array of the base is", "arrays of the base are")
        problem = f"{arrays} named like the leaves of an adapter, but without a kernel."
        raise JloraValueError(who, problem, orphans, f"choose names that don't end in {', '.join(AFFIXES)}.")


def _group_adapter_leaves(leaves: Iterable[TreePath]) -> dict[TreePath, list[TreePath]]:
    """The paths of adapters' leaves by the path of their kernel, whether the kernel exists or not."""
    groups: dict[TreePath, list[TreePath]] = {}
    for path in leaves:
        for affix in AFFIXES:
            if path.endswith(affix):
                groups.setdefault(path.removesuffix(affix), []).append(path)
    return groups


def _check_types(layout: Any, init: Any) -> None:
    if not isinstance(layout, Mapping | None):
        fix = "pass layout=jlora.infer_layout(fn, params, *args), or layout={path: letters}."
        raise JloraTypeError("wrap", f"layout is of type {type(layout).__name__}, not a dict.", [], fix)
    if not callable(init):
        fix = "pass an initializer, such as jax.nn.initializers.orthogonal()."
        raise JloraTypeError("wrap", f"init is of type {type(init).__name__}, not a function.", [], fix)


def _match_layouts(leaves: Mapping[TreePath, Any], layout: Mapping[str, Layout]) -> dict[TreePath, Layout]:
    """The entry of `layout` for each leaf: the one with its exact path, else the first pattern that matches it."""
    patterns = {pattern: letters for pattern, letters in layout.items() if pattern not in leaves}
    check_matches("wrap", patterns, list(leaves), "layout", "leaf")
    tests = [(make_matcher(pattern), letters) for pattern, letters in patterns.items()]
    first = {path: layout.get(path) or next((ls for test, ls in tests if test(path)), None) for path in leaves}
    return {path: letters for path, letters in first.items() if letters}


def _complete_layouts(leaves: Mapping[TreePath, Any], given: Mapping[TreePath, Layout]) -> dict[TreePath, Layout]:
    """The layout of every leaf where it is given or follows from the leaf's name and shape."""
    shapes = {path: tuple(value.shape) for path, value in leaves.items()}
    layouts = {path: given.get(path) or recognize_layout(path, shape, shapes) for path, shape in shapes.items()}
    return {path: layout for path, layout in layouts.items() if layout}


def _choose_kernels(
    leaves: Mapping[TreePath, Any], targets: Targets | None, given: Mapping[TreePath, Layout] | None
) -> dict[TreePath, Rule]:
    """The target kernels, each with its rule."""
    if targets is not None:
        _check_targets(targets)
        return resolve_targets(targets, leaves)
    if given is None:
        chosen = [path for path in leaves if path.rsplit("/", 1)[-1] == "kernel"]
    else:
        chosen = [path for path, layout in given.items() if "v" not in layout]
    if not chosen:
        candidates = [f"{path!r} {tuple(value.shape)}" for path, value in leaves.items() if is_kernel(path, value)]
        raise JloraValueError(
            "wrap",
            "no leaf is named 'kernel', so there is no target. Possible targets:",
            candidates,
            "name them with targets=, or pass layout=jlora.infer_layout(fn, params, *args).",
        )
    return dict.fromkeys(chosen, Rule())


def _check_targets(targets: Any) -> None:
    kinds = "a regular expression, a list of names, or a dict of either to a rank or a Rule"
    if not isinstance(targets, Iterable):
        raise JloraTypeError("wrap", f"targets is {targets!r}.", [], f"pass {kinds}.")
    if isinstance(targets, Collection) and not len(targets):
        raise JloraValueError("wrap", "targets is empty.", [], f"pass {kinds}.")


def _describe_kernels(leaves: Mapping[TreePath, Any], paths: Iterable[TreePath]) -> dict[TreePath, str]:
    return {path: f"{path!r} {leaves[path].dtype}{list(leaves[path].shape)}" for path in paths}


def _check_kernels(
    leaves: Mapping[TreePath, Any], rules: Iterable[TreePath], layouts: Mapping[TreePath, Layout]
) -> None:
    shapes = {path: tuple(leaves[path].shape) for path in rules}
    described = _describe_kernels(leaves, rules)
    integers = [described[p] for p in rules if not jnp.issubdtype(leaves[p].dtype, jnp.floating)]
    if integers:
        raise JloraValueError(
            "wrap",
            f"{count(len(integers), 'target has', 'targets have')} a dtype that is not floating.",
            integers,
            "leave them out with targets=, or dequantize them first.",
        )
    unknown = [described[p] for p in rules if p not in layouts]
    if unknown:
        raise JloraValueError(
            "wrap",
            f"the layout of {count(len(unknown), 'kernel')} can't be determined from name and shape.",
            unknown,
            "pass layout=jlora.infer_layout(fn, params, *args), which looks at how fn contracts them, or "
            "layout={path: letters}, one letter per axis (s stack, i in, o out), as 'iiio' for a 2-D convolution.",
        )
    misfits = [f"{described[p]}  layout {layouts[p]!r}" for p in rules if not is_valid_layout(layouts[p], shapes[p])]
    if misfits:
        raise JloraValueError(
            "wrap",
            count(len(misfits), "layout doesn't fit its kernel", "layouts don't fit their kernels") + ".",
            misfits,
            "give one letter per axis, s, i, o or v, with at least one in (i or v) and one out (o).",
        )


def _check_containers(params: Tree, paths: Iterable[TreePath]) -> None:
    """Raises an error if the container of a kernel can't take the leaves of an adapter."""
    every = find_containers(params)
    containers = {path: every.get(path, (None, path)) for path in paths}
    fixed = [f"{p!r}  in a {type(c).__name__}" for p, (c, _) in containers.items() if not isinstance(c, Mapping)]
    if fixed:
        kernels = count(len(fixed), "kernel is", "kernels are")
        problem = f"{kernels} directly in a list or tuple, or in an object with fixed fields."
        fix = f"put it in a dict, leave it out with targets=, or {AS_DICT}"
        raise JloraValueError("wrap", problem, fixed, fix)
    taken = [
        f"{path!r}  beside {f'{name}{affix}'!r}"
        for path, (container, name) in containers.items()
        for affix in AFFIXES
        if f"{name}{affix}" in container
    ]
    if taken:
        problem = f"{count(len(taken), 'name for an adapter leaf is', 'names for adapter leaves are')} already in use."
        raise JloraValueError("wrap", problem, taken, "rename the module, or leave the kernel out with targets=.")
    # JAX sorts the keys of all mappings but OrderedDict, and it can't compare a number with a string.
    numbers = [
        f"{path!r}  under the key {name!r}"
        for path, (container, name) in containers.items()
        if not isinstance(name, str) and not isinstance(container, OrderedDict)
    ]
    if numbers:
        problem = f"{count(len(numbers), 'kernel is', 'kernels are')} under a key that is not a string."
        raise JloraValueError("wrap", problem, numbers, "rename the key, or leave the kernel out with targets=.")


class _CompleteRule(NamedTuple):
    """A rule without open fields."""

    rank: int
    alpha: float


def _complete_rule(rule: Rule, rank: int, alpha: float | None, cap: int | None) -> _CompleteRule:
    rank = rank if rule.rank is None else rule.rank
    rank = min(rank, cap) if cap is not None and isinstance(rank, int) else rank
    alpha = alpha if rule.alpha is None else rule.alpha
    return _CompleteRule(rank, rank if alpha is None else alpha)


def _check_ranks(
    rules: Mapping[TreePath, _CompleteRule], leaves: Mapping[TreePath, Any], limits: Mapping[TreePath, int]
) -> None:
    described = _describe_kernels(leaves, rules)
    wrong = [described[p] for p, r in rules.items() if not isinstance(r.rank, int) or isinstance(r.rank, bool)]
    if wrong:
        raise JloraTypeError("wrap", "the rank must be an int.", wrong, "pass a whole number from 1.")
    wrong = [
        f"{described[p]}  rank {r.rank}, allowed 1 to {limits[p]}"
        for p, r in rules.items()
        if not 1 <= r.rank <= limits[p]
    ]
    if wrong:
        raise JloraValueError(
            "wrap",
            f"the rank is out of range for {count(len(wrong), 'kernel')}.",
            wrong,
            "choose a rank from 1 to the smaller of the kernel's in and out sizes, set it by kernel with "
            "targets={pattern: rank}, or pass cap_rank=True (in a config, adapter.cap_rank = true), which lowers the "
            "rank of each kernel to the highest rank that it can have.",
        )
    wrong = [f"{described[p]}  alpha {r.alpha!r}" for p, r in rules.items() if not hasattr(r.alpha, "__float__")]
    if wrong:
        raise JloraTypeError("wrap", "alpha must be a number.", wrong, "pass alpha=rank for a scaling of 1.")
    wrong = [f"{described[p]}  alpha {r.alpha}" for p, r in rules.items() if not 0 < r.alpha < math.inf]
    if wrong:
        raise JloraValueError("wrap", "alpha must be above 0 and finite.", wrong, "pass alpha=rank for a scaling of 1.")


def _find_stacks(paths: Iterable[TreePath], layout: Mapping[str, Layout]) -> dict[TreePath, int]:
    """For kernels whose layout marks a stack: where in the path the name of the stack's module ends."""
    patterns = [re.compile(pattern) for pattern in layout]
    matches = {path: next(filter(None, (p.fullmatch(path) for p in patterns)), None) for path in paths}
    return {path: match.end("stack") for path, match in matches.items() if match and match.groupdict().get("stack")}


def _make_keys(key: Key[Array, ""], path: TreePath, stack: int | None, shape: tuple[int, ...]) -> Key[Array, "*stack"]:
    """The keys that a kernel's A is drawn from, one for each position of its stack.

    Args:
        key: of the whole tree.
        path: of the kernel.
        stack: where in the path the name of the stack's module ends; None if the layout doesn't mark it.
        shape: of the stack.
    """
    split = lambda path, shape: jax.random.split(jax.random.fold_in(key, zlib.crc32(path.encode())), shape)
    if stack is None or not shape:
        return split(path, shape)
    layers = (f"{path[:stack]}_{n}{path[stack:]}" for n in range(shape[0]))
    return jnp.stack([split(layer, shape[1:]) for layer in layers])


def _make_pair(
    shape: tuple[int, ...],
    dtype: Any,
    layout: Layout,
    rank: int,
    scale: float,
    keys: Callable[[tuple[int, ...]], Key[Array, "*stack"]],
    init: Initializer,
) -> tuple[Float[Array, "..."], Float[Array, "..."], Float[Array, "*stack"]]:
    """A new A, B and scaling for one kernel."""
    dtype = jnp.promote_types(dtype, jnp.float32)
    shape_a, shape_b, shape_scaling = pair_shapes(shape, layout, rank)
    fan_in, _ = fans(shape, layout)
    draw = lambda key: init(key, (fan_in, rank), dtype)
    for _ in shape_scaling:
        draw = jax.vmap(draw)
    drawn = draw(keys(shape_scaling))
    # Aligned pairs may have stack and in axes interleaved: shape the values as (*stack, *in), then permute the axes.
    order = [n for kind in ("s", "iv") for n, letter in enumerate(layout) if letter in kind]
    drawn = drawn.reshape([*(shape[n] for n in order), rank])
    a = jnp.transpose(drawn, [*(order.index(n) for n in sorted(order)), len(order)]).reshape(shape_a)
    return a, jnp.zeros(shape_b, dtype), jnp.full(shape_scaling, scale, dtype)
