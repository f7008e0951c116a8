"""Singular values of the updates that adapters make, and how much of its rank an adapter uses."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Int

from jlora.errors import JloraValueError, count
from jlora.tree.layouts import AFFIXES, A, Layout, rank_axis
from jlora.tree.paths import Tree, TreePath, flatten
from jlora.tree.wrapping import read_layouts

# A, B and scaling of one kernel.
Trio = tuple[Any, Any, Any]
# Elements of a kernel that are converted to float64 at a time, so that no copy of a whole kernel is made.
BLOCK = 2**16


class Overlap(NamedTuple):
    """Fractions of an update's energy inside the r leading singular directions of its kernel; r is the rank.

    Attributes:
        left: inside the left singular vectors, on the input side.
        right: inside the right singular vectors, on the output side.
    """

    left: Float[np.ndarray, "*stack"]
    right: Float[np.ndarray, "*stack"]


@dataclass(frozen=True, kw_only=True)
class Spectrum:
    """The singular values of one kernel's update, scaling * AB, for every layer of a stack.

    Attributes:
        singular_values: largest first.
        kernel_norm: Frobenius norm of the kernel itself.
        overlap: with the kernel's leading directions; None if it was not requested.
    """

    singular_values: Float[np.ndarray, "*stack rank"]
    kernel_norm: Float[np.ndarray, "*stack"]
    overlap: Overlap | None = None

    @property
    def effective_rank(self) -> Float[np.ndarray, "*stack"]:
        """The exponential of the entropy of the singular values divided by their sum; 0 if there is no update.

        Source:
            Roy & Vetterli 2007, "The effective rank: a measure of effective dimensionality", definition 1.
        """
        return effective_rank(self.singular_values)

    @property
    def energy(self) -> Float[np.ndarray, "*stack rank"]:
        """The fraction of the squared norm in the first n singular values, for n from 1 to the rank."""
        return energy_fractions(self.singular_values)

    @property
    def norm(self) -> Float[np.ndarray, "*stack"]:
        """Frobenius norm of the update."""
        return np.linalg.norm(self.singular_values, axis=-1)

    @property
    def relative_norm(self) -> Float[np.ndarray, "*stack"]:
        """Norm of the update divided by the norm of the kernel."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return self.norm / self.kernel_norm

    def rank_for(self, energy: float) -> Int[np.ndarray, "*stack"]:
        """The smallest rank that keeps this fraction of the energy."""
        return rank_for(self.singular_values, energy)


def spectrum(params: Tree, *, overlap: bool = False) -> dict[TreePath, Spectrum]:
    """The singular values of every kernel's update, in float64. The update itself is never computed.

    With A = Q_A R_A and B = R_B^T Q_B^T they are the singular values of the rank x rank matrix scaling * R_A R_B^T.

    Args:
        params: a wrapped tree.
        overlap: also compute how much of each update is in the leading singular directions of its kernel. This needs a
            singular value decomposition of every kernel, one layer at a time.

    Returns:
        A spectrum for every wrapped kernel, by its path.

    Raises:
        ValueError: the tree has no adapter, or is abstract.

    Source:
        Hu et al. 2021, arXiv:2106.09685, sections 7.2 and 7.3.

    Examples:
        >>> params = jlora.wrap({"kernel": jnp.ones((2, 2))}, rank=2, alpha=4)
        >>> params |= {"kernel_lora_a": jnp.eye(2), "kernel_lora_b": jnp.diag(jnp.array([3.0, 1.0]))}
        >>> print(jlora.spectrum(params)["kernel"].singular_values)
        [6. 2.]
    """
    leaves, spectra = flatten(params, "spectrum"), {}
    for path, (trio, layout) in read_trios("spectrum", params).items():
        spectra[path] = Spectrum(
            singular_values=singular_values(*to_matrices(trio, layout)),
            kernel_norm=kernel_norms(leaves[path], layout),
            overlap=_overlap(leaves[path], trio, layout) if overlap else None,
        )
    return spectra


def read_trios(who: str, params: Tree) -> dict[TreePath, tuple[Trio, Layout]]:
    """A, B and scaling of every wrapped kernel, with the kernel's layout.

    Raises:
        ValueError: the tree has no adapter, or is abstract.
    """
    layouts, leaves = read_layouts(who, params), flatten(params)
    abstract = [repr(path) for path in layouts if isinstance(leaves[path + A], jax.ShapeDtypeStruct)]
    if abstract:
        problem = f"{count(len(abstract), 'adapter has', 'adapters have')} no values."
        raise JloraValueError(who, problem, abstract, "pass arrays, not their abstract form.")
    return {path: (get_trio(leaves, path), layout) for path, layout in layouts.items()}


def get_trio(leaves: Mapping[TreePath, Any], path: TreePath) -> Trio:
    """A, B and scaling of one kernel."""
    a, b, scaling = (leaves[path + affix] for affix in AFFIXES)
    return a, b, scaling


