"""Gives adapters other ranks: the best update of a lower rank, in closed form."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from jlora.adapters.spectrum import is_finite, rank_for, read_trios, singular_values, to_matrices
from jlora.errors import JloraTypeError, JloraValueError, count
from jlora.tree.layouts import A, B, Layout, pair_shapes, rank_axis
from jlora.tree.paths import Tree, TreePath, flatten, map_with_path
from jlora.tree.targets import check_matches, make_matcher, split_pattern
from jlora.tree.wrapping import with_ranks


def resize(
    params: Tree,
    *,
    rank: int | Mapping[str | tuple[str, ...], int] | None = None,
    energy: float | None = None,
) -> Tree:
    """Changes the rank of every adapter. The new update is the best one of that rank in the Frobenius norm.

    ::

        {"kernel": f32[784,128], "kernel_lora_a": f32[784,64], "kernel_lora_b": f32[64,128], ...}

        {"kernel": f32[784,128], "kernel_lora_a": f32[784,5], "kernel_lora_b": f32[5,128], ...}

    The truncated singular value decomposition of AB is split evenly into U sqrt(S) and sqrt(S) V^T. The scalings stay
    the same. An adapter whose rank is raised is padded with zeros, which stay zero in training.

    Args:
        params: a wrapped tree.
        rank: one rank for all kernels, or ranks by path or pattern as in `wrap`'s targets. The first match wins; a
            kernel that no pattern matches keeps its rank.
        energy: instead of a rank, the fraction of each update's squared norm to keep, above 0 and up to 1. Each kernel
            gets the smallest rank that keeps it; a stack gets the largest rank that one of its layers needs.

    Returns:
        The tree with the new adapters. The base is not copied.

    Raises:
        ValueError: neither or both of rank and energy are given, or one is out of range; a pattern matches no wrapped
            kernel; the tree has no adapter, or an adapter has values that are not finite.
        TypeError: a rank is not an int.

    Source:
        Eckart & Young 1936, doi:10.1007/BF02288367.

    Examples:
        >>> small = jlora.resize(jlora.wrap({"kernel": jnp.ones((784, 128))}, rank=64), rank=5)
        >>> small["kernel_lora_a"].shape, small["kernel_lora_b"].shape
        ((784, 5), (5, 128))
    """
    if (rank is None) == (energy is None):
        problem = f"{'neither of rank and energy is' if rank is None else 'both of rank and energy are'} given."
        raise JloraValueError("resize", problem, [], "pass one: rank=8, or energy=0.99.")
    trios, leaves = read_trios("resize", params), flatten(params)
    matrices = {path: to_matrices(trio, layout) for path, (trio, layout) in trios.items()}
    wrong = [repr(path) for path, (a, b, _) in matrices.items() if not is_finite(a, b).all()]
    if wrong:
        problem = f"{count(len(wrong), 'adapter has', 'adapters have')} values that are not finite."
        raise JloraValueError("resize", problem, wrong, "use a checkpoint from before training diverged.")
    current = {path: a.shape[-1] for path, (a, _, _) in matrices.items()}
    if energy is None:
        ranks = _match_ranks(rank, current)
        limits = {path: min(a.shape[-2], b.shape[-2]) for path, (a, b, _) in matrices.items()}
        _check_ranks(ranks, limits)
    else:
        if not 0 < energy <= 1:
            raise JloraValueError("resize", f"energy is {energy}.", [], "pass a fraction above 0 and up to 1.")
        ranks = {path: int(rank_for(singular_values(*three), energy).max()) for path, three in matrices.items()}
    new: dict[TreePath, Any] = {}
    for path, (trio, layout) in trios.items():
        if ranks[path] < current[path]:
            pair = _truncate(*matrices[path][:2], ranks[path])
            for affix, leaf, old in zip((A, B), _to_leaves(pair, leaves[path].shape, layout), trio, strict=False):
                new[path + affix] = jnp.asarray(leaf, old.dtype)
    raised = {path: ranks[path] for path in trios if ranks[path] > current[path]}
    return with_ranks(map_with_path(lambda path, leaf: new.get(path, leaf), params), raised)


def _match_ranks(rank: Any, current: Mapping[TreePath, int]) -> dict[TreePath, Any]:
    """The rank of each kernel: the entry with its exact path, else the first pattern that matches, else its own."""
    if not isinstance(rank, Mapping):
        return dict.fromkeys(current, rank)
    patterns = {pattern: n for pattern, n in rank.items() if pattern not in current}
    names = [name for pattern in patterns for name in split_pattern(pattern)]
    check_matches("resize", names, list(current), "target", "wrapped kernel")
    tests = [(make_matcher(pattern), n) for pattern, n in patterns.items()]
    first = {path: next((n for test, n in tests if test(path)), old) for path, old in current.items()}
    return first | {path: n for path, n in rank.items() if path in current}


def _check_ranks(ranks: Mapping[TreePath, Any], limits: Mapping[TreePath, int]) -> None:
    wrong = [f"{path!r}  {n!r}" for path, n in ranks.items() if not isinstance(n, int) or isinstance(n, bool)]
    if wrong:
        raise JloraTypeError("resize", "the rank must be an int.", wrong, "pass a whole number from 1.")
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


def _to_leaves(
    pair: tuple[np.ndarray, np.ndarray], shape: tuple[int, ...], layout: Layout
) -> tuple[Float[np.ndarray, "..."], Float[np.ndarray, "..."]]:
    """The inverse of `to_matrices`: A and B in the form that the kernel's layout requires."""
    leaves = []
    for matrix, kinds in zip(pair, ("iv", "o"), strict=True):
        order = [n for kind in ("s", kinds) for n, letter in enumerate(layout) if letter in kind]
        full = matrix.reshape([*(shape[n] for n in order), matrix.shape[-1]])
        leaves.append(full.transpose([*(order.index(n) for n in sorted(order)), len(order)]))
    shape_a, shape_b, _ = pair_shapes(shape, layout, pair[0].shape[-1])
    return leaves[0].reshape(shape_a), np.moveaxis(leaves[1], -1, rank_axis(layout)).reshape(shape_b)
