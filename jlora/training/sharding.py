"""Shardings for a wrapped tree: kernels follow the rules, and each adapter follows its kernel.

A is sharded like W along the in axes, B like W along the out axes, both like W along stack axes. The rank axis is
replicated.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jlora.errors import JloraValueError
from jlora.tree.layouts import AFFIXES, A, pair_axes, read_layout
from jlora.tree.paths import Tree, TreePath, flatten, map_with_path

Rules = Sequence[tuple[str, PartitionSpec]]


def make_mesh(shape: Mapping[str, int]) -> Mesh:
    """A mesh over the first devices that JAX reports.

    Args:
        shape: devices by axis, as {"data": 4, "model": 2}.

    Raises:
        ValueError: the mesh has more devices than available, or an axis without devices.
    """
    size, available = int(np.prod(list(shape.values()))), jax.device_count()
    wrong = [f"{axis}={devices}" for axis, devices in shape.items() if devices < 1]
    if not wrong and size > available:
        wrong = [f"{'x'.join(map(str, shape.values()))} needs {size} devices, {available} available"]
    if wrong:
        raise JloraValueError("make_mesh", "the mesh does not fit the devices.", wrong, "make it smaller.")
    devices = np.array(jax.devices()[:size]).reshape(tuple(shape.values()))
    return Mesh(devices, tuple(shape))


def shardings(params: Tree, mesh: Mesh, rules: Rules) -> Tree:
    """The sharding of every leaf of a tree.

    Args:
        params: wrapped or not, concrete or abstract.
        mesh: the devices.
        rules: pairs of a regular expression for a whole slash path and a spec. The first match wins; a leaf that
            matches no rule is replicated. An axis is not sharded where the mesh lacks the axis of the spec, or its
            size doesn't divide the leaf's.
    """
    leaves = flatten(params)
    specs = {path: _spec(path, leaf, mesh, rules) for path, leaf in leaves.items() if not path.endswith(AFFIXES)}
    for path in list(specs):
        if path + A in leaves:
            specs |= _pair_specs(path, leaves, specs[path])
    return map_with_path(lambda path, _: NamedSharding(mesh, specs.get(path, PartitionSpec())), params)


def _spec(path: TreePath, leaf: Any, mesh: Mesh, rules: Rules) -> PartitionSpec:
    spec = next((spec for pattern, spec in rules if re.fullmatch(pattern, path)), PartitionSpec())
    # A spec is for the axes of one kernel; any axes before them are a stack of layers.
    axes = [None] * (leaf.ndim - len(spec)) + list(spec)
    pairs = zip(axes, leaf.shape, strict=True)
    return PartitionSpec(
        *(axis if axis in mesh.shape and size % mesh.shape[axis] == 0 else None for axis, size in pairs)
    )


def _pair_specs(path: TreePath, leaves: Mapping[TreePath, Any], spec: PartitionSpec) -> dict[TreePath, PartitionSpec]:
    """The specs of a kernel's adapter."""
    trio = [leaves[path + affix] for affix in AFFIXES]
    layout = read_layout(leaves[path].shape, *(leaf.shape for leaf in trio))
    assert layout is not None, "the tree is wrapped"
    specs = {}
    for affix, axes in zip(AFFIXES, pair_axes(layout), strict=True):
        specs[path + affix] = PartitionSpec(*(None if axis is None else spec[axis] for axis in axes))
    return specs


def place(tree: Tree, leaf_shardings: Tree) -> Tree:
    """Puts every leaf on its devices. All processes pass the same tree, and each places the part for its devices."""

    def put(leaf: Any, sharding: NamedSharding) -> jax.Array:
        if jax.process_count() == 1:
            return jax.device_put(leaf, sharding)
        host = np.asarray(leaf)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    return jax.tree.map(put, tree, leaf_shardings)


def place_rows(rows: Mapping[str, np.ndarray], mesh: Mesh, axis: str = "data") -> dict[str, jax.Array]:
    """Puts this process's rows of a batch on its devices; the rows of all processes form the batch."""
    sharding = _row_sharding(mesh, axis)
    return {name: jax.make_array_from_process_local_data(sharding, leaf) for name, leaf in rows.items()}


def place_batch(batch: Mapping[str, np.ndarray], mesh: Mesh, axis: str = "data") -> dict[str, jax.Array]:
    """Puts a batch, the same one in every process, on the devices, sharded along the rows."""
    return place(dict(batch), dict.fromkeys(batch, _row_sharding(mesh, axis)))


def _row_sharding(mesh: Mesh, axis: str) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec(axis if axis in mesh.shape else None))
