"""Nested trees of parameters: containers, slash paths, and how a tree is split and joined.

A container is a mapping (dict, FrozenDict, nnx.State), a list, a tuple, or an object of a class registered with JAX as
a pytree node (a flax.struct dataclass, an equinox module). Everything else is a leaf. A leaf may be boxed: an object
whose single child is an array (nnx.Variable, linen's Partitioned).
"""

import copy
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from jlora.errors import JloraTypeError, JloraValueError, count

Tree = Any
Leaf = Any
# A slash path in a tree, such as "encoder/layer_0/query/kernel".
TreePath = str

_ABSENT = object()

# A test runs this code. It works for every pytree, because it doesn't depend on the dict's order.
AS_DICT = """\
give jlora the tree's arrays as a dict, and the function its tree back:
    keys, treedef = jax.tree_util.tree_flatten_with_path(tree)
    names = [jax.tree_util.keystr(key, simple=True, separator="/") for key, _ in keys]
    params = {name: leaf for name, (_, leaf) in zip(names, keys)}
    fn_of_dict = lambda params, *args: fn(jax.tree.unflatten(treedef, [params[name] for name in names]), *args)"""


def children(tree: Tree) -> dict[Any, Tree] | None:
    """The named children of a container, None for a leaf.

    The children of a list or a tuple, including a NamedTuple, are named by their positions.
    """
    if isinstance(tree, Mapping):
        # nnx.State wraps its nested mappings again on every access; the raw ones keep the tree's structure as it is.
        return dict(getattr(tree, "raw_mapping", tree))
    if isinstance(tree, list | tuple):
        return dict(enumerate(tree))
    if tree is None or isinstance(tree, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct):
        return None
    fields = _fields(tree)
    if fields is not None and len(fields) == 1:
        (only,) = fields.values()
        # A field is None if a `partition` put its array on the other side. Such an object is not a box.
        return fields if only is None or children(only) is not None else None
    return fields


def _fields(node: Any) -> dict[Any, Any] | None:
    """The children of an object of a registered class by name, None for any other object."""
    pairs, _ = _flatten_one_level(node)
    if len(pairs) == 1 and not pairs[0][0]:
        return None
    names = [jax.tree_util.keystr(keys, simple=True) for keys, _ in pairs]
    if len(set(names)) < len(names):
        return dict(enumerate(child for _, child in pairs))
    return dict(zip(names, (child for _, child in pairs), strict=True))


def _flatten_one_level(node: Any) -> tuple[list[tuple[Any, Any]], Any]:
    return jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda child: child is not node)


def rebuild(like: Tree, nodes: Mapping[Any, Tree]) -> Tree:
    """A container of the same kind as `like` with the children `nodes`.

    Only a mapping can take names that `like` does not have. Any other container holds None for a missing child.

    Raises:
        ValueError: there are new names, and the container is not a mapping.
    """
    if isinstance(like, dict):
        # A copy keeps the attributes of a subclass, such as defaultdict's factory.
        new = copy.copy(like)
        new.clear()
        new.update(nodes)
        return new
    if isinstance(like, Mapping):
        return type(like)(nodes)  # type: ignore[call-arg]
    names = list(children(like) or ())
    new_names = [repr(name) for name in nodes if name not in names]
    if new_names:
        problem = f"a {type(like).__name__} can't take {count(len(new_names), 'new leaf', 'new leaves')}."
        raise JloraValueError("jlora", problem, new_names, AS_DICT)
    items: list[Any] = [nodes.get(name) for name in names]
    if isinstance(like, list | tuple):
        return type(like)(*items) if hasattr(like, "_fields") else type(like)(items)
    return jax.tree.unflatten(_flatten_one_level(like)[1], items)


def unbox(leaf: Leaf) -> Any:
    """The array in a leaf, boxed or plain; None if there is no array, as in a Python number."""
    values = jax.tree.leaves(leaf)
    return values[0] if len(values) == 1 and hasattr(values[0], "shape") else None


def box(like: Leaf, value: Any, axes: tuple[int | None, ...]) -> Leaf:
    """Puts `value` in a box of the same kind as `like`.

    Args:
        like: the leaf next to the new one.
        value: an array, or its abstract form.
        axes: for every axis of `value` the axis of `like` that it corresponds to, or None. A box that names its axes
            (linen's Partitioned) gives these names to the new leaf, so that sharding rules apply to it too.
    """
    boxed = jax.tree.unflatten(jax.tree.structure(like), [value])
    names = getattr(like, "names", None)
    if isinstance(names, tuple) and hasattr(boxed, "replace"):
        boxed = boxed.replace(names=tuple(None if axis is None else names[axis] for axis in axes))
    return boxed


def join_path(path: TreePath, name: Any) -> TreePath:
    return f"{path}/{name}" if path else str(name)


def flatten(tree: Tree, who: str = "jlora") -> dict[TreePath, Any]:
    """All arrays of a tree by slash path, unboxed, in the tree's own order.

    >>> list(flatten({"dense": {"kernel": np.ones((2, 3)), "bias": np.ones(3)}}))
    ['dense/kernel', 'dense/bias']

    Args:
        tree: any pytree.
        who: the public function that an error names.

    Raises:
        ValueError: several arrays have one path, for example under the keys "a/b" and "a" -> "b", or 0 and "0".
    """
    pairs = list(_walk(tree, ""))
    leaves = dict(pairs)
    if len(leaves) < len(pairs):
        check_unique_paths(who, [path for path, _ in pairs])
    return leaves


