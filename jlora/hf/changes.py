"""Which leaves of a tree have other values than the base that they come from."""

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora.tree.paths import TreePath

Reader = Callable[[np.dtype], np.ndarray]


def changed_leaves(leaves: Mapping[TreePath, Any], base: Mapping[TreePath, Reader]) -> set[TreePath]:
    """The paths of the leaves that the base lacks, or has with other values.

    Args:
        leaves: the tree's leaves, without adapters.
        base: for each leaf of the base, a function that reads it into a dtype.
    """
    return {path for path, leaf in leaves.items() if path not in base or not has_values(leaf, base[path])}


def readers(base: Mapping[TreePath, Any]) -> dict[TreePath, Reader]:
    """The leaves of a base that is in memory, as `changed_leaves` takes them."""
    return {path: functools.partial(as_dtype, leaf) for path, leaf in base.items()}


def as_dtype(leaf: Any, dtype: np.dtype) -> np.ndarray:
    return np.asarray(leaf).astype(dtype)


def has_values(leaf: Any, read: Reader) -> bool:
    """Whether a leaf has the values of the base, in its own dtype or rounded to 16 bits and widened again."""
    dtypes = [np.dtype(leaf.dtype)]
    if dtypes[0].itemsize > 2:
        dtypes += [np.dtype(jnp.bfloat16), np.dtype(jnp.float16)]
    for dtype in dtypes:
        # Numbers too large for float16 become infinite, which is a difference and no fault.
        with np.errstate(over="ignore", invalid="ignore"):
            values = read(dtype).astype(leaf.dtype)
        if values.shape != tuple(leaf.shape):
            return False
        if all(np.array_equal(np.asarray(part), values[index]) for index, part in local_parts(leaf)):
            return True
    return False


def local_parts(leaf: Any) -> Iterator[tuple[Any, Any]]:
    """The parts of a leaf that this process has, each once, with their place in it."""
    if not isinstance(leaf, jax.Array):
        yield ..., leaf
        return
    seen = set()
    for shard in leaf.addressable_shards:
        place = tuple((axis.start, axis.stop) for axis in shard.index)
        if place not in seen:
            seen.add(place)
            yield shard.index, shard.data
