"""Walking nested trees of parameters: containers, slash paths, and the two ways to cut and glue a tree.

A container is a mapping (dict, FrozenDict, nnx.State), a list or a tuple; everything else is a leaf. A leaf may
be boxed: one array in a small pytree of its own (nnx.Variable, linen's Partitioned).
"""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import jax

Tree = Any
Leaf = Any
Path = str

_ABSENT = object()


def children(tree: Tree) -> dict[Any, Tree] | None:
    """The named children of a container, None for a leaf."""
    if isinstance(tree, Mapping):
        # nnx.State wraps its nested mappings anew on every access; the raw ones keep the tree's structure as it is.
        return dict(getattr(tree, "raw_mapping", tree))
    if isinstance(tree, list | tuple):
        return dict(enumerate(tree))
    return None


def rebuild(like: Tree, nodes: Mapping[Any, Tree]) -> Tree:
    """A container of the same kind as `like` that holds `nodes`."""
    if isinstance(like, dict):
        # A copy keeps what a subclass holds besides: defaultdict's factory.
        new = copy.copy(like)
        new.clear()
        new.update(nodes)
        return new
    if isinstance(like, Mapping):
        return type(like)(nodes)  # type: ignore[call-arg]
    items = [nodes.get(index) for index in range(len(like))]
    return type(like)(*items) if hasattr(like, "_fields") else type(like)(items)


def unbox(leaf: Leaf) -> Any:
    """The array in a leaf, boxed or plain; None if the leaf holds none, as a Python number does."""
    values = jax.tree.leaves(leaf)
    return values[0] if len(values) == 1 and hasattr(values[0], "shape") else None


def box(like: Leaf, value: Any, axes: tuple[int | None, ...]) -> Leaf:
    """Puts `value` in a box of the same kind as `like`.

    Args:
      like: the leaf beside which the new one will stand.
      value: an array, or its abstract form.
      axes: for every axis of `value` the axis of `like` it stands for, or None. A box that names its axes
        (linen's Partitioned) hands the names on, so sharding rules hold for the new leaf too.
    """
    boxed = jax.tree.unflatten(jax.tree.structure(like), [value])
    names = getattr(like, "names", None)
    if isinstance(names, tuple) and hasattr(boxed, "replace"):
        boxed = boxed.replace(names=tuple(None if axis is None else names[axis] for axis in axes))
    return boxed


def join_path(path: Path, name: Any) -> Path:
    return f"{path}/{name}" if path else str(name)


def flatten(tree: Tree, path: Path = "") -> dict[Path, Any]:
    """All arrays of a tree by slash path, unboxed, in the tree's own order.

    >>> list(flatten({"dense": {"kernel": np.ones((2, 3)), "bias": np.ones(3)}}))
    ['dense/kernel', 'dense/bias']
    """
    nodes = children(tree)
    if nodes is None:
        value = unbox(tree)
        return {} if value is None else {path: value}
    return {p: leaf for name, node in nodes.items() for p, leaf in flatten(node, join_path(path, name)).items()}


def edit(tree: Tree, change: Callable[[Path, dict[Any, Tree]], Mapping[Any, Tree]], path: Path = "") -> Tree:
    """Rebuilds a tree from the leaves up; `change` gets every container's path and children and gives new children."""
    nodes = children(tree)
    if nodes is None:
        return tree
    edited = {name: edit(node, change, join_path(path, name)) for name, node in nodes.items()}
    return rebuild(tree, change(path, edited))


def map_with_path(fn: Callable[[Path, Any], Any], tree: Tree, path: Path = "") -> Tree:
    """Maps arrays, with their slash paths, to whatever `fn` gives; boxes are kept."""
    nodes = children(tree)
    if nodes is None:
        return jax.tree.map(lambda value: fn(path, value), tree)
    return rebuild(tree, {name: map_with_path(fn, node, join_path(path, name)) for name, node in nodes.items()})


def partition(tree: Tree, chosen: Callable[[Path, Any], bool]) -> tuple[Tree, Tree]:
    """Cuts a tree in two: the leaves for which `chosen(path, array)` holds, and all the rest.

    Both sides keep the containers' kinds. A container left without a leaf is dropped, except one that was empty
    before, which stays with the rest; a place in a list holds None where the leaf went to the other side.
    """
    yes, no = _partition(tree, chosen, "")
    whole = lambda side: rebuild(tree, {}) if side is _ABSENT else side
    return whole(yes), whole(no)


def _partition(tree: Tree, chosen: Callable[[Path, Any], bool], path: Path) -> tuple[Tree, Tree]:
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


def union(left: Tree, right: Tree, path: Path = "") -> Tree:
    """Glues what `partition` cut. The containers' kinds are those of `right`.

    Raises:
      ValueError: a leaf stands on both sides.
    """
    if left is None or right is None:
        return right if left is None else left
    ours, theirs = children(left), children(right)
    if ours is None or theirs is None:
        raise ValueError(
            f"join: {path or 'the tree'} has a leaf on both sides.\nFix: pass the two halves of one split."
        )
    nodes = dict(theirs)
    for name, node in ours.items():
        nodes[name] = union(node, theirs[name], join_path(path, name)) if name in theirs else node
    return rebuild(right, nodes)
