"""Lookups: rows of a table are looked up in one factor and multiplied with the other; a stack is indexed as a view."""

from typing import Any

import jax
import jax.numpy as jnp

from jlora.transform import jaxprs
from jlora.transform.kernel import NO_AXES, AdaptedKernel, Factor
from jlora.transform.registry import Call, register_rule
from jlora.tree.layouts import product


@register_rule("gather", operands=0)
def gather(call: Call, w: AdaptedKernel, indices: Any) -> Any:
    """Rows of a table: the same gather on the factor that has the rows. One of a stack: a gather on both factors."""
    lookup = _Lookup(w, jaxprs.gather(call.equation))
    y = call(w.kernel, indices)
    if lookup.is_view():
        return w.view(y, lambda f: lookup.factor(call, f, indices, y.ndim), lookup.axes(y.ndim))
    roles = ["v" if n in lookup.indexed else "o" for n in range(w.ndim)]

    def low_rank(a: Factor, b: Factor) -> Any:
        a, b = (lookup.factor(call, f, indices, y.ndim) for f in (a, b))
        return jnp.broadcast_to(product(a.astype(y.dtype), b.astype(y.dtype)), y.shape)

    return y + call.apply_factors(w, roles, low_rank)


class _Lookup:
    """A gather, seen from the kernel's axes.

    Attributes:
        indexed: axes that indices choose along.
        kept: axes that are slices in the result.
    """

    def __init__(self, w: AdaptedKernel, how: jaxprs.Gather) -> None:
        self.w, self.how, dims = w, how, how.dimensions
        self.indexed = {*dims.start_index_map, *dims.operand_batching_dims}
        gone = (*dims.collapsed_slice_dims, *dims.operand_batching_dims)
        self.kept = [n for n in range(w.ndim) if n not in gone]

    def is_view(self) -> bool:
        """Whether the result is a kernel: a choice along a later axis, or of a stack; else it is rows of a table."""
        has = [self._indexed_in(factor) for factor in self.w.factors]
        in_stack = all(all(found) for found in has) and (len(self.kept) > 1 or any(has))
        return 0 not in self.indexed or in_stack

    def _indexed_in(self, factor: Factor) -> set[bool]:
        """Whether a factor has the indexed axes; both answers where it has some of them."""
        applies = self.w.applies(factor)
        return {applies[n] for n in self.indexed if self.w.shape[n] != 1}

    def axes(self, ndim: int) -> list[frozenset[int]]:
        """For every axis of the result, the axes in the tree that it contains."""
        # Along the first axis one of a stack is chosen, and the stack's axis is gone.
        chosen = NO_AXES.union(*(self.w.axes[n] for n in self.indexed)) if 0 not in self.indexed else NO_AXES
        axes = [chosen] * ndim
        for n, place in zip(self.kept, self.how.dimensions.offset_dims, strict=True):
            axes[place] = chosen if n in self.indexed else self.w.axes[n]
        return axes

    def factor(self, call: Call, factor: Factor, indices: Any, ndim: int) -> Factor:
        """A factor aligned with the result, itself gathered if it has the indexed axes."""
        dims, sizes = self.how.dimensions, self.how.slice_sizes
        found = self._indexed_in(factor)
        if len(found) > 1:
            call.refuse()
        if all(found):
            own = [size if here else 1 for here, size in zip(self.w.applies(factor), sizes, strict=True)]
            dims = dims._replace(offset_dims=(*dims.offset_dims, ndim))
            # Where an index is out of bounds the kernel's fill value is the whole answer.
            options = self.how.options | {"fill_value": 0}
            return jax.lax.gather(factor, indices, dims, [*own, factor.shape[-1]], **options)
        factor = factor[tuple(slice(0, min(n, size)) for n, size in zip(factor.shape, sizes, strict=False))]
        shape = [1] * ndim
        for n, place in zip(self.kept, dims.offset_dims, strict=True):
            shape[place] = factor.shape[n]
        return factor.reshape(*shape, factor.shape[-1])
