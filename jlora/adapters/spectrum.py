"""What an adapter used of its rank: singular values of its update, its best smaller form, and ranks for each kernel."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from jlora.errors import JloraTypeError, JloraValueError, count, nearest, quoted
from jlora.tree import layouts
from jlora.tree.layouts import AFFIXES, A, B, Layout
from jlora.tree.paths import Tree, TreePath, flatten, map_with_path, read_arrays
from jlora.tree.targets import check_matches, make_matcher, split_pattern
from jlora.tree.wrapping import read_layouts, with_ranks

Trio = tuple[Any, Any, Any]
BLOCK = 2**16


class Overlap(NamedTuple):
    """Shares of an update's energy inside the leading singular directions of its kernel, as many as the rank.

    Attributes:
        left: inside those of the input side.
        right: inside those of the output side.
    """

    left: Float[np.ndarray, "*stack"]
    right: Float[np.ndarray, "*stack"]


@dataclass(frozen=True, kw_only=True)
class Spectrum:
    """The singular values of one kernel's update, scaling * AB, for every layer of a stack.

    Attributes:
        singular_values: largest first.
        kernel_norm: Frobenius norm of the kernel itself.
        overlap: with the kernel's leading directions; None where it was not asked for.
    """

    singular_values: Float[np.ndarray, "*stack rank"]
    kernel_norm: Float[np.ndarray, "*stack"]
    overlap: Overlap | None = None

    @property
    def effective_rank(self) -> Float[np.ndarray, "*stack"]:
        """The entropy of the singular values as shares of their sum, as a number of equal ones; 0 for no update.

        Source:
            Roy & Vetterli 2007, "The effective rank: a measure of effective dimensionality", definition 1.
        """
        return effective_rank(self.singular_values)

    @property
    def energy(self) -> Float[np.ndarray, "*stack rank"]:
        """The share of the squared norm that the first values hold, from one of them to all."""
        return energy_of(self.singular_values)

    @property
    def norm(self) -> Float[np.ndarray, "*stack"]:
        """Frobenius norm of the update."""
        return np.linalg.norm(self.singular_values, axis=-1)

    @property
    def relative_norm(self) -> Float[np.ndarray, "*stack"]:
        """Norm of the update over that of the kernel."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return self.norm / self.kernel_norm

    def rank_for(self, energy: float) -> Int[np.ndarray, "*stack"]:
        """The smallest rank that keeps a share of the energy."""
        return rank_for(self.singular_values, energy)


def spectrum(params: Tree, *, overlap: bool = False) -> dict[TreePath, Spectrum]:
    """The singular values of every kernel's update, in float64, without forming it.

    With A = Q_A R_A and B = R_B^T Q_B^T they are those of the rank x rank matrix scaling * R_A R_B^T.

    Args:
        params: a wrapped tree.
        overlap: also tell how much of each update lies in its kernel's own leading directions. That takes a singular
            value decomposition of every kernel, one layer at a time.

    Returns:
        A spectrum for every wrapped kernel, by its path.

    Raises:
        ValueError: the tree has no adapter, or is abstract.

    Source:
        Hu et al. 2021, arXiv:2106.09685, sections 7.2 and 7.3.
    """
    leaves, found = flatten(params, "spectrum"), {}
    for path, (trio, layout) in _trios("spectrum", params).items():
        found[path] = Spectrum(
            singular_values=singular_values(*matrices(trio, layout)),
            kernel_norm=kernel_norms(leaves[path], layout),
            overlap=_overlap(leaves[path], trio, layout) if overlap else None,
        )
    return found


def _trios(who: str, params: Tree) -> dict[TreePath, tuple[Trio, Layout]]:
    """A, B and scaling of every wrapped kernel, with the kernel's layout."""
    told, leaves = read_layouts(who, params), flatten(params)
    abstract = [repr(path) for path in told if isinstance(leaves[path + A], jax.ShapeDtypeStruct)]
    if abstract:
        problem = f"{count(len(abstract), 'adapter')} without values."
        raise JloraValueError(who, problem, abstract, "pass arrays, not their abstract form.")
    return {path: (trio_of(leaves, path), layout) for path, layout in told.items()}


def trio_of(leaves: Mapping[TreePath, Any], path: TreePath) -> Trio:
    """A, B and scaling of one kernel."""
    a, b, scaling = (leaves[path + affix] for affix in AFFIXES)
    return a, b, scaling


