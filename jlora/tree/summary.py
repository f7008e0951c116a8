"""Counts of the trainable parameters of a wrapped tree, as a table."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jlora.tree.layouts import AFFIXES, Layout, max_rank
from jlora.tree.paths import Tree, TreePath, flatten
from jlora.tree.splitting import make_trainable_test
from jlora.tree.targets import Pattern
from jlora.tree.wrapping import is_adapter_leaf, read_layouts


class SummaryRow(NamedTuple):
    """One kernel with an adapter, or one leaf trained in full (rank and scaling are None).

    Attributes:
        path: slash path of the kernel or leaf.
        shape: its shape.
        rank: columns of A.
        scaling: alpha / rank, the first one of a stack; None where the tree is abstract.
        trainable: number of trainable parameters.
        total: number of parameters of the kernel or leaf itself.
        max_rank: the highest rank that the kernel can have, the smaller of its in and out sizes; None if rank is None.
    """

    path: TreePath
    shape: tuple[int, ...]
    rank: int | None
    scaling: float | None
    trainable: int
    total: int
    max_rank: int | None = None


class Summary(NamedTuple):
    """The trainable parameters of a wrapped tree.

    `str()` of it is a table, in which "(max)" marks a rank that is the highest its kernel can have.

    Attributes:
        rows: one for every kernel with an adapter and every leaf trained in full.
        trainable: number of trainable parameters.
        total: number of parameters of the base, without adapters.
    """

    rows: tuple[SummaryRow, ...]
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
            percent = f"{100 * row.trainable / row.total:.2f} %"
            cells.append((row.path, " x ".join(map(str, row.shape)), rank, scaling, f"{row.trainable:,}", percent))
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
    """Counts the trainable parameters of every kernel, with its shape, rank and scaling.

    Args:
        params: a wrapped tree, concrete or abstract.
        train: leaves trained in full, as in `split`.

    Raises:
        ValueError: the tree has no adapter, or a name in `train` matches nothing.

    Examples:
        >>> print(jlora.summary(jlora.wrap({"dense": {"kernel": jnp.ones((784, 128))}}, rank=8)))
        path          shape      rank  scaling  parameters  trained
        dense/kernel  784 x 128     8        1       7,296   7.27 %
        trainable 7,296 / total 100,352 (7.27 %)
    """
    layouts = read_layouts("summary", params)
    leaves = flatten(params)
    is_trainable = make_trainable_test("summary", params, train)
    rows = [
        _make_row(path, leaves, layouts.get(path))
        for path in leaves
        if path in layouts or (is_trainable(path, None) and not is_adapter_leaf(path))
    ]
    total = sum(math.prod(value.shape) for path, value in leaves.items() if not is_adapter_leaf(path))
    return Summary(tuple(rows), sum(row.trainable for row in rows), total)


def _make_row(path: TreePath, leaves: Mapping[TreePath, Any], layout: Layout | None) -> SummaryRow:
    shape = tuple(leaves[path].shape)
    size = math.prod(shape)
    if layout is None:
        return SummaryRow(path, shape, None, None, size, size)
    a, b, scaling = (leaves[path + affix] for affix in AFFIXES)
    first_scaling = None if isinstance(scaling, jax.ShapeDtypeStruct) else float(jnp.ravel(scaling)[0])
    trainable = math.prod(a.shape) + math.prod(b.shape)
    return SummaryRow(path, shape, a.shape[-1], first_scaling, trainable, size, max_rank(shape, layout))
