"""The value that stands for an adapted kernel while a function is evaluated."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
from jaxtyping import Array, Float

from jlora.tree.layouts import merge_kernel

Factor = Float[Array, "*axes rank"]
Axes = frozenset[int]
NO_AXES: Axes = frozenset()


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class AdaptedKernel:
    """A view of a kernel, together with the same view of its low-rank factors.

    Its value is kernel + sum over rank of a * b, broadcast. The factors are aligned with the kernel: they have the
    kernel's axes, with size 1 along an axis that does not apply to a factor, and the rank last. The scaling is folded
    into b.

    Attributes:
        kernel: (*axes), the frozen kernel under this view.
        factors: a and b, each (*axes, rank). Empty while layouts are inferred: every method works for both cases, so a
            rule does not distinguish them.
        path: slash path of the kernel in the parameter tree.
        tree_ndim: number of axes of the kernel in the parameter tree.
        axes: for every axis of the view, the axes of the kernel in the tree that it contains.
    """

    kernel: Float[Array, "*axes"]
    factors: tuple[Factor, ...]
    path: str = field(metadata={"static": True})
    tree_ndim: int = field(metadata={"static": True})
    axes: tuple[Axes, ...] = field(metadata={"static": True})

    @classmethod
    def whole(cls, path: str, kernel: Any, factors: tuple[Factor, ...] = ()) -> "AdaptedKernel":
        """The kernel as it is stored in the tree."""
        return cls(kernel, factors, path, kernel.ndim, tuple(frozenset([n]) for n in range(kernel.ndim)))

    @property
    def shape(self) -> tuple[int, ...]:
        return self.kernel.shape

    @property
    def ndim(self) -> int:
        return self.kernel.ndim

    def view(self, kernel: Any, change: Callable[[Any], Any], axes: Sequence[Axes] | None = None) -> "AdaptedKernel":
        """Transforms the kernel and both factors alike.

        Args:
            kernel: the transformed kernel.
            change: does to a factor, which has the rank as one more axis at the end, what was done to the kernel.
            axes: for every axis of the new view, the axes in the tree that it contains; None where they stay the same.
        """
        factors = tuple(map(change, self.factors))
        return replace(self, kernel=kernel, factors=factors, axes=self.axes if axes is None else tuple(axes))

    def with_factors(self, kernel: Any, change: Callable[[Any, Any], tuple[Any, Any]]) -> "AdaptedKernel":
        """Replaces the kernel, and the factors by `change(a, b)`; the axes stay the same."""
        return replace(self, kernel=kernel, factors=change(*self.factors) if self.factors else ())

    def applies(self, factor: Factor) -> list[bool]:
        """For every axis of the view, whether it applies to a factor."""
        return [size == whole for size, whole in zip(factor.shape, self.shape, strict=False)]

    def dense(self) -> Float[Array, "*axes"]:
        """The kernel with its update added, which forms a matrix of the kernel's size."""
        return merge_kernel(self.kernel, *self.factors) if self.factors else self.kernel

    def split_stack(self) -> tuple[Any, tuple[Any, ...]]:
        """The arrays to scan over axis 0; a factor that all layers share is None."""
        return self.kernel, tuple(factor if len(factor) == len(self.kernel) else None for factor in self.factors)

    def layer(self, part: tuple[Any, tuple[Any, ...]]) -> "AdaptedKernel":
        """One layer of a stack, from one element of what `split_stack` gave."""
        kernel, scanned = part
        factors = tuple(w[0] if own is None else own for w, own in zip(self.factors, scanned, strict=True))
        return replace(self, kernel=kernel, factors=factors, axes=self.axes[1:])