def matrices(
    trio: Trio, layout: Layout
) -> tuple[
    Float[np.ndarray, "*stack fan_in rank"], Float[np.ndarray, "*stack fan_out rank"], Float[np.ndarray, "*stack"]
]:
    """A, B transposed, and scaling as float64 matrices, the stack's axes first, from either form of the pair."""
    a, b, scaling = (np.asarray(leaf).astype(np.float64) for leaf in trio)
    stack = [n for n, letter in enumerate(layout) if letter == "s"]
    # In the ordered form the rank stands behind the stack, which is then in front already.
    b = np.moveaxis(b, layouts.rank_axis(layout), -1)
    a, b = (np.moveaxis(leaf, stack, range(len(stack))).reshape(*scaling.shape, -1, leaf.shape[-1]) for leaf in (a, b))
    return a, b, scaling


def singular_values(
    a: Float[np.ndarray, "*stack fan_in rank"],
    b: Float[np.ndarray, "*stack fan_out rank"],
    scaling: Float[np.ndarray, "*stack"],
) -> Float[np.ndarray, "*stack rank"]:
    """Those of scaling * A B^T, largest first; NaN in a layer that is not finite."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    finite = _finite(a, b)
    factors: Any = (np.linalg.qr(np.where(finite[..., None, None], leaf, 0), mode="r") for leaf in (a, b))
    ra, rb = factors
    values = np.linalg.svd(ra @ rb.swapaxes(-1, -2), compute_uv=False)
    return np.where(finite[..., None], np.abs(scaling)[..., None] * values, np.nan)


def _finite(*leaves: Float[np.ndarray, "*stack fan rank"]) -> Any:
    return np.all([np.isfinite(leaf).all((-2, -1)) for leaf in leaves], axis=0)


def effective_rank(values: Float[np.ndarray, "*stack rank"]) -> Float[np.ndarray, "*stack"]:
    """The exponential of the entropy of the values as shares of their sum; 0 where all are."""
    total = values.sum(-1)
    shares = values / np.where(total == 0, 1, total)[..., None]
    entropy = -(shares * np.log(np.where(shares == 0, 1, shares))).sum(-1)
    return np.where(total == 0, 0.0, np.exp(entropy))


def energy_of(values: Float[np.ndarray, "*stack rank"]) -> Float[np.ndarray, "*stack rank"]:
    """The first values' share of the sum of squares, from one of them to all; 1 where all are zero."""
    # Against the largest one, so that the squares of tiny values don't vanish.
    sums = np.cumsum(np.square(values / np.where(values[..., :1] == 0, 1, values[..., :1])), -1)
    total = sums[..., -1:]
    return np.where(total == 0, 1.0, sums / np.where(total == 0, 1, total))


def rank_for(values: Float[np.ndarray, "*stack rank"], energy: float) -> Int[np.ndarray, "*stack"]:
    """The smallest rank whose values hold a share of the energy."""
    return 1 + (energy_of(values) < energy).sum(-1)