def _walk(tree: Tree, path: TreePath) -> Iterator[tuple[TreePath, Any]]:
    nodes = children(tree)
    if nodes is None:
        value = unbox(tree)
        if value is not None:
            yield path, value
        return
    for name, node in nodes.items():
        yield from _walk(node, join_path(path, name))


def check_unique_paths(who: str, paths: Iterable[TreePath]) -> None:
    """Raises an error if several arrays have one slash path.

    Raises:
        ValueError: all such paths are listed.
    """
    repeated = [f"{path!r}  {number} arrays" for path, number in Counter(paths).items() if number > 1]
    if repeated:
        subject = count(len(repeated), "slash path of the tree has", "slash paths of the tree have")
        fix = 'rename keys, so that none of them looks like another: "a/b" like "a" -> "b", or 0 like "0".'
        raise JloraValueError(who, f"{subject} several arrays.", repeated, fix)


def read_arrays(who: str, tree: Tree, name: str = "params") -> dict[TreePath, Any]:
    """The arrays of a tree, an argument of a public function, by slash path.

    Args:
        who: the public function.
        tree: the argument.
        name: name of the argument.

    Raises:
        TypeError: the argument is not a tree: None, a number, a function.
        ValueError: the tree has no arrays, or several arrays have one path.
    """
    leaves = flatten(tree, who)
    if not leaves and children(tree) is None:
        kind = "None" if tree is None else f"of type {type(tree).__name__}"
        fix = "pass the model's parameters: nested dicts of arrays."
        raise JloraTypeError(who, f"{name} is {kind}, not a tree of arrays.", [], fix)
    if not leaves:
        raise JloraValueError(who, "the tree has no arrays.", [], "pass the model's parameters.")
    return leaves


def find_containers(tree: Tree, path: TreePath = "") -> dict[TreePath, tuple[Tree, Any]]:
    """The container of every array of a tree and the array's name in it, by slash path."""
    containers: dict[TreePath, tuple[Tree, Any]] = {}
    for name, node in (children(tree) or {}).items():
        child = join_path(path, name)
        containers |= {child: (tree, name)} if children(node) is None else find_containers(node, child)
    return containers


def edit(tree: Tree, change: Callable[[TreePath, dict[Any, Tree]], Mapping[Any, Tree]], path: TreePath = "") -> Tree:
    """Rebuilds a tree from the leaves up; `change` maps each container's path and children to its new children."""
    nodes = children(tree)
    if nodes is None:
        return tree
    edited = {name: edit(node, change, join_path(path, name)) for name, node in nodes.items()}
    return rebuild(tree, change(path, edited))


def map_with_path(fn: Callable[[TreePath, Any], Any], tree: Tree, path: TreePath = "") -> Tree:
    """Replaces every array by `fn(path, array)`; boxes stay."""
    nodes = children(tree)
    if nodes is None:
        return jax.tree.map(lambda value: fn(path, value), tree)
    return rebuild(tree, {name: map_with_path(fn, node, join_path(path, name)) for name, node in nodes.items()})


def partition(tree: Tree, chosen: Callable[[TreePath, Any], bool]) -> tuple[Tree, Tree]:
    """Splits a tree in two: the leaves for which `chosen(path, array)` is true, and all others.

    Both sides keep the kinds of the containers. A container without a leaf is dropped from a side, except that a
    container that was empty before stays on the second side. A list holds None where its leaf is on the other side.
    """
    yes, no = _partition(tree, chosen, "")
    whole = lambda side: rebuild(tree, {}) if side is _ABSENT else side
    return whole(yes), whole(no)


def _partition(tree: Tree, chosen: Callable[[TreePath, Any], bool], path: TreePath) -> tuple[Tree, Tree]:
    nodes = children(tree)
    if nodes is None:
        value = unbox(tree)
        return (tree, _ABSENT) if value is not None and chosen(path, value) else (_ABSENT, tree)
    if not nodes:
        return _ABSENT, tree
    pairs = {name: _partition(node, chosen, join_path(path, name)) for name, node in nodes.items()}
    sides = ({name: pair[k] for name, pair in pairs.items() if pair[k] is not _ABSENT} for k in (0, 1))
    yes, no = (rebuild(tree, side) if side else _ABSENT for side in sides)
    return yes, no


def union(left: Tree, right: Tree, path: TreePath = "") -> Tree:
    """Joins the two sides of a `partition`. The containers have the kinds of those in `right`.

    Raises:
        ValueError: a leaf is on both sides.
    """
    if left is None or right is None:
        return right if left is None else left
    left_nodes, right_nodes = children(left), children(right)
    if left_nodes is None or right_nodes is None:
        raise JloraValueError(
            "join", f"{path or 'the tree'} has a leaf on both sides.", [], "pass the two results of one jlora.split."
        )
    nodes = dict(right_nodes)
    for name, node in left_nodes.items():
        nodes[name] = union(node, right_nodes[name], join_path(path, name)) if name in right_nodes else node
    return rebuild(right, nodes)
