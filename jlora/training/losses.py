"""Cross entropy over a large vocabulary, without the logits of more than one chunk of tokens at a time."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from jlora.errors import JloraValueError
from jlora.tree.paths import Tree

LogitsFn = Callable[[Tree, Float[Array, "chunk features"]], Float[Array, "chunk vocab"]]


def cross_entropy(
    logits_fn: LogitsFn,
    params: Tree,
    hidden: Float[Array, "*tokens features"],
    labels: Int[Array, "*tokens"],
    weights: Float[Array, "*tokens"] | Bool[Array, "*tokens"] | None = None,
    *,
    chunk: int = 512,
) -> Float[Array, ""]:
    """The mean cross entropy of `logits_fn(params, hidden)`, in chunks over tokens.

    A chunk's gradient is taken right where its logits are, in the forward pass, so they are computed once
    and are never all there at once: memory for logits is chunk x vocab, however many tokens there are. Of
    `params` only what is being differentiated gets a gradient: a frozen head costs none.

    An adapted head is adapted inside, and the loss stays outside of any adapted function, since no adapter
    can enter a rule written for plain arrays::

        features = jlora.adapt(lambda params, ids: model.apply({"params": params}, ids, method="features"))
        head = jlora.adapt(lambda params, hidden: model.apply({"params": params}, hidden, method="head"))

        def loss_fn(params, batch, key):
            return cross_entropy(head, params, features(params, batch["ids"]), batch["labels"])

    Args:
        logits_fn: gives logits for rows of `hidden`, each row by itself; must not close over what is differentiated.
        params: passed on to `logits_fn`, wrapped or not.
        hidden: features of every token.
        labels: right class of every token; not read where the weight is 0.
        weights: how much every token counts, a constant to differentiation; None means 1 for all.
        chunk: tokens to a chunk.

    Returns:
        sum(weights * losses) / sum(weights) in float32 or wider; 0 where all weights are 0.

    Raises:
        ValueError: shapes that don't fit each other, no tokens, chunk below 1.
    """
    _check(hidden, labels, weights, chunk)
    tokens = labels.size
    dtype = jnp.promote_types(hidden.dtype, jnp.float32)
    weights = jnp.ones(labels.shape, dtype) if weights is None else weights
    shares = jax.lax.stop_gradient(weights).astype(dtype)
    total = shares.sum()
    shares = shares / jnp.where(total == 0, 1, total)
    labels = jnp.where(shares == 0, 0, labels)
    pieces = math.ceil(tokens / chunk)
    extra = -tokens % pieces

    def cut(leaf: Array, mode: str) -> Array:
        """(*tokens, ...) to (pieces, rows, ...); where tokens lie spread over devices, so does each piece."""
        flat = leaf.reshape(tokens, *leaf.shape[labels.ndim :])
        full = jnp.pad(flat, [(0, extra)] + [(0, 0)] * (flat.ndim - 1), mode=mode)
        return full.reshape(-1, pieces, *flat.shape[1:]).swapaxes(0, 1)

    # What fills the last chunk up repeats the last token, to be as finite as the data, and weighs nothing.
    rows = cut(hidden, "edge"), cut(labels, "edge"), cut(shares, "constant")
    leaves, structure = jax.tree.flatten(params)
    return _scanned(lambda leaves, hidden: logits_fn(jax.tree.unflatten(structure, leaves), hidden))(leaves, *rows)


def _scanned(logits_fn: Callable[[list[Array], Array], Array]) -> Callable[..., Float[Array, ""]]:
    """The loss over chunks, with the rule that takes its gradient in the forward pass."""

    def of_chunk(leaves: list[Array], hidden: Array, labels: Array, shares: Array) -> Float[Array, ""]:
        logits = logits_fn(leaves, hidden).astype(shares.dtype)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return jnp.where(shares == 0, 0, losses * shares).sum()

    @jax.custom_vjp
    def loss(leaves: list[Array], hidden: Array, labels: Array, shares: Array) -> Float[Array, ""]:
        def add(total: Array, rows: tuple[Array, ...]) -> tuple[Array, None]:
            return total + of_chunk(leaves, *rows), None

        return jax.lax.scan(add, jnp.zeros((), shares.dtype), (hidden, labels, shares))[0]

    def forward(leaves: list[Any], hidden: Any, labels: Any, shares: Any) -> tuple[Float[Array, ""], Any]:
        values = [leaf.value for leaf in leaves]
        moving = {n: leaf.value for n, leaf in enumerate(leaves) if leaf.perturbed}

        def add(carry: tuple[Array, Any], rows: tuple[Array, ...]) -> tuple[tuple[Array, Any], Array | None]:
            def of(moving: dict[int, Array], hidden: Array) -> Float[Array, ""]:
                return of_chunk([moving.get(n, value) for n, value in enumerate(values)], hidden, *rows[1:])

            total, sums = carry
            one, pull = jax.vjp(of, moving, rows[0])
            d_moving, d_hidden = pull(jnp.ones_like(one))
            sums = jax.tree.map(lambda sum, new: sum + new.astype(sum.dtype), sums, d_moving)
            return (total + one, sums), d_hidden if hidden.perturbed else None

        zeros = {n: jnp.zeros(v.shape, jnp.promote_types(v.dtype, jnp.float32)) for n, v in moving.items()}
        start = jnp.zeros((), shares.value.dtype), zeros
        (total, sums), d_hidden = jax.lax.scan(add, start, (hidden.value, labels.value, shares.value))
        d_leaves = [sums[n].astype(value.dtype) if n in sums else None for n, value in enumerate(values)]
        return total, (d_leaves, d_hidden)

    def backward(grads: tuple[list[Array | None], Array | None], g: Float[Array, ""]) -> tuple[Any, ...]:
        d_leaves, d_hidden = jax.tree.map(lambda grad: (grad * g).astype(grad.dtype), grads)
        return d_leaves, d_hidden, None, None

    loss.defvjp(forward, backward, symbolic_zeros=True)
    return loss


def _check(hidden: Any, labels: Any, weights: Any, chunk: int) -> None:
    wrong = []
    if hidden.ndim != labels.ndim + 1 or hidden.shape[:-1] != labels.shape:
        shapes = f"hidden {list(hidden.shape)} and labels {list(labels.shape)}"
        wrong.append(f"{shapes}: want (*tokens, features) and (*tokens)")
    if weights is not None and weights.shape != labels.shape:
        wrong.append(f"weights {list(weights.shape)} and labels {list(labels.shape)}: want the same shape")
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        wrong.append(f"labels are {labels.dtype}: want integers")
    if labels.size == 0:
        wrong.append("no tokens")
    if chunk < 1:
        wrong.append(f"chunk={chunk}: want 1 or more")
    if wrong:
        raise JloraValueError("cross_entropy", "the arguments don't fit each other.", wrong, "correct them.")
