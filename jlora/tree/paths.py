"""Walking nested trees of parameters: containers, slash paths, and the two ways to cut and join a tree.

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
TreePath = str

_ABSENT = object()

# Working code: tests run it. It holds for every pytree, since the dict's order does not matter to it.
AS_DICT = """\
give jlora the tree's arrays as a dict, and the function its tree back:
    keys, treedef = jax.tree_util.tree_flatten_with_path(tree)
    names = [jax.tree_util.keystr(key, simple=True, separator="/") for key, _ in keys]
    params = {name: leaf for name, (_, leaf) in zip(names, keys)}
    fn_of_dict = lambda params, *args: fn(jax.tree.unflatten(treedef, [params[name] for name in names]), *args)"""


def children(tree: Tree) -> dict[Any, Tree] | None:
    """The named children of a container, None for a leaf.

    Children of a list or a tuple, a NamedTuple too, are named by their positions.
    """
    if isinstance(tree, Mapping):
        # nnx.State wraps its nested mappings anew on every access; the raw ones keep the tree's structure as it is.
        return dict(getattr(tree, "raw_mapping", tree))
    if isinstance(tree, list | tuple):
        return dict(enumerate(tree))
    if tree is None or isinstance(tree, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct):
        return None
    fields = _fields(tree)
    if fields is not None and len(fields) == 1:
        (only,) = fields.values()
        # A field that is None has lost its array to the other side of a `partition`: no box, then.
        return fields if only is None or children(only) is not None else None
    return fields


def _fields(node: Any) -> dict[Any, Any] | None:
    """The children of an object of a registered class by name, None for any other object."""
    found, _ = _one_level(node)
    if len(found) == 1 and not found[0][0]:
        return None
    names = [jax.tree_util.keystr(keys, simple=True) for keys, _ in found]
    if len(set(names)) < len(names):
        return dict(enumerate(child for _, child in found))
    return dict(zip(names, (child for _, child in found), strict=True))


def _one_level(node: Any) -> tuple[list[tuple[Any, Any]], Any]:
    return jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda child: child is not node)


def rebuild(like: Tree, nodes: Mapping[Any, Tree]) -> Tree:
    """A container of the same kind as `like` that holds `nodes`.

    Only a mapping takes names that `like` does not have. Where another container lacks a node it holds None.

    Raises:
        ValueError: new names for a container that is not a mapping.
    """
    if isinstance(like, dict):
        # A copy keeps what a subclass holds besides: defaultdict's factory.
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
    return jax.tree.unflatten(_one_level(like)[1], items)


def unbox(leaf: Leaf) -> Any:
    """The array in a leaf, boxed or plain; None if the leaf holds none, as a Python number does."""
    values = jax.tree.leaves(leaf)
    return values[0] if len(values) == 1 and hasattr(values[0], "shape") else None


def box(like: Leaf, value: Any, axes: tuple[int | None, ...]) -> Leaf:
    """Puts `value` in a box of the same kind as `like`.

    Args:
        like: the leaf beside which the new one will stand.
        value: an array, or its abstract form.
        axes: for every axis of `value` the axis of `like` it stands for, or None. A box that names its axes (linen's
            Partitioned) hands the names on, so sharding rules hold for the new leaf too.
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
        ValueError: two arrays have one path, as those of the keys "a/b" and "a" -> "b" do, or of 0 and "0".
    """
    pairs = list(_walk(tree, ""))
    leaves = dict(pairs)
    if len(leaves) < len(pairs):
        refuse_same_paths(who, [path for path, _ in pairs])
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


def refuse_same_paths(who: str, paths: Iterable[TreePath]) -> None:
    """Raises where several arrays have one slash path.

    Raises:
        ValueError: all such paths are listed.
    """
    same = [f"{path!r}  {number} arrays" for path, number in Counter(paths).items() if number > 1]
    if same:
        problem = f"{count(len(same), 'slash path')} of the tree with several arrays."
        fix = 'rename keys: "a/b" beside "a" -> "b", or 0 beside "0", have one path.'
        raise JloraValueError(who, problem, same, fix)


def read_arrays(who: str, tree: Tree, name: str = "params") -> dict[TreePath, Any]:
    """The arrays of a tree that a public function was given, by slash path.

    Args:
        who: the public function.
        tree: what it was given.
        name: of the argument.

    Raises:
        TypeError: it is not a tree: None, a number, a function.
        ValueError: it has no arrays, or two of them have one path.
    """
    leaves = flatten(tree, who)
    if not leaves and children(tree) is None:
        kind = "None" if tree is None else f"of type {type(tree).__name__}"
        fix = "pass the model's parameters: nested dicts of arrays."
        raise JloraTypeError(who, f"{name} is {kind}, not a tree of arrays.", [], fix)
    if not leaves:
        raise JloraValueError(who, "the tree has no arrays.", [], "pass the model's parameters.")
    return leaves


def places(tree: Tree, path: TreePath = "") -> dict[TreePath, tuple[Tree, Any]]:
    """For every array of a tree, by slash path, the container it is in and its name there."""
    found: dict[TreePath, tuple[Tree, Any]] = {}
    for name, node in (children(tree) or {}).items():
        where = join_path(path, name)
        found |= {where: (tree, name)} if children(node) is None else places(node, where)
    return found


def edit(tree: Tree, change: Callable[[TreePath, dict[Any, Tree]], Mapping[Any, Tree]], path: TreePath = "") -> Tree:
    """Rebuilds a tree from the leaves up; `change` gets every container's path and children and gives new children."""
    nodes = children(tree)
    if nodes is None:
        return tree
    edited = {name: edit(node, change, join_path(path, name)) for name, node in nodes.items()}
    return rebuild(tree, change(path, edited))


def map_with_path(fn: Callable[[TreePath, Any], Any], tree: Tree, path: TreePath = "") -> Tree:
    """Maps arrays, with their slash paths, to whatever `fn` gives; boxes are kept."""
    nodes = children(tree)
    if nodes is None:
        return jax.tree.map(lambda value: fn(path, value), tree)
    return rebuild(tree, {name: map_with_path(fn, node, join_path(path, name)) for name, node in nodes.items()})


def partition(tree: Tree, chosen: Callable[[TreePath, Any], bool]) -> tuple[Tree, Tree]:
    """Cuts a tree in two: the leaves for which `chosen(path, array)` holds, and all the rest.

    Both sides keep the containers' kinds. A container left without a leaf is dropped, except one that was empty
    before, which stays with the rest; a place in a list holds None where the leaf went to the other side.
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
    """Glues what `partition` cut. The containers' kinds are those of `right`.

    Raises:
        ValueError: a leaf stands on both sides.
    """
    if left is None or right is None:
        return right if left is None else left
    ours, theirs = children(left), children(right)
    if ours is None or theirs is None:
        raise JloraValueError(
            "join", f"{path or 'the tree'} has a leaf on both sides.", [], "pass the two halves of one split."
        )
    nodes = dict(theirs)
    for name, node in ours.items():
        nodes[name] = union(node, theirs[name], join_path(path, name)) if name in theirs else node
    return rebuild(right, nodes)
