"""Where the leaves of a wrapped tree lie on a mesh: a kernel as its rule says, an adapter as its kernel.

A lies as W on the in axes, B as W on the out axes, the rank on every device, a stack as W's.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jlora.errors import JloraValueError
from jlora.tree import layouts
from jlora.tree.layouts import AFFIXES, A
from jlora.tree.paths import Tree, TreePath, flatten, map_with_path

Rules = Sequence[tuple[str, PartitionSpec]]


def make_mesh(shape: Mapping[str, int]) -> Mesh:
    """A mesh over the first devices there are.

    Args:
        shape: devices by axis, as {"data": 4, "model": 2}.

    Raises:
        ValueError: more devices than there are, or an axis without any.
    """
    wanted, have = int(np.prod(list(shape.values()))), jax.device_count()
    wrong = [f"{axis}={size}" for axis, size in shape.items() if size < 1]
    if not wrong and wanted > have:
        wrong = [f"{'x'.join(map(str, shape.values()))} is {wanted} devices, there are {have}"]
    if wrong:
        raise JloraValueError("make_mesh", "the mesh does not fit the devices.", wrong, "make it smaller.")
    devices = np.array(jax.devices()[:wanted]).reshape(tuple(shape.values()))
    return Mesh(devices, tuple(shape))


def shardings(params: Tree, mesh: Mesh, rules: Rules) -> Tree:
    """The sharding of every leaf of a tree.

    Args:
        params: wrapped or not, concrete or abstract.
        mesh: the devices.
        rules: (regex for a whole slash path, spec) pairs, the first match wins, what matches none is on every device.
            An axis that the mesh lacks, or that does not divide the leaf's, is left whole.
    """
    leaves = flatten(params)
    specs = {path: _spec(path, leaf, mesh, rules) for path, leaf in leaves.items() if not path.endswith(AFFIXES)}
    for path in list(specs):
        if path + A in leaves:
            specs |= _pair_specs(path, leaves, specs[path])
    return map_with_path(lambda path, _: NamedSharding(mesh, specs.get(path, PartitionSpec())), params)


def _spec(path: TreePath, leaf: Any, mesh: Mesh, rules: Rules) -> PartitionSpec:
    spec = next((spec for pattern, spec in rules if re.fullmatch(pattern, path)), PartitionSpec())
    # Rules name a kernel's own axes; what stands before them is a stack of layers.
    axes = [None] * (leaf.ndim - len(spec)) + list(spec)
    pairs = zip(axes, leaf.shape, strict=True)
    return PartitionSpec(
        *(axis if axis in mesh.shape and size % mesh.shape[axis] == 0 else None for axis, size in pairs)
    )


def _pair_specs(path: TreePath, leaves: Mapping[TreePath, Any], spec: PartitionSpec) -> dict[TreePath, PartitionSpec]:
    """The specs of a kernel's adapter."""
    trio = [leaves[path + affix] for affix in AFFIXES]
    layout = layouts.read_layout(leaves[path].shape, *(leaf.shape for leaf in trio))
    assert layout is not None, "the tree is wrapped"
    found = {}
    for affix, axes in zip(AFFIXES, layouts.pair_axes(layout), strict=True):
        found[path + affix] = PartitionSpec(*(None if axis is None else spec[axis] for axis in axes))
    return found


def place(tree: Tree, where: Tree) -> Tree:
    """Puts every leaf on its devices; on several hosts each puts its own part of what all of them hold."""

    def put(leaf: Any, sharding: NamedSharding) -> jax.Array:
        if jax.process_count() == 1:
            return jax.device_put(leaf, sharding)
        host = np.asarray(leaf)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    return jax.tree.map(put, tree, where)


def place_rows(rows: Mapping[str, np.ndarray], mesh: Mesh, axis: str = "data") -> dict[str, jax.Array]:
    """Puts this process's rows of a batch on its devices; all processes' rows together are the batch."""
    sharding = _by_rows(mesh, axis)
    return {name: jax.make_array_from_process_local_data(sharding, leaf) for name, leaf in rows.items()}


def place_batch(batch: Mapping[str, np.ndarray], mesh: Mesh, axis: str = "data") -> dict[str, jax.Array]:
    """Puts a batch that every process holds on the devices, cut along the rows."""
    return place(dict(batch), dict.fromkeys(batch, _by_rows(mesh, axis)))


def _by_rows(mesh: Mesh, axis: str) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec(axis if axis in mesh.shape else None))
