"""An optax chain for loops over a whole wrapped tree, in which frozen leaves stay bit-identical."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from jlora.tree.paths import Tree
from jlora.tree.splitting import mask
from jlora.tree.targets import Pattern
from jlora.tree.wrapping import read_layouts


def optimizer(tx: optax.GradientTransformation, params: Tree, train: Pattern = ()) -> optax.GradientTransformation:
    """Restricts an optax chain, clipping included, to the trainable leaves.

    For a loop that differentiates the whole tree, such as one with flax's `TrainState`. Global norms in `tx` are
    computed over the trainable leaves, and the optimizer state has no arrays for the others. The gradients of frozen
    leaves are not read, so XLA removes their computation. `optax.masked` alone would return the raw gradients of
    frozen leaves as their updates.

    Args:
        tx: any optax chain.
        params: a wrapped tree, concrete or abstract; gradients and parameters must have its structure.
        train: leaves to train in full in addition to the adapters, as in `split`.

    Returns:
        A transformation whose update for a frozen leaf is -0.0, the only number that changes no x, not even -0.0, when
        `optax.apply_updates` adds it. (Outside of jit, the sum on a CPU flushes subnormal numbers to zero; inside, XLA
        removes the sum.)

    Raises:
        ValueError: the tree has no adapter, or a name in `train` matches nothing.

    Examples:
        >>> params = jlora.wrap({"kernel": jnp.ones((4, 4))}, rank=2)
        >>> tx = jlora.optimizer(optax.adamw(1e-3), params)
        >>> updates, _ = tx.update(params, tx.init(params), params)  # the parameters stand for gradients
        >>> bool((optax.apply_updates(params, updates)["kernel"] == params["kernel"]).all())
        True
    """
    read_layouts("optimizer", params)
    trainable = mask(params, train)
    frozen = jax.tree.map(lambda is_trainable: not is_trainable, trainable)
    return optax.chain(optax.masked(tx, trainable), optax.masked(optax.stateless(_make_zero_updates), frozen))


def _make_zero_updates(updates: Tree, params: Tree | None) -> Tree:
    return jax.tree.map(_make_zero, updates if params is None else params)


def _make_zero(leaf: Any) -> jax.Array:
    if not jnp.issubdtype(leaf.dtype, jnp.number):  # bool, and float0: the gradient of an integer leaf
        return jnp.zeros(leaf.shape, bool)
    return -jnp.zeros(leaf.shape, leaf.dtype)