def to_matrices(
    trio: Trio, layout: Layout
) -> tuple[
    Float[np.ndarray, "*stack fan_in rank"], Float[np.ndarray, "*stack fan_out rank"], Float[np.ndarray, "*stack"]
]:
    """A, the transpose of B, and scaling in float64, with the stack axes first, from either form of the pair."""
    a, b, scaling = (np.asarray(leaf).astype(np.float64) for leaf in trio)
    stack = [n for n, letter in enumerate(layout) if letter == "s"]
    # In the ordered form the rank axis of b comes right after the stack axes, which are first already.
    b = np.moveaxis(b, rank_axis(layout), -1)
    a, b = (np.moveaxis(leaf, stack, range(len(stack))).reshape(*scaling.shape, -1, leaf.shape[-1]) for leaf in (a, b))
    return a, b, scaling


def singular_values(
    a: Float[np.ndarray, "*stack fan_in rank"],
    b: Float[np.ndarray, "*stack fan_out rank"],
    scaling: Float[np.ndarray, "*stack"],
) -> Float[np.ndarray, "*stack rank"]:
    """The singular values of scaling * A B^T, largest first; NaN in a layer that is not finite."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    finite = is_finite(a, b)
    factors: Any = (np.linalg.qr(np.where(finite[..., None, None], leaf, 0), mode="r") for leaf in (a, b))
    ra, rb = factors
    values = np.linalg.svd(ra @ rb.swapaxes(-1, -2), compute_uv=False)
    return np.where(finite[..., None], np.abs(scaling)[..., None] * values, np.nan)


def is_finite(*leaves: Float[np.ndarray, "*stack fan rank"]) -> Any:
    """For every layer, whether all values of the matrices are finite."""
    return np.all([np.isfinite(leaf).all((-2, -1)) for leaf in leaves], axis=0)


def effective_rank(values: Float[np.ndarray, "*stack rank"]) -> Float[np.ndarray, "*stack"]:
    """The exponential of the entropy of the values divided by their sum; 0 where all values are 0."""
    total = values.sum(-1)
    fractions = values / np.where(total == 0, 1, total)[..., None]
    entropy = -(fractions * np.log(np.where(fractions == 0, 1, fractions))).sum(-1)
    return np.where(total == 0, 0.0, np.exp(entropy))


def energy_fractions(values: Float[np.ndarray, "*stack rank"]) -> Float[np.ndarray, "*stack rank"]:
    """The fraction of the sum of squares in the first n values, for each n from 1; 1 where all values are zero."""
    # The values are divided by the largest one, so that the squares of tiny values don't underflow.
    sums = np.cumsum(np.square(values / np.where(values[..., :1] == 0, 1, values[..., :1])), -1)
    total = sums[..., -1:]
    return np.where(total == 0, 1.0, sums / np.where(total == 0, 1, total))


def rank_for(values: Float[np.ndarray, "*stack rank"], energy: float) -> Int[np.ndarray, "*stack"]:
    """The smallest rank whose singular values have this fraction of the energy."""
    return 1 + (energy_fractions(values) < energy).sum(-1)


def kernel_norms(kernel: Any, layout: Layout) -> Float[np.ndarray, "*stack"]:
    """The Frobenius norm of every layer of a kernel, computed in blocks of rows."""
    layers = _layers(kernel, layout)
    norms = np.zeros(layers.shape[: layout.count("s")])
    for index in np.ndindex(*norms.shape):
        layer = layers[index]
        step = max(1, BLOCK * len(layer) // layer.size)
        blocks = (layer[n : n + step].astype(np.float64) for n in range(0, len(layer), step))
        norms[index] = math.sqrt(sum(float(np.square(block).sum()) for block in blocks))
    return norms


def _layers(kernel: Any, layout: Layout) -> np.ndarray:
    """A view of a kernel with its stack axes first."""
    stack = [n for n, letter in enumerate(layout) if letter == "s"]
    return np.moveaxis(np.asarray(kernel), stack, range(len(stack)))


def _overlap(kernel: Any, trio: Trio, layout: Layout) -> Overlap:
    a, b, _ = to_matrices(trio, layout)
    inner, outer = ([n for n, letter in enumerate(layout.replace("s", "")) if letter in kind] for kind in ("iv", "o"))
    layers, rank = _layers(kernel, layout), a.shape[-1]
    fractions = np.zeros((2, *a.shape[:-2]))
    for index in np.ndindex(*a.shape[:-2]):
        wide = layers[index].astype(np.float64).transpose(*inner, *outer).reshape(a.shape[-2], b.shape[-2])
        u, _, vt = np.linalg.svd(wide, full_matrices=False)
        (qa, ra), (qb, rb) = np.linalg.qr(a[index]), np.linalg.qr(b[index])
        core = ra @ rb.T
        total = np.square(core).sum() or 1.0
        inside = u[:, :rank].T @ qa @ core, core @ (vt[:rank] @ qb).T
        fractions[(slice(None), *index)] = [np.square(part).sum() / total for part in inside]
    return Overlap(*fractions)
