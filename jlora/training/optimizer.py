"""An optax chain for loops over a whole wrapped tree, in which frozen leaves stay frozen to the bit."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from jlora.tree.paths import Tree
from jlora.tree.splitting import mask
from jlora.tree.targets import Pattern
from jlora.tree.wrapping import read_layouts


def optimizer(tx: optax.GradientTransformation, params: Tree, train: Pattern = ()) -> optax.GradientTransformation:
    """Restricts a whole optax chain, clipping included, to the leaves that train.

    For a loop that differentiates the whole tree, as flax's `TrainState` does. Global norms in `tx` are taken
    over the leaves that train, the state holds nothing for the others, and since no frozen leaf's gradient is
    read, XLA drops its computation. `optax.masked` alone would hand the raw gradients of frozen leaves on as
    their updates.

    Args:
        tx: any optax chain.
        params: a wrapped tree, concrete or abstract; gradients and parameters must have its structure.
        train: leaves trained in full beside the adapters, as in `split`.

    Returns:
        A transformation whose update for a frozen leaf is -0.0: the one number that leaves every x as it is, -0.0
        included, when `optax.apply_updates` adds it. (Outside of jit, a sum on the CPU flushes subnormal numbers to
        zero; inside, XLA drops the sum.)

    Raises:
        ValueError: the tree has no adapter, or a name in `train` matches nothing.
    """
    read_layouts("optimizer", params)
    trains = mask(params, train)
    frozen = jax.tree.map(lambda trained: not trained, trains)
    return optax.chain(optax.masked(tx, trains), optax.masked(optax.stateless(_stay), frozen))


def _stay(updates: Tree, params: Tree | None) -> Tree:
    return jax.tree.map(_nothing, updates if params is None else params)


def _nothing(leaf: Any) -> jax.Array:
    if not jnp.issubdtype(leaf.dtype, jnp.number):  # bool, and float0: the gradient of an integer leaf
        return jnp.zeros(leaf.shape, bool)
    return -jnp.zeros(leaf.shape, leaf.dtype)