def kernel_norms(kernel: Any, layout: Layout) -> Float[np.ndarray, "*stack"]:
    """A kernel's Frobenius norms, some rows of a layer widened at a time."""
    layers = _layers(kernel, layout)
    norms = np.zeros(layers.shape[: layout.count("s")])
    for index in np.ndindex(*norms.shape):
        layer = layers[index]
        step = max(1, BLOCK * len(layer) // layer.size)
        blocks = (layer[n : n + step].astype(np.float64) for n in range(0, len(layer), step))
        norms[index] = math.sqrt(sum(float(np.square(block).sum()) for block in blocks))
    return norms


def _layers(kernel: Any, layout: Layout) -> np.ndarray:
    """A view of a kernel with its stack's axes first."""
    stack = [n for n, letter in enumerate(layout) if letter == "s"]
    return np.moveaxis(np.asarray(kernel), stack, range(len(stack)))


def _overlap(kernel: Any, trio: Trio, layout: Layout) -> Overlap:
    a, b, _ = matrices(trio, layout)
    inner, outer = ([n for n, letter in enumerate(layout.replace("s", "")) if letter in kind] for kind in ("iv", "o"))
    layers, rank = _layers(kernel, layout), a.shape[-1]
    shares = np.zeros((2, *a.shape[:-2]))
    for index in np.ndindex(*a.shape[:-2]):
        wide = layers[index].astype(np.float64).transpose(*inner, *outer).reshape(a.shape[-2], b.shape[-2])
        u, _, vt = np.linalg.svd(wide, full_matrices=False)
        (qa, ra), (qb, rb) = np.linalg.qr(a[index]), np.linalg.qr(b[index])
        core = ra @ rb.T
        total = np.square(core).sum() or 1.0
        inside = u[:, :rank].T @ qa @ core, core @ (vt[:rank] @ qb).T
        shares[(slice(None), *index)] = [np.square(part).sum() / total for part in inside]
    return Overlap(*shares)


def resize(
    params: Tree,
    *,
    rank: int | Mapping[str | tuple[str, ...], int] | None = None,
    energy: float | None = None,
) -> Tree:
    """Gives every adapter another rank: the best update of that rank in the Frobenius norm, in closed form.

    ::

        {"kernel": f32[784,128], "kernel_lora_a": f32[784,64], "kernel_lora_b": f32[64,128], ...}

        {"kernel": f32[784,128], "kernel_lora_a": f32[784,5], "kernel_lora_b": f32[5,128], ...}

    The truncated singular value decomposition of AB is shared out evenly, U sqrt(S) and sqrt(S) V^T; scalings keep
    their values. A rank above the present one fills up with zeros, which stay zero in training.

    Args:
        params: a wrapped tree.
        rank: of every kernel, or by path or pattern as in `wrap`'s targets; a kernel that no pattern matches keeps its
            own, and the first match wins.
        energy: instead of a rank, the share of each update's squared norm to keep, above 0 and up to 1. Each kernel
            gets the smallest rank that does; a stack the largest that one of its layers needs.

    Raises:
        ValueError: neither or both of rank and energy, either out of range, a pattern that matches no wrapped kernel, a
            tree without adapters, or one with values that are not finite.
        TypeError: a rank that is no int.

    Source:
        Eckart & Young 1936, doi:10.1007/BF02288367.
    """
    if (rank is None) == (energy is None):
        problem = f"{'neither' if rank is None else 'both'} of rank and energy given."
        raise JloraValueError("resize", problem, [], "pass one: rank=8, or energy=0.99.")
    trios, leaves = _trios("resize", params), flatten(params)
    spread = {path: matrices(trio, layout) for path, (trio, layout) in trios.items()}
    wrong = [repr(path) for path, (a, b, _) in spread.items() if not _finite(a, b).all()]
    if wrong:
        problem = f"{count(len(wrong), 'adapter')} with values that are not finite."
        raise JloraValueError("resize", problem, wrong, "take one from before training diverged.")
    present = {path: a.shape[-1] for path, (a, _, _) in spread.items()}
    if energy is None:
        ranks = _asked(rank, present)
        limits = {path: min(a.shape[-2], b.shape[-2]) for path, (a, b, _) in spread.items()}
        _check_ranks(ranks, limits)
    else:
        if not 0 < energy <= 1:
            raise JloraValueError("resize", f"energy is {energy}.", [], "pass a share above 0 and up to 1.")
        ranks = {path: int(rank_for(singular_values(*three), energy).max()) for path, three in spread.items()}
    new: dict[TreePath, Any] = {}
    for path, (trio, layout) in trios.items():
        if ranks[path] < present[path]:
            pair = _truncate(*spread[path][:2], ranks[path])
            for affix, leaf, old in zip((A, B), _lay(pair, leaves[path].shape, layout), trio, strict=False):
                new[path + affix] = jnp.asarray(leaf, old.dtype)
    more = {path: ranks[path] for path in trios if ranks[path] > present[path]}
    return with_ranks(map_with_path(lambda path, leaf: new.get(path, leaf), params), more)


def _asked(rank: Any, present: Mapping[TreePath, int]) -> dict[TreePath, Any]:
    """The rank that is asked for each kernel: by its very path, else by the first pattern that matches it."""
    if not isinstance(rank, Mapping):
        return dict.fromkeys(present, rank)
    patterns = {pattern: n for pattern, n in rank.items() if pattern not in present}
    check_matches(
        "resize", [p for key in patterns for p in split_pattern(key)], list(present), "target", "wrapped kernel"
    )
    tests = [(make_matcher(pattern), n) for pattern, n in patterns.items()]
    first = {path: next((n for test, n in tests if test(path)), own) for path, own in present.items()}
    return first | {path: n for path, n in rank.items() if path in present}


def _check_ranks(ranks: Mapping[TreePath, Any], limits: Mapping[TreePath, int]) -> None:
    odd = [f"{path!r}  {n!r}" for path, n in ranks.items() if not isinstance(n, int) or isinstance(n, bool)]
    if odd:
        raise JloraTypeError("resize", "the rank must be an int.", odd, "pass a whole number from 1.")
    wrong = [f"{p!r}  rank {n}, allowed 1 to {limits[p]}" for p, n in ranks.items() if not 1 <= n <= limits[p]]
    if wrong:
        problem = f"the rank is out of range for {count(len(wrong), 'kernel')}."
        fix = "choose a rank from 1 to the smaller of the kernel's in and out sizes."
        raise JloraValueError("resize", problem, wrong, fix)


def _truncate(
    a: Float[np.ndarray, "*stack fan_in old"], b: Float[np.ndarray, "*stack fan_out old"], rank: int
) -> tuple[Float[np.ndarray, "*stack fan_in rank"], Float[np.ndarray, "*stack fan_out rank"]]:
    """The pair whose product is the truncated singular value decomposition of A B^T."""
    (qa, ra), (qb, rb) = np.linalg.qr(a), np.linalg.qr(b)
    u, s, vt = np.linalg.svd(ra @ rb.swapaxes(-1, -2))
    root = np.sqrt(s[..., None, :rank])
    return qa @ u[..., :rank] * root, qb @ vt.swapaxes(-1, -2)[..., :rank] * root


def _lay(
    pair: tuple[np.ndarray, np.ndarray], shape: tuple[int, ...], layout: Layout
) -> tuple[Float[np.ndarray, "..."], Float[np.ndarray, "..."]]:
    """What `matrices` made of a pair, turned back into the form that the kernel's layout asks for."""
    laid = []
    for matrix, kinds in zip(pair, ("iv", "o"), strict=True):
        order = [n for kind in ("s", kinds) for n, letter in enumerate(layout) if letter in kind]
        full = matrix.reshape([*(shape[n] for n in order), matrix.shape[-1]])
        laid.append(full.transpose([*(order.index(n) for n in sorted(order)), len(order)]))
    shape_a, shape_b, _ = layouts.pair_shapes(shape, layout, pair[0].shape[-1])
    return laid[0].reshape(shape_a), np.moveaxis(laid[1], -1, layouts.rank_axis(layout)).reshape(shape_b)


def gradient_norms(grads: Tree) -> dict[TreePath, float]:
    """The norm of each adapter's gradient, A's and B's together, by the kernel's path.

    B starts at zero, so at the first step A's gradient is zero and the norm is B's alone.

    Args:
        grads: the gradient of the first half of `split`; leaves trained in full are passed over.

    Raises:
        ValueError: the tree has no gradient of an adapter.
    """
    squares: dict[TreePath, float] = {}
    for path, leaf in read_arrays("gradient_norms", grads, "grads").items():
        stem = next((path[: -len(affix)] for affix in (A, B) if path.endswith(affix)), None)
        if stem is not None:
            squares[stem] = squares.get(stem, 0.0) + float(np.square(np.asarray(leaf).astype(np.float64)).sum())
    if not squares:
        fix = "pass the gradient of what jlora.split(params)[0] holds."
        raise JloraValueError("gradient_norms", "the tree has no gradient of an adapter.", [], fix)
    return {stem: math.sqrt(square) for stem, square in squares.items()}


def allocate(
    importance: Mapping[TreePath, Spectrum] | Mapping[TreePath, float],
    params: Tree,
    *,
    budget: float,
    low: int = 1,
    high: int | None = None,
) -> dict[str, int]:
    """Shares ranks out among kernels, with no more trainable parameters than one rank for all would take.

    By spectra, each further rank goes where it keeps most of the squared norm for a parameter: the best choice wherever
    the kernels are of one size. No kernel gets more than it had, as nothing is known beyond. By numbers, such as
    `gradient_norms`, ranks are in proportion to them, rounded as seats are (Sainte-Lague).

    ::

        ranks = jlora.allocate(jlora.spectrum(params), params, budget=8)
        params = jlora.wrap(jlora.unwrap(params), targets=ranks)

    Args:
        importance: a spectrum or a number from 0 for each wrapped kernel, by its path.
        params: the wrapped tree, which tells the kernels' sizes.
        budget: the rank for all that takes as many parameters.
        low: the least rank of a kernel; where its sizes allow no more, those.
        high: the most; None for no limit but the kernel's sizes.

    Returns:
        A rank for each kernel, by a pattern that matches its path alone, as `wrap` and `resize` take it.

    Raises:
        ValueError: kernels missing from `importance` or unknown, numbers that are negative or not finite or all zero,
            limits out of range, or a budget below what the least ranks take.
    """
    told, leaves = read_layouts("allocate", params), flatten(params)
    _check_importance(importance, list(told))
    whole = all(isinstance(n, int) and not isinstance(n, bool) for n in (low, low if high is None else high))
    if not whole or not 1 <= low <= (low if high is None else high):
        fix = "pass whole numbers, 1 <= low <= high."
        raise JloraValueError("allocate", "limits out of range.", [f"low {low}, high {high}"], fix)
    fans = {path: layouts.fans(tuple(leaves[path].shape), layout) for path, layout in told.items()}
    cost = {path: sum(fans[path]) * math.prod(leaves[path + AFFIXES[2]].shape) for path in told}
    most = {path: min(*fans[path], high or math.inf) for path in told}
    ranks = {path: int(min(low, most[path])) for path in told}
    left = budget * sum(cost.values()) - sum(cost[path] * n for path, n in ranks.items())
    if not (math.isfinite(budget) and left >= 0):
        problem = f"a budget of {budget} is less than rank {low} for every kernel takes, or no number."
        raise JloraValueError("allocate", problem, [], "raise budget, or lower low.")
    gains = {path: _gains(importance[path], cost[path], int(most[path])) for path in told}
    # One pass will do: gains fall with the rank, and what doesn't fit a kernel once doesn't later.
    steps = [(-gain, n, path) for path, falling in gains.items() for n, gain in enumerate(falling) if gain > 0]
    for _, n, path in sorted(steps):
        if n >= ranks[path] and cost[path] <= left:
            ranks[path] += 1
            left -= cost[path]
    return {re.escape(path): n for path, n in ranks.items()}


def _gains(importance: Any, cost: int, most: int) -> list[float]:
    """What each further rank of a kernel is worth, falling."""
    if isinstance(importance, Spectrum):
        values = importance.singular_values
        energies = np.square(values.reshape(-1, values.shape[-1])).sum(0)
        return [float(gain) / cost for gain in energies[:most]]
    return [float(importance) / (n + 0.5) for n in range(most)]


def _check_importance(importance: Mapping[TreePath, Any], paths: list[TreePath]) -> None:
    if not isinstance(importance, Mapping):
        problem = f"importance is of type {type(importance).__name__}, not a dict by the kernels' paths."
        raise JloraTypeError("allocate", problem, [], "pass spectrum(params), or gradient_norms(grads).")
    lost = [f"{path!r}  missing" for path in paths if path not in importance]
    lost += [f"{p!r}  not wrapped, nearest: {quoted(nearest(p, paths))}" for p in importance if p not in paths]
    if lost:
        fix = "pass spectrum(params), or gradient_norms of the same tree's adapters."
        raise JloraValueError("allocate", "importance and tree don't fit.", lost, fix)
    if len({isinstance(value, Spectrum) for value in importance.values()}) > 1:
        fix = "pass one kind for all kernels."
        raise JloraTypeError("allocate", "spectra and numbers can't be compared.", [], fix)
    size = {p: float(np.sum(v.norm)) if isinstance(v, Spectrum) else float(v) for p, v in importance.items()}
    wrong = [f"{path!r}  {number}" for path, number in size.items() if not 0 <= number < math.inf]
    if wrong:
        raise JloraValueError("allocate", "importance is negative or not finite.", wrong, "pass numbers from 0.")
    if not any(size.values()):
        fix = "train for some steps first, or pass gradient norms."
        raise JloraValueError("allocate", "no kernel has any importance.", [], fix)
